"""Who gets which resources: whether the cluster has what a run asks for, and the placement groups that reserve it.

What is asked, and how it lies on GPUs, is ``cluster.layout``. ``shortfall`` and ``check`` are pure; ``view`` and ``place`` talk to
Ray. How workers are made is not decided here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from cluster.errors import PlacementError
from cluster.layout import Ask, ClusterView, PlacementPlan, Strategy, amounts, check, refusal, shortfall
from cluster.names import slot_of

__all__ = [
    "Ask",
    "ClusterView",
    "Placement",
    "PlacementPlan",
    "Strategy",
    "accelerators",
    "amounts",
    "check",
    "found_room",
    "place",
    "shortfall",
    "view",
]


_Slot = tuple[str, int]
"""A role and the number of one of its slots, by which its bundle is named too."""


class Placement:
    """Reserved room: the placement groups of a plan."""

    def __init__(
        self, plan: PlacementPlan, groups: Mapping[str, Any], is_lost: Callable[[Any, int], bool] | None = None
    ) -> None:
        """``groups``: the placement group of each of the plan's reservations, by name. ``is_lost`` says of a group's bundle
        whether its node is gone and it has no other yet; by default Ray's table does.
        """
        self.plan = plan
        self._groups = dict(groups)
        self._is_lost = is_lost or _is_lost
        self._elsewhere: set[_Slot] = set()  # slots that look for room outside their lost bundle
        self._lent: dict[_Slot, _Slot] = {}  # slot → the slot in whose bundle its worker stands
        self._moved: set[_Slot] = set()  # slots whose waiting worker is to look at its bundle anew

    def group(self, role: str) -> Any | None:
        """Return the placement group that ``role`` lies in, or None if it asks for no resources."""
        home = self.plan.home(role, 0)
        return self._groups.get(home[0]) if home else None

    def bundles(self, role: str) -> list[int]:
        """Return the bundle of :meth:`group` that each slot or rank of ``role`` has; colocated, several may have the same."""
        homes = [self.plan.home(role, slot) for slot in range(self.plan.ask(role).count)]
        return [home[1] for home in homes if home]

    def options(self, role: str, name: str) -> dict[str, Any]:
        """Return ``Actor.options(...)`` arguments that put worker ``name`` (see ``cluster.names``) where it belongs.

        A worker of slot ``i`` gets slot ``i``'s bundle, and so does its replacement; slots beyond the plan (the pool was
        resized) and those whose bundle is lost (:meth:`reconsider`) ask the cluster for plain resources of the same
        size.
        """
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        ask, slot = self.plan.ask(role), slot_of(name)
        options: dict[str, Any] = {
            "num_cpus": ask.cpus,
            "num_gpus": ask.gpus,
            "resources": {key: value for key, value in ask.resources.items() if value > 0},
        }
        if (role, slot) in self._elsewhere | self._moved:
            self.reconsider(role, name)  # home again, if the bundle is back
        found = self._bundle(role, slot)
        if found is not None and (role, slot) not in self._elsewhere:
            group, bundle = found
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=bundle
            )
        elif ask.labels:
            options["label_selector"] = dict(ask.labels)
        return options

    def reconsider(self, role: str, name: str) -> bool:
        """Return whether worker ``name``, which has waited for room, is to be made anew with other :meth:`options`.

        When a node dies, Ray moves the bundles that lay there all at once or not at all, so one of two lost workers would
        wait for a bundle while there is room for it elsewhere. Its slot then asks for plain resources, until its bundle
        has a node again.
        """
        slot = slot_of(name)
        found, key = self._bundle(role, slot), (role, slot)
        if key in self._moved:
            self._moved.discard(key)
            self._elsewhere.discard(key)
            return True
        if found is None or self._is_lost(*found) == (key in self._elsewhere):
            return False
        self._elsewhere ^= {key}
        return True

    def lend(self, role: str, slot: int, bundle: _Slot) -> None:
        """Put the next worker of ``slot`` of ``role`` into the bundle of another slot, which asks for plain resources meanwhile."""
        self._lent = {**self._lent, (role, slot): bundle}  # another one: threads read it
        self._moved.add((role, slot))

    def give_back(self, role: str, slot: int) -> None:
        """End :meth:`lend`: the next worker of ``slot`` has its own bundle again, if it has one."""
        if (role, slot) in self._lent:
            self._moved.add(self._lent[role, slot])  # a worker of its owner may wait for plain resources
            self._lent = {key: bundle for key, bundle in self._lent.items() if key != (role, slot)}
            self._moved.add((role, slot))

    @property
    def lent(self) -> Mapping[_Slot, _Slot]:
        """The slots whose workers stand in the bundle of another, and whose."""
        return self._lent

    def is_there(self, bundle: _Slot) -> bool:
        """Return whether the bundle of that slot is reserved on a living node."""
        found = self._home(bundle)
        return found is not None and not self._is_lost(*found)

    def remove(self) -> None:
        """Give back all room; actors that still live there are ended by Ray."""
        from ray.util import remove_placement_group

        while self._groups:
            _, group = self._groups.popitem()
            remove_placement_group(group)

    def _bundle(self, role: str, slot: int) -> tuple[Any, int] | None:
        """Return the placement group and the bundle that ``slot`` may use, if any: its own, or one that was lent to it."""
        key = (role, slot)
        if key in self._lent:
            return self._home(self._lent[key])
        return None if key in self._lent.values() else self._home(key)

    def _home(self, slot: _Slot) -> tuple[Any, int] | None:
        home = self.plan.home(*slot)
        group = self._groups.get(home[0]) if home else None
        return (group, home[1]) if home and group is not None else None

    def __enter__(self) -> Placement:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def _is_lost(group: Any, bundle: int) -> bool:
    from ray.util import placement_group_table

    return not placement_group_table(group)["bundles_to_node_id"].get(bundle)


def view() -> ClusterView:
    """Return what the connected Ray cluster has."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    labels = tuple(node.get("Labels", {}) for node in alive)
    return ClusterView(tuple(node["Resources"] for node in alive), ray.available_resources(), labels)


def accelerators() -> dict[str, str]:
    """Return Ray's name for the type of a node's GPUs (``H100``), by the node's address; nodes without GPUs have none."""
    import ray

    prefix = "accelerator_type:"
    return {
        node["NodeManagerAddress"]: name.removeprefix(prefix)
        for node in ray.nodes()
        if node["Alive"]
        for name in node["Resources"]
        if name.startswith(prefix)
    }


def found_room(actor: Any) -> bool:
    """Return whether the cluster has found room for the process of ``actor``, which may not have finished starting.

    An actor is pending both while it waits for resources and while its process starts; only Ray's own table tells the
    two apart: the second has a port.
    """
    from ray._private import state

    entry = state.actors(actor._actor_id.hex()) or {}
    return entry.get("State") not in ("DEPENDENCIES_UNREADY", "PENDING_CREATION") or bool(entry["Address"]["Port"])


def place(plan: PlacementPlan, timeout_s: float, *, can_grow: bool = False) -> Placement:
    """Reserve everything in ``plan`` or nothing. Blocks up to ``timeout_s``; from a coroutine call it in a thread.

    ``can_grow``: an autoscaler may add nodes, so a plan larger than the cluster is waited for instead of refused at
    once.

    Raises PlacementError, which says what was asked and what the cluster has.
    """
    from ray.util import placement_group

    if not can_grow:
        check(plan, view())
    deadline = time.monotonic() + timeout_s
    placement = Placement(plan, {})
    try:
        for room in plan.reservations():
            where = {"bundle_label_selector": [dict(room.labels) for _ in room.bundles]} if room.labels else {}
            bundles = [dict(bundle) for bundle in room.bundles]
            placement._groups[room.name] = placement_group(bundles, strategy=room.strategy, **where)
        waiting = [
            name
            for name, group in placement._groups.items()
            if not group.wait(max(1, math.ceil(deadline - time.monotonic())))
        ]
        if waiting:
            problem = f"after {timeout_s:g} s there is still no room for {', '.join(waiting)}"
            raise PlacementError(refusal(plan, view(), problem))
    except BaseException:
        placement.remove()
        raise
    return placement
