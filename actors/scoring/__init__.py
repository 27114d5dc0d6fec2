"""Scores of answers, inside an actor.

For: CLIP features, components by name, rewards with models of their own and their contract, the workers of both.
Not for: formulas (``rewards``), advantages (``pipeline.stages``).
Begin with ``scorer``.
"""
