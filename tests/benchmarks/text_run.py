"""A real run of stage 1 whose rewards are those of the text alone, so that no clip is drawn."""

from __future__ import annotations

from pathlib import Path

from cluster.session import connect
from pipeline.config import load_config
from pipeline.run.train import run_training


def text_run(folder: Path, name: str, *overrides: str) -> list[dict[str, float]]:
    """Train the bundled thinker on the toy shards in ``folder``/toy, in a Ray of its own; return each step's metrics."""
    settings = [f"out={folder}/{name}", f"data.train={folder}/toy/train", f"data.eval={folder}/toy/test"]
    settings += ["stage2.steps=0", "checkpoint.every=0", "pools.vdm.workers=1"]
    settings += ["stage1.rewards.weights={format: 1.0, rouge_l: 1.0}", *overrides]
    with connect(local_cpus=8):
        report = run_training(load_config("toy", settings))
    return report.stages["stage1"].history
