"""All that is Wan's.

For: its files and components, its text encoder.
Not for: sampling and learning, which are every family's.
Begin with ``files``.
"""
