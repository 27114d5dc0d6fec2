"""From raw video to the shards of a VNEP dataset: recipes, their stages, the gates, and the models that are asked.

Responsible for: ``vans data build``. Not responsible for what a shard is (``pipeline.data.schema``), nor for files that already
hold questions and captions (``pipeline.data.importers``).
"""
