"""``vans evaluate``: answer held-out samples with a pair (or read other systems' answers), score them, write the report."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from actors.records import Sample, ScoreRequest, Scores
from actors.scoring.video import TorchScriptExtractor, VideoExtractor
from cluster.errors import ConfigError
from pipeline.config import RunConfig
from pipeline.data.source import SampleSource
from pipeline.data.sources import evaluation_source, video_limits
from pipeline.evaluate.predict import answer_samples
from pipeline.evaluate.predictions import Prediction, read_predictions, write_predictions
from pipeline.evaluate.score import score_predictions
from pipeline.evaluate.sheets import evaluation_sheet
from pipeline.evaluate.table import EvaluationTable, check_compared
from pipeline.fleet.models import require_drawable
from pipeline.fleet.open import Fleet, answering, cluster_session, measuring, open_fleet
from pipeline.lock import hold
from pipeline.stages.requests import score
from pipeline.support import terminal
from pipeline.support.location import local_path
from pipeline.support.progress import bar

PAIR = "pair"


def run_evaluation(
    config: RunConfig,
    out: Path,
    *,
    predictions: Sequence[str] = (),
    fvd_extractor: str | None = None,
    compare: tuple[str, str] | None = None,
) -> EvaluationTable:
    """Evaluate the configured pair, or the answers in the folders ``predictions``, into ``out``.

    ``predictions`` and ``fvd_extractor`` are paths, each with a name in front where wanted (``name=path``). ``compare``:
    baseline and system, by name; by default the first and the last. What can be wrong with them is found before
    anything is started.
    """
    console = terminal.console()
    read = read_systems(predictions)
    if not read:
        require_drawable(config)
    if compare is not None:
        check_compared(compare, list(read) or [PAIR])
    video = None
    if fvd_extractor is not None:
        name, file = named(fvd_extractor)
        video = TorchScriptExtractor(file, name)
    with hold(out, "vans evaluate", name=f"--out {out}"), cluster_session(config):
        terminal.keep_log_in(out)
        table = asyncio.run(_evaluate(config, out, read, video, compare, console))
    console.print(Markdown(table.markdown()))
    console.print(f"table, JSON and contact sheet are in {out}", highlight=False, markup=False)
    return table


def named(text: str) -> tuple[str, Path]:
    """Return name and path of ``name=path``; without a name it is the folder's, or the file's without its suffix."""
    name, sign, path = text.partition("=")
    if not sign or Path(text).exists():
        whole = local_path(text).resolve()
        return whole.stem if whole.is_file() else whole.name, local_path(text)
    if not name.strip() or not path:
        raise ConfigError(f"{text!r}: expected a path, or name=path")
    return name.strip(), local_path(path)


def read_systems(predictions: Sequence[str]) -> dict[str, list[Prediction]]:
    """Return the answers in each folder by its system's name; raises ConfigError for a name that comes twice."""
    found: dict[str, list[Prediction]] = {}
    for text in predictions:
        name, folder = named(text)
        if name in found:
            raise ConfigError(f"two systems are called {name!r}; name them apart: --predictions other={folder}")
        found[name] = read_predictions(folder)
    return found


async def _evaluate(
    config: RunConfig,
    out: Path,
    read: Mapping[str, list[Prediction]],
    video: VideoExtractor | None,
    compare: tuple[str, str] | None,
    console: Console,
) -> EvaluationTable:
    samples = await asyncio.to_thread(load_samples, config)
    systems = dict(read)
    async with open_fleet(config, only=measuring(config) if read else answering(config)) as fleet:
        if not read:
            systems[PAIR] = await answer_with_progress(config, fleet, samples, console, "answering")
            write_predictions(out / "predictions", systems[PAIR], config.video.fps)
        with bar(console, "scoring", sum(map(len, systems.values()))) as progress:
            table = await score_systems(
                config, fleet, systems, samples, video=video, compare=compare, on_done=progress.advance
            )
    write_report(out, table, systems, samples)
    return table


def load_samples(config: RunConfig) -> list[Sample]:
    """Return the held-out samples of the run, decoded; all of them where there are fewer than asked for."""
    source: SampleSource = evaluation_source(config)
    return source.load_all(min(config.evaluate.samples, source.count)).samples


async def answer_with_progress(
    config: RunConfig,
    fleet: Fleet,
    samples: Sequence[Sample],
    console: Console,
    title: str,
    said: Callable[[str], str] = str,
) -> list[Prediction]:
    """Answer ``samples`` with the pair in the pools, showing progress. ``said``: see ``predict.answer_one``."""
    with bar(console, title, len(samples)) as progress:
        return await answer_samples(config, fleet, samples, said=said, on_done=progress.advance)


async def score_systems(
    config: RunConfig,
    fleet: Fleet,
    systems: Mapping[str, Sequence[Prediction]],
    samples: Sequence[Sample],
    *,
    video: VideoExtractor | None = None,
    compare: tuple[str, str] | None = None,
    on_done: Callable[[], None] = lambda: None,
) -> EvaluationTable:
    """Score the answers of ``systems`` in the reward pools; ``video`` makes the Fréchet features instead of CLIP.

    Raises ConfigError where one of evaluate.rewards judges whole groups.
    """
    rewards, by_id = config.evaluate.rewards, {sample.id: sample for sample in samples}
    if fleet.scoring is not None and (groups := fleet.scoring.of_groups(rewards)):
        raise ConfigError(
            f"evaluate.rewards: {groups[0]!r} judges the answers of a group at once, and a held-out question has one; leave it out"
        )

    async def ask(request: ScoreRequest) -> Scores:
        return await score(fleet, by_id[request.sample_id], request)

    names = set((await fleet.reward.call_all("fvd_extractor")).values())
    (extractor,) = names
    return await score_predictions(
        systems,
        samples,
        ask,
        extractor=extractor,
        video=video,
        limits=video_limits(config),
        rewards=rewards,
        seed=config.evaluate.seed,
        compare=compare,
        settings=config.alarms,
        on_done=on_done,
    )


def write_report(
    out: Path, table: EvaluationTable, systems: Mapping[str, Sequence[Prediction]], samples: Sequence[Sample]
) -> None:
    """Write table.md, table.json and contact_sheet.png into ``out``."""
    table.write(out)
    evaluation_sheet(samples, systems, out / "contact_sheet.png", table=table, title=" against ".join(systems))
    figures = {name: table.figures(name) for name in systems}
    (out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
