"""The pools of a run and where they stand.

For: which pools there are, their workers, the models they load, what clips are conditioned on,
which pool answers for which reward.
Not for: what a pool is (``actors.pool``), changing sizes (``pipeline.control``).
Begin with ``open``.
"""
