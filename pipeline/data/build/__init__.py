"""From raw video to the shards of a VNEP dataset: recipes, their stages, the gates, and the models that are asked.

For: ``vans data build``. What goes through its stages is in ``video``; each stage is a class of a module here.
Not for: what a shard is (``pipeline.data.schema``), nor files that hold questions and captions already (``pipeline.data.importers``).
Begin with ``video``.
"""
