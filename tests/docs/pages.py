"""The pages that people read, and the commands in them: in fenced blocks as they are typed, and in the running text by name."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"))
)
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.DOTALL | re.MULTILINE)
_NAME = re.compile(r"#\s*(\S+\.(?:yaml|py))\s*$")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    language: str
    text: str

    @property
    def commands(self) -> Iterator[list[str]]:
        """Arguments of our program in each of its lines."""
        if self.language not in ("", "bash", "console"):
            return
        for line in self.text.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ")
            if line.startswith("vans ") or " vans " in line or "-m pipeline " in line:
                words = ours(shlex.split(line, comments=True))
                if words and "[OPTIONS]" not in words:
                    yield words


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    return [Block(page, language, text) for _, language, text in _FENCE.findall(text_of(page))]


def spans(page: str) -> Iterator[list[str]]:
    """Arguments of our program in each piece of inline code; it may be a name with a part of its options."""
    text = _FENCE.sub("", text_of(page))
    for span in re.findall(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)", text):
        if re.match(r"vans [a-z]", span) or "-m pipeline " in span:
            words = ours(span.replace("…", " ").split())
            if words:
                yield words


def ours(words: list[str]) -> list[str] | None:
    """Return the arguments of our program in a command, wherever it stands, up to the next command of a chain."""
    if words[:1] == ["kubectl"]:  # its namespace has our name
        words = words[words.index("--") + 1 :] if "--" in words else []
    for start in (["vans"], ["python", "-m", "pipeline"]):
        for at in range(len(words)):
            if words[at : at + len(start)] == start:
                rest = words[at + len(start) :]
                ends = [rest.index(end) for end in ("|", "&&", ";") if end in rest]
                return rest[: min(ends, default=len(rest))]
    return None


def files_of(page: str) -> dict[str, str]:
    """Return the files that a page has its reader write: blocks whose first line is a comment with the name."""
    return {
        found[1]: block.text
        for block in blocks(page)
        if block.language in ("yaml", "python") and (found := _NAME.match(block.text.splitlines()[0]))
    }
