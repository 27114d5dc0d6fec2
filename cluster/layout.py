"""What a run asks of a cluster, and how that lies on nodes and GPUs: asks → reservations, and why they can never fit. Pure.

*Disaggregated*: each role (a pool, the learner) has a placement group of its own, whose bundle ``i`` is its slot or rank ``i``.
*Colocated*: the roles with a share of a GPU meet on the same GPUs. Ray gives a fraction of a GPU out of the bundle that it
reserved, and a bundle of one GPU is one physical GPU; so there is one placement group with a bundle of a whole GPU for each
shared GPU, and the members of all roles are dealt over these bundles. (A bundle of more than one GPU would not do: the
fractions in it could come from any of its GPUs. Nor would a group for each role: nothing ties their fractions together.)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from cluster.errors import PlacementError
from cluster.labels import check_selector, matches, selector_text

Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
Layout = Literal["disaggregated", "colocated"]

SHARED = "shared GPU"
"""The reservation of the colocated roles; its bundles are GPUs."""

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
    labels: Mapping[str, str] = field(default_factory=dict)
    """Label selector: on which nodes (``cluster.labels``)."""
    reserved: bool = True
    """Whether room is reserved before the first of them starts; otherwise each asks for plain resources by itself. Colocated roles
    have their room reserved anyhow: they meet on the same GPUs."""
    apart: int = 1
    """Members in a row, from the first, that may not share a GPU: the ranks of one group, since NCCL wants a GPU for each."""

    @property
    def bundle(self) -> dict[str, float]:
        """Resources of one worker or rank, those of amount 0 left out."""
        amounts = {"CPU": self.cpus, "GPU": self.gpus, **self.resources}
        return {name: float(amount) for name, amount in amounts.items() if amount > 0}

    def __str__(self) -> str:
        where = f" on {selector_text(self.labels)}" if self.labels else ""
        return f"{self.role}: {self.count} × ({amounts(self.bundle)}){where}"


@dataclass(frozen=True)
class Reservation:
    """One placement group. ``name`` is its role, or ``SHARED``; ``bundles`` may be empty of resources."""

    name: str
    bundles: tuple[Mapping[str, float], ...]
    strategy: Strategy
    labels: Mapping[str, str]
    """Label selector of every bundle."""


@dataclass(frozen=True)
class PlacementPlan:
    """All that a run asks for at the same time.

    Raises PlacementError where colocated roles cannot share a GPU, whatever the cluster.
    """

    asks: tuple[Ask, ...]
    strategy: Strategy = "PACK"
    layout: Layout = "disaggregated"

    def __post_init__(self) -> None:
        roles = [ask.role for ask in self.asks]
        if len(set(roles)) != len(roles):
            raise ValueError(f"a role may stand once in a plan: {roles}")
        for ask in self.asks:
            check_selector(ask.labels)
        self.reservations()

    @property
    def sharing(self) -> tuple[Ask, ...]:
        """The roles that share GPUs; none where the layout is disaggregated."""
        return tuple(a for a in self.asks if self.layout == "colocated" and a.gpus > 0 and a.count)

    @property
    def shared_gpus(self) -> int:
        """How many GPUs the colocated roles share: the fewest that their shares fit on."""
        shared = self.sharing
        if not shared:
            return 0
        fewest, most = max(ask.apart for ask in shared), max(ask.count for ask in shared)
        for gpus in range(fewest, max(fewest, most) + 1):
            loads = [sum(ask.gpus * len(range(gpu, ask.count, gpus)) for ask in shared) for gpu in range(gpus)]
            if max(loads) <= 1 + _EPSILON:
                return gpus
        parts = " + ".join(f"{ask.role} {ask.gpus:g}" for ask in shared)
        raise PlacementError(
            f"colocated roles do not fit on one GPU: {parts} = {sum(ask.gpus for ask in shared):g}. The shares of all roles that "
            "meet on a GPU may add up to 1 (pools.<pool>.gpus, learner.gpus; an engine with tensor_parallel > 1 "
            "and a sampler with context_parallel > 1 need whole GPUs, thus cluster.layout=disaggregated)"
        )

    def reservations(self) -> tuple[Reservation, ...]:
        """Return the placement groups, those that reserve nothing left out."""
        shared = self.sharing
        rooms = [
            Reservation(ask.role, (ask.bundle,) * ask.count, self.strategy_of(ask), ask.labels)
            for ask in self.asks
            if ask not in shared and ask.bundle and ask.count and ask.reserved
        ]
        if shared:
            gpus = self.shared_gpus
            bundles = []
            for gpu in range(gpus):
                members = [ask.bundle for ask in shared for _ in range(gpu, ask.count, gpus)]
                bundles.append({**_sum(members), "GPU": 1.0})
            rooms.append(Reservation(SHARED, tuple(bundles), self._shared_strategy(), self._shared_labels()))
        return tuple(rooms)

    def home(self, role: str, slot: int) -> tuple[str, int] | None:
        """Return the reservation and the bundle in it that are slot (or rank) ``slot``'s of ``role``; None beyond the plan's."""
        ask = self.ask(role)
        if slot >= ask.count or not ask.bundle or not (ask.reserved or ask in self.sharing):
            return None
        return (SHARED, slot % self.shared_gpus) if ask in self.sharing else (role, slot)

    def ask(self, role: str) -> Ask:
        """Return what ``role`` asks for; KeyError where it is not in the plan."""
        for ask in self.asks:
            if ask.role == role:
                return ask
        raise KeyError(f"the plan has no role {role!r}; it has {', '.join(ask.role for ask in self.asks)}")

    def total(self) -> dict[str, float]:
        """Return the sum of all bundles, and of what asks for room by itself."""
        apart = [
            ask.bundle for ask in self.asks if not ask.reserved and ask not in self.sharing for _ in range(ask.count)
        ]
        return _sum([*(bundle for room in self.reservations() for bundle in room.bundles), *apart])

    def strategy_of(self, ask: Ask) -> Strategy:
        """Return the strategy that applies to ``ask``."""
        return ask.strategy or self.strategy

    def table(self, cluster: ClusterView | None = None) -> str:
        """Return the plan as aligned text for people; with ``cluster``, what it has and whether the plan fits."""
        rows = [("role", "count", "each", "together", "placement")]
        for ask in self.asks:
            together = _sum([ask.bundle] * ask.count)
            alone = self.strategy_of(ask) if ask.reserved else "not reserved"
            where = f"shares {self.shared_gpus} GPU(s)" if ask in self.sharing else alone
            if ask.labels:
                where += f" on {selector_text(ask.labels)}"
            rows.append((ask.role, str(ask.count), amounts(ask.bundle), amounts(together), where))
        if self.sharing:
            room = self.reservations()[-1]
            rows.append((SHARED, str(len(room.bundles)), amounts(room.bundles[0]), "", room.strategy))
        rows.append(("needed", "", "", amounts(self.total()), ""))
        if cluster is not None:
            rows.append(("cluster", f"{len(cluster.nodes)} node(s)", "", amounts(cluster.total()), ""))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        if cluster is not None:
            problem = shortfall(self, cluster)
            lines.append(f"does not fit: {problem}" if problem else "fits")
        return "\n".join(lines)

    def _shared_strategy(self) -> Strategy:
        asked = {ask.role: ask.strategy for ask in self.sharing if ask.strategy}
        if len(set(asked.values())) > 1:
            told = ", ".join(f"{role}={strategy}" for role, strategy in asked.items())
            raise PlacementError(
                f"colocated roles lie on the same GPUs, so they have one placement strategy, not {told}; set one of them"
            )
        return next(iter(asked.values()), None) or self.strategy

    def _shared_labels(self) -> dict[str, str]:
        merged: dict[str, str] = {}
        for ask in self.sharing:
            for key, condition in ask.labels.items():
                if merged.setdefault(key, condition) != condition:
                    raise PlacementError(
                        f"colocated roles lie on the same nodes, but {ask.role} wants {key}={condition} and another role "
                        f"{key}={merged[key]}; set them equal, or cluster.layout=disaggregated"
                    )
        return merged


@dataclass(frozen=True)
class ClusterView:
    """What a cluster has: resources of each live node, and what is free in all."""

    nodes: tuple[Mapping[str, float], ...]
    free: Mapping[str, float] = field(default_factory=dict)
    labels: tuple[Mapping[str, str], ...] = ()
    """Labels of each node, in the same order; empty where none has any."""

    def total(self) -> dict[str, float]:
        """Return the sum over nodes."""
        return _sum(self.nodes)

    def matching(self, selector: Mapping[str, str]) -> ClusterView:
        """Return the nodes that ``selector`` allows."""
        if not selector:
            return self
        labels = self.labels or ({},) * len(self.nodes)
        kept = [(node, own) for node, own in zip(self.nodes, labels, strict=True) if matches(selector, own)]
        return ClusterView(tuple(node for node, _ in kept), self.free, tuple(own for _, own in kept))


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
    for room in plan.reservations():
        problem = _room_shortfall(room, cluster)
        if problem is not None:
            return problem
    total = cluster.total()
    if not _fits(plan.total(), total):
        return f"all together need {amounts(plan.total())}, and the whole cluster has {amounts(total)}"
    return None


def check(plan: PlacementPlan, cluster: ClusterView) -> None:
    """Raise PlacementError if ``plan`` can never fit into ``cluster``."""
    problem = shortfall(plan, cluster)
    if problem is not None:
        raise PlacementError(refusal(plan, cluster, problem))


def refusal(plan: PlacementPlan, cluster: ClusterView, problem: str) -> str:
    """Return the message for a ``plan`` that has no room in ``cluster`` because of ``problem``."""
    asked = "; ".join(str(ask) for ask in plan.asks)
    has = f"{amounts(cluster.total())} on {len(cluster.nodes)} node(s)"
    if cluster.free:
        has += f", of which free: {amounts(cluster.free)}"
    layout = ""
    if plan.sharing:
        layout = f", colocated on {plan.shared_gpus} GPU(s)"
    return (
        f"No room in the cluster: {problem}.\n  asked:   {asked}{layout}\n  cluster: {has}\n"
        "Ask for fewer or smaller workers and ranks (config sections pools and learner), or add nodes "
        "(an embedded local cluster: raise cluster.local_cpus)."
    )


def _room_shortfall(room: Reservation, cluster: ClusterView) -> str | None:
    count, largest = len(room.bundles), _largest(room.bundles)
    allowed, which = cluster.matching(room.labels), ""
    if room.labels:
        which = f" with {selector_text(room.labels)}"
        if not allowed.nodes:
            return f"no node has the labels {selector_text(room.labels)}, which {room.name} is to stand on"
    if not any(_fits(largest, node) for node in allowed.nodes):
        sizes = "; ".join(sorted({amounts(node) for node in allowed.nodes})) or "no nodes"
        return f"no node{which} has {amounts(largest)}, which one {room.name} needs (nodes have: {sizes})"
    together = _sum(room.bundles)
    if room.strategy == "STRICT_PACK" and not any(_fits(together, node) for node in allowed.nodes):
        return f"STRICT_PACK wants all {count} {room.name} on one node, and no node{which} has {amounts(together)}"
    if room.strategy == "STRICT_SPREAD" and count > len(allowed.nodes):
        return f"STRICT_SPREAD wants {count} nodes for {room.name}, and the cluster has {len(allowed.nodes)}{which}"
    if not _fits(together, allowed.total()):
        where = f"all nodes{which} have" if room.labels else "the whole cluster has"
        return f"{room.name} needs {amounts(together)}, and {where} {amounts(allowed.total())}"
    smallest = _smallest(room.bundles)
    places = sum(_places(smallest, node) for node in allowed.nodes)
    if places < count:
        return (
            f"{room.name} needs {count} × ({amounts(smallest)}), each on one node, and the nodes{which} have room for {places} "
            "of them"
        )
    return None


def _places(bundle: Mapping[str, float], node: Mapping[str, float]) -> int:
    """Return how many of ``bundle`` one empty node holds. A fraction of a GPU is a fraction of one and the same GPU."""
    found = []
    for name, amount in bundle.items():
        has = node.get(name, 0.0)
        if name == "GPU" and amount < 1:
            found.append(int(has + _EPSILON) * int(1 / amount + _EPSILON))
        else:
            found.append(int(has / amount + _EPSILON))
    return min(found, default=0)


def _largest(bundles: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: max(b.get(name, 0.0) for b in bundles) for bundle in bundles for name in bundle}


def _smallest(bundles: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: low for name in bundles[0] if (low := min(bundle.get(name, 0.0) for bundle in bundles)) > 0}


def _sum(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, amount in part.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def _fits(need: Mapping[str, float], room: Mapping[str, float]) -> bool:
    return all(amount <= room.get(name, 0.0) + _EPSILON for name, amount in need.items())
