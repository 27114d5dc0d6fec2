"""Checkpoints that are whole or not there.

For: what a run needs to go on (``state``), what it learns from (``inputs``), folders, their mirror in a store.
Not for: tensors (``actors.learner.checkpoint``).
Begin with ``store``.
"""

from pipeline.checkpoint.failures import WriteFailures
from pipeline.checkpoint.inputs import DataFacts, Inputs, compare_inputs, model_digests
from pipeline.checkpoint.mirror import Mirror, newest_of_both
from pipeline.checkpoint.state import TrainState, free_besides, require_same_config
from pipeline.checkpoint.store import Checkpoint, CheckpointStore
from pipeline.checkpoint.uploads import Uploads, uploads_to

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "DataFacts",
    "Inputs",
    "Mirror",
    "TrainState",
    "Uploads",
    "WriteFailures",
    "compare_inputs",
    "free_besides",
    "model_digests",
    "newest_of_both",
    "require_same_config",
    "uploads_to",
]
