"""Tensors moved from their device to host memory and back, in place: whoever holds them (a module, FSDP2, an optimizer) keeps its
references, and notices nothing as long as it does not compute meanwhile.

It works on storages, so that views stay views: the bytes are copied out and the storage is freed, and later it is given room and
its bytes again, exactly. On a CPU it does the same, which saves nothing but is the same code.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Offloader:
    """Holds the bytes of the tensors that it was given last. ``device``: tensors elsewhere are left where they are."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[int, tuple[Any, Tensor]] = {}  # by storage: it, and its bytes in host memory
        self.away = False
        self._users = 0
        self._turn = threading.Condition()

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within it, the tensors are on their device; any number of threads may be within."""
        with self._turn:
            self.load()
            self._users += 1
        try:
            yield
        finally:
            with self._turn:
                self._users -= 1
                self._turn.notify_all()

    def rest(self, tensors: Callable[[], Iterable[Tensor]]) -> int:
        """Unload ``tensors()`` when nobody uses them any more; returns the bytes freed."""
        with self._turn:
            self._turn.wait_for(lambda: self._users == 0)
            return self.unload(tensors())

    def unload(self, tensors: Iterable[Tensor]) -> int:
        """Move ``tensors`` to host memory and free theirs; returns the bytes freed. They must not be touched until :meth:`load`."""
        if self.away:
            return 0
        held: dict[int, tuple[Any, Tensor]] = {}
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            storage = local.detach().untyped_storage()
            key = storage._cdata
            # A file that is mapped into memory, say, has a storage that cannot be freed.
            if local.device.type != self._device.type or key in held or not storage.resizable() or not storage.nbytes():
                continue
            before = self._held.get(key)
            host = before[1] if before is not None and before[1].numel() == storage.nbytes() else self._room(storage)
            host.copy_(_bytes(storage))
            held[key] = (storage, host)
        self._wait()
        freed = 0
        for storage, host in held.values():
            storage.resize_(0)
            freed += host.numel()
        self._held, self.away = held, True
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # torch would keep it for itself; it is another process that needs it
        return freed

    def load(self) -> None:
        """Give every tensor its memory and its bytes again; without an :meth:`unload` before it does nothing."""
        if not self.away:
            return
        for storage, host in self._held.values():
            storage.resize_(host.numel())
            _bytes(storage).copy_(host, non_blocking=True)
        self._wait()
        self.away = False

    def _room(self, storage: Any) -> Tensor:
        return torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=self._device.type == "cuda")

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def module_tensors(*modules: nn.Module | None) -> list[Tensor]:
    """Return all parameters and buffers of ``modules``; None among them is left out."""
    return [t for module in modules if module is not None for t in (*module.parameters(), *module.buffers())]


def _bytes(storage: Any) -> Tensor:
    """Return ``storage`` as a uint8 tensor."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
