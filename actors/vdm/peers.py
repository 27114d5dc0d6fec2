"""The other processes of a sampler whose clips lie on several GPUs (``pools.vdm.context_parallel``).

The pool knows one Ray actor, which reserved all the GPUs. It leads: it starts the others, its peers, on its own machine, and has
them do with their part of a clip's tokens what it does with its own. They end together. A peer that ends takes the leader along, so
that the pool replaces the whole worker; a peer notices at once that its leader is gone, however that ended.

Responsible for processes, for what travels to them and for their end. What they do is ``served``'s.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from typing import TYPE_CHECKING, Any

from actors.failures import Failure, InfrastructureError, Ok, Outcome, attempt

if TYPE_CHECKING:  # it loads torch and diffusers, which a peer does while its leader does
    from actors.vdm.served import Served

GRACE_S = 3.0
"""How long a process that failed leaves its peers to say what failed there, before its own end ends them."""


class Peers:
    """The processes beside the leader's. One thread at a time uses them."""

    def __init__(self, who: str, count: int, threads: int | None, served: Mapping[str, Any]) -> None:
        """Start ``count`` of them. ``served``: arguments of ``Served`` beside its name and its rank; ``who`` is the leader."""
        self._who, self._broken = who, ""
        self._processes: list[Any] = []
        self._lines: list[Connection] = []
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        for rank in range(1, count + 1):
            line, theirs = context.Pipe()
            process = context.Process(
                target=_peer, args=(theirs, f"{who}, peer {rank}", rank, threads, dict(served)), daemon=True
            )
            process.start()
            theirs.close()  # so that the line ends with the peer
            self._processes.append(process)
            self._lines.append(line)
        self._over = threading.Event()
        atexit.register(self._over.set)  # Python ends them with this process
        threading.Thread(target=self._watch, name=f"{who}-peers", daemon=True).start()

    def check(self) -> None:
        """Raise InfrastructureError where they can no longer be used."""
        if self._broken:
            raise InfrastructureError(self._broken)

    def pids(self) -> list[int]:
        """Return their process ids."""
        return [process.pid for process in self._processes]

    @contextmanager
    def doing(self, method: str, *arguments: Any, timeout_s: float) -> Iterator[None]:
        """Have each call ``Served.method(*arguments)`` while the leader does its own part within the block.

        Raises what the block raises; InfrastructureError where a peer has ended, failed for a reason of its machine, or not done its
        part within ``timeout_s`` of the block's end; RuntimeError where one failed otherwise. After any of these the peers are
        ended: they may stand in the midst of an exchange.
        """
        self.check()
        try:
            for line in self._lines:
                line.send((method, arguments))
            yield
        except Exception as error:
            lost = next((found for found in self._failures(GRACE_S) if found.kind == "infrastructure"), None)
            self._break(f"{self._who}: {method} failed: {error}")
            if lost is not None:
                raise InfrastructureError(lost.message) from error
            raise
        self.wait(timeout_s)

    def wait(self, timeout_s: float) -> None:
        """Wait until each has done what it was asked last, which at first is to load its policy; raises as :meth:`doing`."""
        failures = self._failures(timeout_s, silent=True)
        if failures:
            first = failures[0]
            self._break(first.message)
            raise (InfrastructureError if first.kind == "infrastructure" else RuntimeError)(
                "\n".join([first.message, first.traceback])
            )

    def close(self) -> None:
        """End them; may be called again."""
        self._over.set()
        self._broken = self._broken or f"{self._who}: its peers were ended"
        for line in self._lines:
            line.close()
        deadline = time.monotonic() + GRACE_S
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():  # in an exchange that nobody answers any more
                process.kill()
                process.join()

    def _failures(self, timeout_s: float, silent: bool = False) -> list[Failure]:
        """Return what the peers failed by, of those that answer within ``timeout_s``; with ``silent`` the others failed too."""
        deadline, found = time.monotonic() + timeout_s, []
        for rank, line in enumerate(self._lines, 1):
            who = f"{self._who}, peer {rank}"
            try:
                if line.poll(max(0.0, deadline - time.monotonic())):
                    answer = line.recv()
                    if isinstance(answer, Failure):
                        found.append(replace(answer, message=f"{who}: {answer.message}"))
                elif silent:
                    found.append(Failure("infrastructure", f"{who} has not done its part within {timeout_s:g} s"))
            except (EOFError, OSError):
                found.append(Failure("infrastructure", f"{who} has ended"))
        return found

    def _break(self, reason: str) -> None:
        self._broken = reason
        for process in self._processes:
            process.kill()
        self.close()

    def _watch(self) -> None:
        """End this process when a peer has ended unasked: its leader may wait for it in an exchange, for ever."""
        ended = wait_for([process.sentinel for process in self._processes])
        if not self._over.wait(GRACE_S):
            ranks = [k for k, process in enumerate(self._processes, 1) if process.sentinel in ended]
            print(f"{self._who}: its peer {ranks[0]} has ended; the worker ends with it", file=sys.stderr, flush=True)
            os._exit(1)


def _peer(line: Connection, who: str, rank: int, threads: int | None, served: dict[str, Any]) -> None:
    """Be a peer until the leader closes ``line`` or is gone."""
    threading.Thread(target=_end_with_leader, daemon=True).start()

    def load() -> Served:
        import torch

        from actors.vdm.served import Served

        if threads is not None:
            torch.set_num_threads(threads)
        found = Served(who, rank=rank, **served)
        found.load()
        return found

    policy: Served = _done(line, attempt(load))
    while True:
        try:
            method, arguments = line.recv()
        except EOFError:
            os._exit(0)  # at once: the leader waits, and there is nothing to clean up
        _done(line, attempt(lambda call=getattr(policy, method), given=arguments: call(*given)))  # type: ignore[misc]


def _done(line: Connection, outcome: Outcome) -> Any:
    """Tell the leader how it went, and return the value; after a failure end: in an exchange others wait for this process, for ever."""
    if isinstance(outcome, Ok):
        line.send(Ok(None))
        return outcome.value
    line.send(outcome)
    time.sleep(GRACE_S)  # a leader that failed likewise tells its own reason
    os._exit(1)


def _end_with_leader() -> None:
    leader = multiprocessing.parent_process()
    assert leader is not None
    wait_for([leader.sentinel])
    os._exit(1)
