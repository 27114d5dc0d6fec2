"""FSDP2 learner groups: gradients, optimizer, checkpoints, publication.

For: one trainer for both models, its ranks as actors, adapters on disk, supervised steps.
Not for: what is learnt (``objectives``), what a model is (``actors.policy``).
Begin with ``trainer``.
"""
