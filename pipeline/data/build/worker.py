"""What runs in Ray Data's workers: the sources that a task begins with, and one stage over the videos that reach it.

Videos travel as JSON in one column. What a stage made of a video is kept in the work area, by all that it depends on, so that a
build that is called again passes over it. A video that a stage cannot bear is lost alone; a stage that cannot be set up ends the
build.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.errors import ConfigError, DataError, StorageError, VansError
from cluster.harmless import printable
from pipeline.data.build.asking import Asker, BudgetSpentError, Meter, PendingError
from pipeline.data.build.files import placed, stamp_of
from pipeline.data.build.models import Ask, ModelSection
from pipeline.data.build.shared import Build, video_of, video_to_json
from pipeline.data.build.store import WorkArea, digest_of
from pipeline.data.build.video import Lost, Video
from pipeline.support.location import Uri, sha256_of

COLUMN = "travel"
SOURCES, DONE = "sources", "videos"  # kinds in the work area
CHUNK = 64  # sources that lie in one file
GOING, PENDING, UNFINISHED, FATAL = "", "pending", "unfinished", "fatal"


class SetupError(VansError):
    """A stage could not be set up."""


@dataclass
class Travel:
    """A video between two stages. ``spent``: stage → its account; ``state``: why it goes through no further stage.

    What ends the build travels as ``told``, behind the videos that were before it: an exception would take them along.
    """

    video: Video
    key: str  # of the source and the recipe
    spent: dict[str, dict[str, Any]] = field(default_factory=dict)
    state: str = GOING
    asks: list[dict[str, Any]] = field(default_factory=list)  # of a pending one
    told: str = ""  # of a fatal one
    kind: str = ""  # of its error

    def dump(self) -> str:
        """Return it as JSON."""
        return json.dumps({**vars(self), "video": video_to_json(self.video)}, ensure_ascii=True)

    @classmethod
    def load(cls, text: str) -> Travel:
        """Return what :meth:`dump` wrote."""
        values = json.loads(text)
        return cls(**{**values, "video": video_of(values["video"])})

    def fail(self, error: VansError) -> None:
        """Let ``error`` end the build."""
        self.state, self.told, self.kind = FATAL, str(error), type(error).__name__

    def error(self) -> VansError:
        """Return the error that ends the build."""
        kinds = {kind.__name__: kind for kind in (ConfigError, DataError, StorageError, SetupError)}
        return kinds.get(self.kind, VansError)(self.told)


def table_of(travels: list[Travel]) -> pa.Table:
    """Return ``travels`` as a block of Ray Data."""
    return pa.table({COLUMN: pa.array([travel.dump() for travel in travels], pa.large_string())})


def travels_of(block: pa.Table) -> list[Travel]:
    """Return what :func:`table_of` made ``block`` of."""
    return [Travel.load(text) for text in block.column(COLUMN).to_pylist()]


# --- sources ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sources:
    """The source videos of a build as they lie in its work area, by number."""

    area: WorkArea
    root: Path | Uri
    identity: str  # of the recipe

    def chunk(self, number: int) -> list[Video]:
        """Return the videos ``number * CHUNK`` and following; raises DataError where they are gone."""
        values = self.area.read(SOURCES, self.key(number))
        if values is None:
            raise DataError(f"{self.area.folder} lacks the list of the sources; delete that folder to begin anew")
        return [video_of(value) for value in values]

    @staticmethod
    def key(number: int) -> str:
        """Return what chunk ``number`` is kept as."""
        return digest_of(SOURCES, number)

    def travel(self, video: Video) -> Travel:
        """Return ``video`` before its first stage."""
        return Travel(video, digest_of("video", self.identity, video_to_json(video), self._stamp(video)))

    def _stamp(self, video: Video) -> list[int]:
        """Return what of the file says that it is another one now."""
        try:
            return stamp_of(placed(self.root, video.path))
        except (DataError, OSError):
            return []

    def __call__(self, block: pa.Table, first: int = 0) -> pa.Table:
        """Return the videos whose numbers, from ``first`` on, are in ``block``, each with the digest of its file."""
        chunks: dict[int, list[Video]] = {}
        travels = []
        for number in block.column("id").to_pylist():
            part, place = divmod(first + number, CHUNK)
            if part not in chunks:
                chunks[part] = self.chunk(part)
            travel = self.travel(chunks[part][place])
            if travel.video.path and not travel.video.digest:
                self._identify(travel.video)
            travels.append(travel)
        return table_of(travels)

    def _identify(self, video: Video) -> None:
        try:
            video.digest = sha256_of(placed(self.root, video.path))
        except (DataError, OSError) as error:
            video.clips, video.pairs = [], []
            video.lost.append(Lost(SOURCES, "video", "unreadable", printable(str(error), 300)))


# --- stages -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One stage of a build, as its workers get it."""

    name: str
    stage: type[Any]
    settings: Any
    identity: str
    build: Build
    model_name: str = ""
    model: ModelSection | None = None
    threads: int = 1
    meter: Meter | None = None
    last: bool = False

    def asker(self) -> Asker | None:
        """Return what the stage asks its model by, None where it has none."""
        if self.model is None:
            return None
        build = self.build
        return Asker(
            self.name, self.model_name, self.model, build.store, build.seed, self.threads, build.limits, self.meter
        )


class StageWorker:
    """One worker of a stage: a callable of Ray Data's ``map_batches``."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.asker = task.asker()
        self._broken = ""
        try:
            if self.asker is not None:
                self.asker.setup()
            self.stage = task.stage(settings=task.settings, build=replace(task.build, asker=self.asker))
            self.stage.setup()
        except Exception as error:  # noqa: BLE001 - Ray Data would start the worker again and again; the first video tells it
            self._broken = str(error) if isinstance(error, VansError) else f"{type(error).__name__}: {error}"

    def __call__(self, block: pa.Table) -> pa.Table:
        """Take each video of ``block`` through the stage."""
        return table_of([self.pass_on(travel) for travel in travels_of(block)])

    def pass_on(self, travel: Travel) -> Travel:
        """Return ``travel`` behind the stage."""
        if travel.state == GOING:
            try:
                if self._broken:
                    raise SetupError(f"stages.{self.task.name} cannot be set up: {self._broken}")
                self._through(travel)
            except VansError as error:  # the store, the endpoint, the set-up: another video would fare no better
                travel.fail(error)
        if self.task.last and travel.state == GOING:
            self.task.build.store.write(DONE, travel.key, {"video": video_to_json(travel.video), "spent": travel.spent})
        return travel

    def _through(self, travel: Travel) -> None:
        store, name = self.task.build.store, self.task.name
        key = digest_of(name, self.task.identity, video_to_json(travel.video))
        kept = store.read(f"stages/{name}", key)
        if kept is not None:
            travel.video = video_of(kept["video"])
            travel.spent[name] = kept["spent"]
            return
        if self.asker is not None:
            self.asker.begin()
        before = video_to_json(travel.video)
        try:
            travel.video = self.stage(travel.video)
        except PendingError as pending:
            travel.video = video_of(before)
            travel.state, travel.asks = PENDING, [asdict(ask) for ask in pending.asks]
            return
        except BudgetSpentError:
            travel.video = video_of(before)
            travel.state = UNFINISHED
            return
        except DataError as error:
            travel.video = _without(before, name, "unusable", str(error))
        except (VansError, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001 - a bad video costs itself alone, whatever it does to a decoder
            travel.video = _without(before, name, "failed", f"{type(error).__name__}: {error}")
        travel.spent[name] = asdict(self.asker.taken()) if self.asker is not None else {}
        store.write(f"stages/{name}", key, {"video": video_to_json(travel.video), "spent": travel.spent[name]})


def _without(before: dict[str, Any], stage: str, reason: str, told: str) -> Video:
    """Return the video as it was ``before`` the stage, without all that could become a row."""
    video = video_of(before)
    video.clips, video.pairs = [], []
    video.lost.append(Lost(stage, "video", reason, printable(told, 500)))
    return video


# --- asks that wait for an engine -------------------------------------------------------------------------------------


def asks_of(block: pa.Table, model: str, key: Callable[[Ask], str]) -> list[tuple[str, Ask]]:
    """Return key and ask of all that the videos in ``block`` wait for from ``model``, each once."""
    from pipeline.data.build.models import Shown

    found: dict[str, Ask] = {}
    for travel in travels_of(block):
        for values in travel.asks:
            ask = Ask(**{**values, "shown": tuple(Shown(**shown) for shown in values["shown"])})
            if ask.model == model:
                found.setdefault(key(ask), ask)
    return list(found.items())
