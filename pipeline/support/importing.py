"""A user's own modules found from the command line, as Ray's workers find them."""

from __future__ import annotations

import os
import sys


def working_directory_importable() -> None:
    """Let modules of the working directory be imported, after everything else; a console script leaves it out."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
