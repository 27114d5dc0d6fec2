"""Checkpoints: what a run needs to go on (``state``), in folders that are whole or absent (``store``), copied to a ``mirror``."""

from pipeline.checkpoint.failures import WriteFailures
from pipeline.checkpoint.mirror import Mirror, newest_of_both
from pipeline.checkpoint.state import TrainState, require_same_config
from pipeline.checkpoint.store import Checkpoint, CheckpointStore
from pipeline.checkpoint.uploads import Uploads, uploads_to

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "Mirror",
    "TrainState",
    "Uploads",
    "WriteFailures",
    "newest_of_both",
    "require_same_config",
    "uploads_to",
]
