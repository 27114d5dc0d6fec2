"""How roles lie on GPUs, colocated and disaggregated, and label selectors: on paper. No Ray."""

from __future__ import annotations

import pytest

from cluster.errors import PlacementError
from cluster.labels import check_selector, matches
from cluster.layout import SHARED, Ask, ClusterView, PlacementPlan, shortfall
from cluster.resources import Placement

NODE = {"CPU": 16.0, "GPU": 4.0}
TWO = ClusterView((NODE, NODE), labels=({"card": "h100", "zone": "a"}, {"card": "l40s"}))


def colocated(*asks: Ask) -> PlacementPlan:
    return PlacementPlan(asks, layout="colocated")


def test_disaggregated_roles_have_a_group_of_their_own() -> None:
    plan = PlacementPlan(
        (Ask("vlm", 2, 1.0, 1.0), Ask("reward", 1, 0.0), Ask("learner", 2, 0.5, 1.0, strategy="STRICT_PACK"))
    )
    rooms = plan.reservations()
    assert [(r.name, len(r.bundles), r.strategy) for r in rooms] == [("vlm", 2, "PACK"), ("learner", 2, "STRICT_PACK")]
    assert plan.home("vlm", 1) == ("vlm", 1) and plan.home("vlm", 2) is None and plan.home("reward", 0) is None
    assert plan.shared_gpus == 0 and plan.total() == {"CPU": 3.0, "GPU": 4.0}


def test_what_is_not_reserved_is_counted_and_asks_for_room_by_itself() -> None:
    asks = (Ask("vdm", 2, 1.0, 1.0, labels={"card": "h100"}, reserved=False), Ask("learner", 2, 0.5, 1.0))
    plan = PlacementPlan(asks)
    assert [room.name for room in plan.reservations()] == ["learner"]
    assert plan.home("vdm", 0) is None and plan.home("learner", 1) == ("learner", 1)
    assert plan.total() == {"CPU": 3.0, "GPU": 4.0} and "not reserved on card=h100" in plan.table()
    options = Placement(plan, {"learner": object()}).options("vdm", "vdm-0")
    assert options["num_gpus"] == 1.0 and options["label_selector"] == {"card": "h100"}
    assert "scheduling_strategy" not in options
    shared = colocated(Ask("vlm", 1, 1.0, 0.5, reserved=False), Ask("learner", 1, 1.0, 0.5))
    assert shared.home("vlm", 0) == (SHARED, 0) and shared.total() == {"CPU": 2.0, "GPU": 1.0}  # they meet on one GPU


def test_colocated_roles_are_dealt_over_whole_gpus() -> None:
    plan = colocated(
        Ask("vlm", 4, 1.0, 0.35),
        Ask("vdm", 4, 1.0, 0.35, {"disk": 1.0}),
        Ask("reward", 2, 0.5, 0.05),
        Ask("learner", 4, 0.5, 0.2, apart=4),
        Ask("spare", 1, 1.0),
    )
    (spare, shared) = plan.reservations()
    assert spare.name == "spare" and spare.bundles == ({"CPU": 1.0},)  # no GPU: nothing to share
    assert shared.name == SHARED and plan.shared_gpus == 4
    assert shared.bundles[0] == {"CPU": 3.0, "GPU": 1.0, "disk": 1.0}
    assert shared.bundles[3] == {"CPU": 2.5, "GPU": 1.0, "disk": 1.0}  # no scorer there
    homes = {plan.home(role, 3) for role in ("vlm", "vdm", "learner")}
    assert homes == {(SHARED, 3)} and plan.home("reward", 1) == (SHARED, 1) and plan.home("vdm", 4) is None
    table = plan.table(ClusterView(({**NODE, "disk": 4.0},)))
    assert "shares 4 GPU(s)" in table and table.endswith("\nfits")


def test_ranks_of_a_group_are_apart_and_what_has_room_moves_together() -> None:
    pools = (Ask("vlm", 2, 1.0, 0.25), Ask("vdm", 4, 1.0, 0.25))
    assert colocated(*pools).shared_gpus == 2  # 0.25 + 2 × 0.25 on each; on one GPU it would be 1.5
    assert colocated(*pools, Ask("learner", 4, 0.5, 0.1, apart=4)).shared_gpus == 4
    both = colocated(Ask("learner", 4, 0.5, 0.5, apart=2))  # all-in-one: two groups of two ranks
    assert [both.home("learner", rank) for rank in range(4)] == [(SHARED, 0), (SHARED, 1), (SHARED, 0), (SHARED, 1)]
    placement = Placement(both, {SHARED: "the group"})
    assert placement.group("learner") == "the group" and placement.bundles("learner") == [0, 1, 0, 1]


def test_shares_that_exceed_a_gpu_are_refused_with_the_sum() -> None:
    with pytest.raises(PlacementError, match=r"vlm 0\.6 \+ learner 0\.5 = 1\.1.*may add up to 1"):
        colocated(Ask("vlm", 2, 1.0, 0.6), Ask("learner", 2, 1.0, 0.5, apart=2))
    with pytest.raises(
        PlacementError, match="tensor_parallel > 1 and a sampler with context_parallel > 1 need whole GPUs"
    ):
        colocated(Ask("vlm", 1, 1.0, 2.0))
    with pytest.raises(PlacementError, match="not vlm=SPREAD, learner=STRICT_PACK"):
        colocated(Ask("vlm", 1, 1.0, 0.5, strategy="SPREAD"), Ask("learner", 1, 1.0, 0.5, strategy="STRICT_PACK"))
    with pytest.raises(PlacementError, match="vdm wants zone=b and another role zone=a"):
        colocated(Ask("vlm", 1, 1.0, 0.5, labels={"zone": "a"}), Ask("vdm", 1, 1.0, 0.5, labels={"zone": "b"}))


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        (colocated(Ask("vdm", 9, 1.0, 1.0)), "shared GPU needs CPU 9, GPU 9, and the whole cluster has CPU 32, GPU 8"),
        (
            colocated(Ask("vdm", 6, 1.0, 0.5), Ask("learner", 6, 1.0, 0.5, apart=6, strategy="STRICT_PACK")),
            "STRICT_PACK wants all 6 shared GPU on one node, and no node has CPU 12, GPU 6",
        ),
        (
            PlacementPlan((Ask("vlm", 3, 1.0, 3.0),)),
            "vlm needs CPU 3, GPU 9, and the whole cluster has CPU 32, GPU 8",
        ),
        (
            PlacementPlan((Ask("vlm", 2, 9.0, 2.0), Ask("vdm", 3, 9.0, 1.0))),
            "vdm needs 3 × (CPU 9, GPU 1), each on one node, and the nodes have room for 2 of them",
        ),
        (
            PlacementPlan((Ask("vdm", 10, 1.0, 0.6),)),
            "vdm needs 10 × (CPU 1, GPU 0.6), each on one node, and the nodes have room for 8 of them",
        ),
        (
            PlacementPlan((Ask("vdm", 5, 1.0, 1.0, labels={"card": "h100"}),)),
            "vdm needs CPU 5, GPU 5, and all nodes with card=h100 have CPU 16, GPU 4",
        ),
        (
            PlacementPlan((Ask("vdm", 1, 1.0, 1.0, labels={"card": "in(a100, h200)"}),)),
            "no node has the labels card=in(a100, h200), which vdm is to stand on",
        ),
        (PlacementPlan((Ask("vdm", 4, 1.0, 1.0, labels={"card": "!l40s"}),)), None),
    ],
)
def test_what_can_never_fit(plan: PlacementPlan, problem: str | None) -> None:
    assert shortfall(plan, TWO) == problem


def test_selectors() -> None:
    h100 = {"ray.io/accelerator-type": "H100", "zone": "a"}
    for condition, yes in (("H100", True), ("!H100", False), ("in(A100, H100)", True), ("!in(A100,B200)", True)):
        check_selector({"ray.io/accelerator-type": condition})
        assert matches({"ray.io/accelerator-type": condition}, h100) is yes
    assert matches({}, {}) and matches({"zone": "!b"}, {}) and not matches({"zone": "b"}, {})
    assert not matches({"zone": "a", "disk": "ssd"}, h100)
    for wrong in ({"zone": "in()"}, {"zone": "-a"}, {"a b": "x"}, {"zone": "in(a, b"}):
        with pytest.raises(ValueError, match="label"):
            check_selector(wrong)
