"""Held-out evaluation.

For: predictions of any system, their scores, figures with intervals, table and sheets.
Not for: rewards of training (``actors.scoring``).
Begin with ``evaluation``.
"""
