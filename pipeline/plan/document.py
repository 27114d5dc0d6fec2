"""Writes what ``vans plan`` prints into docs/placement.md: ``python -m pipeline.plan.document docs/placement.md``."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console

from cluster.hardware import parse_gpus, rates_of
from pipeline.config import load_config
from pipeline.plan import load_models, make_plan
from pipeline.plan.report import PLAN_WIDTH, show, show_search
from pipeline.plan.search import pareto, search

_BLOCK = re.compile(r"```\n\$ vans plan (\S+) --gpus (\S+)( --search)?\n.*?```", re.DOTALL)


def printed(config: str, gpus: str, *, searched: bool = False) -> str:
    """Return what ``vans plan CONFIG --gpus GPUS`` prints to a file, or the same command with ``--search``."""
    run, hardware = load_config(config), parse_gpus(gpus)
    console = Console(width=PLAN_WIDTH, file=io.StringIO(), color_system=None)
    rates, models = rates_of(hardware), load_models(run)
    if searched:
        tried = search(run, hardware, rates, models)
        show_search(pareto(tried), len(tried), console)
    else:
        show(make_plan(run, hardware, rates, models), console)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def renewed(text: str) -> str:
    """Return ``text`` with the output under each ``$ vans plan CONFIG --gpus GPUS`` written anew."""

    def block(found: re.Match[str]) -> str:
        output = printed(found[1], found[2], searched=bool(found[3]))
        return f"```\n$ vans plan {found[1]} --gpus {found[2]}{found[3] or ''}\n{output}\n```"

    return _BLOCK.sub(block, text)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(renewed(path.read_text(encoding="utf-8")), encoding="utf-8")
