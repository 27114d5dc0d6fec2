"""Placement plans against clusters on paper: what is asked, what there is, and errors that say so. No Ray."""

from __future__ import annotations

import pytest

from cluster.errors import PlacementError
from cluster.names import slot_of, worker_name
from cluster.resources import Ask, ClusterView, Placement, PlacementPlan, amounts, check, shortfall

TWO_NODES = ClusterView(({"CPU": 8.0, "GPU": 4.0, "memory": 1e9}, {"CPU": 8.0, "GPU": 4.0}), {"CPU": 10.0, "GPU": 8.0})


def test_names_round_trip() -> None:
    assert worker_name("vdm", 3) == "vdm-3" and worker_name("vdm", 3, 2) == "vdm-3.2"
    assert [slot_of(worker_name("a-b", slot, n)) for slot, n in ((0, 1), (12, 1), (12, 34))] == [0, 12, 12]
    with pytest.raises(ValueError, match="is not a worker's name"):
        slot_of("vdm")


def test_totals_and_table() -> None:
    plan = PlacementPlan((Ask("vlm", 2, 1.0, 0.5), Ask("learner", 4, 0.5, 1.0, {"fast": 1.0}), Ask("reward", 1, 0.0)))
    assert plan.total() == {"CPU": 4.0, "GPU": 5.0, "fast": 4.0}
    table = plan.table(ClusterView(({"CPU": 4.0, "GPU": 8.0, "fast": 4.0, "node:10.0.0.1": 1.0},)))
    assert table.splitlines()[1].split() == ["vlm", "2", "CPU", "1,", "GPU", "0.5", "CPU", "2,", "GPU", "1", "PACK"]
    assert "node:10" not in table and table.endswith("fits") and "does not" not in table
    assert amounts({"CPU_group_0_" + "a1" * 18: 1.0}) == "nothing"
    with pytest.raises(ValueError, match="once"):
        PlacementPlan((Ask("vlm", 1, 1.0), Ask("vlm", 1, 1.0)))


@pytest.mark.parametrize(
    ("ask", "problem"),
    [
        (Ask("learner", 9, 1.0, 1.0), "learner needs CPU 9, GPU 9, and the whole cluster has CPU 16, GPU 8"),
        (Ask("learner", 1, 1.0, 8.0), "no node has CPU 1, GPU 8"),
        (Ask("vdm", 1, 1.0, 0.0, {"h100": 1.0}), "no node has CPU 1, h100 1"),
        (Ask("learner", 6, 1.0, 1.0, strategy="STRICT_PACK"), "on one node, and no node has CPU 6, GPU 6"),
        (Ask("learner", 3, 1.0, 1.0, strategy="STRICT_SPREAD"), "3 nodes for learner, and the cluster has 2"),
    ],
)
def test_what_can_never_fit_is_refused_with_numbers(ask: Ask, problem: str) -> None:
    with pytest.raises(PlacementError) as refusal:
        check(PlacementPlan((ask,)), TWO_NODES)
    text = str(refusal.value)
    assert problem in text and f"{ask.role}: {ask.count} × " in text and "free: CPU 10, GPU 8" in text


def test_sum_of_roles_counts_and_what_fits_passes() -> None:
    halves = tuple(Ask(role, 5, 1.0, 1.0) for role in ("vlm", "vdm"))
    assert "all together need CPU 10, GPU 10" in (shortfall(PlacementPlan(halves), TWO_NODES) or "")
    assert shortfall(PlacementPlan((Ask("vlm", 8, 2.0, 1.0),)), TWO_NODES) is None
    # Ten tenths of a core are one core, whatever floats say.
    assert shortfall(PlacementPlan((Ask("reward", 10, 0.1),)), ClusterView(({"CPU": 1.0},))) is None
    assert "no nodes" in (shortfall(PlacementPlan((Ask("vlm", 1, 1.0),)), ClusterView(())) or "")


def test_a_lent_bundle_is_one_workers_and_its_owners_again_when_it_is_given_back() -> None:
    lost: set[str] = {"reward's group"}
    plan = PlacementPlan((Ask("vdm", 2, 1.0), Ask("reward", 1, 0.5, labels={"disk": "ssd"})))
    groups = {"vdm": "vdm's group", "reward": "reward's group"}
    room = Placement(plan, groups, lambda group, bundle: group in lost)

    def where(role: str, name: str) -> tuple[str, int] | None:
        found = room.options(role, name).get("scheduling_strategy")
        return (found.placement_group, found.placement_group_bundle_index) if found else None

    assert where("reward", "reward-0") == ("reward's group", 0)  # Ray may still find another node for it
    assert room.reconsider("reward", "reward-0") and where("reward", "reward-0") is None
    assert room.options("reward", "reward-0")["label_selector"] == {"disk": "ssd"}
    room.lend("reward", 0, ("vdm", 1))
    assert room.reconsider("reward", "reward-0") and not room.reconsider("reward", "reward-0")
    assert (
        where("reward", "reward-0.2") == ("vdm's group", 1) and room.options("reward", "reward-0.2")["num_cpus"] == 0.5
    )
    assert where("vdm", "vdm-1.2") is None and where("vdm", "vdm-0") == ("vdm's group", 0)
    assert not room.is_there(("reward", 0)) and room.is_there(("vdm", 1)) and not room.is_there(("vdm", 2))
    lost.clear()
    room.give_back("reward", 0)
    assert not room.lent and room.reconsider(
        "vdm", "vdm-1.2"
    )  # one that waited for plain resources has its bundle again
    assert where("vdm", "vdm-1.2") == ("vdm's group", 1) and where("reward", "reward-0.3") == ("reward's group", 0)
