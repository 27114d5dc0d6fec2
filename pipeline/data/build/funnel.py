"""Where a build loses what: counts by stage and reason, as JSON beside the shards and as a picture.

A build has three kinds of things: source videos, their clips, and pairs of clips. What a stage refused is counted by its kind.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from cluster.errors import DataError
from cluster.harmless import printable
from pipeline.data.build.video import Video
from pipeline.support.location import Uri, read_bytes, write_bytes

FUNNEL = "_funnel.json"
"""Name of the file in a build's folder."""
What = Literal["video", "clip", "pair"]
KINDS: tuple[What, ...] = get_args(What)
REASONS = 3  # reasons that the picture names of a stage
_KEPT, _LOST, _INK, _SOFT = "#2f9e6e", "#e3a79f", "#16202c", "#5c6b7a"
_PLURAL = {"video": "videos", "clip": "clips", "pair": "pairs"}


class Passage(BaseModel):
    """What a stage did to one kind of things: how many came, how many went on, and how many it lost for each reason."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    stage: str
    what: What
    entered: NonNegativeInt
    passed: NonNegativeInt
    lost: dict[str, NonNegativeInt]


class Funnel(BaseModel):
    """The counts of a build. ``passages`` has, kind by kind, the stages that lost something, in the order in which they work.

    ``made``: how many there were of each kind, without the clips of videos that were lost as a whole. ``kept``: how many are left.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[1] = 1
    made: dict[What, NonNegativeInt]
    kept: dict[What, NonNegativeInt]
    passages: list[Passage]


class Count:
    """Sums over the videos that went through a build; nothing of a single one is kept.

    ``stages``: names in the order in which they work; one that is not among them comes where it is first seen, after these.
    """

    def __init__(self, stages: Sequence[str] = ()) -> None:
        self._stages = list(stages)
        self._lost: dict[tuple[What, str], Counter[str]] = {}
        self._kept: Counter[What] = Counter()

    def add(self, video: Video) -> None:
        """Count ``video``, its clips and its pairs, and what it lost.

        Raises ValueError where what was lost is called by none of the kinds.
        """
        self._kept["clip"] += len(video.clips)
        self._kept["pair"] += len(video.pairs)
        whole = True
        for lost in video.lost:
            what = lost.what.partition(" ")[0]
            if what not in KINDS:
                raise ValueError(f"{lost.what!r} is none of {', '.join(KINDS)}")
            if what == "video":
                if not whole:  # once is enough
                    continue
                whole = False
            if lost.stage not in self._stages:
                self._stages.append(lost.stage)
            self._lost.setdefault((what, lost.stage), Counter())[lost.reason] += 1  # type: ignore[index, arg-type]
        self._kept["video"] += whole

    def funnel(self) -> Funnel:
        """Return the counts so far."""
        passages: list[Passage] = []
        made: dict[What, int] = {}
        for what in KINDS:
            passed, found = self._kept[what], []
            for stage in reversed(self._stages):
                reasons = self._lost.get((what, stage))
                if reasons:
                    ranked = dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))
                    entered = passed + sum(reasons.values())
                    found.append(Passage(stage=stage, what=what, entered=entered, passed=passed, lost=ranked))
                    passed = entered
            passages += reversed(found)
            made[what] = passed
        return Funnel(made=made, kept={what: self._kept[what] for what in KINDS}, passages=passages)


def count(videos: Iterable[Video], stages: Sequence[str] = ()) -> Funnel:
    """Return the counts of ``videos`` behind all stages; ``stages``: as for :class:`Count`."""
    counted = Count(stages)
    for video in videos:
        counted.add(video)
    return counted.funnel()


def write_funnel(funnel: Funnel, folder: Path | Uri) -> None:
    """Write ``funnel`` into a build's ``folder``; raises StorageError."""
    write_bytes(folder / FUNNEL, (json.dumps(funnel.model_dump(), ensure_ascii=False, indent=1) + "\n").encode())


def read_funnel(folder: Path | Uri) -> Funnel | None:
    """Return the funnel of the build whose shards lie in ``folder`` or, split by split, below it; None where there is none.

    Raises DataError for one that is damaged or of another version.
    """
    for place in (folder, folder.parent):
        try:
            raw = read_bytes(place / FUNNEL)
        except FileNotFoundError:
            continue
        try:
            return Funnel.model_validate_json(raw)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise DataError(f"{place / FUNNEL} is no funnel of this version: {where}: {first['msg']}") from error
    return None


def draw_funnel(funnel: Funnel, path: Path, *, title: str = "") -> Path:
    """Write a PNG with a bar for each kind of things and each stage that lost some of them, and return ``path``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines: list[tuple[str, int, int, str, int]] = []  # name, kept, lost, note, all of its kind
    for what in KINDS:
        made = funnel.made.get(what, 0)
        if not made:
            continue
        lines.append((_PLURAL[what], made, 0, "", made))
        for passage in (passage for passage in funnel.passages if passage.what == what):
            reasons = [f"{printable(reason, 28)} {times:,}" for reason, times in list(passage.lost.items())[:REASONS]]
            reasons += ["…"] if len(passage.lost) > REASONS else []
            lost = passage.entered - passage.passed
            lines.append((f"– {printable(passage.stage, 20)}", passage.passed, lost, ", ".join(reasons), made))
    figure = Figure(figsize=(9.0, 0.34 * max(1, len(lines)) + 0.8), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.17, 0.05, 0.4, 0.95 - 0.45 / figure.get_figheight()))
    for place, (name, kept, lost, note, made) in enumerate(lines):
        bold = "normal" if name.startswith("–") else "bold"
        axes.barh(place, kept / made, color=_KEPT, height=0.62)
        axes.barh(place, lost / made, left=kept / made, color=_LOST, height=0.62)
        axes.text(-0.02, place, name, ha="right", va="center", fontsize=9, color=_INK, fontweight=bold)
        axes.text(1.02, place, f"{kept:,}", ha="left", va="center", fontsize=9, color=_INK, fontweight=bold)
        axes.text(1.2, place, note, ha="left", va="center", fontsize=8, color=_SOFT)
    axes.set_xlim(0, 1)
    axes.set_ylim(max(1, len(lines)) - 0.4, -0.6)
    axes.axis("off")
    if title:
        figure.suptitle(printable(title, 90), fontsize=10, color=_INK, x=0.02, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
