"""``vans profile RUN``: where the steps of a run went, read from what it has logged; for a run that goes on or has ended."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cluster.errors import ConfigError
from pipeline.config import load_config
from pipeline.support.location import local_path
from pipeline.tracking.history import Series, newest_parent, read_stages
from pipeline.tracking.tracker import has_store, location

PARTS = {
    "wait for the rollout": "time/wait_s",
    "pools give up memory": "time/rest_s",
    "update": "time/update_s",
    "publish": "time/publish_s",
    "held-out evaluation": "time/evaluate_s",
}


@dataclass(frozen=True)
class PoolShare:
    """A pool's seconds in a step, summed over its workers (busy, idle) or requests (waiting); means over steps."""

    busy_s: float
    idle_s: float
    wait_s: float

    @property
    def busy(self) -> float:
        """Share of its workers' time that was work."""
        lived = self.busy_s + self.idle_s
        return self.busy_s / lived if lived else 0.0


@dataclass(frozen=True)
class Speed:
    """How fast a pool or learner works, as means over the steps in which it did. None is what is not known, as an MFU on CPUs."""

    unit: str
    """What ``per_s`` counts: tokens, or latents."""
    per_s: float
    flops_per_s: float | None
    mfu: float | None


@dataclass(frozen=True)
class StageProfile:
    """Means over ``steps`` steps of one stage. ``parts``: the chain of what the driver waits for; they add up to ``step_s``."""

    stage: str
    steps: int
    step_s: float
    lower_bound_s: float
    pools: dict[str, PoolShare]
    parts: dict[str, float]
    speeds: dict[str, Speed] = field(default_factory=dict)

    @property
    def gap_ratio(self) -> float:
        """Share of the step above the lower bound."""
        return 1.0 - self.lower_bound_s / self.step_s if self.step_s else 0.0

    @property
    def bottleneck(self) -> str:
        """The pool whose workers are busiest, or the learner where it takes longer than all of them."""
        learner = self.parts["update"] + self.parts["publish"]
        name = max(self.pools, key=lambda pool: self.pools[pool].busy, default="learner")
        return "learner" if not self.pools or learner > self.step_s * self.pools[name].busy else name

    def advice(self) -> str:
        """Return one sentence about what would help most."""
        if self.gap_ratio > 0.3:
            return (
                f"{self.gap_ratio:.0%} of a step is above the lower bound: it waits rather than works (few prompts per step, "
                "stragglers, rollout and update one after the other: rollout.max_staleness)"
            )
        if self.bottleneck == "learner":
            return "the learner takes longest: more ranks (learner.ranks), or a larger learner.micro_batch"
        return f"pool {self.bottleneck} is the bottleneck: more workers there (vans scale RUN {self.bottleneck}=N)"

    def as_json(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return asdict(self) | {"gap_ratio": self.gap_ratio, "bottleneck": self.bottleneck, "advice": self.advice()}


def summarise(
    stage: str, series: Mapping[str, Sequence[tuple[int, float]]], last: int | None = None
) -> StageProfile | None:
    """Return the profile of ``stage`` over its ``last`` steps (all without), or None where it recorded none.

    The first step of a process is left out where there are others: it waits for caches and for the first decoded batch.
    """
    steps = [step for step, _ in series.get("profile/step_s", ())]
    chosen = set(steps[1:] or steps)
    if last is not None:
        chosen = set(sorted(chosen)[-last:])
    if not chosen:
        return None

    def known(name: str) -> float | None:
        values = [value for step, value in series.get(name, ()) if step in chosen]
        return fmean(values) if values else None

    def mean(name: str) -> float:
        return known(name) or 0.0

    names = sorted({name.split("/")[1] for name in series if name.startswith("profile/") and name.count("/") == 2})
    pools = {n: PoolShare(*(mean(f"profile/{n}/{part}_s") for part in ("busy", "idle", "wait"))) for n in names}
    whole = mean("profile/step_s")
    parts = {title: mean(name) for title, name in PARTS.items()}
    parts["tracking, checkpoint, the rest"] = max(0.0, whole - sum(parts.values()))
    speeds: dict[str, Speed] = {}
    for name in sorted(series):
        party, _, unit = name.removeprefix("speed/").removesuffix("_per_s").rpartition("/")
        per_s = known(name) if name.startswith("speed/") and unit in ("tokens", "latents") else None
        if per_s is not None:
            speeds[party] = Speed(unit, per_s, known(f"speed/{party}/flops_per_s"), known(f"speed/{party}/mfu"))
    return StageProfile(stage, len(chosen), whole, mean("profile/lower_bound_s"), pools, parts, speeds)


def read_profiles(folder: str | Path, last: int | None = None) -> list[StageProfile]:
    """Return the profiles of the stages of the run in ``folder``.

    Raises ConfigError where it is no run's folder, or the run has not logged a step yet.
    """
    root = local_path(folder)
    if not (root / "config.yaml").is_file():
        raise ConfigError(
            f"{folder}: not a run's folder, there is no config.yaml in it (a run's is its `out`, such as runs/toy)"
        )
    config = load_config(root / "config.yaml")
    uri, _ = location(root, config.tracking)
    found: dict[str, Series] = {}
    if has_store(root, config.tracking) and (parent := newest_parent(uri, config.tracking.experiment, config.name)):
        found = read_stages(uri, parent, ("profile/", "speed/", *PARTS.values()))
    profiles = [profile for stage, series in sorted(found.items()) if (profile := summarise(stage, series, last))]
    if not profiles:
        raise ConfigError(
            f"{folder}: no step of this run is in MLflow ({uri}) yet; a step's times are logged when it ends"
        )
    return profiles


def tables(profiles: Sequence[StageProfile]) -> RenderableType:
    """Return the profiles for people."""
    parts: list[RenderableType] = []
    for found in profiles:
        head = f"{found.stage} · mean of {found.steps} steps · {found.step_s:.2f} s a step"
        bound = f"lower bound {found.lower_bound_s:.2f} s, gap {found.gap_ratio:.0%}"
        parts.append(Text(f"{head} · {bound}", style="bold"))
        pools = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("pool", "busy", "busy s", "idle s", "requests waited s"):
            pools.add_column(name, justify="left" if name == "pool" else "right")
        for name, share in found.pools.items():
            figures = (f"{share.busy:.0%}", *(f"{value:.2f}" for value in (share.busy_s, share.idle_s, share.wait_s)))
            pools.add_row(name, *figures)
        chain = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        chain.add_column("the driver's chain")
        chain.add_column("s", justify="right")
        chain.add_column("of the step", justify="right")
        for name, value in found.parts.items():
            if value > 0:
                chain.add_row(name, f"{value:.2f}", f"{value / found.step_s:.0%}" if found.step_s else "")
        parts += [pools, chain, *([_speeds(found.speeds)] if found.speeds else [])]
        parts.append(Text(found.advice() + "\n", style="green"))
    return Group(*parts)


def _speeds(speeds: Mapping[str, Speed]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("at work", "per second", "FLOP/s", "MFU"):
        table.add_column(name, justify="left" if name == "at work" else "right")
    for party, speed in speeds.items():
        flops = "–" if speed.flops_per_s is None else _prefixed(speed.flops_per_s)
        mfu = "–" if speed.mfu is None else f"{speed.mfu:.1%}"
        table.add_row(party, f"{speed.per_s:,.4g} {speed.unit}", flops, mfu)
    return table


def _prefixed(value: float) -> str:
    """Return ``value`` with three digits and a prefix of the SI: 2.5e12 → ``2.5 T``."""
    power = min(5, max(0, int(math.log10(value)) // 3)) if value >= 1 else 0
    return f"{value / 1000**power:.3g} {' kMGTP'[power]}".rstrip()
