"""``vans train``, from the configuration to two tuned models.

For: the order of a run, where it begins, what follows each step, checkpoints, restarts.
Not for: what a stage does (``pipeline.stages``), the pools (``pipeline.fleet``), what a checkpoint is (``pipeline.checkpoint``).
Begin with ``train``.
"""
