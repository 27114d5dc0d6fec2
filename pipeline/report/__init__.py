"""A run's page: what it was, its curves, and every stored rollout to look at.

For: one static page (a folder or a single file) of what a run has left, also while it goes on; without server and network.
Not for: measuring, storing rollouts (``pipeline.tracking``), or deciding anything.
Begin with ``page``.
"""
