"""`make bench`: every row of the table in a process of its own, and the table in the terminal and as Markdown.

    python -m tests.benchmarks.run                          # all rows, printed
    python -m tests.benchmarks.run --rows 3,9               # some of them
    python -m tests.benchmarks.run --out docs/results       # writes benchmarks.md and benchmarks.json as well

Exit status 1 where a row could not be measured; a missed bar is told in the table and is no failure of the command.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.bench import Result, Size, machine

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Row:
    """A row of the table: ``module`` has a function ``measure(size) -> Result``, or the named one."""

    number: int
    what: str
    baseline: str
    module: str
    function: str = "measure"


ROWS = (
    Row(1, "VLM pool, one worker, video prompts, G = 8", "bare vLLM `LLM.generate`, the same requests", "vlm_pool"),
    Row(2, "VLM pool, one worker, video prompts, G = 8", "transformers `generate`", "vlm_pool", "measure_transformers"),
    Row(3, "VDM pool, one worker", "stock diffusers `WanPipeline`, the same clips and steps", "vdm_pool"),
    Row(4, "reward pool", "bare batched CLIP forward; `rouge-score`", "reward_pool"),
    Row(5, "Ray Data input", "PyAV loop on all cores", "data_input"),
    Row(6, "weights: publish until every worker serves", "memcpy of the same bytes", "publish_weights"),
    Row(7, "streaming step, recorded service times", "barriers between sampling, rendering and scoring", "streaming"),
    Row(8, "streaming, `max_staleness: 1`", "`max_staleness: 0`", "streaming", "measure_staleness"),
    Row(9, "64 VLM + 512 VDM + 64 reward workers that sleep", "busiest pool's work / its size", "scheduling"),
    Row(10, "stage 2's update on an SDE window of 2 of 10 steps", "all steps trained", "sde_window"),
    Row(11, "step of stage 1, text rewards alone", "TRL `GRPOTrainer`, the same thinker, batch and G", "trl_step"),
    Row(12, "start-up: `vans train` to its first whole group", "sum of bare model loads", "start_up"),
    Row(13, "stage 2's gain in equal CPU time, by `nft` and `awm`", "by `grpo` on the SDE window", "stage2_objectives"),
    Row(14, "a build's clips, cut and gated on Ray Data", "the same PyAV code in a loop on all cores", "footage"),
    Row(
        15,
        "a build on 64 workers that sleep; of 100 times the rows",
        "the slowest stage alone; few rows",
        "build_scale",
    ),
)


def environment() -> dict[str, str]:
    """Return what a row's process runs in: offline, one thread for each process, Ray on this machine alone."""
    fixed = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "TORCH_COMPILE_DISABLE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_KVSPACE": "1",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "GIT_PYTHON_REFRESH": "quiet",
    }
    kept = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    paths = [str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | fixed | {"PYTHONPATH": os.pathsep.join(paths)}


def measure(row: Row, size: Size) -> Result:
    """Measure ``row`` in this process."""
    module = importlib.import_module(f"tests.benchmarks.{row.module}")
    result = getattr(module, row.function)(size)
    assert isinstance(result, Result)
    return result


def measure_apart(row: Row, size: Size, timeout_s: float) -> dict[str, Any]:
    """Measure ``row`` in a process of its own; returns its result as plain values, or ``error`` with the end of its output."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        found, log = Path(folder, "result.json"), Path(folder, "log")
        command = [sys.executable, "-m", "tests.benchmarks.run", "--one", str(row.number), "--size", size]
        started = time.monotonic()
        with log.open("wb") as sink:
            try:
                done = subprocess.run(
                    [*command, "--json", str(found)],
                    cwd=ROOT,
                    env=environment(),
                    stdout=sink,
                    stderr=subprocess.STDOUT,
                    timeout=timeout_s,
                    check=False,
                )
                fault = "" if done.returncode == 0 else f"exit status {done.returncode}"
            except subprocess.TimeoutExpired:
                fault = f"not finished after {timeout_s:.0f} s"
        wall_s = time.monotonic() - started
        if fault or not found.exists():
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
            return {"error": f"{fault or 'no result'}\n{tail}", "wall_s": wall_s}
        return json.loads(found.read_text()) | {"wall_s": wall_s}


def table(measured: dict[int, dict[str, Any]]) -> list[str]:
    """Return the Markdown table of what was measured: a line for each check."""
    lines = [
        "| # | what | baseline in the same run | measured: median (lowest–highest) | bar | met |",
        "|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        if row.number not in measured:
            continue
        plain = measured[row.number]
        if "error" in plain:
            lines.append(f"| {row.number} | {row.what} | {row.baseline} | could not be measured | | no |")
            continue
        for i, check in enumerate(Result.from_json(plain).checks):
            left = f"| {row.number} | {row.what} | {row.baseline} " if i == 0 else "| | | "
            met = "yes" if check.met else "**no**"
            lines.append(f"{left}| {check.shown()} | {check.sign} {check.bar:,g} {check.unit} | {met} |")
    return lines


def document(measured: dict[int, dict[str, Any]]) -> str:
    """Return ``docs/results/benchmarks.md``."""
    machines: dict[str, list[int]] = {}
    for number, plain in sorted(measured.items()):
        where = plain["machine"]
        told = ", ".join(f"{name} {value}" for name, value in where.items() if name not in ("processor", "cores"))
        machines.setdefault(f"{where['cores']} cores of {where['processor']}; {told}", []).append(number)
    lines = [
        "# Benchmarks",
        "",
        "What `make bench` printed. Each row measures ours and its baseline in the same process, turn by turn; a figure is the",
        "median over the repeats, with the lowest and the highest. `benchmarks.json` beside this file has every single value.",
        "",
        *(f"- rows {', '.join(map(str, rows))}: measured on {where}" for where, rows in machines.items()),
        "",
        *table(measured),
        "",
        "## Behind the rows",
    ]
    for row in ROWS:
        plain = measured.get(row.number, {"notes": [], "figures": {}})
        if not plain.get("notes") and not plain.get("figures"):
            continue
        lines += ["", f"### {row.number} · {row.what}", "", *plain["notes"]]
        if plain["figures"]:
            lines += ["", "| figure | value |", "|---|---|"]
            lines += [f"| {name} | {value:,.4g} |" for name, value in plain["figures"].items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="numbers with commas between; all without it")
    parser.add_argument("--size", choices=("full", "smoke"), default="full")
    parser.add_argument("--out", type=Path, help="folder for benchmarks.md and benchmarks.json")
    parser.add_argument("--timeout", type=float, default=1200.0, help="seconds that one row may take")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    rows = {row.number: row for row in ROWS}
    if args.one is not None:
        result = measure(rows[args.one], args.size)
        args.json.write_text(json.dumps(result.as_json()))
        return 0
    wanted = [int(part) for part in args.rows.split(",")] if args.rows else list(rows)
    unknown = [n for n in wanted if n not in rows]
    if unknown:
        parser.error(f"--rows: there is no row {unknown[0]}; there are {min(rows)} to {max(rows)}")
    measured: dict[int, dict[str, Any]] = {}
    kept = args.out / "benchmarks.json" if args.out else None
    if kept is not None and kept.exists() and args.rows:  # some rows again: the others stay as they were
        measured = {int(n): plain for n, plain in json.loads(kept.read_text()).items()}
    for number in wanted:
        print(f"row {number}: {rows[number].what} …", flush=True)
        plain = measure_apart(rows[number], args.size, args.timeout) | {"machine": machine()}
        measured[number] = plain
        if "error" in plain:
            print(plain["error"], flush=True)
        else:
            for check in Result.from_json(plain).checks:
                told = "met" if check.met else "MISSED"
                print(f"  {check.shown()}   bar {check.sign} {check.bar:g} {check.unit}: {told}", flush=True)
        print(f"  {plain['wall_s']:.0f} s", flush=True)
    print("\n" + "\n".join(table(measured)))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "benchmarks.md").write_text(document(measured))
        kept.write_text(json.dumps({str(n): measured[n] for n in sorted(measured)}, indent=1) + "\n")
    return int(any("error" in plain for plain in measured.values()))


if __name__ == "__main__":
    sys.exit(main())
