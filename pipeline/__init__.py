"""The story of a run.

For: configuration, data, the two stages, evaluation, tracking, checkpoints, the command line.
Not for: what runs in actors (``actors``), scores (``rewards``).
Begin with ``run.train``.
"""

import sys
from pathlib import Path

_ROOT = str(Path(__file__).resolve().parent.parent)

sys.path.insert(0, _ROOT)  # for this one import: the working directory may have a cluster.py
from cluster.packages import preference  # noqa: E402

sys.path.remove(_ROOT)
preference(_ROOT)()
