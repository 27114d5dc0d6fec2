"""Who gets which resources: what a run asks for, whether the cluster has it, and the placement groups that reserve it.

``PlacementPlan`` and ``check`` are pure; ``view`` and ``place`` talk to Ray. How workers are made is not decided here.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from cluster.errors import PlacementError
from cluster.names import slot_of

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]

_EPSILON = 1e-4  # Ray counts resources in ten-thousandths
_IMPLICIT = ("node:", "bundle_", "memory", "object_store_memory", "accelerator_type:")
_IN_A_GROUP = re.compile(r"_group_(\d+_)?[0-9a-f]{32,}$")  # Ray's names for what a placement group has reserved


@dataclass(frozen=True)
class Ask:
    """What one role (a pool or a learner group) asks for: ``count`` bundles of equal size."""

    role: str
    count: int
    cpus: float
    gpus: float = 0.0
    resources: Mapping[str, float] = field(default_factory=dict)
    """Custom Ray resources of each bundle."""
    strategy: Strategy | None = None
    """How this role's bundles lie on nodes; None takes the plan's."""

    @property
    def bundle(self) -> dict[str, float]:
        """Resources of one worker or rank, those of amount 0 left out."""
        amounts = {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
        return {name: float(amount) for name, amount in amounts.items() if amount > 0}

    def __str__(self) -> str:
        return f"{self.role}: {self.count} × ({amounts(self.bundle)})"


@dataclass(frozen=True)
class PlacementPlan:
    """All that a run asks for at the same time.

    Each role gets a placement group of its own, so that bundle ``i`` is its rank or slot ``i``.
    """

    asks: tuple[Ask, ...]
    strategy: Strategy = "PACK"

    def __post_init__(self) -> None:
        roles = [ask.role for ask in self.asks]
        if len(set(roles)) != len(roles):
            raise ValueError(f"a role may stand once in a plan: {roles}")

    def total(self) -> dict[str, float]:
        """Return the sum of all bundles."""
        return _sum([ask.bundle for ask in self.asks for _ in range(ask.count)])

    def strategy_of(self, ask: Ask) -> Strategy:
        """Return the strategy that applies to ``ask``."""
        return ask.strategy or self.strategy

    def table(self, cluster: ClusterView | None = None) -> str:
        """Return the plan as aligned text for people; with ``cluster``, what it has and whether the plan fits."""
        rows = [("role", "count", "each", "together", "placement")]
        for ask in self.asks:
            together = _sum([ask.bundle] * ask.count)
            rows.append((ask.role, str(ask.count), amounts(ask.bundle), amounts(together), self.strategy_of(ask)))
        rows.append(("needed", "", "", amounts(self.total()), ""))
        if cluster is not None:
            rows.append(("cluster", f"{len(cluster.nodes)} node(s)", "", amounts(cluster.total()), ""))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        if cluster is not None:
            problem = shortfall(self, cluster)
            lines.append(f"does not fit: {problem}" if problem else "fits")
        return "\n".join(lines)


@dataclass(frozen=True)
class ClusterView:
    """What a cluster has: resources of each live node, and what is free in all."""

    nodes: tuple[Mapping[str, float], ...]
    free: Mapping[str, float] = field(default_factory=dict)

    def total(self) -> dict[str, float]:
        """Return the sum over nodes."""
        return _sum(self.nodes)


def amounts(resources: Mapping[str, float]) -> str:
    """Return resources for people: ``CPU 4, GPU 1``."""
    shown = {
        name: amount
        for name, amount in resources.items()
        if not name.startswith(_IMPLICIT) and not _IN_A_GROUP.search(name)
    }
    order = sorted(shown, key=lambda name: (name not in ("CPU", "GPU"), name))
    return ", ".join(f"{name} {shown[name]:g}" for name in order) or "nothing"


def shortfall(plan: PlacementPlan, cluster: ClusterView) -> str | None:
    """Return why ``plan`` can never fit into ``cluster``, even when it is empty; None if nothing is known against it.

    Necessary conditions only: a plan that passes may still not fit (fragments, other runs), which placing it finds out.
    """
    total = cluster.total()
    for ask in plan.asks:
        if not any(_fits(ask.bundle, node) for node in cluster.nodes):
            sizes = "; ".join(sorted({amounts(node) for node in cluster.nodes})) or "no nodes"
            return f"no node has {amounts(ask.bundle)}, which one {ask.role} needs (nodes have: {sizes})"
        strategy = plan.strategy_of(ask)
        together = _sum([ask.bundle] * ask.count)
        if strategy == "STRICT_PACK" and not any(_fits(together, node) for node in cluster.nodes):
            return f"STRICT_PACK wants all {ask.count} {ask.role} on one node, and no node has {amounts(together)}"
        if strategy == "STRICT_SPREAD" and ask.count > len(cluster.nodes):
            return f"STRICT_SPREAD wants {ask.count} nodes for {ask.role}, and the cluster has {len(cluster.nodes)}"
        if not _fits(together, total):
            return f"{ask.role} needs {amounts(together)}, and the whole cluster has {amounts(total)}"
    if not _fits(plan.total(), total):
        return f"all together need {amounts(plan.total())}, and the whole cluster has {amounts(total)}"
    return None


def check(plan: PlacementPlan, cluster: ClusterView) -> None:
    """Raise PlacementError if ``plan`` can never fit into ``cluster``."""
    problem = shortfall(plan, cluster)
    if problem is not None:
        raise PlacementError(_refusal(plan, cluster, problem))


class Placement:
    """Reserved room: the placement groups of a plan, by role."""

    def __init__(self, plan: PlacementPlan, groups: Mapping[str, Any]) -> None:
        self.plan = plan
        self._groups = dict(groups)
        self._asks = {ask.role: ask for ask in plan.asks}
        self._astray: set[tuple[str, int]] = set()  # slots that look for room outside their lost bundle

    def group(self, role: str) -> Any | None:
        """Return the role's placement group (bundle ``i`` for rank ``i``), or None if it asks for no resources."""
        self._ask(role)
        return self._groups.get(role)

    def options(self, role: str, name: str) -> dict[str, Any]:
        """Return ``Actor.options(...)`` arguments that put worker ``name`` (see ``cluster.names``) where it belongs.

        A worker of slot ``i`` gets bundle ``i``, and so does its replacement; slots beyond the plan (the pool was
        resized) and those whose bundle is lost (:meth:`reconsider`) ask the cluster for plain resources of the same
        size.
        """
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        ask, slot, group = self._ask(role), slot_of(name), self._groups.get(role)
        options: dict[str, Any] = {
            "num_cpus": ask.cpus,
            "num_gpus": ask.gpus,
            "resources": {key: value for key, value in ask.resources.items() if value > 0},
        }
        if (role, slot) in self._astray:
            self.reconsider(role, name)  # home again, if the bundle is back
        if group is not None and slot < ask.count and (role, slot) not in self._astray:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=slot
            )
        return options

    def reconsider(self, role: str, name: str) -> bool:
        """Return whether worker ``name``, which has waited for room, is to be made anew with other :meth:`options`.

        When a node dies, Ray moves the bundles that lay there all at once or not at all, so one of two lost workers would
        wait for a bundle while there is room for it elsewhere. Its slot then asks for plain resources, until its bundle
        has a node again.
        """
        ask, slot, group = self._ask(role), slot_of(name), self._groups.get(role)
        if group is None or slot >= ask.count:
            return False
        from ray.util import placement_group_table

        lost = not placement_group_table(group)["bundles_to_node_id"].get(slot)
        if lost == ((role, slot) in self._astray):
            return False
        self._astray ^= {(role, slot)}
        return True

    def remove(self, *roles: str) -> None:
        """Give back the room of ``roles``, or of all; actors that still live there are ended by Ray."""
        from ray.util import remove_placement_group

        for role in roles or tuple(self._groups):
            group = self._groups.pop(role, None)
            if group is not None:
                remove_placement_group(group)

    def __enter__(self) -> Placement:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _ask(self, role: str) -> Ask:
        if role not in self._asks:
            raise KeyError(f"the plan has no role {role!r}; it has {', '.join(self._asks)}")
        return self._asks[role]


def view() -> ClusterView:
    """Return what the connected Ray cluster has."""
    import ray

    nodes = tuple(node["Resources"] for node in ray.nodes() if node["Alive"])
    return ClusterView(nodes, ray.available_resources())


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
        for ask in plan.asks:
            if ask.bundle and ask.count:
                bundles = [dict(ask.bundle) for _ in range(ask.count)]
                placement._groups[ask.role] = placement_group(bundles, strategy=plan.strategy_of(ask))
        waiting = [
            role
            for role, group in placement._groups.items()
            if not group.wait(max(1, math.ceil(deadline - time.monotonic())))
        ]
        if waiting:
            problem = f"after {timeout_s:g} s there is still no room for {', '.join(waiting)}"
            raise PlacementError(_refusal(plan, view(), problem))
    except BaseException:
        placement.remove()
        raise
    return placement


def _refusal(plan: PlacementPlan, cluster: ClusterView, problem: str) -> str:
    asked = "; ".join(str(ask) for ask in plan.asks)
    has = f"{amounts(cluster.total())} on {len(cluster.nodes)} node(s)"
    if cluster.free:
        has += f", of which free: {amounts(cluster.free)}"
    return (
        f"No room in the cluster: {problem}.\n  asked:   {asked}\n  cluster: {has}\n"
        "Ask for fewer or smaller workers and ranks (config sections pools and learner), or add nodes "
        "(an embedded local cluster: raise cluster.local_cpus)."
    )


def _sum(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, amount in part.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def _fits(need: Mapping[str, float], room: Mapping[str, float]) -> bool:
    return all(amount <= room.get(name, 0.0) + _EPSILON for name, amount in need.items())
