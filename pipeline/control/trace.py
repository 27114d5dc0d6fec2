"""``pools.jsonl`` in a run's folder: now and then a line with the point of each pool (``autoscale.PoolPoint``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TRACE_FILE = "pools.jsonl"


def read_trace(path: Path) -> list[dict[str, Any]]:
    """Return the lines of the file: ``time`` in seconds since 1970, ``pools`` by name. A last line that was cut short is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines
