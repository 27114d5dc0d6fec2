"""Tracking in MLflow, by the driver alone: :class:`Tracker` is what the pipeline uses, ``metrics`` declares every name."""

from pipeline.tracking.store import TrackingError
from pipeline.tracking.tracker import Tracker, has_store

__all__ = ["Tracker", "TrackingError", "has_store"]
