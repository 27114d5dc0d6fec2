"""One process at a time writes into a run's folder, and into a mirror.

For: the owner, where that is noted, how it is taken, kept and given back.
Not for: protection against a person who wants to break it.
Begin with ``holding``.
"""

from pipeline.lock.holding import InUseError, Lock, LockLostError, held, hold, hold_all, require_token
from pipeline.lock.slots import LOCK

__all__ = ["LOCK", "InUseError", "Lock", "LockLostError", "held", "hold", "hold_all", "require_token"]
