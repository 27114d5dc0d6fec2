"""What ``make test-fast`` runs starts no Ray: the rule, held against the text of the files."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
STARTS = re.compile(
    r"\bray\.init\(|\bstart_ray\(\)|\bconnect\(local_cpus|"
    r"\b(ray_local|ray_alone|qwen3_worker|qwen25_worker)\b"
)


def test_a_file_whose_text_starts_ray_says_so() -> None:
    silent = []
    for path in sorted(TESTS.rglob("test_*.py")):
        text = path.read_text()
        if not path.name.endswith("_ray.py") and STARTS.search(text) and "mark.ray" not in text:
            silent.append(str(path.relative_to(TESTS)))
    assert silent == []
