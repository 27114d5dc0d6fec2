"""Row 15: how `vans data build` scales without models: 64 logical workers against the slowest stage, and 100 times as many rows."""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pipeline.config.load import parse_section
from pipeline.data.build import run as running
from pipeline.data.build.meter import ActorMeter
from pipeline.data.build.recipe import Recipe, plan_stages, recipe_identity
from pipeline.data.build.store import AREA, WorkArea
from pipeline.data.build.stream import slots
from tests.benchmarks.bench import Check, Result, Size

STAGES = "tests.pipeline.data.build.stages"
NAPS = {"first": (1.0, 3.0, 16), "second": (2.0, 6.0, 32), "third": (1.0, 3.0, 16)}  # seconds, seconds, workers
ROWS_OF_A_VIDEO = 10


def sources(root: Path, count: int) -> None:
    """Make ``count`` source files that nothing opens as video."""
    root.mkdir()
    (root / "v0.mp4").write_bytes(b"not opened")
    for number in range(1, count):
        os.link(root / "v0.mp4", root / f"v{number}.mp4")


def nap_seconds(order: int, low: float, high: float) -> float:
    """Return the service time of a video, as ``Nap`` has it."""
    return low + (high - low) * (order * 7919 % 101) / 100


def efficiency(videos: int) -> tuple[float, float]:
    """Return the seconds that the slowest stage's workers need alone for the last three quarters of the videos, and those taken."""
    with tempfile.TemporaryDirectory() as folder:
        sources(Path(folder) / "videos", videos)
        stages = {
            name: {"use": f"{STAGES}:Nap", "cpus": 0.1, "threads": workers, "shortest": low, "longest": high}
            for name, (low, high, workers) in NAPS.items()
        }
        recipe = parse_section(Recipe, {"sources": {"videos": Path(folder) / "videos"}, "stages": stages}, "scale")
        plans, area = plan_stages(recipe), WorkArea(Path(folder) / AREA)
        listed = running.list_sources(recipe)
        running.write_sources(recipe, listed, area)
        with running.connect(None, local_cpus=slots(recipe)):
            run = running.Run(
                recipe, plans, area, recipe_identity(recipe, plans), listed.count, ActorMeter(None, False)
            )
            times, orders = [], []
            for travel in run.videos():
                times.append(time.monotonic())
                orders.append(travel.video.order)
    assert orders == list(range(videos))
    quarter = videos // 4
    ideal = max(
        sum(nap_seconds(order, low, high) for order in orders[quarter:]) / workers
        for low, high, workers in NAPS.values()
    )
    return ideal, times[-1] - times[quarter - 1]


def build(rows: int) -> dict[str, float]:
    """Build ``rows`` rows in this process, and return its seconds and its peak memory in MiB."""
    with tempfile.TemporaryDirectory() as folder:
        sources(Path(folder) / "videos", rows // ROWS_OF_A_VIDEO)
        stage = {"use": f"{STAGES}:Ready", "rows": ROWS_OF_A_VIDEO, "batch": 16}
        recipe = parse_section(
            Recipe, {"sources": {"videos": Path(folder) / "videos"}, "stages": {"ready": stage}}, "scale"
        )
        began = time.monotonic()
        running.build_dataset(recipe, Path(folder) / "out", quiet=True)
        took = time.monotonic() - began
    return {"seconds": took, "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def build_apart(rows: int) -> dict[str, float]:
    """Return what :func:`build` does in a process of its own: a peak never falls."""
    command = [sys.executable, "-m", "tests.benchmarks.build_scale", str(rows)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(said.splitlines()[-1])
    return found


def measure(size: Size) -> Result:
    """Measure efficiency, and the driver's memory and seconds for few and for many rows."""
    full = size == "full"
    few, middle, many = (1_000, 10_000, 100_000) if full else (20, 40, 80)
    videos = 400 if full else 8
    ideal, took = efficiency(videos)
    found: dict[int, dict[str, float]] = {rows: build_apart(rows) for rows in (few, middle, many)}
    further = {rows: (found[rows]["seconds"] - found[few]["seconds"]) / (rows - few) for rows in (middle, many)}
    growth = further[many] / max(further[middle], 1e-9)
    checks = (
        Check("efficiency: seconds of the slowest stage alone ÷ seconds taken", (ideal / took,), "≥", 0.9),
        Check(f"driver's memory for {many:,} rows ÷ for {few:,}", (found[many]["mib"] / found[few]["mib"],), "≤", 1.1),
        Check(f"seconds of a further row, up to {many:,} ÷ up to {middle:,}", (growth,), "≤", 1.1),
    )
    figures: dict[str, Any] = {
        "videos of the efficiency check": float(videos),
        "slowest stage alone, s": ideal,
        "taken, s": took,
    }
    for rows, values in found.items():
        figures |= {f"{rows:,} rows: s": values["seconds"], f"{rows:,} rows: peak MiB of the driver": values["mib"]}
    notes = (
        "Ray Data's own executor. 64 workers of three stages sleep for 1 to 6 s a video, each its own time; the first quarter, when",
        "the stages fill, is left out. The rows of the other checks are made by a stage without a model, ten a video, and written as",
        "shards; each build has a process of its own. What it takes to start is in none of the seconds of a further row.",
    )
    return Result(checks, figures, notes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build so many rows, and print seconds and peak memory as JSON.")
    parser.add_argument("rows", type=int)
    print(json.dumps(build(parser.parse_args().rows)))
