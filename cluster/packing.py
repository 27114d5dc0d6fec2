"""Which GPU each worker and rank of a plan would stand on, on empty nodes that are all alike. Pure.

Ray decides in the end; this follows its rules (strategies, whole GPUs before shares, a share on the fullest GPU that still has room
for it), so that memory can be added up for each GPU beforehand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cluster.errors import PlacementError
from cluster.layout import SHARED, PlacementPlan, Reservation

_EPSILON = 1e-4


@dataclass(frozen=True)
class Member:
    """Worker or rank ``slot`` of ``role``."""

    role: str
    slot: int

    def __str__(self) -> str:
        return f"{self.role}-{self.slot}"


@dataclass(frozen=True)
class Gpu:
    """One GPU and who stands on it."""

    node: int
    index: int
    members: tuple[Member, ...]


@dataclass
class _Node:
    free: list[float]
    used_by: dict[str, int] = field(default_factory=dict)

    def take(self, amount: float, room: str) -> tuple[int, ...] | None:
        """Take ``amount`` of GPUs and return which; None where there is no room."""
        if amount >= 1:
            whole = [i for i, free in enumerate(self.free) if free >= 1 - _EPSILON][: round(amount)]
            if len(whole) < round(amount):
                return None
            taken, each = tuple(whole), 1.0
        else:
            fits = [(free, i) for i, free in enumerate(self.free) if free >= amount - _EPSILON]
            if not fits:
                return None
            taken, each = (min(fits)[1],), amount
        for i in taken:
            self.free[i] -= each
        self.used_by[room] = self.used_by.get(room, 0) + 1
        return taken

    def give_back(self, taken: Iterable[int], amount: float, room: str) -> None:
        for i in taken:
            self.free[i] += min(amount, 1.0)
        self.used_by[room] -= 1


def pack(plan: PlacementPlan, nodes: int, per_node: int) -> tuple[Gpu, ...]:
    """Return all GPUs of ``nodes`` nodes with ``per_node`` each, and which members of ``plan`` stand on them.

    Roles without a GPU stand nowhere. Raises PlacementError where a reservation finds no room.
    """
    cluster = [_Node([1.0] * per_node) for _ in range(nodes)]
    places: dict[tuple[str, int], tuple[int, tuple[int, ...]]] = {}
    rooms = [room for room in plan.reservations() if any(bundle.get("GPU", 0) for bundle in room.bundles)]
    # What is hardest to place first: all on one node, then the largest bundles.
    rooms.sort(key=lambda r: (not r.strategy.startswith("STRICT"), -max(b.get("GPU", 0.0) for b in r.bundles)))
    for room in rooms:
        for bundle, place in enumerate(_place(room, cluster)):
            places[room.name, bundle] = place
    standing: dict[tuple[int, int], list[Member]] = {}
    for ask in plan.asks:
        for slot in range(ask.count if ask.gpus else 0):
            home = plan.home(ask.role, slot)
            assert home is not None
            node, gpus = places[home]
            for gpu in gpus:
                standing.setdefault((node, gpu), []).append(Member(ask.role, slot))
    return tuple(Gpu(n, g, tuple(standing.get((n, g), ()))) for n in range(nodes) for g in range(per_node))


def _place(room: Reservation, cluster: list[_Node]) -> list[tuple[int, tuple[int, ...]]]:
    amounts = [bundle.get("GPU", 0.0) for bundle in room.bundles]
    if room.strategy == "STRICT_PACK":
        for index, node in enumerate(cluster):
            found = _all_on(node, room.name, amounts)
            if found is not None:
                return [(index, taken) for taken in found]
        raise PlacementError(f"STRICT_PACK: no node has room for all {len(amounts)} of {_name(room)} at once")
    places = []
    for amount in amounts:
        order = sorted(range(len(cluster)), key=lambda i: _preference(room, cluster[i], i))
        if room.strategy == "STRICT_SPREAD":
            order = [i for i in order if not cluster[i].used_by.get(room.name)]
        for index in order:
            taken = cluster[index].take(amount, room.name)
            if taken is not None:
                places.append((index, taken))
                break
        else:
            raise PlacementError(
                f"no room for {_name(room)} number {len(places) + 1} of {len(amounts)}, which needs {amount:g} GPU(s) on one node "
                f"({room.strategy}); {sum(sum(n.free) for n in cluster):g} are left, in pieces that do not serve"
            )
    return places


def _preference(room: Reservation, node: _Node, index: int) -> tuple[float, ...]:
    used = node.used_by.get(room.name, 0)
    if room.strategy in ("SPREAD", "STRICT_SPREAD"):
        return (used, -sum(node.free), index)
    return (-used, index)


def _all_on(node: _Node, room: str, amounts: list[float]) -> list[tuple[int, ...]] | None:
    found: list[tuple[int, ...]] = []
    for amount in amounts:
        taken = node.take(amount, room)
        if taken is None:
            for undo, again in zip(found, amounts):
                node.give_back(undo, again, room)
            return None
        found.append(taken)
    return found


def _name(room: Reservation) -> str:
    return "the shared GPUs" if room.name == SHARED else room.name


def crowd(gpus: Iterable[Gpu]) -> Mapping[tuple[tuple[str, int], ...], list[Gpu]]:
    """Return the GPUs by what stands on them: (role, members of it), those that are alike together."""
    alike: dict[tuple[tuple[str, int], ...], list[Gpu]] = {}
    for gpu in gpus:
        counts: dict[str, int] = {}
        for member in gpu.members:
            counts[member.role] = counts.get(member.role, 0) + 1
        alike.setdefault(tuple(counts.items()), []).append(gpu)
    return alike
