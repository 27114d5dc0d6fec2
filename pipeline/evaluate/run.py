"""``vans evaluate``: answer held-out samples with a pair (or read another system's answers), score them, write the report."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from actors.records import Sample
from pipeline.config import RunConfig
from pipeline.data.source import SampleSource
from pipeline.evaluate.predict import answer_samples
from pipeline.evaluate.predictions import Prediction, read_predictions, write_predictions
from pipeline.evaluate.score import score_predictions
from pipeline.evaluate.sheets import evaluation_sheet
from pipeline.evaluate.table import EvaluationTable
from pipeline.fleet import Fleet, cluster_session, open_fleet
from pipeline.progress import bar
from pipeline.sources import evaluation_source


def run_evaluation(config: RunConfig, out: Path, *, predictions: Path | None = None) -> EvaluationTable:
    """Evaluate the configured pair, or the answers in the folder ``predictions``, into ``out``."""
    console = Console()
    read = read_predictions(predictions) if predictions else None
    with cluster_session(config):
        table = asyncio.run(_evaluate(config, out, read, predictions.name if predictions else "pair", console))
    console.print(Markdown(table.markdown()))
    console.print(f"table, JSON and contact sheet are in {out}", highlight=False)
    return table


async def _evaluate(
    config: RunConfig, out: Path, read: list[Prediction] | None, name: str, console: Console
) -> EvaluationTable:
    samples = await asyncio.to_thread(load_samples, config)
    async with open_fleet(config, only=("reward",) if read is not None else ()) as fleet:
        answers = read if read is not None else await answer_with_progress(config, fleet, samples, console, "answering")
        table = await score_systems(config, fleet, {name: answers}, samples)
    if read is None:
        write_predictions(out / "predictions", answers, config.video.fps)
    write_report(out, table, {name: answers}, samples)
    return table


def load_samples(config: RunConfig) -> list[Sample]:
    """Return the held-out samples of the run, decoded; all of them where there are fewer than asked for."""
    source: SampleSource = evaluation_source(config)
    return source.load_all(min(config.evaluate.samples, source.count)).samples


async def answer_with_progress(
    config: RunConfig, fleet: Fleet, samples: Sequence[Sample], console: Console, title: str
) -> list[Prediction]:
    """Answer ``samples`` with the pair in the pools, showing progress."""
    with bar(console, title, len(samples)) as progress:
        return await answer_samples(config, fleet, samples, on_done=progress.advance)


async def score_systems(
    config: RunConfig, fleet: Fleet, systems: Mapping[str, Sequence[Prediction]], samples: Sequence[Sample]
) -> EvaluationTable:
    """Score the answers of ``systems`` in the reward pool."""
    names = set((await fleet.reward.call_all("fvd_extractor")).values())
    (extractor,) = names
    return await score_predictions(
        systems, samples, fleet.reward.submit, extractor=extractor, seed=config.evaluate.seed
    )


def write_report(
    out: Path, table: EvaluationTable, systems: Mapping[str, Sequence[Prediction]], samples: Sequence[Sample]
) -> None:
    """Write table.md, table.json and contact_sheet.png into ``out``."""
    table.write(out)
    evaluation_sheet(samples, systems, out / "contact_sheet.png", table=table, title=" against ".join(systems))
    figures = {name: table.figures(name) for name in systems}
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
