"""The one error that scoring functions raise on purpose."""

from __future__ import annotations


class RewardError(ValueError):
    """A score that cannot be computed from what was given; the message says which, and what would be right."""
