"""The shapes of models, without their weights: what a name or a folder would load, for plans and checks of size."""

from actors.architectures.architecture import COMPONENTS, Architecture, Role, architecture, known

__all__ = ["COMPONENTS", "Architecture", "Role", "architecture", "known"]
