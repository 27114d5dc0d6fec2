"""GPUs on paper: what ``--gpus`` means, what a card is assumed to achieve, and who stands on which GPU."""

from __future__ import annotations

import pytest

from cluster.errors import ConfigError, PlacementError
from cluster.hardware import Hardware, parse_gpus, rates_of
from cluster.layout import Ask, PlacementPlan
from cluster.packing import crowd, pack


def stands(plan: PlacementPlan, nodes: int, per_node: int) -> list[str]:
    """Return who stands on each GPU, as text."""
    return [" ".join(str(member) for member in gpu.members) for gpu in pack(plan, nodes, per_node)]


def test_gpus_are_read_as_people_write_them() -> None:
    assert parse_gpus("8x80") == Hardware(1, 8, 80.0) and str(parse_gpus("8x80")) == "8 GPU(s) of 80 GiB"
    assert parse_gpus("2X8×141") == Hardware(2, 8, 141.0) and parse_gpus("2x8x141").gpus == 16
    for wrong in ("8", "8x", "0x80", "8x0", "64x8x80", "eight x 80", "-1x80"):
        with pytest.raises(ConfigError, match="--gpus"):
            parse_gpus(wrong)


def test_rates_are_shares_of_the_data_sheets() -> None:
    h100 = rates_of(Hardware(1, 8, 80.0), mfu=0.5, mbu=0.5)
    assert (h100.bf16, h100.tf32, h100.float32) == (494.5e12, 247e12, 33.5e12)
    assert h100.bandwidth == 1.675e12 and h100.flops("float32") == 33.5e12 and h100.flops("bfloat16") == 494.5e12
    assert "H100" in h100.source and "50%" in h100.source
    stated = rates_of(Hardware(1, 1, 80.0), "a100", tflops=156.0)  # half of its peak, so half of the others too
    assert (stated.bf16, stated.float32) == (156e12, 9.75e12) and "as stated" in stated.source
    assert rates_of(Hardware(1, 1, 24.0)).source.startswith("A100")  # of no card that is known
    with pytest.raises(ConfigError, match="a100, h100"):
        rates_of(Hardware(1, 1, 80.0), "tpu")


def test_roles_fill_gpus_as_ray_would() -> None:
    plan = PlacementPlan(
        (Ask("vlm", 1, 1.0, 2.0), Ask("vdm", 3, 1.0, 0.5), Ask("reward", 2, 1.0, 0.25), Ask("learner", 2, 1.0, 1.0))
    )
    assert stands(plan, 1, 6) == ["vlm-0", "vlm-0", "learner-0", "learner-1", "vdm-0 vdm-1", "vdm-2 reward-0 reward-1"]
    alike = crowd(pack(plan, 1, 6))
    assert [gpu.index for gpu in alike[("learner", 1),]] == [2, 3]
    with pytest.raises(PlacementError, match=r"no room for reward number 1 of 2.*0\.25 GPU"):
        pack(PlacementPlan((Ask("vdm", 2, 1.0, 0.8), Ask("reward", 2, 1.0, 0.25))), 1, 2)


def test_strategies_choose_nodes() -> None:
    def learner(strategy: str) -> PlacementPlan:
        return PlacementPlan((Ask("vdm", 1, 1.0, 1.0), Ask("learner", 2, 1.0, 1.0, strategy=strategy)))  # type: ignore[arg-type]

    assert stands(learner("PACK"), 2, 2) == ["vdm-0", "learner-0", "learner-1", ""]
    assert stands(learner("STRICT_PACK"), 2, 2) == ["learner-0", "learner-1", "vdm-0", ""]
    assert stands(learner("SPREAD"), 2, 2) == ["vdm-0", "learner-1", "learner-0", ""]
    assert stands(learner("STRICT_SPREAD"), 2, 2) == ["learner-0", "vdm-0", "learner-1", ""]
    two = PlacementPlan(tuple(Ask(role, 3, 1.0, 1.0, strategy="STRICT_PACK") for role in ("a", "b")))
    with pytest.raises(PlacementError, match="STRICT_PACK: no node has room for all 3 of b at once"):
        pack(two, 1, 4)


def test_colocated_roles_stand_together() -> None:
    roles = (Ask("vlm", 2, 1.0, 0.3), Ask("vdm", 2, 1.0, 0.3), Ask("learner", 2, 1.0, 0.4, apart=2))
    assert stands(PlacementPlan(roles, layout="colocated"), 1, 3) == [
        "vlm-0 vdm-0 learner-0",
        "vlm-1 vdm-1 learner-1",
        "",
    ]
