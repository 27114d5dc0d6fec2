"""Other people's videos, brought into the dataset format.

For: VANS CSVs, JSONL manifests, cuts of long videos.
Not for: reading shards (``pipeline.data.source``).
Begin with ``importing``.
"""
