"""What the cluster looks like.

For: sessions, resources, placement, errors, files that put a run on a cluster.
Not for: models, data, MLflow.
Begin with ``session``.
"""
