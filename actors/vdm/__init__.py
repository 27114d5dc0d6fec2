"""The artist: a video diffusion model that draws and learns.

For: sampling by ODE or SDE, trajectories, log-probabilities, its worker.
Not for: what is one family's own (``wan``), what is learnt (``actors.learner.objectives``).
Begin with ``policy``.
"""
