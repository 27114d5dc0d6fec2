"""A broadcast between processes: bitwise what was sent, and never a hang, whoever dies, comes late or stays away."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from actors.records import Weights
from actors.weights.broadcast import Broadcast, BroadcastError, BroadcastSpec, Offer, receive_broadcast
from actors.weights.transport import as_tensors, pack

CPU = torch.device("cpu")
SPEC = BroadcastSpec(join_timeout_s=2.0, transfer_timeout_s=10.0, bucket_bytes=1 << 20)
Process = tuple[Any, Connection]


def some_weights(version: int = 3, megabytes: int = 4) -> Weights:
    generator = torch.Generator().manual_seed(version)
    tensors = {
        "scalar": torch.tensor(1.5),
        "odd.bytes": torch.randint(0, 255, (7,), dtype=torch.uint8, generator=generator),
        "half": torch.randn(3, 5, generator=generator).to(torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "large": torch.randn(megabytes, 1 << 18, generator=generator),  # more than a message
        "not.contiguous": torch.randn(6, 4, generator=generator).T,
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    return pack(version, "full", tensors)


def digest(tensors: dict[str, torch.Tensor]) -> str:
    result = hashlib.sha256()
    for name, tensor in tensors.items():
        result.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        result.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return result.hexdigest()


def _receiver(pipe: Connection, pause_after: int | None) -> None:
    """Receive each offer that comes through ``pipe`` and answer with a digest, or with an error's text."""
    torch.set_num_threads(1)
    pipe.send("ready")
    while True:
        offer: Offer = pipe.recv()
        tensors: dict[str, torch.Tensor] = {}
        try:
            for count, batch in enumerate(receive_broadcast(offer, CPU)):
                tensors.update(batch)
                if count == pause_after:
                    pipe.send("in the middle")
                    time.sleep(60)
            pipe.send(digest(tensors))
        except BroadcastError as error:
            pipe.send(f"failed: {error}")


@pytest.fixture(scope="module")
def context() -> Any:
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch", "torch.distributed", "actors.weights"])
    return server


def start(context: Any, pause_after: int | None = None) -> Process:
    ours, theirs = context.Pipe()
    process = context.Process(target=_receiver, args=(theirs, pause_after), daemon=True)
    process.start()
    return process, ours


@pytest.fixture(scope="module")
def receivers(context: Any) -> Iterator[list[Process]]:
    started = [start(context) for _ in range(2)]
    for _, pipe in started:
        assert answer(pipe, 60) == "ready"
    yield started
    for process, _ in started:
        process.kill()


def answer(pipe: Connection, timeout_s: float) -> str:
    assert pipe.poll(timeout_s), f"no answer within {timeout_s} s"
    return pipe.recv()


def test_all_receivers_get_exactly_what_was_sent(receivers: list[Process]) -> None:
    weights = some_weights()
    for _ in range(2):  # each version has a group of its own
        broadcast = Broadcast(weights, "127.0.0.1", 2, SPEC, CPU)
        for _, pipe in receivers:
            pipe.send(broadcast.offer)
        assert [answer(pipe, 10) for _, pipe in receivers] == [digest(as_tensors(weights))] * 2
        assert broadcast.wait(5) and broadcast.sent_to == 2


def test_what_is_sent_is_a_snapshot(receivers: list[Process]) -> None:
    parameter = torch.randn(8, 8)
    weights = pack(1, "full", {"w": parameter})
    before = digest(as_tensors(weights))
    broadcast = Broadcast(weights, "127.0.0.1", 1, SPEC, CPU)
    parameter.add_(1.0)  # the learner goes on
    assert digest(as_tensors(weights)) != before  # on a CPU a published array is the parameter's memory
    receivers[0][1].send(broadcast.offer)
    assert answer(receivers[0][1], 10) == before


def test_an_offer_closes_and_does_not_wait_for_those_who_stay_away(receivers: list[Process]) -> None:
    broadcast = Broadcast(some_weights(), "127.0.0.1", 3, SPEC, CPU)  # three expected, two come
    for _, pipe in receivers:
        pipe.send(broadcast.offer)
    started = time.monotonic()
    assert [answer(pipe, 10) for _, pipe in receivers] == [digest(as_tensors(some_weights()))] * 2
    assert SPEC.join_timeout_s - 0.5 < time.monotonic() - started < SPEC.join_timeout_s + 4
    assert broadcast.wait(5) and broadcast.sent_to == 2
    receivers[0][1].send(broadcast.offer)  # too late
    assert "is over" in answer(receivers[0][1], 5)


def test_an_offer_that_nobody_takes_ends_when_it_is_closed(receivers: list[Process]) -> None:
    broadcast = Broadcast(some_weights(), "127.0.0.1", 2, SPEC, CPU)
    assert not broadcast.wait(0.2)
    assert broadcast.close() and broadcast.sent_to == 0
    receivers[0][1].send(broadcast.offer)
    assert "is over" in answer(receivers[0][1], 5)


def test_a_receiver_killed_in_the_middle_holds_up_nobody(context: Any, receivers: list[Process]) -> None:
    victim, pipe = start(context, pause_after=0)
    assert answer(pipe, 60) == "ready"
    broadcast = Broadcast(some_weights(megabytes=64), "127.0.0.1", 3, SPEC, CPU)
    for _, other in (*receivers, (victim, pipe)):
        other.send(broadcast.offer)
    assert answer(pipe, 10) == "in the middle"
    started = time.monotonic()
    os.kill(victim.pid, signal.SIGKILL)
    told = [answer(other, 15) for _, other in receivers]
    # Who has everything may use it; who has not is told, and goes to the object store.
    assert all(text == digest(as_tensors(some_weights(megabytes=64))) or text.startswith("failed: ") for text in told)
    assert broadcast.wait(15)
    assert time.monotonic() - started < SPEC.transfer_timeout_s + 5
    again = Broadcast(some_weights(), "127.0.0.1", 2, SPEC, CPU)  # the others take part in the next one
    for _, other in receivers:
        other.send(again.offer)
    assert [answer(other, 10) for _, other in receivers] == [digest(as_tensors(some_weights()))] * 2


def test_a_receiver_killed_before_the_group_is_made_holds_up_nobody(receivers: list[Process]) -> None:
    broadcast = Broadcast(some_weights(), "127.0.0.1", 2, SPEC, CPU)
    keys = torch.distributed.PrefixStore(
        broadcast.offer.token, torch.distributed.TCPStore("127.0.0.1", broadcast.offer.port, wait_for_workers=False)
    )
    assert keys.add("joined", 1) == 1  # joins, and is never heard of again
    receivers[0][1].send(broadcast.offer)
    started = time.monotonic()
    assert answer(receivers[0][1], 15).startswith("failed: ")
    assert time.monotonic() - started < 2 * SPEC.join_timeout_s + 3 and broadcast.wait(5)


def test_a_sender_that_is_gone_is_noticed_at_once() -> None:
    broadcast = Broadcast(some_weights(), "127.0.0.1", 2, SPEC, CPU)
    errors: list[str] = []

    def receive() -> None:
        try:
            list(receive_broadcast(broadcast.offer, CPU))
        except BroadcastError as error:
            errors.append(str(error))

    broadcast.close()
    thread = threading.Thread(target=receive)
    thread.start()
    thread.join(5)
    assert errors and "is over" in errors[0]


def test_deadlines_must_be_positive() -> None:
    with pytest.raises(ValueError, match=r"join_timeout_s=0"):
        BroadcastSpec(join_timeout_s=0)
