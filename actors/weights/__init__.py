"""Published weights on the move: through the object store, and to disk as ordinary adapter folders."""

from actors.weights.files import read_adapter, write_adapter
from actors.weights.transport import as_tensors, pack, receive, send

__all__ = ["as_tensors", "pack", "read_adapter", "receive", "send", "write_adapter"]
