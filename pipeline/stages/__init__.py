"""The two stages of Joint-GRPO.

For: drawing samples, one coroutine for each group, advantages, the step, alarms.
Not for: learning (``actors.learner``), checkpoints and restarts (``pipeline.run``).
Begin with ``loop``.
"""
