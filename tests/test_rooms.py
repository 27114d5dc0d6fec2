"""Every package says what it is for, what it is not for and where to begin; docs/architecture.md shows the house as it stands."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = sorted(
    path.parent.relative_to(ROOT).as_posix()
    for top in ("pipeline", "actors", "rewards", "cluster")
    for path in (ROOT / top).rglob("__init__.py")
)
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
LIMIT = 450


def docstring(package: str) -> str:
    found = ast.get_docstring(ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8")))
    assert found, f"{package}/__init__.py has no docstring"
    return found


def row(package: str) -> str:
    """Return the line of the rooms' table that shows ``package``."""
    title, begin = docstring(package).splitlines()[0], begins_with(package)
    return f"| `{package}/` | {title} | `{begin}` |"


def begins_with(package: str) -> str:
    found = re.search(r"^Begin with ``([\w.]+)``\.$", docstring(package), re.M)
    assert found, f"{package}/__init__.py does not say where to begin: Begin with ``module``."
    return found[1].replace(".", "/") + ".py"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_its_purpose_its_limit_and_where_to_begin(package: str) -> None:
    lines = docstring(package).splitlines()
    assert lines[0].endswith(".") and lines[1] == "", f"{package}: the first line is one sentence"
    assert [line.partition(":")[0] for line in lines if re.match(r"(For|Not for): \S", line)] == ["For", "Not for"]
    assert (ROOT / package / begins_with(package)).is_file()


def test_the_rooms_of_the_architecture_page_are_those_of_the_tree() -> None:
    shown = [line for line in TEXT.splitlines() if re.match(r"\| `(pipeline|actors|rewards|cluster)[\w/]*/` \|", line)]
    assert shown == [row(package) for package in PACKAGES]


def test_what_is_to_be_touched_exists() -> None:
    """The table "To add … touch …" names files and folders of the tree; what is to be written is in angle brackets."""
    table = TEXT.partition("## To add")[2].partition("\n## ")[0]
    named = set(re.findall(r"`((?:pipeline|actors|rewards|cluster|tests|docs)/[\w./-]*)`", table))
    assert len(named) >= 8
    assert not [path for path in sorted(named) if not (ROOT / path).exists()]


def test_no_file_is_longer_than_the_house_allows() -> None:
    sources = [p for top in ("pipeline", "actors", "rewards", "cluster", "tests") for p in (ROOT / top).rglob("*.py")]
    long = {p.relative_to(ROOT).as_posix(): n for p in sources if (n := len(p.read_text().splitlines())) > LIMIT}
    assert not long


if __name__ == "__main__":
    print(*(row(package) for package in PACKAGES), sep="\n")
