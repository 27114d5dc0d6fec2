"""Service times of a run that was: what its MLflow runs and its ``pools.jsonl`` recorded, as seconds of a worker per piece of work.

A run says how long its own settings take on its own machines, so it can stand in only for a run whose models, shapes and sampling
are the same; numbers of workers, ranks, prompts and steps may differ.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from cluster.errors import ConfigError
from pipeline.config import RunConfig, flatten, load_config
from pipeline.control.trace import TRACE_FILE, read_trace
from pipeline.fleet.rewards import reward_models
from pipeline.plan.models import score_of

_SAME = (
    "models.",
    "video.",
    "training",
    "pools.vlm.dtype",
    "pools.vlm.tensor_parallel",
    "pools.vdm.dtype",
    "learner.dtype",
    "learner.activation_checkpointing",
    "learner.micro_batch",
    "learner.micro_completions",
    "learner.shared_prompts",
)
_SAME_IN_STAGES = (
    "rollout.group_size",
    "text.",
    "render.",
    "sde.window_size",
    "grpo.kl_beta",
    "grpo.old_logprobs",
    "grpo.gate_every",
    "lora.rank",
)
_PREFIXES = ("pool/vdm/", "pool/reward/", "time/update_s", "time/publish_s")


@dataclass(frozen=True)
class Measured:
    """What a run took. Keys are (stage, demand), as ``pipeline.plan.demands`` names them."""

    run: str
    unit_s: Mapping[tuple[str, str], float]
    """Seconds of one worker or rank per request or experience; of publishing per step."""
    per_step: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """Requests per step and prompt: fewer than planned where captions are equal or malformed."""


def read_run(folder: str | Path, config: RunConfig) -> Measured:
    """Return what the run in ``folder`` took, for a plan of ``config``.

    Raises ConfigError where the folder is not a run's, has recorded nothing, or is of a run that ``config`` cannot be compared with
    (the message names the keys).
    """
    from pipeline.tracking.history import newest_parent, read_stages, stage_windows
    from pipeline.tracking.tracker import has_store, location

    root = Path(folder)
    if not (root / "config.yaml").is_file():
        raise ConfigError(f"--measured {folder}: not a run's folder, there is no config.yaml in it")
    its = load_config(root / "config.yaml")
    different = incomparable(its, config)
    if different:
        raise ConfigError(
            f"--measured {folder}: that run differs in {', '.join(different)}, so its times say nothing of this one"
        )
    uri, _ = location(root, its.tracking)
    absent = not has_store(root, its.tracking)  # asking would make it
    parent = None if absent else newest_parent(uri, its.tracking.experiment, its.name)
    stages = read_stages(uri, parent, _PREFIXES) if parent else {}
    windows = stage_windows(uri, parent) if parent else {}
    unit_s: dict[tuple[str, str], float] = {}
    per_step: dict[tuple[str, str], float] = {}
    for stage, series in stages.items():
        if stage not in ("stage1", "stage2"):
            continue
        section = getattr(its, stage)
        prompts, group = section.rollout.prompts_per_step, section.rollout.group_size
        judges = [(pool, score_of(pool)) for pool in reward_models(its)]
        for pool, demand in (("vdm", "draw"), ("reward", "score"), *judges):
            served = per_request(series, pool)
            if served is not None:
                unit_s[stage, demand], requests = served
                per_step[stage, demand] = requests / prompts
        for metric, demand, factor in (
            ("time/update_s", "learn", its.learner.ranks / (prompts * group)),
            ("time/publish_s", "publish", 1.0),
        ):
            if values := [value for _, value in series.get(metric, ())]:
                unit_s[stage, demand] = median(values) * factor
    if (root / TRACE_FILE).is_file():
        trace = read_trace(root / TRACE_FILE)
        # Completions cost the thinker far more than stage 2's anchors, so stage 1 alone says what they take.
        thinking = busy_per_request(trace, "vlm", windows.get("stage1", (0.0, float("inf"))))
        if thinking is not None:
            unit_s["stage1", "think"] = thinking
        anchors = busy_per_request(trace, "vlm", windows["stage2"]) if "stage2" in windows else None
        if anchors is not None:
            unit_s["stage2", "anchor"] = anchors
    if not unit_s:
        raise ConfigError(
            f"--measured {folder}: nothing is recorded there: neither MLflow metrics of its stages at its tracking store, nor "
            f"{TRACE_FILE} (control.trace_every_s)"
        )
    return Measured(str(folder), unit_s, per_step)


def incomparable(its: RunConfig, ours: RunConfig) -> list[str]:
    """Return the keys that change how long one piece of work takes, and in which the two configurations differ."""
    stages = tuple(f"{stage}.{key}" for stage in ("stage1", "stage2") for key in _SAME_IN_STAGES)
    theirs, mine = flatten(its), flatten(ours)
    keys = sorted({*theirs, *mine})
    return [key for key in keys if key.startswith(_SAME + stages) and theirs.get(key) != mine.get(key)]


def per_request(series: Mapping[str, Sequence[tuple[int, float]]], pool: str) -> tuple[float, float] | None:
    """Return (seconds of a worker per request, requests per step) of a pool whose workers have one call at a time.

    From the totals after each step; where a resumed run counts anew, that step is left out. None without two steps.
    """
    done = dict(series.get(f"pool/{pool}/done", ()))
    busy = dict(series.get(f"pool/{pool}/service_total_s", ()))
    requests, seconds, steps = 0.0, 0.0, 0
    for before, after in itertools.pairwise(sorted(done.keys() & busy.keys())):
        if after == before + 1 and done[after] > done[before] and busy[after] > busy[before]:
            requests, seconds, steps = (
                requests + done[after] - done[before],
                seconds + busy[after] - busy[before],
                steps + 1,
            )
    return (seconds / requests, requests / steps) if requests else None


def busy_per_request(trace: Iterable[Mapping[str, Any]], pool: str, window: tuple[float, float]) -> float | None:
    """Return the seconds that a worker of ``pool`` had calls under way per request answered, within ``window``.

    That is the time that a request costs whatever the number of calls a worker has at once. None without any.
    """
    points = [
        (line["time"], line["pools"][pool])
        for line in trace
        if window[0] <= line["time"] <= window[1] and pool in line.get("pools", {})
    ]
    busy = requests = 0.0
    for (began, before), (ended, after) in itertools.pairwise(points):
        if after["done"] < before["done"]:  # another process: it was resumed
            continue
        busy += 0.5 * (before["busy_ratio"] * before["ready"] + after["busy_ratio"] * after["ready"]) * (ended - began)
        requests += after["done"] - before["done"]
    return busy / requests if requests else None
