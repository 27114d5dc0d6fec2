"""Stage 2 with an embed pool, on real workers and a real learner: nobody else holds the frozen models, each caption is embedded
once, and what is drawn is bitwise what samplers draw that embed for themselves.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.failures import Ok
from actors.learner.group import LearnerGroup
from actors.records import Sample
from actors.scoring.worker import RewardWorker
from actors.vdm.worker import VdmWorker
from pipeline.config import RunConfig, load_config
from pipeline.data.toy import make_sample
from pipeline.fleet.open import open_fleet
from pipeline.run.learners import learner_spec
from pipeline.stages.loop import StageResult, StepReport, run_stage
from pipeline.stages.stage2 import Anchor, Stage2, sde_spec

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]
GROUP, STEPS, GUIDANCE = 3, 2, 2.0


class Samples:
    """A feed that gives the same two samples at every step."""

    cursor, quarantined = None, ()

    async def draw(self, count: int) -> list[Sample]:
        return [sample(i) for i in range(count)]


@dataclass
class Seen:
    """What a run with the pool left behind."""

    result: StageResult
    batches: list[StepReport] = field(default_factory=list)
    held: dict[str, list[dict[str, int]]] = field(default_factory=dict)
    embedded: float = 0.0
    encoded: float = 0.0


def sample(index: int) -> Sample:
    s = make_sample(index, "test")
    return Sample(s.id, "predictive", s.question, s.caption, s.input_frames, s.target_frames)


def settings(vdm: Path, clip: Path, *more: str) -> RunConfig:
    return load_config(
        "toy",
        [
            f"models={{vdm: {vdm}, clip: {clip}}}",
            "deterministic=true",
            f"stage2.steps={STEPS}",
            "stage2.anchor=truth",
            f"stage2.rollout={{prompts_per_step: 2, group_size: {GROUP}}}",
            f"stage2.render={{steps: 4, guidance: {GUIDANCE}}}",
            "stage2.sde={window_size: 2, window_range: [0, 3], window_schedule: fixed}",
            "learner={ranks: 1, micro_steps: 1}",
            "pools.vdm={workers: 2, max_decode: 1}",
            *more,
        ],
    )


@pytest.fixture(scope="module")
def seen(tiny_vdm_dir: Path, tiny_clip_dir: Path) -> Seen:
    config = settings(tiny_vdm_dir, tiny_clip_dir, "pools.embed.workers=1")

    async def story() -> Seen:
        reports: list[StepReport] = []

        async def keep(report: StepReport) -> None:
            reports.append(report)

        async with open_fleet(config, only=("embed", "vdm", "reward")) as fleet:
            stage = Stage2(config, fleet)
            learner = LearnerGroup(learner_spec(config, stage, "vdm"))
            await learner.start()
            try:
                result = await run_stage(stage, Samples(), {"vdm": learner}, on_step=keep)  # type: ignore[arg-type]
                held = {
                    pool.name: list((await pool.call_all("held")).values())
                    for pool in fleet.pools()
                    if pool.name[0] != "r"
                }
                held["learner"] = await asyncio.gather(*(rank.held.remote() for rank in learner.ranks))
            finally:
                await learner.close()
            (counts,) = (await fleet.named["embed"].call_all("counters")).values()
        return Seen(result, reports, held, counts["captions"], counts["references"])

    return asyncio.run(asyncio.wait_for(story(), 550))


@pytest.mark.timeout(600)
def test_only_the_embed_pool_holds_the_frozen_models(seen: Seen) -> None:
    parts = {name: [set(held) for held in workers] for name, workers in seen.held.items()}
    assert parts == {
        "vlm": [],
        "embed": [{"text_encoder", "vae_encoder"}],
        "vdm": [{"transformer", "vae_decoder"}] * 2,
        "learner": [{"transformer"}],
    }
    assert all(size > 0 for workers in seen.held.values() for held in workers for size in held.values())


def test_each_caption_and_each_samples_frames_are_encoded_once(seen: Seen) -> None:
    captions = {m.caption for report in seen.batches for g in report.batch.groups for m in g.members}
    samples = {g.sample.id for report in seen.batches for g in report.batch.groups}
    last = seen.batches[-1].metrics
    assert seen.embedded == last["cache/captions"] == len(captions) + 1  # and the negative prompt
    assert seen.encoded == last["cache/references"] == len(samples) == 2
    asked = STEPS * 2 * GROUP
    assert last["cache/reference_hit_ratio"] == pytest.approx(1 - 2 / asked)
    assert last["cache/caption_hit_ratio"] == pytest.approx(1 - (len(captions) + 1) / (2 * asked))
    assert last["pool/embed/done"] == len(captions) + 1 + 2


def test_the_learner_learns_from_what_came_along(seen: Seen) -> None:
    assert seen.result.frozen_ok and seen.result.ratio_max_dev == 0.0
    for report in seen.batches:
        assert report.metrics["learner/applied"] == 1.0 and report.metrics["learner/grad_norm"] > 0
        assert report.metrics["learner/logp_diff_max"] < 1e-4


def test_with_and_without_the_pool_the_same_is_drawn(seen: Seen, tiny_vdm_dir: Path, tiny_clip_dir: Path) -> None:
    """The samplers without the pool run in this process, one request a call, as the deterministic pool calls them."""
    config = settings(tiny_vdm_dir, tiny_clip_dir)
    fleet = Local(
        VdmWorker("vdm", str(tiny_vdm_dir)), RewardWorker("reward", str(tiny_clip_dir), ("clip_v", "clip_score"))
    )
    stage = Stage2(config, fleet)  # type: ignore[arg-type]
    for group in seen.batches[0].batch.groups:
        anchor, spec = Anchor("", group.sample.caption, 1.0), sde_spec(config, stage.window, 0, group.sample.id)
        alone = asyncio.run(stage.group(group.sample, anchor, "0", spec))
        assert alone is not None and len(alone.members) == len(group.members) == GROUP
        for a, b in zip(alone.members, group.members, strict=True):
            assert a.clip is not None and b.clip is not None and a.clip.trajectory and b.clip.trajectory
            assert np.array_equal(a.clip.frames, b.clip.frames)
            assert np.array_equal(a.clip.trajectory.latents, b.clip.trajectory.latents)
            assert np.array_equal(a.clip.trajectory.logprobs, b.clip.trajectory.logprobs)
            assert a.scores.values == b.scores.values
            for name in ("text", "negative", "references"):
                assert np.array_equal(getattr(a.clip.condition, name), getattr(b.clip.condition, name))


@dataclass
class Here:
    """A pool whose only worker runs in this process."""

    worker: Any

    async def submit(self, request: Any) -> Any:
        (outcome,) = self.worker.process([request])
        assert isinstance(outcome, Ok), outcome
        return outcome.value


class Local:
    """A fleet without an embed pool, in this process."""

    conditions = None
    scoring = None

    def __init__(self, vdm: VdmWorker, reward: RewardWorker) -> None:
        for worker in (vdm, reward):
            worker.setup()
        self.vdm, self.reward = Here(vdm), Here(reward)
