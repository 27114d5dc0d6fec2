"""All that is LTX-Video's.

For: what its models cost, how they are called.
Not for: files, sampling and learning, which are every family's.
Begin with ``family``.
"""
