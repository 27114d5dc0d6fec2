"""What runs inside Ray actors.

For: policies, engines, samplers, scorers, learners, pools, and the records that travel between them.
Not for: the order of a run, data, tracking (``pipeline``); pure scores (``rewards``); the cluster (``cluster``).
Begin with ``records``.
"""
