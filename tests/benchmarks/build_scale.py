"""How `vans data build` scales, on one machine, without models: two figures that a test suite should not time.

    python -m tests.benchmarks.build_scale efficiency   # 64 logical workers that sleep, against the slowest stage alone
    python -m tests.benchmarks.build_scale memory       # peak memory of the driver, 1,000 and 100,000 rows

Prints JSON. Efficiency is taken over the last three quarters of the videos: the seconds that the slowest stage's workers would
need for them alone, over the seconds that they took.
"""

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


def efficiency(videos: int) -> dict[str, Any]:
    """Return the efficiency of 64 logical workers in three stages."""
    with tempfile.TemporaryDirectory() as folder:
        sources(Path(folder) / "videos", videos)
        stages = {
            name: {"use": f"{STAGES}:Nap", "cpus": 0.1, "threads": workers, "shortest": low, "longest": high}
            for name, (low, high, workers) in NAPS.items()
        }
        recipe = parse_section(Recipe, {"sources": {"videos": Path(folder) / "videos"}, "stages": stages}, "scale")
        plans, area = plan_stages(recipe), WorkArea(Path(folder) / AREA)
        listed = running.list_sources(recipe)
        running.write_sources(recipe, area)
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
    took = times[-1] - times[quarter - 1]
    return {
        "videos": videos,
        "ideal_s": round(ideal, 2),
        "took_s": round(took, 2),
        "efficiency": round(ideal / took, 3),
    }


def build(rows: int) -> dict[str, Any]:
    """Build ``rows`` rows in this process, and return its peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        sources(Path(folder) / "videos", rows // ROWS_OF_A_VIDEO)
        stage = {"use": f"{STAGES}:Ready", "rows": ROWS_OF_A_VIDEO, "batch": 16}
        recipe = parse_section(
            Recipe, {"sources": {"videos": Path(folder) / "videos"}, "stages": {"ready": stage}}, "scale"
        )
        began = time.monotonic()
        running.build_dataset(recipe, Path(folder) / "out", quiet=True)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        return {"rows": rows, "seconds": round(time.monotonic() - began, 1), "driver_peak_mib": peak}


def main() -> None:
    """Print what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("efficiency", "memory", "build"))
    parser.add_argument("--count", type=int, default=0, help="videos of efficiency, rows of build")
    arguments = parser.parse_args()
    if arguments.part == "efficiency":
        print(json.dumps(efficiency(arguments.count or 400)))
    elif arguments.part == "build":
        print(json.dumps(build(arguments.count)))
    else:
        for rows in (1_000, 100_000):  # a process each: a peak never falls
            command = [sys.executable, "-m", "tests.benchmarks.build_scale", "build", "--count", str(rows)]
            subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
