"""The worker's state machine: the way into READY leads through the current weights, and there is no other."""

from __future__ import annotations

from itertools import pairwise

import pytest

from actors.pool.state import TRANSITIONS, IllegalTransition, S, Worker, WorkerState


def paths_to_ready(start: WorkerState) -> list[list[WorkerState]]:
    """All simple paths from ``start`` to READY."""
    found, open_paths = [], [[start]]
    while open_paths:
        path = open_paths.pop()
        for state in TRANSITIONS[path[-1]]:
            if state is S.READY:
                found.append([*path, state])
            elif state not in path:
                open_paths.append([*path, state])
    return found


@pytest.mark.parametrize("start", [state for state in WorkerState if state not in (S.READY, S.RETIRED)])
def test_every_way_to_ready_ends_with_stale(start: WorkerState) -> None:
    paths = paths_to_ready(start)
    assert paths and all(path[-2] is S.STALE for path in paths)


def test_a_retired_worker_stays_retired() -> None:
    assert not TRANSITIONS[S.RETIRED]


@pytest.mark.parametrize("state", [S.STARTING, S.DEAD, S.RESTARTING, S.SUSPECT, S.RETIRED])
def test_no_direct_transition_into_service(state: WorkerState) -> None:
    worker = Worker("vdm", 0, state=state)
    with pytest.raises(IllegalTransition, match=f"vdm-0: {state} → ready"):
        worker.move(S.READY)
    assert worker.state is state


def test_life_of_a_worker_that_dies_once() -> None:
    worker = Worker("vdm", 2)
    seen = [worker.state]
    worker.started()
    seen.append(worker.state)
    worker.loaded(4, current=5)  # weights moved on while it loaded
    assert worker.state is S.STALE and worker.version == 4
    worker.loaded(5, current=5)
    seen.append(worker.state)
    for state in (S.SUSPECT, S.DEAD):
        worker.move(state)
        seen.append(state)
    worker.restart(not_before=3.0)
    seen.append(worker.state)
    assert worker.version is None and worker.name == "vdm-2.2"  # a new process, whose weights are unknown
    worker.started()
    seen.append(worker.state)
    assert seen == [S.STARTING, S.STALE, S.READY, S.SUSPECT, S.DEAD, S.RESTARTING, S.STALE]
    assert all(b in TRANSITIONS[a] for a, b in pairwise(seen))


def test_a_new_process_starts_clean() -> None:
    """What the old process did, and what was asked of it, is not the new one's."""
    worker = Worker("vdm", 0)
    worker.started()
    worker.loaded(3, current=3)
    worker.errand, worker.side_calls, worker.strikes, worker.requests_done, worker.placed = "probe", 2, 2, 9, True
    worker.move(S.DEAD)
    worker.restart(not_before=7.5)
    assert (worker.state, worker.incarnation, worker.version, worker.not_before) == (S.RESTARTING, 2, None, 7.5)
    assert (worker.errand, worker.side_calls, worker.strikes, worker.requests_done) == (None, 0, 0, 0)
    assert not worker.placed and not worker.seen


def test_a_process_that_has_started_is_there_and_its_weights_are_not_trusted() -> None:
    worker = Worker("vdm", 0, version=4)
    worker.started()
    assert worker.placed and worker.seen and worker.version is None and worker.state is S.STALE


def test_serving_forgives_failed_starts_and_old_weights_do_not() -> None:
    worker = Worker("vdm", 0, failed_starts=3)
    worker.started()
    worker.loaded(1, current=2)
    assert worker.failed_starts == 3
    worker.loaded(2, current=2)
    assert worker.state is S.READY and worker.failed_starts == 0


def test_weights_of_any_other_version_do_not_serve() -> None:
    """Not older ones, and not newer ones either: what is current is the pool's word."""
    worker = Worker("vdm", 0)
    worker.started()
    for version in (4, 6):
        worker.loaded(version, current=5)
        assert worker.state is S.STALE and worker.version == version
