"""Scores of answers, inside an actor.

For: CLIP features, components by name, the reward worker.
Not for: formulas (``rewards``), advantages (``pipeline.stages``).
Begin with ``scorer``.
"""
