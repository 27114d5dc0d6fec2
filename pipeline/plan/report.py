"""A plan as tables for people, and as JSON for programs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.hardware import GIB
from cluster.packing import crowd
from pipeline.plan.balance import ROLES, Split
from pipeline.plan.memory import LOADING, PARTS, USABLE, Process
from pipeline.plan.plan import Plan, overrides
from pipeline.plan.search import Point

PLAN_WIDTH = 150  # columns of what is printed into a file


def tables(plan: Plan) -> RenderableType:
    """Return the plan as it is printed."""
    parts: list[RenderableType] = [Text(f"{plan.config.name} on {plan.hardware}", style="bold"), Text()]
    if plan.gpus:
        parts += [_where(plan), Text()]
    parts += [_memory(plan.processes), Text(), _seconds(plan), Text()]
    if plan.splits:
        parts += [_splits(plan), Text()]
    return Group(*parts)


def closing(plan: Plan) -> list[Text]:
    """Return what stands below the tables, in lines to be printed as they are: assumptions, overrides, and the verdict."""
    lines = [Text("assumptions", style="bold"), *(Text(f"  {line}") for line in plan.assumptions), Text()]
    for split in plan.splits:
        name = "all shared" if split.colocated else "balanced"
        lines.append(Text(f"{name}: {overrides(plan.config, split)}"))
    if plan.fits:
        return [*lines, Text("fits", style="bold green")]
    for problem in plan.problems:
        lines.append(Text(f"does not fit: {problem.what}", style="bold red"))
        lines.append(
            Text(
                f"  what would help: {problem.cure or 'nothing that this plan can tell; other models, or larger GPUs'}"
            )
        )
    return lines


def show(plan: Plan, console: Console) -> None:
    """Print ``plan``."""
    console.print(tables(plan), highlight=False)
    for line in closing(plan):
        console.print(line, highlight=False, soft_wrap=True)


def show_search(points: Sequence[Point], tried: int, console: Console) -> None:
    """Print the ``points`` that none of the ``tried`` ways beats, and the overrides of the fastest of each batch.

    ``search_as_json`` has those of all.
    """
    if not points:
        console.print(Text("no way to run it fits", style="bold red"))
        return
    table = _table("batch", "GPUs", "run", "GPU-hours", "max_staleness", "layout", *ROLES)
    for point in points:
        split = point.split
        layout = "colocated" if split.colocated else "disaggregated"
        counts = [str(split.gpus[role]) for role in ROLES]
        facts = [duration(point.run_s), f"{point.gpu_hours:.3g}", str(point.staleness), layout]
        table.add_row(f"{point.batch} ×", str(point.hardware.gpus), *facts, *counts)
    console.print(table, highlight=False)
    console.print(
        f"\nnone of the {tried} ways that fit is both cheaper and faster than one of these of its batch",
        highlight=False,
    )
    for batch in sorted({point.batch for point in points}):
        fastest = min((point for point in points if point.batch == batch), key=lambda point: point.run_s)
        line = f"{batch} ×, fastest: {fastest.settings}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def search_as_json(points: Sequence[Point]) -> list[dict[str, Any]]:
    """Return the points as plain values: seconds, GPU-hours, counts, overrides."""
    return [
        {
            "gpus": point.hardware.gpus,
            "nodes": point.hardware.nodes,
            "run_s": point.run_s,
            "gpu_hours": point.gpu_hours,
            "max_staleness": point.staleness,
            "batch": point.batch,
            "colocated": point.split.colocated,
            "split": dict(point.split.gpus),
            "step_s": dict(point.split.step_s),
            "overrides": point.settings,
        }
        for point in points
    ]


def as_json(plan: Plan) -> dict[str, Any]:
    """Return the plan as plain values: bytes, seconds, counts."""
    return {
        "run": plan.config.name,
        "hardware": {"nodes": plan.hardware.nodes, "gpus_per_node": plan.hardware.per_node, "gib": plan.hardware.gib},
        "layout": plan.config.cluster.layout,
        "fits": plan.fits,
        "problems": [{"what": p.what, "cure": p.cure} for p in plan.problems],
        "gpus": [
            {
                "node": gpu.node,
                "gpu": gpu.index,
                "members": [str(member) for member in gpu.members],
                "peak_bytes": round(plan.peaks[gpu.node, gpu.index]),
            }
            for gpu in plan.gpus
        ],
        "processes": [
            {
                "role": kind.role,
                "does": kind.does,
                "bytes": {name: round(size) for name, size in kind.parts.items()},
                "loading_bytes": round(kind.loading),
                "total_bytes": round(kind.total),
            }
            for kind in plan.processes
        ],
        "stages": [
            {
                "stage": stage.name,
                "steps": stage.steps,
                "step_s": _finite(plan.step_s(stage)),
                "bottleneck": stage.bottleneck(plan.workers).name,
                "demands": [
                    {
                        "name": demand.name,
                        "role": demand.role,
                        "units": demand.units,
                        "unit_s": demand.unit_s,
                        "fixed_s": demand.fixed_s,
                        "workers": plan.workers[demand.role],
                        "seconds": _finite(demand.seconds(plan.workers[demand.role])),
                        "source": demand.source,
                    }
                    for demand in stage.demands
                ],
            }
            for stage in plan.stages
        ],
        "splits": [
            {
                "layout": "colocated" if split.colocated else "disaggregated",
                "gpus": dict(split.gpus),
                "step_s": {name: round(seconds, 3) for name, seconds in split.step_s.items()},
                "run_s": round(split.run_s, 1),
                "overrides": overrides(plan.config, split),
            }
            for split in plan.splits
        ],
        "assumptions": list(plan.assumptions),
    }


def duration(seconds: float) -> str:
    """Return a length of time for people, with two figures at least: ``0.42 s``, ``12 s``, ``3.4 min``, ``1.5 h``."""
    if not math.isfinite(seconds):
        return "never"
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def _finite(seconds: float) -> float | None:
    return round(seconds, 4) if math.isfinite(seconds) else None


def _where(plan: Plan) -> Table:
    table = _table("GPUs", "what stands on each", "peak", "of")
    for roles, gpus in crowd(plan.gpus).items():
        names = ", ".join(f"{n} {role}" for role, n in roles) or "nothing"
        ids = _ranges(plan, [gpu.node * plan.hardware.per_node + gpu.index for gpu in gpus])
        need = max(plan.peaks[gpu.node, gpu.index] for gpu in gpus)
        style = "bold red" if need > USABLE * plan.hardware.gib * GIB else ""
        table.add_row(ids, names, Text(_gib(need), style=style), f"{plan.hardware.gib:g} GiB")
    return table


def _ranges(plan: Plan, ids: Iterable[int]) -> str:
    """Return numbers as ``0–3, 6``; with several nodes, as ``node 0: 0–3``."""
    by_node: dict[int, list[int]] = {}
    for i in ids:
        by_node.setdefault(i // plan.hardware.per_node, []).append(i % plan.hardware.per_node)
    told = []
    for node, numbers in by_node.items():
        runs: list[list[int]] = []
        for number in sorted(numbers):
            if runs and number == runs[-1][-1] + 1:
                runs[-1].append(number)
            else:
                runs.append([number])
        text = ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
        told.append(text if plan.hardware.nodes == 1 else f"node {node}: {text}")
    return "; ".join(told)


def _memory(kinds: Iterable[Process]) -> Table:
    kinds = list(kinds)
    used = [part for part in PARTS if any(kind.parts.get(part) for kind in kinds)]
    table = _table("memory per process, GiB", *used, LOADING, "peak")
    for kind in kinds:
        cells = [_number(kind.parts.get(part, 0.0)) for part in used]
        table.add_row(f"{kind.role}: {kind.does}", *cells, _number(kind.loading), _number(kind.total))
    return table


def _seconds(plan: Plan) -> Table:
    table = _table("step of", "part", "on", "work", "each", "seconds", "from")
    for stage in plan.stages:
        slowest = stage.bottleneck(plan.workers)
        for demand in stage.demands:
            count = plan.workers[demand.role]
            mark = "  ← slowest" if demand is slowest else ""
            table.add_row(
                stage.name,
                demand.name,
                f"{count:g} × {demand.role}",
                f"{demand.units:.3g}",
                duration(demand.unit_s),
                f"{duration(demand.seconds(count))}{mark}",
                demand.source,
            )
        step = plan.step_s(stage)
        total = f"{stage.steps} steps: {duration(step * stage.steps)}"
        table.add_row(stage.name, "step", "", "", "", Text(duration(step), style="bold"), total, end_section=True)
    return table


def _splits(plan: Plan) -> Table:
    stages = [stage.name for stage in plan.stages]
    table = _table("split of the GPUs", *ROLES, *(f"{name} step" for name in stages), "run")
    workers = {role: f"{plan.workers[role]:g}" for role in ROLES}
    steps = [plan.step_s(stage) for stage in plan.stages]
    run = sum(step * stage.steps for step, stage in zip(steps, plan.stages))
    table.add_row(
        f"as configured, {plan.config.cluster.layout}", *workers.values(), *(duration(s) for s in steps), duration(run)
    )
    for split in plan.splits:
        table.add_row(*_split_row(split, stages))
    return table


def _split_row(split: Split, stages: list[str]) -> list[str]:
    name = "all shared, colocated" if split.colocated else "balanced, disaggregated"
    return [
        name,
        *(str(split.gpus[role]) for role in ROLES),
        *(duration(split.step_s[stage]) for stage in stages),
        duration(split.run_s),
    ]


def _table(*headers: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, header in enumerate(headers):
        table.add_column(header, overflow="fold", no_wrap=number == 0)
    return table


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _number(size: float) -> str:
    return f"{size / GIB:.1f}" if size >= 0.05 * GIB else ("–" if not size else "<0.1")
