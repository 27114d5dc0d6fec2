"""One elastic pool for all kinds of workers.

For: queue, batches, deadlines, retries, replacement, resizing, versions of weights.
Not for: what a worker does (``vlm``, ``vdm``, ``scoring``), where it stands (``cluster.resources``).
Begin with ``pool``.
"""
