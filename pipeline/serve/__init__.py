"""Answers for people over HTTP: both models loaded once, on Ray Serve.

For: the replicas of the two models, the API in front of them, what is kept of answers.
Not for: what the models are asked about a video (``pipeline.stages.question``), arguments (``pipeline.commands.serve``).
Begin with ``app``.
"""
