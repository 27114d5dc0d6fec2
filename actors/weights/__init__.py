"""Published weights on the move.

For: the object store, broadcast, ordinary folders on disk.
Not for: when they are published (``pipeline.stages``).
Begin with ``transport``.
"""
