"""Build a dataset by a recipe: sources → stages on Ray Data → rows of the splits.

A build that was interrupted, at any moment, is continued by the same call, and its shards are those of an undisturbed one: what a
stage or a model answered is in the work area, and rows are written in the order of the sources.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import DataError
from cluster.harmless import printable
from cluster.session import connect
from pipeline.data.build.annotations import annotated_videos, missing, unannotated_videos
from pipeline.data.build.files import VideoFiles
from pipeline.data.build.funnel import Count, write_funnel
from pipeline.data.build.meter import ActorMeter, start_account
from pipeline.data.build.readiness import ready_models
from pipeline.data.build.recipe import Recipe, StagePlan, plan_stages, recipe_identity, stage_identity
from pipeline.data.build.rows import STAGE as ROWS
from pipeline.data.build.rows import RowWriters, refusal, taken_up
from pipeline.data.build.shared import Build, video_of, video_to_json
from pipeline.data.build.splits import STAGE as SPLITS
from pipeline.data.build.splits import TRAIN, Splitter
from pipeline.data.build.store import AREA, WorkArea, digest_of
from pipeline.data.build.stream import pipeline, require_room, slots, travelled
from pipeline.data.build.summary import Summary
from pipeline.data.build.video import Video
from pipeline.data.build.worker import CHUNK, DONE, PENDING, SOURCES, UNFINISHED, Sources, Task, Travel
from pipeline.data.marker import COMPLETE
from pipeline.data.schema import ShardWriter, shard_paths
from pipeline.support import progress, terminal
from pipeline.support.location import Uri, parse_location, remove

ROWS_PER_SHARD = 1024
EARLY = "early"  # kind in the work area: a build that a budget ended, whose shards are whole and not all


@dataclass(frozen=True)
class Listed:
    """The sources of a build."""

    count: int
    digest: str
    note: str  # about those that are missing
    files: VideoFiles = field(compare=False)


def build_dataset(
    recipe: Recipe,
    out: str | Path | Uri,
    splits: Mapping[str, float] | None = None,
    *,
    rows_per_shard: int = ROWS_PER_SHARD,
    keep_work: bool = False,
    quiet: bool = False,
) -> Summary:
    """Write the dataset of ``recipe`` to ``out``: a folder of shards for each split, ``train`` being what the others leave.

    ``splits``: name → share of the videos. ``keep_work`` leaves the work area, with every reply that was paid for, when the
    build is whole. Joins the Ray cluster of RAY_ADDRESS, or starts one. Raises ConfigError for a recipe that cannot run,
    DataError where ``out`` holds another dataset or no row came out, PlacementError, StorageError.
    """
    out, began = parse_location(out), time.monotonic()
    out = out.absolute() if isinstance(out, Path) else out
    plans = plan_stages(recipe)
    shares = _checked(splits or {})
    area = WorkArea(out / AREA)
    console = terminal.console()
    say = (lambda line: None) if quiet else (lambda line: console.print(printable(line), highlight=False, markup=False))
    models = ready_models(recipe.models, _shown(plans), say)
    recipe = recipe.model_copy(update={"models": models})
    identity = recipe_identity(recipe, plans)
    listed = list_sources(recipe)
    plan = {
        "command": "data build",
        "recipe": identity,
        "sources": listed.digest,
        "seed": recipe.seed,
        "splits": shares,
    }
    names = [TRAIN, *shares]
    if all(ShardWriter.wrote(out / name, {**plan, "split": name}) for name in names) and not area.read(
        EARLY, digest_of(plan)
    ):
        raise DataError(f"{out} holds this very dataset already; write to another folder, or delete it first")
    summary = Summary(out, listed.count, Count([SOURCES, *(plan.name for plan in plans), ROWS, SPLITS]))
    if listed.note:
        say(listed.note)
    write_sources(recipe, listed, area)
    with connect(None, local_cpus=slots(recipe)) as session:
        total = session.view().total()
        require_room(recipe, total.get("CPU", 0.0), total.get("GPU", 0.0))
        budget = recipe.budget
        account = start_account(area, budget.max_tokens_total, budget.max_cost)
        meter = ActorMeter(account, bounded=(budget.max_tokens_total, budget.max_cost) != (None, None))
        run = Run(recipe, plans, area, identity, listed.count, meter)
        _clear_early(out, names, plan, area)
        with (
            RowWriters(out, names, plan, area, rows_per_shard) as writers,
            progress.bar(console, recipe.name, listed.count) as bar,
        ):
            for line in taken_up(writers.kept):
                say(line)
            _write(run, writers, summary, shares, () if quiet else (bar,))
            if not summary.whole:  # said before the shards are, or they would be taken for all
                area.write(EARLY, digest_of(plan), {"videos": summary.videos})
        tokens, cost = _saved(account)
    summary.seconds = time.monotonic() - began
    write_funnel(summary.count.funnel(), out)
    if summary.whole:
        empty = (name for name in names if not summary.rows[name])
        summary.notes += [f"no row went to {name}: its share of the videos is too small" for name in empty]
    else:
        summary.notes.append(
            f"the budget is spent ({tokens} tokens, cost {cost:.4f}): {listed.count - summary.videos} videos are not done. The same "
            "command with a larger budget goes on, and asks nothing twice"
        )
    written = summary.rows.total()
    if summary.whole and written:
        area.write(EARLY, digest_of(plan), {})
        if not keep_work:
            area.forget()
    if not quiet:
        summary.print(console)
    if summary.whole and not written:
        raise DataError(
            f"no row came out of {listed.count} videos; what the stages refused is listed above, and kept in {area.folder}"
        )
    return summary


def _shown(plans: Sequence[StagePlan]) -> dict[str, bool]:
    """Return the models that stages ask, and whether one of these shows them clips."""
    found: dict[str, bool] = {}
    for plan in plans:
        if plan.model is not None:
            found[plan.model] = found.get(plan.model, False) or getattr(plan.stage, "shows", True)
    return found


def _saved(account: Any) -> tuple[int, float]:
    import ray

    tokens, cost = ray.get(account.save.remote())
    ray.kill(account)
    return tokens, cost


def parse_splits(texts: Sequence[str]) -> dict[str, float]:
    """Return the splits that ``NAME=SHARE`` texts name; raises DataError."""
    found: dict[str, float] = {}
    for text in texts:
        name, sign, share = text.partition("=")
        try:
            found[name.strip()] = float(share)
        except ValueError:
            sign = ""
        if not sign:
            raise DataError(f"--split {text}: write NAME=SHARE, such as test=0.02")
    return found


def _checked(splits: Mapping[str, float]) -> dict[str, float]:
    """Return ``splits``; raises DataError for names and shares that cannot be."""
    for name, share in splits.items():
        if not name.isidentifier() or name == TRAIN:
            raise DataError(
                f"--split {name}={share:g}: a split is called by letters and digits, and not {TRAIN}, which is the rest"
            )
        if not 0 < share < 1:
            raise DataError(f"--split {name}={share:g}: a share lies between 0 and 1")
    if (total := sum(splits.values())) >= 1:
        raise DataError(f"the splits take {total:g} of the videos, and nothing is left for {TRAIN}")
    return dict(splits)


def _chunks(recipe: Recipe, files: VideoFiles) -> Iterator[list[Video]]:
    """Yield the sources, some at a time; raises DataError where there is none."""
    sources = recipe.sources
    if sources.annotations:
        videos = annotated_videos(sources.annotations, files)
    else:
        videos = unannotated_videos(files, sources.listed)
    while chunk := list(itertools.islice(videos, CHUNK)):
        yield chunk


def list_sources(recipe: Recipe) -> Listed:
    """Return what is known of the sources before one is opened."""
    count, digest, lost, files = 0, "", [], VideoFiles(recipe.sources.videos)
    for chunk in _chunks(recipe, files):
        lost += [video for video in chunk if video.lost]
        digest = digest_of(
            digest, [video_to_json(video) for video in chunk], [files.sizes.get(v.path, -1) for v in chunk]
        )
        count += len(chunk)
    return Listed(count, digest, missing(lost), files)


def write_sources(recipe: Recipe, listed: Listed, area: WorkArea) -> None:
    """Write the sources into the work area, some to a file, for the workers."""
    for number, chunk in enumerate(_chunks(recipe, listed.files)):
        area.write(SOURCES, Sources.key(number), [video_to_json(video) for video in chunk])


def _clear_early(out: Path | Uri, names: Sequence[str], plan: Mapping[str, Any], area: WorkArea) -> None:
    """Take away the shards of a build of ``plan`` that a budget ended: they are written anew, with those that were left out."""
    if not area.read(EARLY, digest_of(plan)):
        return
    for name in names:
        if ShardWriter.wrote(out / name, {**plan, "split": name}):
            for shard in shard_paths(out / name, required=False):
                remove(shard)
            remove(out / name / COMPLETE)


class Run:
    """The videos of a build behind all stages, in their order."""

    def __init__(
        self, recipe: Recipe, plans: Sequence[StagePlan], area: WorkArea, identity: str, count: int, meter: ActorMeter
    ) -> None:
        self.recipe, self.plans, self.area, self.count = recipe, plans, area, count
        root = recipe.sources.videos
        root = root.absolute() if isinstance(root, Path) else root
        self.sources = Sources(area, root, identity)
        build = Build(root, area, recipe.seed, languages=recipe.spoken)
        self.tasks = [(plan, self._task(plan, build, meter)) for plan in plans]

    def _task(self, plan: StagePlan, build: Build, meter: ActorMeter) -> Task:
        recipe, model = self.recipe, self.recipe.models[plan.model] if plan.model else None
        asking = sum(other.section.workers for other in self.plans if other.model == plan.model)
        return Task(
            plan.name,
            plan.stage,
            plan.settings,
            stage_identity(recipe, plan),
            build,
            model_name=plan.model or "",
            model=model,
            threads=max(1, model.concurrency // asking) if model is not None else plan.section.threads,
            meter=meter,
            last=plan is self.plans[-1],
        )

    def videos(self) -> Iterator[Travel]:
        """Yield each video: from the work area as long as they are done there, then through the stages."""
        first = 0
        for number in range(-(-self.count // CHUNK)):
            for video in self.sources.chunk(number):
                travel = self.sources.travel(video)
                kept = self.area.read(DONE, travel.key)
                if kept is None:
                    yield from self._streamed(first)
                    return
                travel.video, travel.spent = video_of(kept["video"]), kept["spent"]
                yield travel
                first += 1

    def _streamed(self, first: int) -> Iterator[Travel]:
        from pipeline.data.build.engine import answer_pending

        engines = [name for name, model in self.recipe.models.items() if model.engine is not None]
        answer_pending(self.recipe, engines, self.area, lambda: pipeline(self.sources, self.tasks, first, self.count))
        with closing(travelled(pipeline(self.sources, self.tasks, first, self.count))) as travels:
            yield from travels


def _write(run: Run, writers: RowWriters, summary: Summary, shares: Mapping[str, float], bars: Sequence[Any]) -> None:
    splitter = Splitter(shares, run.recipe.seed)
    with closing(run.videos()) as travels:  # type: ignore[type-var]
        for travel in require_order(travels):
            if travel.state == UNFINISHED:
                summary.whole = False
                return
            if travel.state == PENDING:
                raise RuntimeError(f"an engine left asks of the video {travel.video.name!r} without a reply")
            video = travel.video
            pairs = []
            for pair in video.pairs:
                if (lost := refusal(video, pair)) is not None:
                    video.lost.append(lost)
                else:
                    pairs.append(pair)
            split = splitter.assign(video)
            video.pairs = pairs if split is not None else []
            summary.add(video, travel.spent)
            if split is not None and pairs:
                writers.add(split, video, pairs)
                summary.rows[split] += len(pairs)
            for bar in bars:
                bar.advance(f"{summary.rows.total()} rows")


def require_order(travels: Iterator[Travel]) -> Iterator[Travel]:
    """Yield ``travels``; raises RuntimeError where one does not come in the order of the sources."""
    for place, travel in enumerate(travels):
        if travel.video.order != place:
            raise RuntimeError(f"Ray Data broke the order: video {travel.video.order} came where {place} was due")
        yield travel
