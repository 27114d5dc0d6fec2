"""Pure scoring functions.

For: text, frames and features in, numbers out (docs/rewards.md).
Not for: Ray, models; a value that cannot be computed is a RewardError, never 0.
Begin with ``combine``.
"""
