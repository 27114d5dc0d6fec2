"""Row 12: from `vans train` to the first group that is sampled, drawn and scored, beside the sum of bare model loads."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pipeline.data.toy.shards import write_toy
from pipeline.fleet.models import resolve_model
from tests.benchmarks.bench import Check, Result, Size, medians, ratios

LOADS = {
    "vLLM engine": (
        "vlm",
        "from actors.vlm.engine_args import EngineSpec, engine_args, prepare_environment as p; "
        "spec = EngineSpec(sys.argv[1]); p(spec); from vllm import LLM; LLM(**engine_args(spec))",
    ),
    "WanPipeline": ("vdm", "from diffusers import WanPipeline; WanPipeline.from_pretrained(sys.argv[1])"),
    "CLIP": ("clip", "from transformers import CLIPModel; CLIPModel.from_pretrained(sys.argv[1])"),
    "learner's thinker": (
        "vlm",
        "from transformers import AutoModelForImageTextToText as M; M.from_pretrained(sys.argv[1])",
    ),
}
"""What loads each model, and nothing else; the process of each begins with nothing imported."""
COPIES = {"vLLM engine": 1, "WanPipeline": 2, "CLIP": 1, "learner's thinker": 2}
"""How many of them the toy run has: pools and learner ranks."""

CHILD = """
import sys, time
from pathlib import Path
from pipeline.stages.stage1 import Stage1
whole = Stage1.group
async def group(self, sample, step):
    found = await whole(self, sample, step)
    mark = Path(sys.argv[1])
    if not mark.exists():
        mark.write_text("")
    return found
Stage1.group = group
from pipeline.cli import app
app(sys.argv[2:])
"""


def load_s(name: str) -> float:
    """Return the seconds of a process that loads the model ``name`` and ends."""
    role, statement = LOADS[name]
    began = time.perf_counter()
    code = f"import sys\nif __name__ == '__main__':\n    {statement}\n    import os; print('loaded', flush=True)"
    with tempfile.TemporaryDirectory(prefix="bench-load-") as folder:
        script = Path(folder, "load.py")  # a file: vLLM's engine process imports it again
        script.write_text(code)
        command = [sys.executable, str(script), str(resolve_model("tiny", role))]  # type: ignore[arg-type]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            loaded = any(line.startswith("loaded") for line in process.stdout)
            took = time.perf_counter() - began
    if not loaded or process.returncode != 0:
        raise RuntimeError(f"loading {name} ended with {process.returncode}")
    return took


def first_rollout_s(folder: Path, turn: int) -> float:
    """Return the seconds from the command's start until the first group of stage 1 is whole."""
    mark = folder / f"mark{turn}"
    overrides = [f"out={folder}/run{turn}", f"data.train={folder}/toy/train", f"data.eval={folder}/toy/test"]
    overrides += ["stage1.steps=1", "stage2.steps=0", "checkpoint.every=0", "tracking.clips_every=0"]
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(mark), "train", "toy", *overrides],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not mark.exists():
            if process.poll() is not None:
                raise RuntimeError(f"the run ended with {process.returncode} before its first group")
            time.sleep(0.02)
        took = time.perf_counter() - began
        if process.wait(timeout=300) != 0:
            raise RuntimeError(f"the run ended with {process.returncode}")
        return took
    finally:
        process.kill()
        process.wait()


def measure(size: Size) -> Result:
    """Measure both in turn."""
    repeats = 3 if size == "full" else 1
    rounds: list[tuple[float, float]] = []
    loads: dict[str, list[float]] = {name: [] for name in LOADS}
    with tempfile.TemporaryDirectory(prefix="bench-start-") as name:
        folder = Path(name)
        write_toy(folder / "toy", train=64, test=8, seed=0)
        for turn in range(repeats):
            for each, found in loads.items():
                found.append(load_s(each))
            total = sum(COPIES[each] * found[-1] for each, found in loads.items())
            rounds.append((first_rollout_s(folder, turn), total))
    check = Check("seconds to the first group, `vans train` ÷ sum of bare loads", ratios(rounds), "≤", 1.5)
    figures = medians(rounds, "s, `vans train toy` to its first whole group", "s, sum of bare loads")
    figures |= {
        f"s, {each}, of which there are {COPIES[each]}": sorted(found)[repeats // 2] for each, found in loads.items()
    }
    notes = (
        "From the command until the first group of stage 1 is sampled, drawn and scored: Ray, pools, learner, data and tracking start",
        "in between. The sum is what the models that the toy run loads take one after the other, each in a process of its own that",
        "imports its library, loads and ends: the vLLM engine, two artists, one CLIP, and the thinker of two learner ranks.",
    )
    return Result((check,), figures, notes)
