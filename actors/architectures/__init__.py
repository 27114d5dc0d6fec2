"""Models' shapes without their weights.

For: what a name or a folder would load, how many parameters it has, what a shape costs.
Not for: loading weights (``actors.loading``), plans (``pipeline.plan``).
Begin with ``architecture``.
"""

from actors.architectures.architecture import Architecture, Role, architecture, known

__all__ = ["Architecture", "Role", "architecture", "known"]
