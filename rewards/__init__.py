"""Pure scoring functions: text, frames and features in, numbers out. No Ray, no models, no pipeline import.

A value that cannot be computed is an error (:class:`rewards.errors.RewardError`), never 0: a scorer's failure must
not look like a bad answer. See docs/rewards.md for every component.
"""
