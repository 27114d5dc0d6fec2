"""What the environment needs beyond ``pip install``.

For: the torchvision import hook for CPU machines, byte code of what is imported.
Not for: what runs.
Begin with ``torchvision_hook``.
"""

import sys
from pathlib import Path


def install_seconds() -> float | None:
    """Wall seconds that ``make setup`` took to fill the running environment; None where it was filled otherwise."""
    note = Path(sys.prefix) / "install_seconds"
    return float(note.read_text(encoding="utf-8")) if note.is_file() else None
