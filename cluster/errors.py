"""Errors a person can act on.

Every error that this project raises on purpose derives from :class:`VansError`; its message says what was wrong, where, and
what would be right. The command line prints the message alone for these, and a traceback for everything else.
"""


class VansError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(VansError):
    """A configuration that cannot be run: unknown key, wrong type, contradictory settings."""


class DataError(VansError):
    """A dataset, video or manifest that cannot be used."""


class CheckpointError(VansError):
    """A checkpoint or model folder that is missing, damaged or of another run."""


class CheckpointWriteError(CheckpointError):
    """A checkpoint could not be written: the disk is full, a limit was reached, the device failed."""


class StorageError(VansError):
    """A store of data or checkpoints (S3, GCS, HDFS) that does not answer, or has no such bucket."""


class PlacementError(VansError):
    """The cluster has no room for what the configuration asks for."""


class WorkerTimeoutError(VansError):
    """An actor did not answer within its deadline; the message names the actor and what was asked of it."""


class TrainingError(VansError):
    """Training cannot go on: non-finite loss, ratio gate exceeded, too many quarantined samples."""
