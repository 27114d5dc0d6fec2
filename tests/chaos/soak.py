"""``python tests/chaos/soak.py``: a deterministic run on a cluster of three nodes, under random faults, against one left in peace.

Kills and stops workers, learner ranks, a whole node and the driver, at times and in an order that ``--seed`` decides, and resumes
the driver whenever it has ended. Prints what was injected, and whether anything was lost, doubled or changed. Exit status 1 where
it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pipeline.tracking.store import PARENT_TAG, STAGE_TAG  # noqa: E402 - found through the line above

WORKERS = ("VlmWorker", "VdmWorker", "RewardWorker")
CLOCK = (
    "time/",
    "profile/",
    "speed/",
    "pool/",
    "cache/",
    "learner/prompt_hit_ratio",
    "learner/restarts",
    "checkpoint/failed",
    "data/quarantined",
)
"""Metrics of how long things took, of what the pools did meanwhile, and of what befell this process."""
NODE_CPUS = 4
console = Console(width=120, highlight=False)


@dataclass
class Nodes:
    """A cluster of a head without room for work, and two nodes with it."""

    cluster: Any = None
    workers: list[Any] = field(default_factory=list)

    def __enter__(self) -> Nodes:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 200 << 20})
        self.workers = [self._add() for _ in range(2)]
        return self

    def __exit__(self, *_: object) -> None:
        self.cluster.shutdown()

    def _add(self) -> Any:
        return self.cluster.add_node(num_cpus=NODE_CPUS, object_store_memory=200 << 20)

    def lose(self, index: int) -> None:
        """End a node as a power cut does."""
        self.cluster.remove_node(self.workers[index], allow_graceful=False)

    def replace(self, index: int) -> None:
        """A new node takes the place of a lost one."""
        self.workers[index] = self._add()


def processes(*names: str) -> list[psutil.Process]:
    """Return the workers of this process's cluster, and of no other, whose title names one of the actor classes ``names``."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:  # it has ended meanwhile
            continue
        if title.startswith("ray::") and any(name in title for name in names):
            found.append(process)
    return sorted(found, key=lambda p: p.pid)


class Soak:
    """One run under faults."""

    def __init__(self, nodes: Nodes, arguments: list[str], out: Path, seed: int, until: float) -> None:
        self.nodes, self.arguments, self.out, self.until = nodes, arguments, out, until
        self.random = random.Random(seed)
        self.faults: Counter[str] = Counter()
        self.starts = 0
        self.returns_at: float | None = None  # when the lost node comes back
        self.log = out.with_suffix(".log")

    def run(self) -> None:
        """Run to the end of training, with a fault every 15 to 40 seconds until the time is up."""
        driver = self._start()
        next_fault = time.monotonic() + 20
        while True:
            time.sleep(0.5)
            now = time.monotonic()
            if self.returns_at is not None and now >= self.returns_at:
                self.nodes.replace(0)
                self.returns_at = None
            status = driver.poll()
            if status == 0:
                return
            if status is not None:
                driver = self._start()
                continue
            if now < next_fault or now > self.until or not self._has_checkpoint():
                continue
            next_fault = now + self.random.uniform(15, 40)
            self._fault(driver)

    def _has_checkpoint(self) -> bool:
        return any((self.out / "checkpoints").glob("*/manifest.json"))

    def _start(self) -> subprocess.Popen[bytes]:
        if self.starts > 200:
            raise SystemExit(f"the run was started {self.starts} times and did not come to its end; see {self.log}")
        self.starts += 1
        resume = ["--resume"] if self._has_checkpoint() else []
        address = {"RAY_ADDRESS": self.nodes.cluster.address}
        with self.log.open("ab") as stream:
            command = [sys.executable, "-m", "pipeline", "train", *self.arguments, f"out={self.out}", *resume]
            return subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=stream, env={**os.environ, **address})

    def _fault(self, driver: subprocess.Popen[bytes]) -> None:
        kinds: dict[str, tuple[int, Callable[[], bool]]] = {
            "worker killed": (7, lambda: self._signal(signal.SIGKILL, *WORKERS)),
            "worker stopped": (2, lambda: self._signal(signal.SIGSTOP, "VdmWorker", "RewardWorker")),
            "learner rank killed": (4, lambda: self._signal(signal.SIGKILL, "LearnerRank")),
            "node lost": (2, self._lose_node),
            "driver killed": (3, lambda: self._end(driver, signal.SIGKILL)),
            "driver asked to end": (2, lambda: self._end(driver, signal.SIGTERM)),
        }
        names, weights = list(kinds), [weight for weight, _ in kinds.values()]
        kind = self.random.choices(names, weights)[0]
        if kinds[kind][1]():
            self.faults[kind] += 1
            console.print(f"{time.strftime('%H:%M:%S')} {kind}")

    def _signal(self, number: int, *names: str) -> bool:
        victims = processes(*names)
        if not victims:
            return False
        self.random.choice(victims).send_signal(number)
        return True

    def _lose_node(self) -> bool:
        if self.returns_at is not None:
            return False
        self.nodes.lose(0)
        self.returns_at = time.monotonic() + self.random.uniform(5, 15)
        return True

    def _end(self, driver: subprocess.Popen[bytes], number: int) -> bool:
        driver.send_signal(number)
        try:
            driver.wait(timeout=300)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"the driver hangs after signal {number}; see {self.log}") from None
        return True


def histories(out: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Return stage → metric → every point that MLflow holds, doubled ones included, but for the clock's."""
    client = mlflow.MlflowClient(f"sqlite:///{out}/mlflow.db")
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for run in client.search_runs([client.get_experiment_by_name("vans").experiment_id]):
        if PARENT_TAG in run.data.tags:
            stage = found.setdefault(run.data.tags[STAGE_TAG], {})
            for name in run.data.metrics:
                if not name.startswith(CLOCK):
                    points = client.get_metric_history(run.info.run_id, name)
                    stage[name] = sorted(stage.get(name, []) + [(p.step, p.value) for p in points])
    return found


def difference(one: Path, other: Path) -> float:
    """Return the largest absolute difference of the two runs' tuned weights; raises where the files differ in kind."""
    largest = 0.0
    for name in ("vlm_adapter", "vdm_adapter"):
        a, b = (load_file(out / name / "adapter_model.safetensors") for out in (one, other))
        if a.keys() != b.keys():
            raise SystemExit(f"{name}: the runs export other parameters")
        largest = max(largest, *(float(np.abs(a[key].astype(np.float64) - b[key]).max()) for key in a))
    return largest


def evaluation(out: Path, arguments: list[str]) -> str:
    """Return the digest of the held-out table of the pair that ``out`` holds."""
    place = out / "evaluation"
    command = [sys.executable, "-m", "pipeline", "evaluate", *arguments, f"out={out}", "--out", str(place)]
    command += ["--vlm-adapter", str(out / "vlm_adapter"), "--vdm-adapter", str(out / "vdm_adapter")]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    table = json.loads((place / "table.json").read_text())
    return hashlib.sha256(json.dumps(table["systems"], sort_keys=True).encode()).hexdigest()[:12]


def main() -> int:
    """Run both, compare, print; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=20.0, help="how long faults are injected (default 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, nargs=2, default=(60, 40), help="steps of stage 1 and 2 (default 60 40)")
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"))
    options = parser.parse_args()
    out = options.out.resolve()
    if any(out.glob("*")):
        raise SystemExit(f"{out} is not empty; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    from pipeline.data.toy.shards import write_toy

    write_toy(out / "data", train=256, test=32, seed=options.seed)
    data = [f"data.train={out}/data/train", f"data.eval={out}/data/test", f"seed={options.seed}"]
    arguments = ["toy", *data, "deterministic=true", "checkpoint.every=2", "evaluate.samples=32"]
    arguments += [f"stage1.steps={options.steps[0]}", f"stage2.steps={options.steps[1]}"]
    arguments += [
        "stage1.rollout={prompts_per_step: 4, group_size: 4}",
        "stage2.rollout={prompts_per_step: 2, group_size: 4}",
    ]
    arguments += ["stage2.anchor_min_rouge=0.2", "pools.vdm.request_timeout_s=60", "pools.reward.request_timeout_s=60"]
    arguments += ["pools.vdm.start_timeout_s=90", "pools.reward.start_timeout_s=90", "learner.step_timeout_s=90"]
    arguments += ["pools.vdm.max_restarts=1000", "pools.vlm.max_restarts=1000", "pools.reward.max_restarts=1000"]
    with Nodes() as nodes:
        console.print("the undisturbed run …")
        peace = Soak(nodes, arguments, out / "peaceful", options.seed, until=0.0)
        peace.run()
        if peace.starts > 1:
            raise SystemExit(f"the undisturbed run did not come to its end by itself; see {peace.log}")
        console.print(f"the run under faults, for {options.minutes:g} minutes …")
        soak = Soak(nodes, arguments, out / "disturbed", options.seed, time.monotonic() + 60 * options.minutes)
        soak.run()
    expected, found = histories(peace.out), histories(soak.out)
    lost = doubled = changed = 0
    for stage, metrics in expected.items():
        for name, points in metrics.items():
            steps = Counter(step for step, _ in found.get(stage, {}).get(name, []))
            if name == "reward/total_mean":
                lost += sum(steps[step] == 0 for step, _ in points)
                doubled += sum(count - 1 for count in steps.values())
            changed += found.get(stage, {}).get(name) != points
    tables = [evaluation(run.out, arguments) for run in (peace, soak)]
    rows = Table("what", "figure", title=f"{sum(soak.faults.values())} faults, seed {options.seed}")
    for kind, count in sorted(soak.faults.items()):
        rows.add_row(f"faults injected: {kind}", str(count))
    rows.add_row("driver started", str(soak.starts))
    rows.add_row("steps lost", str(lost))
    rows.add_row("steps doubled", str(doubled))
    rows.add_row("metrics that differ", f"{changed} of {sum(map(len, expected.values()))}")
    largest = difference(peace.out, soak.out)
    rows.add_row("largest difference of a weight", f"{largest:g}")
    rows.add_row("held-out tables", f"{tables[0]} and {tables[1]}")
    console.print(rows)
    return int(bool(lost or doubled or changed or largest or tables[0] != tables[1]))


if __name__ == "__main__":
    sys.exit(main())
