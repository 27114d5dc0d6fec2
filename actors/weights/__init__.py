"""Published weights on the move.

For: the object store, broadcast, ordinary folders on disk.
Not for: when they are published (``pipeline.stages``).
Begin with ``transport``.
"""

from actors.weights.broadcast import Broadcast, BroadcastError, BroadcastSpec, Offer, receive_broadcast, snapshot
from actors.weights.files import read_adapter, read_model, read_weights, write_adapter
from actors.weights.transport import Delivery, as_tensors, fetch, offer_of, pack, receive, send

__all__ = [
    "Broadcast",
    "BroadcastError",
    "BroadcastSpec",
    "Delivery",
    "Offer",
    "as_tensors",
    "fetch",
    "offer_of",
    "pack",
    "read_adapter",
    "read_model",
    "read_weights",
    "receive",
    "receive_broadcast",
    "send",
    "snapshot",
    "write_adapter",
]
