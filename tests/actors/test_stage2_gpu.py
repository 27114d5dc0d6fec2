"""Stage 2 on a GPU: artist and scorer pools and the learner are Ray actors with shares of one card. Skipped without CUDA.

Needs no vLLM, tracking or data: the anchors are true captions, and models and samples are those of this repository.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from actors.learner.group import LearnerGroup, LearnerSpec
from actors.learner.objectives.settings import GrpoSection
from actors.learner.settings import LearnerSection, OptimSection
from actors.policy.settings import LoraSection
from actors.pool.pool import WorkerPool
from actors.pool.settings import PoolSection
from actors.records import Clip, RenderRequest, ScoreRequest, SdeSpec, VdmExperience
from actors.scoring.clip import ClipScorer
from actors.scoring.scorer import Scorer
from actors.scoring.worker import RewardWorker
from actors.vdm.policy import VdmPolicy
from actors.vdm.sampling import sample
from actors.vdm.worker import VdmWorker
from pipeline.stages.advantages import group_advantages

TINY = Path(__file__).resolve().parents[2] / "pipeline" / "assets" / "tiny"
CAPTIONS = ("the red circle moves up", "the blue square moves down")
GROUP = 4
COMPONENTS = ("clip_v", "clip_score")
LORA = LoraSection(rank=8, alpha=16.0)
SPEC = LearnerSpec(
    kind="vdm",
    model_path=str(TINY / "vdm"),
    lora=LORA,
    settings=LearnerSection(ranks=1, gpus=0.3, micro_batch=GROUP, offload="all"),
    learning=GrpoSection(clip_low=1e-3, clip_high=1e-3, kl_beta=0.1, loss_norm="sequence"),
    optim=OptimSection(lr=1e-2),
    policy_kwargs={"components": ("transformer",)},
)

pytestmark = [pytest.mark.ray, pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


@pytest.fixture(scope="module")
def card() -> Iterator[None]:
    """A Ray of one GPU."""
    if ray.is_initialized():
        ray.shutdown()
    ray.init(
        address="local", num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level="error"
    )
    yield
    ray.shutdown()


def requests(sde: SdeSpec | None) -> list[RenderRequest]:
    rng = np.random.default_rng(0)
    frames = [rng.integers(0, 256, (2, 32, 32, 3)).astype(np.uint8) for _ in CAPTIONS]
    return [
        RenderRequest(f"s{k}", i, caption, frames[k], 9, 6, 1.0, noise_seed=k, sde_seed=10 * k + i, sde=sde)
        for k, caption in enumerate(CAPTIONS)
        for i in range(GROUP)
    ]


def score_requests(clips: list[Clip]) -> list[ScoreRequest]:
    target = np.random.default_rng(1).integers(0, 256, (9, 32, 32, 3)).astype(np.uint8)
    return [
        ScoreRequest(c.sample_id, c.index, COMPONENTS, "", c.caption, c.caption, target, target[0], c.frames)
        for c in clips
    ]


def worker(kind: Any, share: float, *args: Any, **kwargs: Any) -> Any:
    actor = ray.remote(kind).options(num_cpus=0.5, num_gpus=share, max_concurrency=2)
    return lambda name: actor.remote(name, *args, device="cuda", **kwargs)


async def everything(tmp_path: Path) -> None:
    artist = WorkerPool("vdm", worker(VdmWorker, 0.3, str(TINY / "vdm")), PoolSection(workers=1, max_batch=GROUP))
    scorer = WorkerPool(
        "reward", worker(RewardWorker, 0.2, str(TINY / "clip"), COMPONENTS), PoolSection(workers=1, max_batch=8)
    )
    learner = LearnerGroup(SPEC)
    async with artist, scorer:
        await learner.start()
        try:
            assert learner.infos[0].device == "cuda"

            async def drawn(sde: SdeSpec | None) -> list[Clip]:
                return list(await asyncio.gather(*(artist.submit(r) for r in requests(sde))))

            plain = await drawn(None)
            alone = sample(VdmPolicy.load(TINY / "vdm"), requests(None))
            for ours, theirs in zip(plain, alone, strict=True):  # the CPU's float32, convolutions in TF32 here
                assert np.abs(ours.frames.astype(int) - theirs.frames).mean() < 1.0

            clips = await drawn(SdeSpec("flow", 0.7, 0, 2))
            scores = await asyncio.gather(*(scorer.submit(r) for r in score_requests(clips)))
            here = Scorer(ClipScorer(TINY / "clip"), diagnostics=False).score(score_requests(clips))
            for found, expected in zip(scores, here, strict=True):
                assert found.values == pytest.approx(expected.value.values, abs=2e-3)  # type: ignore[union-attr]

            totals = [sum(s.values.values()) for s in scores]
            advantages, _ = group_advantages([totals[:GROUP], totals[GROUP:]])
            items = [
                VdmExperience(c.sample_id, c.index, c.caption, np.zeros((0, 32, 32, 3), np.uint8), c.trajectory, float(a), c.condition)
                for c, a in zip(clips, np.concatenate(advantages), strict=True)
                if c.trajectory is not None
            ]  # fmt: skip
            figures = await learner.update(items)
            assert figures["ratio_max_dev"] == 0.0 and figures["applied"] == 1.0 and figures["grad_norm"] > 0
            assert figures["logp_diff_max"] < 1e-3
            print({name: figures[name] for name in ("ratio_max_dev", "logp_diff_max", "grad_norm", "kl")})

            await learner.save(str(tmp_path / "kept"))
            kept = await learner.checksum()
            await artist.set_weights(learner.version, await learner.publish())
            tuned = await drawn(None)
            assert {c.weights_version for c in tuned} == {1}
            assert any(not np.array_equal(a.frames, b.frames) for a, b in zip(tuned, plain, strict=True))

            await artist.rest()  # its memory goes to the host, and comes back with the next request
            artist.wake()
            again = await drawn(None)
            for ours, before in zip(again, tuned, strict=True):
                assert np.array_equal(ours.frames, before.frames)

            await learner.update([replace(item, advantage=-item.advantage) for item in items])
            assert await learner.checksum() != kept
            await learner.restore(str(tmp_path / "kept"))
            assert await learner.checksum() == kept
        finally:
            await learner.close()


@pytest.mark.timeout(300)
def test_pools_and_learner_share_a_card(card: None, tmp_path: Path) -> None:
    asyncio.run(everything(tmp_path))
