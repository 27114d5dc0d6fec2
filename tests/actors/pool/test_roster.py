"""The indices over a pool's workers and queue say what a look at all of them would say, after any history."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from actors.pool.roster import Roster
from actors.pool.state import ALIVE, COMING, S, Worker
from actors.pool.waiting import Ticket, Waiting

PROBE_S = 10.0
ACTIONS = ("start", "load", "send", "answer", "errand", "retire", "leave", "stale", "rest")


def change(roster: Roster, worker: Worker, action: str, now: float, number: int) -> None:
    """Do ``action`` to ``worker`` where its state allows it."""
    roster.touch(worker)
    if action == "start" and worker.state in COMING:
        worker.started()
    elif action == "load" and worker.state is S.STALE:
        worker.loaded(1, 1)
    elif action == "send" and worker.state is S.READY:
        worker.calls[number] = now
        worker.last_sent = number
    elif action == "answer" and worker.calls:
        worker.calls.pop(next(iter(worker.calls)))
        worker.last_heard = now
    elif action == "errand":
        worker.errand = None if worker.errand else "probe"
    elif action == "retire" and worker.state is not S.RETIRED:
        worker.move(S.RETIRED)
    elif action == "stale" and worker.state is S.READY:
        worker.move(S.STALE)
    elif action == "leave":
        roster.remove(worker)
    elif action == "rest":
        roster.resting = not roster.resting


def due_at(roster: Roster, worker: Worker) -> float | None:
    """When a look at every worker would find this one due."""
    if worker.errand is not None or (worker.state in COMING and roster.resting):
        return None
    if worker.state in COMING:
        return worker.not_before
    waits = worker.state is S.READY or (roster.resting and worker.state is S.STALE)
    return worker.last_heard + PROBE_S if waits and not worker.calls else None


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from(ACTIONS), st.sampled_from([0.0, 0.5, 6.0])), max_size=80))
def test_the_indices_agree_with_a_look_at_every_worker(history: list[tuple[int, str, float]]) -> None:
    roster, now = Roster(max_inflight=2, probe_every_s=PROBE_S), 0.0
    for slot in range(5):
        worker = Worker("p", slot)
        worker.not_before = float(slot)
        roster.add(worker)
    looked_at: set[Worker] = set()  # due, and nothing was done about it: no second look without a change
    for number, (slot, action, later) in enumerate(history, 1):
        now += later
        worker = next((w for w in roster.workers if w.slot == slot), None)
        if worker is not None:
            change(roster, worker, action, now, number)
        overdue = {w for w in roster.workers if (due := due_at(roster, w)) is not None and due <= now}
        found = roster.due(now)
        assert overdue - looked_at <= set(found), "whoever is due is looked at, once"
        looked_at = overdue
        for one in found:
            roster.settle(one)
        assert roster.alive == sum(w.state in ALIVE for w in roster.workers)
        assert roster.busy == sum(w.state in ALIVE and bool(w.calls) for w in roster.workers)
        free = [w for w in roster.workers if w.state is S.READY and w.errand is None and len(w.calls) < 2]
        assert roster.free == len(free)
        taken = list(roster.take_free())
        assert taken == sorted(free, key=lambda w: (len(w.calls), w.last_sent, w.slot))
        for one in taken:
            roster.settle(one)
        times = [due for w in roster.workers if (due := due_at(roster, w)) is not None and due > now]
        woken = roster.wake_at()
        assert not times or (woken is not None and woken <= min(times)), "nobody is overlooked"
        assert all(roster.find(w.name) is w for w in roster.workers)
        for one in roster.workers:
            roster.settle(one)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["new", "take", "take2", "fail", "forget"]), max_size=80))
def test_the_queue_agrees_with_a_plain_list(history: list[str]) -> None:
    queue, plain, taken, made = Waiting(), [], [], 0
    for now, action in enumerate(history):
        if action == "new":
            ticket = Ticket(made, float(now))
            made += 1
            queue.append(ticket)
            plain.append(ticket)
        elif action.startswith("take"):
            size = 2 if action == "take2" else 1
            expected: list[Ticket] = []
            for ticket in plain:
                if ticket.avoid == "w" or (ticket.retries >= 2 and expected):
                    continue
                expected.append(ticket)
                if ticket.retries >= 2 or len(expected) == size:
                    break
            assert queue.take(size, "w", others=True) == expected
            plain = [t for t in plain if t not in expected]
            taken += expected
        elif action == "fail" and taken:
            ticket = taken.pop()
            ticket.retries, ticket.since = ticket.retries + 1, float(now)
            ticket.avoid = "w" if now % 2 else "v"
            queue.send_again(ticket)
            plain = sorted([*plain, ticket], key=lambda t: t.id)
        elif action == "forget" and plain:
            queue.discard(plain.pop(len(plain) // 2))
        assert len(queue) == len(plain)
        if plain:
            assert queue.oldest() == min(t.since for t in plain)
    assert queue.clear() == plain
