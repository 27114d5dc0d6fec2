"""The requests of a pool that wait for a worker, oldest first. Pure; every operation costs the same however many wait."""

from __future__ import annotations

import bisect
from collections import OrderedDict
from dataclasses import dataclass, field


@dataclass(eq=False)
class Ticket:
    """One request in the pool."""

    id: int
    since: float  # in the queue since
    retries: int = 0
    avoid: str | None = None  # the worker on which it failed last
    wanted: bool = True  # its submitter still waits
    reasons: list[str] = field(default_factory=list)


class Waiting:
    """Tickets in the order of their ids, so that what is sent again goes first.

    Those sent before stand apart: all of their ids are below those of the others, which leave from the front only.
    """

    def __init__(self) -> None:
        self._again: list[Ticket] = []  # few: only failures of machines bring one here
        self._fresh: OrderedDict[int, Ticket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._again) + len(self._fresh)

    def append(self, ticket: Ticket) -> None:
        """A new request, with a higher id than all before."""
        self._fresh[ticket.id] = ticket

    def send_again(self, ticket: Ticket) -> None:
        """A request that had been sent and has failed."""
        bisect.insort(self._again, ticket, key=lambda t: t.id)

    def discard(self, ticket: Ticket) -> None:
        """Drop ``ticket`` where it waits."""
        if self._fresh.pop(ticket.id, None) is None and ticket in self._again:
            self._again.remove(ticket)

    def oldest(self) -> float:
        """Return since when the longest-waiting one waits; ValueError where none does."""
        fresh = next(iter(self._fresh.values()), None)  # new ones come in the order of time
        return min([t.since for t in self._again] + ([fresh.since] if fresh else []))

    def take(self, size: int, worker: str, others: bool) -> list[Ticket]:
        """Take up to ``size`` tickets for ``worker``; ``others``: there is another worker that could have them.

        A ticket keeps away from the worker that failed it while there is another. One that has failed twice goes alone:
        if it is what kills workers, it takes no neighbour with it a third time.
        """
        batch: list[Ticket] = []
        for ticket in self._again:
            if (others and ticket.avoid == worker) or (ticket.retries >= 2 and batch):
                continue
            batch.append(ticket)
            if ticket.retries >= 2:
                size = 1
            if len(batch) == size:
                break
        if batch:
            chosen = {ticket.id for ticket in batch}
            self._again = [ticket for ticket in self._again if ticket.id not in chosen]
        while self._fresh and len(batch) < size:
            batch.append(self._fresh.popitem(last=False)[1])
        return batch

    def clear(self) -> list[Ticket]:
        """Take all."""
        taken = [*self._again, *self._fresh.values()]
        self._again, self._fresh = [], OrderedDict()
        return taken
