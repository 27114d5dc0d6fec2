"""One process at a time writes into a run's folder, and into a mirror: who holds it (``owner``), where that is noted (``slots``),
how it is taken, kept and given back (``holding``).

It is no protection against a person who wants to break it. It keeps two runs from mixing their checkpoints.
"""

from pipeline.lock.holding import InUseError, Lock, LockLostError, held, hold, hold_all, require_token
from pipeline.lock.slots import LOCK

__all__ = ["LOCK", "InUseError", "Lock", "LockLostError", "held", "hold", "hold_all", "require_token"]
