"""Records ``trace.json`` from a real pool: ``python tests/pipeline/control/record_trace.py [FILE]``, about a minute.

An embedded Ray of three slots, a pool of toy workers of one slot each, a call of 0.05 s per request, a look every half second. A
minute in the life of a pool: quiet, a burst on one worker, a second worker, a size beyond the cluster (the fourth worker waits for
room), the burst's end, idleness. Sizes are set by hand at the times in STORY; nothing decides.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from cluster.resources import Ask, PlacementPlan, place
from cluster.session import connect
from pipeline.control.autoscale import PoolPoint
from tests.pipeline.control.toy_run import toy_pool

TRACE = Path(__file__).with_name("trace.json")
EVERY_S = 0.5
STORY = {"burst": 4.0, "two": 16.0, "four": 28.0, "end": 44.0, "one": 62.0, "stop": 66.0}
"""Seconds from the beginning; ``one`` goes back to one worker."""
REQUESTS_PER_S = 40
QUIET_PER_S = 4


async def record(folder: Path) -> list[PoolPoint]:
    points: list[PoolPoint] = []
    work: list[asyncio.Task[object]] = []
    with place(PlacementPlan((Ask("toy", 1, 1.0),)), 30) as room:
        async with toy_pool("toy", folder, room, 1) as pool:
            began, next_look, number = time.monotonic(), 0.0, 0
            todo = {STORY["two"]: 2, STORY["four"]: 4, STORY["one"]: 1}
            due = 0.0
            while (now := time.monotonic() - began) < STORY["stop"]:
                while due <= now:
                    burst = STORY["burst"] <= due < STORY["end"]
                    if due < STORY["end"]:
                        work.append(asyncio.create_task(pool.submit(number)))
                        number += 1
                    due += 1.0 / (REQUESTS_PER_S if burst else QUIET_PER_S)
                for at in [at for at in todo if at <= now]:
                    await pool.resize(todo.pop(at))
                if now >= next_look:
                    points.append(PoolPoint.of(pool.stats(), now))
                    next_look = now + EVERY_S
                await asyncio.sleep(0.01)
            for task in work:
                task.cancel()
            await asyncio.gather(*work, return_exceptions=True)
    return points


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch, connect("local", local_cpus=3, object_store_mib=128):
        found = asyncio.run(record(Path(scratch)))
    rows = ",\n".join(json.dumps(list(dataclasses.asdict(point).values())) for point in found)
    names = json.dumps([field.name for field in dataclasses.fields(PoolPoint)])
    about = json.dumps("A real pool of toy workers, recorded by record_trace.py, which says how.")
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else TRACE
    file.write_text(f'{{"about": {about},\n"fields": {names},\n"points": [\n{rows}\n]}}\n')
    print(f"{len(found)} points in {file}")
