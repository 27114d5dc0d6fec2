"""The evaluation table: metrics of several systems on the same samples, as markdown and JSON.

Responsible for means, intervals and layout. The numbers per answer come from ``score``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.evaluate.bootstrap import Estimate, mean_estimate
from rewards.alarms import AlarmSettings, judge
from rewards.frechet import FrechetDistance, frechet_distance, fvd_name
from rewards.text import BLEU_ORDERS, bleu

GROUPS = ("all", "procedural", "predictive")

METRICS: dict[str, str] = {
    "rouge_l": "ROUGE-L ↑",
    **{f"bleu_{n}": f"BLEU@{n} ↑" for n in BLEU_ORDERS},
    "frechet": "FVD ↓",
    "clip_v": "CLIP-V ↑",
    "clip_t": "CLIP-T, own caption ↑",
    "clip_t_truth": "CLIP-T, true caption ↑",
    "follow": "follow ↑",
    "event": "event named ↑",
    "faithful": "faithful ↑",
    "drawable": "drawable ↑",
    "format": "format ↑",
    "answered": "answered ↑",
}
"""Metric → its heading, in the order of the table; what each means is in docs/evaluation.md."""

SIGNS: dict[str, str] = {
    "motion_ratio": "motion ÷ truth (1)",
    "copy_excess": "copy excess (0)",
    "sharpness_ratio": "sharpness ÷ truth (1)",
    "saturation_shift": "saturation shift (0)",
    "caption_truncated": "captions cut by CLIP (0)",
}
"""Diagnostics of reward hacking → heading; in brackets what ground truth itself has."""

HEADINGS = METRICS | SIGNS


@dataclass(frozen=True, eq=False)
class Answered:
    """One answer with its numbers. ``values`` holds only what applies (a missing video has no CLIP-V)."""

    id: str
    index: int
    kind: str
    caption: str
    reference: str
    values: dict[str, float]
    features: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class SystemResult:
    """One system's metrics: group → metric → estimate, its Fréchet distances by group, and its answers."""

    name: str
    metrics: dict[str, dict[str, Estimate]]
    frechet: dict[str, FrechetDistance]
    answers: tuple[Answered, ...]


@dataclass(frozen=True, eq=False)
class EvaluationTable:
    """Systems compared on the same samples. ``samples``: group → how many; ``extractor`` names the Fréchet features."""

    systems: dict[str, SystemResult]
    samples: dict[str, int]
    extractor: str
    seed: int = 0

    def figures(self, system: str, group: str = "all") -> dict[str, float]:
        """Return one system's metrics as plain numbers, and ``n``, the number of samples."""
        return {name: e.value for name, e in self.systems[system].metrics[group].items()} | {"n": self.samples[group]}

    def difference(self, system: str, baseline: str, metric: str, group: str = "all") -> Estimate | None:
        """Return the mean paired difference ``system`` − ``baseline`` with its interval, where both have it."""
        a, b = (_per_sample(self.systems[s].answers, metric, group) for s in (system, baseline))
        both = [i for i in a if i in b]
        return mean_estimate([a[i] - b[i] for i in both], self.seed) if both else None

    def alarms(self, system: str) -> tuple[str, ...]:
        """Return what in the system's clips looks like reward hacking, in words."""
        return tuple(judge({n: e.value for n, e in self.systems[system].metrics["all"].items()}, AlarmSettings()).values())

    def markdown(self) -> str:
        """Return the table for people: all samples with intervals, then procedural / predictive."""
        names = list(self.systems)
        delta = names[-1] if len(names) > 1 else None
        parts = [
            f"**All {self.samples['all']} samples** (mean [95% bootstrap interval over samples])",
            _grid(["", *names] + ([f"{delta} − {names[0]}"] if delta else []), self._rows_all(names, delta, METRICS)),
        ]
        kinds = [g for g in GROUPS[1:] if self.samples.get(g)]
        if len(kinds) > 1:
            counts = " / ".join(f"{self.samples[g]} {g}" for g in kinds)
            parts += [
                f"**By kind: {' / '.join(kinds)}** ({counts})",
                _grid(["", *names], self._rows_kinds(names, kinds)),
            ]
        if signs := self._rows_all(names, None, SIGNS):
            parts += ["**Signs of reward hacking** (in brackets: what ground truth has)", _grid(["", *names], signs)]
        parts.append(self._notes(names))
        return "\n\n".join(parts) + "\n"

    def to_json(self) -> dict[str, Any]:
        """Return everything but features as JSON-ready values."""
        return {
            "samples": self.samples,
            "extractor": self.extractor,
            "systems": {
                name: {
                    "metrics": {g: {m: asdict(e) for m, e in values.items()} for g, values in result.metrics.items()},
                    "frechet": {g: {"name": d.name, **asdict(d)} for g, d in result.frechet.items()},
                    "alarms": list(self.alarms(name)),
                    "answers": [
                        {
                            "id": a.id,
                            "index": a.index,
                            "kind": a.kind,
                            "caption": a.caption,
                            "truth": a.reference,
                            **a.values,
                        }
                        for a in result.answers
                    ],
                }
                for name, result in self.systems.items()
            },
        }

    def write(self, folder: Path) -> None:
        """Write ``table.md`` and ``table.json`` into ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.md").write_text(self.markdown(), encoding="utf-8")
        (folder / "table.json").write_text(
            json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )

    def _present(self, group: str, choice: Mapping[str, str] = METRICS) -> list[str]:
        return [m for m in choice if any(m in r.metrics.get(group, {}) for r in self.systems.values())]

    def _heading(self, metric: str) -> str:
        return HEADINGS[metric].replace("FVD", fvd_name(self.extractor)) if metric == "frechet" else HEADINGS[metric]

    def _rows_all(self, names: Sequence[str], delta: str | None, choice: Mapping[str, str]) -> list[list[str]]:
        rows = []
        for metric in self._present("all", choice):
            estimates = [self.systems[n].metrics["all"].get(metric) for n in names]
            row = [
                self._heading(metric),
                *(_value(metric, e, _interval(e) + self._count(n, e)) for n, e in zip(names, estimates)),
            ]
            if delta:
                row.append(self._change(delta, names[0], metric))
            rows.append(row)
        return rows

    def _rows_kinds(self, names: Sequence[str], kinds: Sequence[str]) -> list[list[str]]:
        metrics = [m for m in self._present("all") if any(m in self._present(k) for k in kinds)]
        return [
            [
                self._heading(m),
                *(" / ".join(_value(m, self.systems[n].metrics[k].get(m)) for k in kinds) for n in names),
            ]
            for m in metrics
        ]

    def _count(self, name: str, estimate: Estimate | None) -> str:
        return f" (n={estimate.n})" if estimate is not None and estimate.n != self.samples["all"] else ""

    def _change(self, system: str, baseline: str, metric: str) -> str:
        paired = self.difference(system, baseline, metric)
        if paired is not None:
            return _value(metric, paired, _interval(paired, "+"), "+")
        new, old = (self.systems[s].metrics["all"].get(metric) for s in (system, baseline))
        if new is None or old is None or new.n != old.n:  # corpus metrics compare at equal N only
            return "–"
        return (_distance if metric == "frechet" else _digits)(new.value - old.value, "+")

    def _notes(self, names: Sequence[str]) -> str:
        lines = []
        for name in names:
            distances = self.systems[name].frechet
            if not distances:
                continue
            counts = ", ".join(f"{g} N={d.n}" for g, d in distances.items())
            dim = next(iter(distances.values())).dim
            weak = [g for g, d in distances.items() if not d.well_posed]
            warn = f"; {' and '.join(weak)}: fewer clips than features, only roughly estimated" if weak else ""
            lines.append(
                f"- {fvd_name(self.extractor)} of {name}: {dim} features, {counts}{warn}. Compare at equal N only."
            )
        for name in names:
            lines += [f"- **alarm** {name}: {text}" for text in self.alarms(name)]
        return "\n".join(lines)


def build_table(answers: Mapping[str, Sequence[Answered]], extractor: str, *, seed: int = 0) -> EvaluationTable:
    """Return the table of each system's answers; every system must have answered the same samples."""
    systems: dict[str, SystemResult] = {}
    samples: dict[str, int] = {}
    for name, found in answers.items():
        metrics: dict[str, dict[str, Estimate]] = {}
        distances: dict[str, FrechetDistance] = {}
        for group in GROUPS:
            members = [a for a in found if group in ("all", a.kind)]
            samples[group] = len({a.id for a in members})
            metrics[group], distance = _estimates(members, extractor, seed)
            if distance is not None:
                distances[group] = distance
        systems[name] = SystemResult(name, metrics, distances, tuple(found))
    return EvaluationTable(systems, samples, extractor, seed)


def _estimates(
    members: Sequence[Answered], extractor: str, seed: int
) -> tuple[dict[str, Estimate], FrechetDistance | None]:
    if not members:
        return {}, None
    count = len({a.id for a in members})
    found = {m: mean_estimate(list(v.values()), seed) for m in HEADINGS if (v := _per_sample(members, m, "all"))}
    found |= {
        n: Estimate(v, count) for n, v in bleu([a.caption for a in members], [a.reference for a in members]).items()
    }
    clips = [a.features for a in members if a.features]
    if len(clips) < 2:
        return found, None
    distance = frechet_distance(np.stack([c["clip"] for c in clips]), np.stack([c["target"] for c in clips]), extractor)
    return found | {"frechet": Estimate(distance.value, distance.n)}, distance


def _per_sample(answers: Sequence[Answered], metric: str, group: str) -> dict[str, float]:
    """Return sample id → the metric's mean over the sample's answers."""
    values: dict[str, list[float]] = {}
    for answer in answers:
        if group in ("all", answer.kind) and metric in answer.values:
            values.setdefault(answer.id, []).append(answer.values[metric])
    return {i: float(np.mean(v)) for i, v in values.items()}


def _value(metric: str, estimate: Estimate | None, suffix: str = "", sign: str = "") -> str:
    """Return an estimate's value as text, or a dash where there is none."""
    if estimate is None:
        return "–"
    return (_distance if metric == "frechet" else _digits)(estimate.value, sign) + suffix


def _interval(estimate: Estimate | None, sign: str = "") -> str:
    if estimate is None or estimate.low is None or estimate.high is None:
        return ""
    return f" [{_digits(estimate.low, sign)}, {_digits(estimate.high, sign)}]"


def _digits(value: float, sign: str = "") -> str:
    return format(value, f"{sign}.3f")


def _distance(value: float, sign: str = "") -> str:
    """Return four significant digits: the scale of a Fréchet distance is its features' own."""
    return format(value, f"{sign}.4g") if abs(value) > 1e-9 else "0"


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table whose columns line up in plain text too."""
    cells = [[c.replace("|", "\\|") for c in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])
