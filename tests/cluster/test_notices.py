"""What a person reads of Ray's notices: one line, the cure's place, and no dump."""

from __future__ import annotations

from cluster.notices import notice

LOGS = "/tmp/ray/session_1/logs"
LOST = (
    "The node with node id: db7ed4bf and address: 192.0.2.2 and node name: worker-2 has been marked dead because the detector has "
    "missed too many heartbeats from it. This can happen when a \t(1) raylet crashes unexpectedly (OOM, etc.) \n"
    "\t(2) raylet has lagging heartbeats due to slow network or busy workload."
)


def test_a_lost_node_is_named_with_the_folder_of_its_logs() -> None:
    assert notice(LOST, LOGS) == (
        "Ray has lost the node 192.0.2.2: its raylet has ended, or has not answered for too long. Why is in Ray's logs, "
        "/tmp/ray/session_1/logs on that node and on the head"
    )


def test_what_the_lost_node_and_the_pool_say_is_not_said_again() -> None:
    dump = "Raylet is terminated. Termination is unexpected. … Last 20 lines of the Raylet logs:\n    [state-dump] a\n"
    assert notice(dump, LOGS) is None
    assert notice("A worker died or was killed while executing a task by an unexpected system error.", LOGS) is None


def test_any_other_notice_is_one_short_line_that_cannot_move_the_cursor() -> None:
    line = notice("2 Workers killed due to\x1b[2J memory pressure\n" + "    [state-dump] x\n" * 400, LOGS)
    assert line is not None and line.startswith("Ray: 2 Workers killed due to\\x1b[2J memory pressure [state-dump] x")
    assert (
        "\n" not in line and len(line) < 400 and line.endswith("… (Ray's logs: /tmp/ray/session_1/logs on each node)")
    )
