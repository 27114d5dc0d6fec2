"""Placement on a simulated cluster of two nodes with two GPUs each: which GPU each worker really gets. The GPUs are names alone."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import ray

from cluster.errors import PlacementError
from cluster.layout import Ask, PlacementPlan
from cluster.resources import Placement, accelerators, place

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_alone")]


class Probe:
    """Tells on which GPUs of which node it is."""

    def look(self) -> tuple[str, tuple[str, ...], str]:
        ids = tuple(str(gpu) for gpu in ray.get_gpu_ids())
        return ray.get_runtime_context().get_node_id(), ids, os.environ.get("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(scope="module")
def nodes(ray_alone: None) -> Iterator[dict[str, str]]:
    """Node id by the value of its label ``room``."""
    from ray.cluster_utils import Cluster

    size = {"num_cpus": 4, "num_gpus": 2, "object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**size, "labels": {"room": "a"}})
    try:
        cluster.add_node(**size, labels={"room": "b"}, resources={"accelerator_type:H200": 1.0})
        ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
        cluster.wait_for_nodes()
        yield {node["Labels"]["room"]: node["NodeID"] for node in ray.nodes()}
    finally:
        ray.shutdown()
        cluster.shutdown()


def looks(room: Placement, *names: str) -> dict[str, tuple[str, tuple[str, ...], str]]:
    """Start a worker of each name (role-slot) in ``room``, and return what it sees; they live as long as the room."""
    actor = ray.remote(Probe)
    probes: dict[str, Any] = {name: actor.options(**room.options(name.split("-")[0], name)).remote() for name in names}
    LIVING.extend(probes.values())
    return dict(zip(probes, ray.get([probe.look.remote() for probe in probes.values()], timeout=120)))


LIVING: list[Any] = []


def test_the_type_of_a_nodes_gpus_is_told_by_its_address(nodes: dict[str, str]) -> None:
    (address,) = {node["NodeManagerAddress"] for node in ray.nodes()}  # both nodes are this machine
    assert accelerators() == {address: "H200"}


@pytest.fixture(autouse=True)
def _end_workers() -> Iterator[None]:
    yield
    while LIVING:
        ray.kill(LIVING.pop())


def test_colocated_roles_meet_on_the_same_gpu(nodes: dict[str, str]) -> None:
    plan = PlacementPlan(
        (Ask("vlm", 3, 0.1, 0.4), Ask("reward", 3, 0.1, 0.1), Ask("learner", 3, 0.1, 0.5, apart=3)), layout="colocated"
    )
    assert plan.shared_gpus == 3  # so one of the nodes has two of them
    with place(plan, 60) as room:
        seen = looks(room, *(f"{role}-{slot}" for slot in range(3) for role in ("vlm", "reward", "learner")))
        cards = [{seen[f"{role}-{slot}"] for role in ("vlm", "reward", "learner")} for slot in range(3)]
        assert all(len(card) == 1 for card in cards), cards
        places = {next(iter(card))[:2] for card in cards}
        assert len(places) == 3 and all(len(ids) == 1 for _, ids in places)
        assert all(visible == ids[0] for card in cards for _, ids, visible in card)
        ray.kill(LIVING.pop(6))  # vlm-2
        assert looks(room, "vlm-2.1")["vlm-2.1"] == seen["vlm-2"]  # its replacement takes its place


def test_labels_and_strict_pack_decide_the_node(nodes: dict[str, str]) -> None:
    plan = PlacementPlan(
        (
            Ask("vdm", 2, 0.1, 0.5, labels={"room": "!a"}),
            Ask("learner", 2, 0.1, 1.0, strategy="STRICT_PACK", apart=2),
        ),
        strategy="SPREAD",
    )
    with place(plan, 60) as room:
        seen = looks(room, "vdm-0", "vdm-1", "vdm-2", "learner-0", "learner-1")  # vdm-2: beyond the plan
        assert {seen[f"vdm-{slot}"][0] for slot in range(3)} == {nodes["b"]}
        assert {seen[f"learner-{rank}"][0] for rank in range(2)} == {nodes["a"]}
        assert {seen[f"learner-{rank}"][1] for rank in range(2)} == {("0",), ("1",)}


def test_an_engine_over_two_gpus_has_both_of_one_node(nodes: dict[str, str]) -> None:
    with place(PlacementPlan((Ask("vlm", 2, 0.1, 2.0),)), 60) as room:
        seen = looks(room, "vlm-0", "vlm-1")
    assert {node for node, _, _ in seen.values()} == set(nodes.values())
    assert all(sorted(ids) == ["0", "1"] for _, ids, _ in seen.values())


def test_what_does_not_fit_is_refused_at_once(nodes: dict[str, str]) -> None:
    began = time.monotonic()
    with pytest.raises(PlacementError, match=r"(?s)STRICT_PACK wants all 3 shared GPU.*colocated on 3 GPU\(s\)"):
        place(PlacementPlan((Ask("learner", 3, 0.1, 0.5, apart=3, strategy="STRICT_PACK"),), layout="colocated"), 60)
    with pytest.raises(PlacementError, match=r"all nodes with room=b have.*GPU 2\."):
        place(PlacementPlan((Ask("vdm", 3, 0.1, 1.0, labels={"room": "b"}),)), 60)
    with pytest.raises(PlacementError, match=r"no node has the labels room=c, which vdm is to stand on"):
        place(PlacementPlan((Ask("vdm", 1, 0.1, 1.0, labels={"room": "c"}),)), 60)
    assert time.monotonic() - began < 10
