"""Commands that are more than a call.

For: ``vans answer``, ``demo``, ``doctor``, ``manifests`` and ``serve``.
Not for: arguments and their help (``pipeline.cli``).
Begin with ``answer``.
"""
