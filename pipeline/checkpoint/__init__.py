"""Checkpoints: what a run needs to go on (``state``), in folders that are whole or absent (``store``)."""

from pipeline.checkpoint.failures import WriteFailures
from pipeline.checkpoint.state import TrainState, require_same_config
from pipeline.checkpoint.store import Checkpoint, CheckpointStore

__all__ = ["Checkpoint", "CheckpointStore", "TrainState", "WriteFailures", "require_same_config"]
