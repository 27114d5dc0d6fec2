"""Ways to learn from scored trajectories: losses, their settings and their gates.

For: one small module for each, which the trainer asks and never names.
Not for: optimizers, gradients over ranks, models.
Begin with ``base``.
"""
