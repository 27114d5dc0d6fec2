"""Tracking in MLflow, by the driver alone: :class:`Tracker` is what the pipeline uses, ``metrics`` declares every name."""

from pipeline.tracking.store import TrackingError
from pipeline.tracking.tracker import Tracker

__all__ = ["Tracker", "TrackingError"]
