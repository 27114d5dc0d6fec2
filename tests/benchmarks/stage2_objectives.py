"""Row 13: what stage 2 learns in equal CPU time, by each objective, beside GRPO on the SDE window.

``python -m tests.benchmarks.stage2_objectives [OBJECTIVE …]`` prints the search on val that the settings below were chosen by:
equally many configurations for each objective.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh

from actors.records import Sample
from actors.scoring.clip import ClipScorer
from actors.scoring.scorer import Scorer
from pipeline.config import load_config
from pipeline.data.toy.world import make_sample
from pipeline.fleet.models import resolve_model
from pipeline.stages.stage2 import sde_window
from tests.benchmarks.bench import Check, Result, Size, medians
from tests.benchmarks.sde_window import PROMPTS, Artist, held_out, one_rank, toys

SEARCHED: dict[str, tuple[tuple[str, ...], ...]] = {
    "grpo": (
        ("render.steps=8", "optim.lr=1e-3"),
        ("render.steps=6", "optim.lr=3e-3"),
        ("render.steps=6", "optim.lr=3e-3", "grpo.kl_beta=0.0"),
        ("render.steps=6", "optim.lr=3e-3", "grpo.epochs_per_batch=4"),
        ("render.steps=6", "optim.lr=3e-3", "sde.window_per=prompt", "grpo.step_balance=rectify"),
        ("render.steps=6", "optim.lr=3e-3", "sde.window_size=1", "sde.window_per=prompt", "grpo.step_balance=rectify"),
    ),
    "nft": (
        ("render.steps=6", "optim.lr=1e-3"),
        ("render.steps=6", "optim.lr=3e-3"),
        ("render.steps=6", "optim.lr=1e-3", "nft.epochs_per_batch=8"),
        ("render.steps=6", "optim.lr=3e-3", "nft.kl_beta=0.1"),
        ("render.steps=5", "optim.lr=2e-3", "nft.beta=0.3"),
        ("render.steps=6", "optim.lr=3e-3", "nft.advantage_max=1.0", "nft.behaviour_decay=0.5"),
    ),
    "awm": (
        ("render.steps=6", "optim.lr=1e-3", "awm.weight=10"),
        ("render.steps=6", "optim.lr=3e-3", "awm.weight=10"),
        ("render.steps=6", "optim.lr=3e-3", "awm.weight=30"),
        ("render.steps=6", "optim.lr=3e-3", "awm.weight=10", "awm.kl_beta=0.1"),
        ("render.steps=6", "optim.lr=1e-3", "awm.weight=10", "awm.epochs_per_batch=8"),
        ("render.steps=5", "optim.lr=2e-3", "awm.weight=10", "awm.clip_low=0.5", "awm.clip_high=0.5"),
    ),
}
"""Keys of ``stage2``; the others are the toy run's, with a moving window of two steps."""
CHOSEN = {"grpo": 4, "nft": 4, "awm": 4}
"""Which of them was best on val, by the mean over its seeds."""
UNIT = "of CLIP-V + CLIPScore"
FIRST_TESTED, FIRST_VAL = 100_000, 200_000  # numbers of clips that no training draws


def val(first: int, count: int) -> list[Sample]:
    """Return ``count`` samples of the toy world's val split."""
    made = [make_sample(first + i, "val") for i in range(count)]
    return [Sample(t.id, "predictive", t.question, t.caption, t.input_frames, t.target_frames) for t in made]


def trained(
    name: str, keys: tuple[str, ...], seed: int, budget_s: float, prompts: int, mesh: DeviceMesh, scorer: Scorer
) -> Artist:
    """Return the artist after ``budget_s`` CPU seconds of stage 2 by ``name``."""
    overrides = ["learner.ranks=1", f"seed={seed}", f"stage2.objective={name}", *(f"stage2.{key}" for key in keys)]
    config = load_config("toy", overrides)
    artist = Artist(config, mesh, scorer, sde_window(config))
    end = time.process_time() + budget_s
    while time.process_time() < end:
        artist.step(toys(1000 + artist.steps * prompts, prompts))
    return artist


def search(names: Sequence[str], seeds: int = 2, budget_s: float = 40.0, clips: int = 128) -> None:
    """Print the gain on val of every configuration of ``names``, seed by seed."""
    torch.set_num_threads(1)
    scorer = Scorer(ClipScorer(resolve_model("tiny", "clip")), diagnostics=False)
    samples = val(FIRST_VAL, clips)
    with one_rank() as mesh:
        starts = [held_out(trained("grpo", (), seed, 0.0, PROMPTS, mesh, scorer), samples) for seed in range(seeds)]
        for place in range(max(map(len, SEARCHED.values()))):
            for name in names:
                keys, gains, steps = SEARCHED[name][place], [], []
                for seed in range(seeds):
                    artist = trained(name, keys, seed, budget_s, PROMPTS, mesh, scorer)
                    gains.append(held_out(artist, samples) - starts[seed])
                    steps.append(artist.steps)
                shown = " ".join(f"{gain:+.3f}" for gain in gains)
                print(
                    f"{name:5} {place} {statistics.mean(gains):+.4f}  ({shown}; {steps} batches)  {' '.join(keys)}",
                    flush=True,
                )


def measure(size: Size) -> Result:
    """Measure the held-out reward of each objective after equal CPU time, seed by seed, in turn."""
    seeds, budget_s, clips, prompts = (5, 40.0, 256, PROMPTS) if size == "full" else (1, 0.5, 4, 2)
    torch.set_num_threads(1)
    scorer = Scorer(ClipScorer(resolve_model("tiny", "clip")), diagnostics=False)
    samples, gains, counts = toys(FIRST_TESTED, clips), [], []
    with one_rank() as mesh:
        for seed in range(seeds):
            start = held_out(trained("grpo", (), seed, 0.0, prompts, mesh, scorer), samples)
            found, done = {}, {}
            for name in list(SEARCHED)[:: 1 if seed % 2 == 0 else -1]:
                artist = trained(name, SEARCHED[name][CHOSEN[name]], seed, budget_s, prompts, mesh, scorer)
                found[name], done[name] = held_out(artist, samples) - start, artist.steps
            gains.append(tuple(found[name] for name in SEARCHED))
            counts.append(tuple(done[name] for name in SEARCHED))
    window = [gain[0] for gain in gains]
    differences = {name: tuple(g[i] - g[0] for g in gains) for i, name in enumerate(SEARCHED) if name != "grpo"}
    checks = tuple(
        Check(
            f"gain of {name} − gain of the window, seed by seed",
            differences[name],
            "≥",
            bar(window),
            UNIT,
        )
        for name in differences
    )
    figures = medians(gains, *(f"gain, {name}" for name in SEARCHED)) | medians(
        counts, *(f"batches, {name}" for name in SEARCHED)
    )
    for name, values in differences.items():
        figures |= interval(name, list(values))
    figures |= {"CPU seconds of each training": budget_s, "seeds": float(seeds), "held-out clips": float(clips)}
    notes = (
        "Stage 2 on true captions as in row 10, by each objective with the settings that were best on val among equally many",
        "(`python -m tests.benchmarks.stage2_objectives`), for equal CPU time on one thread, in turn. The bar is that the better one",
        "gains twice as much as the window: the difference of the gains must reach the window's own median gain.",
    )
    return Result(checks, figures, notes)


def bar(window: list[float]) -> float:
    """Return the difference that makes a gain twice the window's."""
    return max(statistics.median(window), 0.0)


def interval(name: str, differences: list[float]) -> dict[str, float]:
    """Return the mean of the paired differences, and the half of its 95 % interval by Student's t."""
    from scipy import stats

    mean = statistics.mean(differences)
    if len(differences) < 2:
        return {f"mean difference, {name}": mean}
    half = stats.t.ppf(0.975, len(differences) - 1) * statistics.stdev(differences) / len(differences) ** 0.5
    return {f"mean difference, {name}": mean, f"95 % interval ±, {name}": float(half)}


if __name__ == "__main__":
    search(sys.argv[1:] or list(SEARCHED))
