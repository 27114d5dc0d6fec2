"""Full weights from the learner's rank 0 to many workers at once: a torch.distributed broadcast that never hangs.

Each publication makes a process group of its own out of whoever comes: gloo between CPUs, NCCL between GPUs. The learner
opens a rendezvous (:class:`Broadcast`), its address travels to the workers as an :class:`Offer`, and the offer closes when
all that were expected are there, or ``join_timeout_s`` after the first. Who comes later, or whose transfer fails because
another process died in the middle of it, gets a :class:`BroadcastError` within a deadline, and takes the same version from
the object store (``actors.weights.transport``). Workers may therefore start, die and leave at any time.

Bytes travel as they lie in memory, several tensors to a message, so they arrive exactly as they do through the object store.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from actors.records import Weights

log = logging.getLogger(__name__)
T = TypeVar("T")

BUCKET_BYTES = 256 << 20  # of one message; a larger tensor is a message of its own
_ALIGN = 16  # so that any dtype can be read where a tensor begins
_CLOSED = 1 << 32  # added to the count of those who joined: whoever counts beyond it has come too late
_CONNECT_S = 3.0  # a rendezvous that is over does not answer: no use in waiting for it


def snapshot(weights: Weights) -> Weights:
    """Return a copy of ``weights`` that shares no memory with anything."""
    return replace(weights, tensors={name: np.array(array) for name, array in weights.tensors.items()})


class BroadcastError(RuntimeError):
    """The weights did not arrive by broadcast; they can still be had from the object store."""


@dataclass(frozen=True)
class BroadcastSpec:
    """Deadlines of a broadcast in seconds: for the others to come after the first, and for the transfer itself."""

    join_timeout_s: float = 10.0
    transfer_timeout_s: float = 120.0
    bucket_bytes: int = BUCKET_BYTES

    def __post_init__(self) -> None:
        if min(self.join_timeout_s, self.transfer_timeout_s) <= 0 or self.bucket_bytes < 1:
            raise ValueError(
                f"join_timeout_s={self.join_timeout_s:g}, transfer_timeout_s={self.transfer_timeout_s:g} and "
                f"bucket_bytes={self.bucket_bytes} must be positive"
            )


@dataclass(frozen=True)
class Offer:
    """Where one version can be received; plain values, so that it also travels as a dict (``dataclasses.asdict``)."""

    version: int
    host: str
    port: int
    token: str
    """Tells this rendezvous from a later one at the same port."""
    backend: str
    """``gloo`` or ``nccl``."""
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    bucket_bytes: int
    join_timeout_s: float
    transfer_timeout_s: float


class Broadcast:
    """The sender's side: one version, offered until it has been sent once, or until :meth:`close`.

    A thread of its own waits for the receivers and sends; the learner's next work does not wait for it. ``host`` is the
    address of this process's node, ``receivers`` how many are expected, ``device`` the learner's.
    """

    def __init__(self, weights: Weights, host: str, receivers: int, spec: BroadcastSpec, device: torch.device) -> None:
        self.sent_to = 0
        """How many received it, once it has been sent."""
        if device.type != "cuda":  # there, arrays may share the memory of parameters that go on learning
            weights = snapshot(weights)
        self._weights, self._spec, self._receivers, self._device = weights, spec, receivers, device
        listener = socket.create_server((host, 0), backlog=max(128, receivers))  # on this address alone
        port = listener.getsockname()[1]
        self._store = dist.TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),  # the store closes it
            timeout=timedelta(seconds=spec.join_timeout_s),
        )
        names = list(weights.tensors)
        self.offer = Offer(
            version=weights.version,
            host=host,
            port=port,
            token=uuid.uuid4().hex,
            backend="nccl" if device.type == "cuda" else "gloo",
            names=names,
            dtypes=["bfloat16" if n in weights.bf16 else str(weights.tensors[n].dtype) for n in names],
            shapes=[list(weights.tensors[n].shape) for n in names],
            bucket_bytes=spec.bucket_bytes,
            join_timeout_s=spec.join_timeout_s,
            transfer_timeout_s=spec.transfer_timeout_s,
        )
        self._keys = dist.PrefixStore(self.offer.token, self._store)
        self._keys.set("open", b"1")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"broadcast-{weights.version}", daemon=True)
        self._thread.start()

    def close(self, timeout_s: float = 5.0) -> bool:
        """Close the offer; returns whether its thread has ended: one that hangs in a transfer is left behind."""
        self._over.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def wait(self, timeout_s: float) -> bool:
        """Wait until it has been sent, has failed or was closed; returns whether that has come."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            members = self._gather_members()
            if members:
                self._send(members)
                self.sent_to = members
        except Exception as error:  # noqa: BLE001 - the receivers have noticed too, and go to the object store
            log.warning("weights version %d were not broadcast to all: %s", self.offer.version, error)
        finally:
            del self._keys, self._store  # it listens no more: who comes now is refused at once
            self._weights = Weights(self.offer.version, "full", {})

    def _gather_members(self) -> int:
        """Wait for the receivers; returns how many have come."""
        deadline, present = float("inf"), 0
        while not self._over.is_set() and present < self._receivers and time.monotonic() < deadline:
            present = self._keys.add("joined", 0)
            if present and deadline == float("inf"):
                deadline = time.monotonic() + self._spec.join_timeout_s
            if present < self._receivers:
                self._over.wait(0.002 if present else 0.02)
        members = self._keys.add("joined", _CLOSED) - _CLOSED
        self._keys.set("members", str(members))
        return members

    def _send(self, members: int) -> None:
        offer = self.offer
        group = _Group(self._keys, 0, members + 1, offer, offer.host, self._device)
        try:
            for bucket in _buckets(offer):
                group.broadcast(_fill(bucket, self._weights, offer).to(group.device))
            # What was sent may still be on its way: who leaves a group takes its connections along.
            done = [f"done{rank}" for rank in range(1, members + 1)]
            while not self._keys.check(done):
                if group.left() <= 0 or self._over.wait(0.005):
                    raise BroadcastError("not every receiver has confirmed it")
        finally:
            group.close()


def receive_broadcast(offer: Offer, device: torch.device) -> Iterator[list[tuple[str, Tensor]]]:
    """Yield the offered tensors in batches, on ``device``; views of a buffer of their own, which nobody else uses.

    Raises:
        BroadcastError: too late, another process died, a deadline passed; what was yielded before is then worthless.
    """
    if offer.backend == "nccl" and device.type != "cuda":
        raise BroadcastError(f"version {offer.version} is offered to GPUs, and this process has none")
    address = _local_address(offer)
    try:
        store = dist.TCPStore(
            offer.host, offer.port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=_CONNECT_S)
        )
        keys = dist.PrefixStore(offer.token, store)
        if not keys.check(["open"]):
            raise BroadcastError(f"the offer of version {offer.version} is over")
        rank = keys.add("joined", 1)
        if rank > _CLOSED:
            raise BroadcastError(f"the offer of version {offer.version} is closed")
        keys.wait(["members"], timedelta(seconds=offer.join_timeout_s + _CONNECT_S))
        members = int(keys.get("members"))
    except BroadcastError:
        raise
    except Exception as error:
        raise BroadcastError(f"the rendezvous of version {offer.version} is lost: {error}") from error
    group = _Group(keys, rank, members + 1, offer, address, device)
    try:
        for bucket in _buckets(offer):
            size = bucket[-1].end
            data = group.broadcast(torch.empty(size, dtype=torch.uint8, device=group.device)).to(device)
            yield [(part.name, part.view(data)) for part in bucket]
        try:
            keys.set(f"done{rank}", b"1")
        except Exception as error:  # noqa: BLE001 - everything has arrived; the sender only waits in vain
            log.warning("the sender of version %d is gone after the transfer: %s", offer.version, error)
    finally:
        group.close()


class _Group:
    """A process group of the sender (rank 0) and its receivers, in which every step has a deadline.

    gloo keeps deadlines by itself. NCCL may hang while a communicator is made, whatever it is told, so every step runs in a
    thread that can be left behind; a process in which that has happened takes part in no further broadcast.
    """

    stuck = False  # of this process

    def __init__(self, keys: Any, rank: int, size: int, offer: Offer, address: str, device: torch.device) -> None:
        if _Group.stuck:
            raise BroadcastError("an earlier broadcast still hangs in this process")
        self.device = device if offer.backend == "nccl" else torch.device("cpu")
        self._deadline = time.monotonic() + offer.transfer_timeout_s
        self._version = offer.version
        joining = timedelta(seconds=min(offer.join_timeout_s, offer.transfer_timeout_s))
        make = _nccl if offer.backend == "nccl" else _gloo
        self._group: Any = self.within(lambda: make(dist.PrefixStore("group", keys), rank, size, address, joining))

    def left(self) -> float:
        """Return the seconds that are left for the transfer."""
        return self._deadline - time.monotonic()

    def broadcast(self, data: Tensor) -> Tensor:
        """Send ``data`` (rank 0) or fill it (the others); uint8, on the group's device. Returns it."""

        def work() -> None:
            if data.device.type == "cuda":
                torch.cuda.set_device(data.device)
            options = dist.BroadcastOptions()
            options.rootRank, options.timeout = 0, timedelta(seconds=max(self.left(), 0.001))
            self._group.broadcast([data], options).wait(options.timeout)
            if data.device.type == "cuda":
                torch.cuda.synchronize(data.device)

        self.within(work)
        return data

    def within(self, step: Callable[[], T]) -> T:
        """Return what ``step`` returns; BroadcastError where it fails or the deadline passes."""
        done: list[T] = []
        failed: list[BaseException] = []

        def run() -> None:
            try:
                done.append(step())
            except BaseException as error:  # noqa: BLE001 - raised below
                failed.append(error)

        thread = threading.Thread(target=run, name="broadcast-step", daemon=True)
        thread.start()
        thread.join(max(self.left(), 0.0) + 1.0)  # the step's own deadline comes first, where it has one
        if failed:
            raise BroadcastError(f"the broadcast of version {self._version} failed: {failed[0]}") from failed[0]
        if not done:
            _Group.stuck = True
            raise BroadcastError(f"the broadcast of version {self._version} hangs")
        return done[0]

    def close(self) -> None:
        """Leave the group; whoever still waits for this process learns of it."""
        group, self._group = self._group, None
        if group is not None and not _Group.stuck:
            group.abort()


def _gloo(store: Any, rank: int, size: int, address: str, timeout: timedelta) -> Any:
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, size, options)


def _nccl(store: Any, rank: int, size: int, address: str, timeout: timedelta) -> Any:
    # By default a watchdog ends the process when a peer dies. With this, read while the group is made, there is none: wait()
    # raises instead (torch, ProcessGroupNCCL.cpp).
    before = os.environ.get("TORCH_NCCL_BLOCKING_WAIT")
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    try:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, options)
    finally:
        if before is None:
            del os.environ["TORCH_NCCL_BLOCKING_WAIT"]
        else:
            os.environ["TORCH_NCCL_BLOCKING_WAIT"] = before


def _local_address(offer: Offer) -> str:
    """Return the address of this machine from which it reaches the sender; BroadcastError where it does not."""
    try:
        with socket.create_connection((offer.host, offer.port), timeout=_CONNECT_S) as probe:
            return str(probe.getsockname()[0])
    except OSError as error:
        raise BroadcastError(f"the offer of version {offer.version} is over: {error}") from error


@dataclass(frozen=True)
class _Part:
    """Where a tensor lies in its message, in bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    def view(self, data: Tensor) -> Tensor:
        """Return the tensor as a view of its message."""
        return data[self.start : self.end].view(self.dtype).view(self.shape)


def _buckets(offer: Offer) -> list[Sequence[_Part]]:
    """Return the messages of ``offer``; a function of it alone, so that all sides cut alike."""
    buckets: list[list[_Part]] = [[]]
    for name, kind, shape in zip(offer.names, offer.dtypes, offer.shapes, strict=True):
        dtype = getattr(torch, kind)
        size = dtype.itemsize
        for length in shape:
            size *= length
        start = buckets[-1][-1].end if buckets[-1] else 0
        start += -start % _ALIGN
        if buckets[-1] and start + size > offer.bucket_bytes:
            buckets.append([])
            start = 0
        buckets[-1].append(_Part(name, dtype, tuple(shape), start, start + size))
    return [bucket for bucket in buckets if bucket]


def _fill(bucket: Sequence[_Part], weights: Weights, offer: Offer) -> Tensor:
    """Return the message's bytes."""
    data = torch.zeros(bucket[-1].end, dtype=torch.uint8)
    for part in bucket:
        array = weights.tensors[part.name]
        value = torch.from_numpy(array)
        part.view(data).copy_(value.view(torch.bfloat16) if part.name in weights.bf16 else value)
    return data
