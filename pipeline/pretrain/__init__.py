"""The tiny pair: architectures small enough for two CPU cores, and their pretraining on the toy world."""

from .run import Effort, pretrain

__all__ = ["Effort", "pretrain"]
