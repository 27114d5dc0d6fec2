"""Row 10: stage 2's update on a window of two of ten denoising steps beside the update on all of them; then both for equal time."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from actors.learner.batches import plan_batch
from actors.learner.rank import load_policy
from actors.learner.trainer import Trainer
from actors.records import Clip, Experience, RenderRequest, Sample, ScoreRequest, SdeSpec, VdmExperience, derive_seed
from actors.scoring.clip import ClipScorer
from actors.scoring.scorer import Scorer
from actors.vdm.flow_sde import WindowSchedule
from actors.vdm.frames import select_reference_frames
from actors.vdm.policy import VdmPolicy
from actors.vdm.sampling import sample
from actors.weights.transport import as_tensors
from pipeline.config import RunConfig, load_config
from pipeline.data.toy.world import make_sample
from pipeline.fleet.models import resolve_model
from pipeline.run.learners import learner_spec
from pipeline.stages.advantages import group_advantages
from pipeline.stages.stage2 import Stage2
from rewards.combine import combine_rewards
from tests.benchmarks.bench import Check, Result, Size, interleave, medians, ratios

STEPS, WINDOW, GROUP, PROMPTS = 10, 2, 8, 8
SAME = ["learner.ranks=1", f"stage2.render.steps={STEPS}"]


class Artist:
    """Stage 2 on truth captions in one process, by our sampler, scorer and learner: each :meth:`step` is one rollout batch."""

    def __init__(self, config: RunConfig, mesh: DeviceMesh, scorer: Scorer, window: WindowSchedule) -> None:
        spec = learner_spec(config, Stage2(config, None), "vdm")  # type: ignore[arg-type]
        self.config, self.scorer, self.window = config, scorer, window
        self.trainer = Trainer(load_policy(spec, torch.device("cpu")), spec, mesh, torch.device("cpu"))
        self.sampler = VdmPolicy.load(spec.model_path, lora=spec.lora, shift=config.models.flow_shift)
        self.steps = 0
        self.publish()

    def publish(self) -> None:
        """Make the sampler draw with what has been learned."""
        weights = self.trainer.weights()
        assert weights is not None
        self.sampler.load_adapter_state(as_tensors(weights))

    def draw(self, samples: list[Sample], count: int, kind: Literal["held out", "steps", "ends"]) -> list[list[Clip]]:
        """Return ``count`` clips of each sample's true caption, those of a group from one noise, unless only their ``ends`` count.

        A rollout takes the run's number of steps, and what is held out ten.
        """
        rollout, ends, sde = kind != "held out", kind == "ends", self.config.stage2.sde
        requests = [
            RenderRequest(
                s.id,
                i,
                s.caption,
                select_reference_frames(s.context, self.config.video.reference_frames),
                self.config.video.num_frames,
                self.config.stage2.render.steps if rollout else STEPS,
                1.0,
                noise_seed=derive_seed(
                    self.config.seed, self.steps if rollout else "held out", s.id, *([i] if ends else [])
                ),
                sde_seed=derive_seed(self.config.seed, self.steps, s.id, i),
                sde=SdeSpec(
                    sde.schedule,
                    sde.level,
                    self.window.start_at(self.steps, s.id),
                    self.window.size,
                    self.window.reach,
                )
                if kind == "steps"
                else None,
                ends=ends,
            )
            for s in samples
            for i in range(count)
        ]
        clips: list[Clip] = []
        for start in range(0, len(requests), self.config.pools.vdm.max_batch):
            clips += sample(self.sampler, requests[start : start + self.config.pools.vdm.max_batch])
        return [clips[k * count : (k + 1) * count] for k in range(len(samples))]

    def rewards(self, samples: list[Sample], groups: list[list[Clip]]) -> list[np.ndarray]:
        """Return the totals (G,) of each group."""
        weights = self.config.stage2.rewards.weights
        asked = [
            ScoreRequest(
                s.id, c.index, tuple(weights), "", s.caption, s.caption, s.target_frames, s.context[-1], c.frames
            )
            for s, group in zip(samples, groups, strict=True)
            for c in group
        ]
        scored = [outcome.value.values for outcome in self.scorer.score(asked)]  # type: ignore[union-attr]
        size = len(groups[0])
        parts = [scored[k * size : (k + 1) * size] for k in range(len(groups))]
        return [combine_rewards({n: [v[n] for v in part] for n in weights}, weights) for part in parts]

    def rollout(self, samples: list[Sample]) -> list[Experience]:
        """Return the trajectories of the groups of ``samples`` with their advantages."""
        learning = self.config.stage2.learning
        groups = self.draw(samples, GROUP, learning.samples)
        advantages, _ = group_advantages(self.rewards(samples, groups), learning.std_norm)
        items: list[Experience] = []
        for group, values in zip(groups, advantages, strict=True):
            for c, value in zip(group, values, strict=True):
                assert c.trajectory is not None and c.condition is not None
                frames = np.zeros((0, 32, 32, 3), np.uint8)  # their latents are in the condition
                items.append(
                    VdmExperience(c.sample_id, c.index, c.caption, frames, c.trajectory, float(value), c.condition)
                )
        return items

    def update(self, items: list[Experience]) -> None:
        """Take the optimizer steps of one batch of ``items``."""
        (plan,) = plan_batch(items, ranks=1, micro_batch=self.config.learner.micro_batch, updates=1)
        self.trainer.update(plan, self.config.stage2.learning.epochs_per_batch)

    def step(self, samples: list[Sample]) -> None:
        """Draw, score, learn, publish."""
        self.update(self.rollout(samples))
        self.steps += 1
        self.publish()


@contextmanager
def one_rank() -> Iterator[DeviceMesh]:
    """Yield the mesh of a process group of this process alone."""
    with tempfile.TemporaryDirectory(prefix="bench-group-") as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield init_device_mesh("cpu", (1,))
        finally:
            dist.destroy_process_group()


def toys(first: int, count: int) -> list[Sample]:
    """Return ``count`` samples of the toy world from number ``first`` on."""
    made = [make_sample(first + i, "train") for i in range(count)]
    return [Sample(t.id, "predictive", t.question, t.caption, t.input_frames, t.target_frames) for t in made]


def windows(seed: int) -> tuple[WindowSchedule, WindowSchedule]:
    """Return the toy run's moving window of two steps, and one over all steps that draw noise."""
    return (
        WindowSchedule("random", 0, 4, WINDOW, seed=seed),
        WindowSchedule("fixed", 0, STEPS - 1, STEPS - 1, seed=seed),
    )


def held_out(artist: Artist, samples: list[Sample]) -> float:
    """Return the mean reward of clips drawn without noise on the way."""
    return float(np.mean(artist.rewards(samples, artist.draw(samples, 1, "held out"))))


def measure(size: Size) -> Result:
    """Measure updates/s of both, and both's held-out reward after equal time."""
    repeats, prompts, seeds, budget_s, tests = (7, PROMPTS, 3, 40.0, 64) if size == "full" else (1, 2, 1, 0.5, 4)
    torch.set_num_threads(1)
    scorer = Scorer(ClipScorer(resolve_model("tiny", "clip")), diagnostics=False)
    with one_rank() as mesh:
        both = [Artist(load_config("toy", SAME), mesh, scorer, w) for w in windows(0)]
        samples = toys(0, prompts)
        batches = [artist.rollout(samples) for artist in both]

        def timed(artist: Artist, items: list[Experience]) -> Any:
            def run() -> float:
                began = time.perf_counter()
                artist.update(items)
                return 1 / (time.perf_counter() - began)

            return run

        def whole(artist: Artist) -> Any:
            def run() -> float:
                began = time.perf_counter()
                artist.step(samples)
                return 1 / (time.perf_counter() - began)

            return run

        updates = interleave([timed(a, b) for a, b in zip(both, batches, strict=True)], repeats)
        steps = interleave([whole(a) for a in both], repeats)
        start, gains, counts = [], [], []
        tested = toys(100_000, tests)
        for seed in range(seeds):
            ends, done = [], []
            for window in windows(seed):
                artist = Artist(load_config("toy", [*SAME, f"seed={seed}"]), mesh, scorer, window)
                start.append(held_out(artist, tested))
                end = time.perf_counter() + budget_s
                while time.perf_counter() < end:
                    artist.step(toys(1000 + artist.steps * prompts, prompts))
                ends.append(held_out(artist, tested))
                done.append(artist.steps)
            gains.append(tuple(ends))
            counts.append(tuple(done))
    checks = (
        Check("updates/s, a window of 2 steps ÷ all 9 that draw noise", ratios(updates), "≥", 2.5),
        Check(
            "held-out reward after equal time, window − all, seed by seed",
            tuple(a - b for a, b in gains),
            "≥",
            0.0,
            "of CLIP-V + CLIPScore",
        ),
    )
    figures = medians(updates, "updates/s, window", "updates/s, all steps")
    figures |= medians(steps, "whole steps/s (draw, score, update), window", "whole steps/s, all steps")
    figures |= {"held-out reward before": statistics.mean(start)}
    figures |= medians(gains, "held-out reward, window", "held-out reward, all steps")
    figures |= medians(counts, "steps in equal time, window", "steps in equal time, all steps")
    figures |= {"seconds of each training": budget_s, "seeds": float(seeds), "held-out samples": float(tests)}
    notes = (
        "Stage 2 of the toy run (8 prompts, 8 clips each, ten denoising steps, its learning rate and clipping) on true captions, in",
        "one process on one thread: our sampler, scorer and learner without pools. The last of the ten steps draws no noise, so all",
        "steps are nine. An update is the learner's whole work on one batch: old log-probabilities, the frozen reference, forward,",
        "backward, AdamW. The held-out clips are drawn without noise on the way.",
    )
    return Result(checks, figures, notes)
