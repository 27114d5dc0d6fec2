"""Row 4: the reward pool beside a bare CLIP forward, and ROUGE-L beside the reference package."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

import numpy as np
import ray
import torch
from rouge_score.rouge_scorer import RougeScorer

from actors.pool.pool import WorkerPool
from actors.pool.settings import PoolSection
from actors.records import ScoreRequest
from actors.scoring.clip import ClipScorer
from actors.scoring.worker import RewardWorker
from pipeline.data.toy.shards import make_sample
from pipeline.fleet.models import resolve_model
from rewards.similarity import clip_v
from rewards.text import rouge_l
from tests.benchmarks.bench import Check, Result, Size, interleave, interleave_async, medians, ratios, start_ray

GROUP = 8
NAMES = ("format", "rouge_l", "clip_v")


def requests(groups: int, turn: int) -> list[ScoreRequest]:
    """Return what stage 1 asks about ``groups`` groups of eight different clips; other ones every ``turn``: nothing is cached."""
    noise, found = np.random.default_rng(turn), []
    for g in range(groups):
        s = make_sample(turn * groups + g, "train")
        for i in range(GROUP):
            grain = noise.integers(-8, 8, s.target_frames.shape)
            clip = np.clip(np.roll(s.target_frames, i, axis=2) + grain, 0, 255).astype(np.uint8)
            text, last = s.answer_text, s.input_frames[-1]
            found.append(ScoreRequest(s.id, i, NAMES, text, s.caption, s.caption, s.target_frames, last, clip))
    return found


def bare(clip: ClipScorer, batch: list[ScoreRequest]) -> list[float]:
    """Resize, normalise and embed the frames in batches of 64, and compare: CLIP as transformers has it, and nothing else."""
    targets = {r.sample_id: r.target_frames for r in batch}
    arrays = [*targets.values(), *(r.clip for r in batch)]
    frames = torch.from_numpy(np.concatenate(arrays)).permute(0, 3, 1, 2)
    parts = []
    with torch.inference_mode():
        for start in range(0, len(frames), 64):
            pixels = clip.images(frames[start : start + 64], return_tensors="pt")["pixel_values"]
            found: Any = clip.model.get_image_features(pixel_values=pixels)
            parts.append(found if isinstance(found, torch.Tensor) else found.pooler_output)
    features = np.split(torch.cat(parts).numpy(), np.cumsum([len(a) for a in arrays])[:-1])
    truth = dict(zip(targets, features, strict=False))
    return [clip_v(own, truth[r.sample_id]) for r, own in zip(batch, features[len(targets) :], strict=True)]


async def clips_per_s(size: Size, *, diagnostics: bool) -> list[tuple[float, ...]]:
    """Return clips/s of the pool, and of bare CLIP, round by round."""
    groups, repeats = (32, 7) if size == "full" else (2, 1)
    path = str(resolve_model("tiny", "clip"))
    torch.set_num_threads(1)
    clip = ClipScorer(path)
    actor = ray.remote(RewardWorker)
    spec = PoolSection(workers=1, max_batch=64, max_inflight=2)
    turn = 0

    async with WorkerPool(
        "reward",
        lambda name: actor.options(num_cpus=1, max_concurrency=2).remote(name, path, NAMES, diagnostics=diagnostics),
        spec,
    ) as pool:

        async def ours() -> float:
            batch = requests(groups, turn)
            began = time.perf_counter()
            scores = await asyncio.gather(*(pool.submit(r) for r in batch))
            spent = time.perf_counter() - began
            answers[turn] = [s.values["clip_v"] for s in scores]
            return len(batch) / spent

        async def theirs() -> float:
            batch = requests(groups, turn)
            began = time.perf_counter()
            values = bare(clip, batch)
            spent = time.perf_counter() - began
            expected[turn] = values
            return len(batch) / spent

        rounds, answers, expected = [], {}, {}  # type: ignore[var-annotated]
        for turn in range(repeats + 1):  # noqa: B007 - the sides read it
            rounds += await interleave_async([ours, theirs], 1, warm_up=0)
    assert all(np.allclose(answers[t], expected[t], atol=1e-5) for t in answers), "the same scores"
    return rounds[1:]


def captions(count: int) -> list[tuple[str, str]]:
    """Return pairs of answer and reference: a group's answers share their reference."""
    words = [make_sample(i, "train").caption for i in range(count)]

    def answer(i: int, j: int) -> str:
        return f"{words[(7 * i + j) % count]} and {words[(3 * i + 5 * j) % count]}"

    return [(answer(i, j), words[i]) for i in range(count) for j in range(GROUP)]


def measure(size: Size) -> Result:
    """Measure both."""
    start_ray()
    clips, whole = (asyncio.run(clips_per_s(size, diagnostics=on)) for on in (False, True))
    pairs = captions(400 if size == "full" else 20)
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    assert [rouge_l(c, r) for c, r in pairs] == [scorer.score(r, c)["rougeL"].fmeasure for c, r in pairs]

    def timed(work: Any) -> float:
        began = time.perf_counter()
        for candidate, reference in pairs:
            work(candidate, reference)
        return len(pairs) / (time.perf_counter() - began)

    text = interleave(
        [lambda: timed(rouge_l), lambda: timed(lambda c, r: scorer.score(r, c))], 7 if size == "full" else 1
    )
    checks = (
        Check("clips/s, pool ÷ bare CLIP", ratios(clips), "≥", 0.95),
        Check("ROUGE-L/s, ours ÷ rouge-score", ratios(text), "≥", 10.0),
    )
    figures = medians(clips, "clips/s, pool", "clips/s, bare CLIP")
    figures |= {"with the alarms' diagnostics: clips/s, pool": medians(whole, "pool")["pool"]}
    figures |= {"with the alarms' diagnostics: ratio": statistics.median(ratios(whole))}
    figures |= medians(text, "ROUGE-L/s, ours", "ROUGE-L/s, rouge-score")
    notes = (
        "The pool is asked what stage 1 asks (format, ROUGE-L, CLIP-V) about groups of eight different clips, new ones every round;",
        "frames travel to it through the object store. Bare CLIP resizes and embeds the same clips and targets in this process. The",
        "alarms' diagnostics (on in a run) are work on top of that, and large only beside a CLIP as tiny as this one: see the",
        "figures. ROUGE-L is the same to the last bit.",
    )
    return Result(checks, figures, notes)
