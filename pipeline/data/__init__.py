"""Datasets: Parquet shards of videos, questions and answers.

For: schema, writing, decoding, limits, the Ray Data source, contact sheets.
Not for: importing what others have (``importers``), the toy world (``toy``).
Begin with ``schema``.
"""
