"""The evaluation table: metrics of several systems on the same samples, as markdown and JSON.

Responsible for which metrics there are and for the layout. Values and intervals are ``figures``, the numbers per answer
come from ``score``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from cluster.harmless import in_markdown
from pipeline.evaluate.bootstrap import Estimate
from pipeline.evaluate.figures import FRECHET, Answered, Difference, Frechet, difference_of, measure, value_of
from rewards.alarms import AlarmSettings, judge
from rewards.frechet import FrechetDistance, fvd_name
from rewards.text import BLEU_ORDERS

GROUPS = ("all", "procedural", "predictive")

METRICS: dict[str, str] = {
    "rouge_l": "ROUGE-L ↑",
    **{f"bleu_{n}": f"BLEU@{n} ↑" for n in BLEU_ORDERS},
    FRECHET: "FVD ↓",
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


def require_metric(name: str, rewards: Sequence[str] = ()) -> bool:
    """Return whether a higher ``name`` is better; raises ConfigError, with the known ones, where it is no metric of the table.

    ``rewards`` are those that are measured too (evaluate.rewards).
    """
    if name in rewards:
        return True
    if name not in METRICS:
        known = ", ".join(f"{metric} {heading[-1]}" for metric, heading in METRICS.items())
        raise ConfigError(
            f"evaluate.metric={name!r} is not known. Known, and whether higher (↑) or lower (↓) is better: {known}; and those of "
            "evaluate.rewards"
        )
    return METRICS[name].endswith("↑")


SIGNS: dict[str, str] = {
    "motion_ratio": "motion ÷ truth (1)",
    "copy_excess": "copy excess (0)",
    "sharpness_ratio": "sharpness ÷ truth (1)",
    "saturation_shift": "saturation shift (0)",
    "caption_truncated": "captions cut by CLIP (0)",
}
"""Diagnostics of reward hacking → heading; in brackets what ground truth itself has."""

HEADINGS = METRICS | SIGNS


def heading(metric: str) -> str:
    """Return the heading of ``metric``; one that is not of the table is a reward, which has none but its name."""
    return HEADINGS.get(metric, f"{metric} ↑")


@dataclass(frozen=True, eq=False)
class SystemResult:
    """One system's metrics: group → metric → estimate, its Fréchet distances by group, and its answers."""

    name: str
    metrics: dict[str, dict[str, Estimate]]
    frechet: dict[str, FrechetDistance]
    answers: tuple[Answered, ...]


@dataclass(frozen=True, eq=False)
class EvaluationTable:
    """Systems compared on the same samples. ``samples``: group → how many; ``extractor`` names the Fréchet features.

    ``compare``: (baseline, system), the two that are compared sample by sample; None where there is one system.
    """

    systems: dict[str, SystemResult]
    samples: dict[str, int]
    extractor: str
    seed: int = 0
    compare: tuple[str, str] | None = None
    settings: AlarmSettings = field(default_factory=AlarmSettings)

    def figures(self, system: str, group: str = "all") -> dict[str, float]:
        """Return one system's metrics as plain numbers, and ``n``, the number of samples."""
        return {name: e.value for name, e in self.systems[system].metrics[group].items()} | {"n": self.samples[group]}

    def difference(self, system: str, baseline: str, metric: str, group: str = "all") -> Difference | None:
        """Return ``system`` − ``baseline`` over the samples that both have the metric for, by a paired bootstrap."""
        new, old = (_members(self.systems[name].answers, group) for name in (system, baseline))
        return difference_of(measure(metric, self.extractor), new, old, self.seed)

    @cached_property
    def comparison(self) -> dict[str, dict[str, Difference]]:
        """Group → metric → difference of the two systems in ``compare``; empty without."""
        if self.compare is None:
            return {}
        baseline, system = self.compare
        found = {
            g: {
                m: d
                for m in self._present(g, self.metrics | SIGNS)
                if (d := self.difference(system, baseline, m, g)) is not None
            }
            for g in GROUPS
        }
        return {group: differences for group, differences in found.items() if differences}

    @cached_property
    def metrics(self) -> dict[str, str]:
        """Metric → heading: those of every table, and the rewards that these answers were measured by."""
        found = dict.fromkeys(m for r in self.systems.values() for m in r.metrics["all"] if m not in HEADINGS)
        return METRICS | {metric: heading(metric) for metric in found}

    def alarms(self, system: str) -> tuple[str, ...]:
        """Return what in the system's clips looks like reward hacking, in words."""
        signs = {name: e.value for name, e in self.systems[system].metrics["all"].items() if name in SIGNS}
        return tuple(judge(signs, self.settings).values())

    def markdown(self) -> str:
        """Return the table for people: all samples with intervals, by kind, signs, the comparison, notes."""
        names = list(self.systems)
        parts = [
            f"**All {self.samples['all']} samples** (mean [95% bootstrap interval over samples])",
            markdown_grid(["", *names], self._rows_all(names, self.metrics)),
        ]
        kinds = self._kinds()
        if len(kinds) > 1:
            counts = " / ".join(f"{self.samples[g]} {g}" for g in kinds)
            parts += [
                f"**By kind: {' / '.join(kinds)}** ({counts})",
                markdown_grid(["", *names], self._rows_kinds(names, kinds)),
            ]
        if signs := self._rows_all(names, SIGNS):
            parts += [
                "**Signs of reward hacking** (in brackets: what ground truth has)",
                markdown_grid(["", *names], signs),
            ]
        if self.comparison:
            parts += self._compared()
        parts.append(self._notes(names))
        return "\n\n".join(parts) + "\n"

    def to_json(self) -> dict[str, Any]:
        """Return everything but features as JSON-ready values."""
        return {
            "samples": self.samples,
            "extractor": self.extractor,
            "comparison": self.comparison
            and {
                "baseline": self.compare and self.compare[0],
                "system": self.compare and self.compare[1],
                "differences": {g: {m: asdict(d) for m, d in found.items()} for g, found in self.comparison.items()},
            },
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
                            **({"lost": a.lost} if a.lost else {}),
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

    def _present(self, group: str, choice: Mapping[str, str]) -> list[str]:
        return [m for m in choice if any(m in r.metrics.get(group, {}) for r in self.systems.values())]

    def _heading(self, metric: str) -> str:
        return heading(metric).replace("FVD", fvd_name(self.extractor)) if metric == FRECHET else heading(metric)

    def _kinds(self) -> list[str]:
        return [g for g in GROUPS[1:] if self.samples.get(g)]

    def _rows_all(self, names: Sequence[str], choice: Mapping[str, str]) -> list[list[str]]:
        rows = []
        for metric in self._present("all", choice):
            estimates = [self.systems[n].metrics["all"].get(metric) for n in names]
            cells = (
                _value(metric, e, _interval(metric, e) + self._count(metric, n, e)) for n, e in zip(names, estimates)
            )
            rows.append([self._heading(metric), *cells])
        return rows

    def _compared(self) -> list[str]:
        """Return title and table of the comparison: the difference over all samples, and apart for each kind."""
        assert self.compare is not None
        baseline, system = self.compare
        kinds = self._kinds()
        groups = ["all", *(kinds if len(kinds) > 1 else [])]
        rows = []
        for metric in self.metrics:
            if metric in self.comparison["all"]:
                found = [self.comparison.get(group, {}).get(metric) for group in groups]
                cells = ["–" if d is None else _number(metric, d.value, "+") + _interval(metric, d, "+") for d in found]
                whole = self.comparison["all"][metric]
                rows.append([self._heading(metric), cells[0], f"{whole.differ} of {whole.n}", *cells[1:]])
        title = (
            f"**{in_markdown(system)} − {in_markdown(baseline)}**, "
            "sample by sample (mean difference [95% paired bootstrap interval], and the samples "
            "on which they differ)"
        )
        return [title, markdown_grid(["", "all", "differ", *groups[1:]], rows)]

    def _rows_kinds(self, names: Sequence[str], kinds: Sequence[str]) -> list[list[str]]:
        metrics = [
            m
            for m in self._present("all", self.metrics)
            if any(m in self.systems[n].metrics[k] for k in kinds for n in names)
        ]
        return [
            [
                self._heading(m),
                *(" / ".join(_value(m, self.systems[n].metrics[k].get(m)) for k in kinds) for n in names),
            ]
            for m in metrics
        ]

    def _count(self, metric: str, name: str, estimate: Estimate | None) -> str:
        if metric == FRECHET and estimate is not None:
            return f" (N={self.systems[name].frechet['all'].n})"
        return f" (n={estimate.n})" if estimate is not None and estimate.n != self.samples["all"] else ""

    def _notes(self, names: Sequence[str]) -> str:
        lines = []
        for name in names:
            distances = self.systems[name].frechet
            if not distances:
                continue
            counts = ", ".join(f"{g} N={d.n}" for g, d in distances.items())
            dim = next(iter(distances.values())).dim
            weak = [g for g, d in distances.items() if not d.well_posed]
            lines.append(
                f"- {fvd_name(self.extractor)} of {in_markdown(name)}: {dim} features, {counts}. Compare at equal N only."
            )
            if weak:
                lines.append(
                    f"- **warning** {fvd_name(self.extractor)} of {in_markdown(name)}: not more clips than features "
                    f"({', '.join(weak)}), so the distance is only roughly estimated and too high"
                )
        for name in names:
            lines += self._lost(name)
        for name in names:
            lines += [f"- **alarm** {in_markdown(name)}: {text}" for text in self.alarms(name)]
        return "\n".join(lines)

    def _lost(self, name: str) -> list[str]:
        """Return a line for each component that could not be computed for some answers of the system."""
        answers = self.systems[name].answers
        lines = []
        for component in dict.fromkeys(c for a in answers for c in a.lost):
            reasons = Counter(a.lost[component] for a in answers if component in a.lost)
            ((reason, _),) = reasons.most_common(1)
            lines.append(
                f"- **warning** {in_markdown(component)} of {in_markdown(name)} cannot be computed for {reasons.total()} of "
                f"{len(answers)} answers, which are left out of it: {in_markdown(reason)}"
            )
        return lines


def build_table(
    answers: Mapping[str, Sequence[Answered]],
    extractor: str,
    *,
    seed: int = 0,
    compare: tuple[str, str] | None = None,
    settings: AlarmSettings | None = None,
) -> EvaluationTable:
    """Return the table of each system's answers; every system must have answered the same samples.

    ``compare``: (baseline, system); by default the first and the last. Raises ConfigError for a system that is not there.
    """
    systems: dict[str, SystemResult] = {}
    samples: dict[str, int] = {}
    rewards = dict.fromkeys(m for found in answers.values() for a in found for m in a.values if m not in HEADINGS)
    for name, found in answers.items():
        metrics: dict[str, dict[str, Estimate]] = {}
        distances: dict[str, FrechetDistance] = {}
        for group in GROUPS:
            members = _members(found, group)
            samples[group] = len({a.id for a in members})
            values = {m: value_of(measure(m, extractor), members, seed) for m in (*HEADINGS, *rewards)}
            metrics[group] = {m: e for m, e in values.items() if e is not None}
            if FRECHET in metrics[group]:
                how = Frechet(extractor)
                distances[group] = how.distance(list(how.rows(members).values()))
        systems[name] = SystemResult(name, metrics, distances, tuple(found))
    names = list(systems)
    if compare is None and len(names) > 1:
        compare = names[0], names[-1]
    if compare is not None:
        check_compared(compare, names)
    return EvaluationTable(systems, samples, extractor, seed, compare, settings or AlarmSettings())


def check_compared(compare: tuple[str, str], names: Sequence[str]) -> None:
    """Raise ConfigError where one of the two systems to ``compare`` is not among ``names``."""
    if unknown := [name for name in compare if name not in names]:
        raise ConfigError(f"cannot compare {unknown[0]!r}: the systems are {', '.join(names)}")


def _members(answers: Sequence[Answered], group: str) -> list[Answered]:
    return [a for a in answers if group in ("all", a.kind)]


def _value(metric: str, estimate: Estimate | None, suffix: str = "", sign: str = "") -> str:
    """Return an estimate's value as text, or a dash where there is none."""
    if estimate is None:
        return "–"
    return _number(metric, estimate.value, sign) + suffix


def _interval(metric: str, estimate: Estimate | Difference | None, sign: str = "") -> str:
    if estimate is None or estimate.low is None or estimate.high is None:
        return ""
    return f" [{_number(metric, estimate.low, sign)}, {_number(metric, estimate.high, sign)}]"


def _number(metric: str, value: float, sign: str = "") -> str:
    return (_distance if metric == FRECHET else _digits)(value, sign)


def _digits(value: float, sign: str = "") -> str:
    return format(value, f"{sign}.3f")


def _distance(value: float, sign: str = "") -> str:
    """Return four significant digits: the scale of a Fréchet distance is its features' own."""
    return format(value, f"{sign}.4g") if abs(value) > 1e-9 else "0"


def markdown_grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table whose columns line up in plain text too."""
    cells = [[in_markdown(c) for c in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])
