"""What the real-size benchmark measures with: sizes, a meter of seconds, memory and operations, the card's own rate."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

TINY = Path(__file__).resolve().parents[2] / "pipeline" / "assets" / "tiny"


CAPTION = "the red circle moves up"


@dataclass(frozen=True)
class Size:
    """What is measured: models, the clip, the group, and how the learner cuts it."""

    vlm: str
    vdm: str
    clip: str
    frames: tuple[int, int, int]  # of a clip: number, height, width
    references: int
    input_frames: tuple[int, int, int]  # of the VLM's video
    group: int
    steps: int
    completion: int  # tokens
    text_tokens: int
    micro_batch: int
    vlm_micro_batch: int
    dtype: torch.dtype
    rounds: int = 3  # of what is compared turn by turn


REAL = Size(
    vlm="Qwen/Qwen2.5-VL-3B-Instruct",
    vdm="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    clip="openai/clip-vit-large-patch14",
    frames=(33, 352, 640),
    references=6,
    input_frames=(16, 252, 448),
    group=8,
    steps=10,
    completion=256,
    text_tokens=512,
    micro_batch=2,
    vlm_micro_batch=2,
    dtype=torch.bfloat16,
)


SIZES = {
    "real": REAL,
    "tiny": replace(
        REAL,
        vlm=str(TINY / "vlm"),
        vdm=str(TINY / "vdm"),
        clip=str(TINY / "clip"),
        frames=(9, 32, 32),
        references=2,
        input_frames=(9, 32, 32),
        steps=4,
        completion=16,
        text_tokens=16,
        micro_batch=4,
        vlm_micro_batch=4,
        rounds=1,
    ),
}


class Meter:
    """Seconds, peak memory and achieved operations of named parts."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self.parts: dict[str, dict[str, float]] = {}
        self.compared: dict[str, dict[str, Any]] = {}

    def compare(self, name: str, ours: Callable[[], Any], other: Callable[[], Any], rounds: int) -> None:
        """Call both in turn, after a round that does not count; note seconds, other ÷ ours, and how far results differ."""
        found: list[tuple[float, float]] = []
        results: list[Any] = []
        for turn in range(rounds + 1):
            order = (0, 1) if turn % 2 else (1, 0)
            taken, results = [0.0, 0.0], [None, None]
            for i in order:
                self.wait()
                started = time.perf_counter()
                results[i] = (ours, other)[i]()
                self.wait()
                taken[i] = time.perf_counter() - started
            found.append((taken[0], taken[1]))
        a, b = (torch.as_tensor(r).double() for r in results)
        ratios = [y / x for x, y in found[1:]]
        self.compared[name] = {
            "ours_s": [x for x, _ in found[1:]],
            "other_s": [y for _, y in found[1:]],
            "other_over_ours": float(np.median(ratios)),
            "largest_difference": float((a - b).abs().max()),
            "largest_value": float(b.abs().max()),
        }
        print(name, self.compared[name], flush=True)

    def wait(self) -> None:
        """Wait until the device has nothing to do."""
        if self.cuda:
            torch.cuda.synchronize()

    def run(self, name: str, work: Callable[[], Any], flops: float = 0.0, repeat: int = 1) -> Any:
        """Call ``work`` ``repeat`` times and note what the last call took."""
        result = None
        for _ in range(repeat):
            result = None
            gc.collect()
            if self.cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            result = work()
            if self.cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
        self.parts[name] = {"seconds": seconds, "tflop": flops / 1e12, "tflop_per_s": flops / seconds / 1e12}
        if self.cuda:
            self.parts[name]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        print(name, {k: round(v, 4) for k, v in self.parts[name].items()}, flush=True)
        return result


def matmul_rate(device: torch.device, side: int, dtype: torch.dtype) -> float:
    """Return the operations per second of a square matrix product, the best of 10."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def frames_of(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3)).astype(np.uint8)
