"""The two real policies under a learner group: ratio exactly 1 in float32, learning, and exports that load again."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from actors.learner.group import LearnerGroup, LearnerSpec
from actors.learner.objectives.settings import GrpoSection
from actors.learner.settings import LearnerSection, OptimSection
from actors.policy.settings import LoraSection
from actors.records import Experience, RenderRequest, SdeSpec, VdmExperience, VideoQuestion, VlmExperience
from actors.vdm.policy import VdmPolicy
from actors.vdm.sampling import sample
from actors.vlm.policy import VlmPolicy
from actors.weights.files import read_adapter
from actors.weights.transport import receive

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]
GROUP = 4


def vlm_items() -> list[Experience]:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (9, 32, 32, 3)).astype(np.uint8)
    items: list[Experience] = []
    for i in range(GROUP):
        ids = rng.integers(20, 100, size=5 + i).astype(np.int32)
        logprobs = np.full(len(ids), -5.0, np.float32)
        items.append(VlmExperience("s", i, VideoQuestion("what comes next?", frames, 8.0), ids, logprobs, (-1.0) ** i))
    return items


def vdm_items(folder: Path) -> list[Experience]:
    policy = VdmPolicy.load(folder)
    frames = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    sde = SdeSpec("flow", 0.7, window_start=1, window_size=2)
    requests = [
        RenderRequest("s", i, "the red circle rises", frames, 9, 4, 1.0, noise_seed=1, sde_seed=i, sde=sde)
        for i in range(GROUP)
    ]
    return [
        VdmExperience("s", c.index, c.caption, frames, c.trajectory, (-1.0) ** c.index)
        for c in sample(policy, requests)
        if c.trajectory is not None
    ]


@pytest.mark.parametrize("kind", ["vlm", "vdm"])
def test_first_update_of_each_stage_has_ratio_exactly_one_and_learns(
    kind: str, tiny_vlm_dir: Path, tiny_vdm_dir: Path, tmp_path: Path
) -> None:
    model = {"vlm": tiny_vlm_dir, "vdm": tiny_vdm_dir}[kind]
    items = vlm_items() if kind == "vlm" else vdm_items(model)
    spec = LearnerSpec(
        kind=kind,
        model_path=str(model),
        lora=LoraSection(rank=4, alpha=16.0),
        settings=LearnerSection(ranks=2, cpus=0.25, micro_batch=2),
        learning=GrpoSection(clip_low=1e-3, clip_high=1e-3, kl_beta=0.004, loss_norm="sequence"),
        optim=OptimSection(lr=1e-3),
    )

    async def main() -> None:
        group = LearnerGroup(spec)
        try:
            await group.start()
            base = await group.base_hash()
            first = await group.update(items)
            second = await group.update(items)
            assert await group.base_hash() == base
            for metrics in (first, second):
                assert metrics["ratio_max_dev"] == 0.0 and metrics["grad_norm"] > 0
                assert metrics["ratio"] == 1.0 and metrics["clip_frac"] == 0.0
            assert first["kl"] == pytest.approx(0.0, abs=1e-6) and second["kl"] > 0
            if kind == "vdm":
                # The sampler and the learner take the same steps: their log-probabilities differ by float noise.
                assert first["logp_diff_max"] < 1e-4
                assert second["logp_diff_t01"] > 0 and {"logp_diff_t02"} < second.keys()
            else:
                positions = [name for name in first if name.startswith("logp_diff_p")]
                assert sorted(positions) == [f"logp_diff_p{start:04d}" for start in (0, 1, 2, 4)]
            await group.export(str(tmp_path / "adapter"))
            published = receive(await group.publish())
        finally:
            await group.close()
        exported = read_adapter(tmp_path / "adapter")
        for name, array in published.tensors.items():
            np.testing.assert_array_equal(exported.tensors[name], array)
        policy_class = VlmPolicy if kind == "vlm" else VdmPolicy
        loaded = policy_class.load(str(model), adapter=str(tmp_path / "adapter")).adapter_state()
        assert loaded.keys() == published.tensors.keys()

    asyncio.run(main())
