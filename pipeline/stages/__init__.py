"""The two stages of Joint-GRPO: ``loop`` is shared, ``stage1`` and ``stage2`` say how a group comes about and what is learnt."""
