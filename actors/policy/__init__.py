"""What a trainable policy is, whichever model it holds.

For: its protocol, its LoRA adapter, the cache of what frozen parts make.
Not for: one model's own ways (``actors.vlm``, ``actors.vdm``), training (``actors.learner``).
Begin with ``protocol``.
"""
