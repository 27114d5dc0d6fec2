"""Tracking in MLflow, by the driver alone.

For: the tracker, every metric's name and meaning, the outbox that never blocks, stored rollouts, profiles.
Not for: deciding anything.
Begin with ``tracker``.
"""

from pipeline.tracking.also import TrackingError
from pipeline.tracking.tracker import Tracker, has_store

__all__ = ["Tracker", "TrackingError", "has_store"]
