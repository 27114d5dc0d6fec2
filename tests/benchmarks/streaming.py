"""Rows 7 and 8: a step without barriers, and sampling beside learning, on recorded service times in simulated time."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np

from actors.architectures import cost as costs
from pipeline.config import load_config
from pipeline.data.toy.shards import write_toy
from pipeline.plan.memory import completions_of_a_row
from pipeline.plan.models import load_models
from pipeline.stages.loop import StepReport, run_stage
from pipeline.stages.stage1 import Stage1
from tests.benchmarks.bench import Check, Result, Size
from tests.benchmarks.simulated import (
    POOLS,
    Cluster,
    Feed,
    Recorded,
    Service,
    SleepingLearner,
    cluster,
    sample,
    simulate,
)
from tests.benchmarks.text_run import text_run

REAL_SIZE = Path(__file__).resolve().parents[2] / "docs" / "results" / "gpu" / "real_size.json"
LIMITS = {"vlm": {"max_inflight": 1}, "vdm": {"max_batch": 8, "max_inflight": 1}, "reward": {"max_inflight": 1}}


class Gate:
    """Lets nobody through before everybody has come."""

    def __init__(self, parties: int) -> None:
        self._missing, self._open = parties, asyncio.Event()

    async def wait(self) -> None:
        """Wait for all the others."""
        self._missing -= 1
        if self._missing == 0:
            self._open.set()
        await self._open.wait()


@dataclass
class Barrier:
    """A pool as the stage sees it, with gates: nothing is asked of it before the pool in front has answered everything."""

    pool: Any
    before: Gate | None = None
    after: Gate | None = None

    async def submit(self, request: Any) -> Any:
        """As ``WorkerPool.submit``, behind the gate."""
        if self.before is not None:
            await self.before.wait()
        answer = await self.pool.submit(request)
        if self.after is not None:
            await self.after.wait()
        return answer


@dataclass
class Barriers:
    """The fleet of a step with barriers between sampling, rendering and scoring; all captions of the step are drawn."""

    found: Cluster
    groups: int
    conditions: ClassVar[None] = None
    scoring: ClassVar[None] = None
    vlm: Barrier = field(init=False)
    vdm: Barrier = field(init=False)
    reward: Barrier = field(init=False)

    def __post_init__(self) -> None:
        clips = self.groups * self.found.config.stage1.rollout.group_size
        fleet = self.found.fleet
        self.vlm = Barrier(fleet.vlm, after=Gate(self.groups))
        self.vdm = Barrier(fleet.vdm, after=Gate(clips))
        self.reward = Barrier(fleet.reward)


@dataclass(frozen=True)
class Step:
    """One simulated rollout of a step."""

    makespan_s: float
    bound_s: float
    scores: tuple[tuple[str, int, float], ...]
    """Who was scored how, for a comparison of the two ways."""


def step(workers: Sequence[int], prompts: int, seed: int, *, barriers: bool) -> Step:
    """Sample, render and score the groups of one step."""
    service = Recorded.load().service(seed)
    seen: list[tuple[str, int, float]] = []

    async def work() -> Step:
        loop = asyncio.get_running_loop()
        async with cluster(service, workers, limits=LIMITS) as found:
            fleet = Barriers(found, prompts) if barriers else found.fleet
            stage, began = Stage1(found.config, cast(Any, fleet)), loop.time()
            done = await asyncio.gather(*(stage.group(sample(i), "0") for i in range(prompts)))
            for group in done:
                assert group is not None and not group.failures
                seen.extend((group.sample.id, m.index, m.scores.values["clip_v"]) for m in group.members)
            return Step(loop.time() - began, found.lower_bound_s(), tuple(seen))

    return simulate(work)


def split(total: int, group_size: int = 8) -> tuple[int, int, int]:
    """Return ``total`` workers dealt to the pools by the work that a group is to each, at least one each."""
    recorded = Recorded.load()
    per_request = {
        pool: statistics.fmean(s / n for n, times in by.items() for s in times) for pool, by in recorded.calls.items()
    }
    work = [per_request["vlm"], group_size * per_request["vdm"], group_size * per_request["reward"]]
    workers = [1, 1, 1]
    while sum(workers) < total:
        most = max(range(3), key=lambda i: work[i] / workers[i])
        workers[most] += 1
    return workers[0], workers[1], workers[2]


def measure(size: Size) -> Result:
    """Row 7: makespan of a step with barriers divided by the streaming one's."""
    total, prompts, repeats = (32, 64, 9) if size == "full" else (6, 8, 2)
    balanced = split(total)
    found = {}
    for name, workers in (("balanced", balanced), ("even", (total // 3,) * 3)):
        pairs = [
            (step(workers, prompts, seed, barriers=True), step(workers, prompts, seed, barriers=False))
            for seed in range(repeats)
        ]
        assert all(sorted(a.scores) == sorted(b.scores) for a, b in pairs)
        found[name] = pairs
    checks = (
        Check(
            "makespan with barriers ÷ streaming",
            tuple(a.makespan_s / b.makespan_s for a, b in found["balanced"]),
            "≥",
            1.3,
        ),
    )
    figures: dict[str, float] = {f"workers: {pool}": float(n) for pool, n in zip(POOLS, balanced, strict=True)}
    figures |= {"prompts of a step": float(prompts), "completions of a prompt": 8.0}
    for name, pairs in found.items():
        label = "split by work" if name == "balanced" else "a third of the workers each"
        figures |= {
            f"{label}: with barriers, simulated s": statistics.median(a.makespan_s for a, _ in pairs),
            f"{label}: streaming, simulated s": statistics.median(b.makespan_s for _, b in pairs),
            f"{label}: ratio": statistics.median(a.makespan_s / b.makespan_s for a, b in pairs),
            f"{label}: lower bound ÷ streaming": statistics.median(b.bound_s / b.makespan_s for _, b in pairs),
        }
    notes = (
        "One step of stage 1 in simulated time: the run's own pools and `Stage1.group`; the baseline's pools have gates between them.",
        "Both give the same scores to the same members. Workers are dealt to the pools by their work, as `vans plan` does;",
        "with one pool far busier than the others there is less to gain, which the second split shows.",
    )
    return Result(checks, figures, notes)


@dataclass(frozen=True)
class Times:
    """How long everything takes: calls of the pools, and updates."""

    service: Callable[[int], Service]
    update_s: tuple[float, ...]


def real_size(prompts: int) -> Times:
    """Return the times of ``vans_8gpu`` as ``gpu_real_size.py`` measured its parts on one GPU; the thinker's calls, which it
    did not measure, are the tiny one's, hence too short. Its update was measured with a prompt for each completion; that of
    completions which share one (``learner.shared_prompts``) is taken to be shorter by as much as its FLOPs are fewer.
    """
    config, parts = load_config("vans_8gpu"), json.loads(REAL_SIZE.read_text())["all"]["parts"]
    seconds = {name: part["seconds"] for name, part in parts.items()}
    group, steps = 8, 10  # of what was measured
    clip_s = (seconds["sample_window"] / steps * config.stage1.render.steps + seconds["decode"]) / group
    per_request = {"vdm": clip_s, "reward": seconds["clip_images"] / group}
    tiny = Recorded.load()

    def service(seed: int) -> Service:
        recorded = tiny.service(seed)
        return lambda pool, n: n * per_request[pool] if pool in per_request else recorded(pool, n)

    scale = config.stage1.rollout.group_size / group * prompts / config.learner.ranks
    models = load_models(config)
    together, alone = (
        costs.completion_flops(models.vlm, models.prompt, config.stage1.text.max_tokens, completions)
        .update(lora=True, checkpointing=True, kl=True)
        .total
        for completions in (completions_of_a_row(config), 1)
    )
    return Times(service, (seconds["stage1_update"] * scale * together / alone,))


def steps_per_s(
    staleness: int, times: Times, workers: Sequence[int], prompts: int, steps: int, seed: int
) -> tuple[float, list[tuple[str, ...]]]:
    """Return the simulated steps per second of ``run_stage``, and whom each update learnt from."""
    recorded = Recorded.load()
    draw = random.Random(seed)
    learner = SleepingLearner(lambda: draw.choice(times.update_s))

    async def work() -> float:
        loop = asyncio.get_running_loop()
        settings = {"steps": steps, "rollout.prompts_per_step": prompts, "rollout.max_staleness": staleness}
        publish = statistics.fmean(recorded.publish_s)
        async with cluster(times.service(seed), workers, load_s=publish, limits=LIMITS, **settings) as found:
            ends = [loop.time()]

            async def on_step(report: StepReport) -> None:
                ends.append(loop.time())

            stage = Stage1(found.config, found.fleet)
            await run_stage(stage, cast(Any, Feed()), {"vlm": cast(Any, learner)}, on_step=on_step)
            return steps / (ends[-1] - ends[0])

    return simulate(work), learner.seen


def reward_curves(steps: int, seeds: Sequence[int]) -> dict[int, list[list[float]]]:
    """Return the mean reward of every step of real text-only runs: staleness, seed, step."""
    found: dict[int, list[list[float]]] = {0: [], 1: []}
    with tempfile.TemporaryDirectory(prefix="bench-staleness-") as name:
        folder = Path(name)
        write_toy(folder / "toy", train=512, test=8, seed=0)
        for seed in seeds:
            for staleness, curves in found.items():
                overrides = (f"seed={seed}", f"stage1.steps={steps}", f"stage1.rollout.max_staleness={staleness}")
                history = text_run(folder, f"run{seed}-{staleness}", *overrides)
                curves.append([step["reward/total_mean"] for step in history])
    return found


def distance(curves: dict[int, list[list[float]]], parts: int = 4) -> dict[str, float]:
    """Return how far the mean curves of the two are apart, and how far the seeds without staleness are from each other.

    Both are means over the ``parts`` of a run.
    """
    quarters = {k: np.array([[p.mean() for p in np.array_split(c, parts)] for c in v]) for k, v in curves.items()}
    strict, ahead = quarters[0], quarters[1]
    return {
        "apart": float(np.abs(ahead.mean(0) - strict.mean(0)).mean()),
        "spread": float((strict.max(0) - strict.min(0)).mean()),
        "first": float(strict[:, 0].mean()),
        "last, max_staleness 0": float(strict[:, -1].mean()),
        "last, max_staleness 1": float(ahead[:, -1].mean()),
    }


def measure_staleness(size: Size) -> Result:
    """Row 8: steps per second with one batch in flight beside the one that is learnt from, and without."""
    steps, repeats = (40, 9) if size == "full" else (4, 2)
    recorded, large = Recorded.load(), load_config("vans_8gpu")
    toy, prompts = Times(recorded.service, recorded.update_s), large.stage1.rollout.prompts_per_step
    runs = {
        "toy run": (toy, (1, 2, 1), 8),
        "vans_8gpu": (real_size(prompts), tuple(getattr(large.pools, pool).workers for pool in POOLS), prompts),
    }
    figures, checks = {}, []
    for name, (times, workers, count) in runs.items():
        pairs = []
        for seed in range(repeats):
            (ahead, seen), (strict, expected) = (steps_per_s(n, times, workers, count, steps, seed) for n in (1, 0))
            assert [sorted(s) for s in seen] == [sorted(s) for s in expected], "the same samples, step by step"
            pairs.append((ahead, strict))
        ratios = tuple(a / b for a, b in pairs)
        if name == "vans_8gpu":
            checks.append(Check(f"steps/s, max_staleness 1 ÷ 0, {name}", ratios, "≥", 1.2))
        figures |= {
            f"{name}: ratio": statistics.median(ratios),
            f"{name}: simulated steps/s, max_staleness 1": statistics.median(a for a, _ in pairs),
            f"{name}: simulated steps/s, max_staleness 0": statistics.median(b for _, b in pairs),
            f"{name}: update, s": statistics.median(times.update_s),
        }
    figures["publication, s"] = statistics.median(recorded.publish_s)
    learnt: tuple[str, ...] = ()
    if size == "full":
        found = distance(reward_curves(40, range(3)))
        figures |= {f"reward: {name}": value for name, value in found.items()}
        checks.append(Check("reward curves, apart ÷ the seeds' spread", (found["apart"] / found["spread"],), "≤", 1.0))
        learnt = (
            "The reward curves are those of real runs of 40 steps of stage 1 with text rewards and three seeds each: how far the means",
            "over the seeds are apart, and the seeds' largest minus smallest without staleness, both as means over a run's quarters.",
        )
    notes = (
        "`run_stage` in simulated time, with each run's own number of workers and a learner that sleeps for the updates. Two cores",
        "cannot show it: sampler and learner share them. The toy run's times are those recorded here; there is little to gain where",
        "the update is a small share of the step. The times of `vans_8gpu` are those of one H200 (docs/results/gpu), where drawing",
        "and learning were measured and the thinker was not: its calls are the tiny one's, too short, which makes the gain smaller.",
        "Its update was measured with a prompt for each completion; for `learner.shared_prompts` it is shortened as its FLOPs are.",
        "What each step learns from is the same in both.",
        *learnt,
    )
    return Result(tuple(checks), figures, notes)
