"""Published weights on the move: through the object store, and to disk as ordinary folders."""

from actors.weights.files import read_adapter, read_model, read_weights, write_adapter
from actors.weights.transport import as_tensors, pack, receive, send

__all__ = ["as_tensors", "pack", "read_adapter", "read_model", "read_weights", "receive", "send", "write_adapter"]
