"""What commands need and Joint-GRPO does not.

For: the terminal, progress, signals, harmless text, paths and stores.
Not for: anything of models or learning.
Begin with ``terminal``.
"""
