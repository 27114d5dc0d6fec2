"""From the videos behind all stages to the rows of the dataset's splits."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

from pipeline.data.build.store import WorkArea
from pipeline.data.build.video import Lost, Pair, Video
from pipeline.data.schema import Row, ShardWriter
from rewards.format import DEFAULT
from rewards.text import comparable

STAGE = "rows"  # the name that what is lost here is counted under
READERS = 4  # threads that fetch clips
AHEAD = 16  # rows whose clips are fetched before they are due


def row_id(video: Video, pair: Pair) -> str:
    """Return the row's id, unique in a build: ``VIDEO/FIRST-SECOND``, then ``#NUMBER`` unless 0, ``@LANGUAGE`` unless English."""
    number = f"#{pair.number}" if pair.number else ""
    return f"{video.name}/{pair.first}-{pair.second}{number}" + (f"@{pair.language}" if pair.language != "en" else "")


def refusal(video: Video, pair: Pair) -> Lost | None:
    """Return why ``pair`` cannot be a row, None where it can."""

    def lost(reason: str, told: str) -> Lost:
        return Lost(STAGE, pair_name(pair), reason, told)

    if not (pair.question.strip() and pair.caption.strip()):
        return lost("no question", "no stage of the recipe has written a question and a caption")
    if not comparable(pair.caption):
        return lost("caption", "the caption has no letter and no digit, so no answer could be compared with it")
    if pair.reasoning and not DEFAULT.reward(DEFAULT.write(pair.reasoning, pair.caption)):
        return lost("tags", "the reasoning or the caption holds a tag of answers, such as <ans>")
    try:
        if video.clip(pair.first).stored and video.clip(pair.second).stored:
            return None
        return lost("not cut", "no stage of the recipe has cut its clips")
    except KeyError as error:
        return lost("no clip", f"there is no clip {error}")


def pair_name(pair: Pair) -> str:
    """Return what ``Lost.what`` calls ``pair``."""
    return f"pair {pair.first}-{pair.second}" + (f"#{pair.number}" if pair.number else "")


def meta_of(video: Video, pair: Pair) -> str:
    """Return the row's ``meta``: where it comes from, its language, and what ties its clips."""
    first, second = video.clip(pair.first), video.clip(pair.second)
    values: dict[str, Any] = {
        "language": pair.language,
        "video": video.name,
        "topic": video.topic,
        "input_seconds": [first.start, first.end],
        "target_seconds": [second.start, second.end],
        "input_label": first.label,
        "target_label": second.label,
        "skipped": pair.skipped,
        "ties": pair.ties,
    }
    return json.dumps({name: value for name, value in values.items() if value not in ("", [], {})}, ensure_ascii=False)


class RowWriters:
    """The writers of a build's splits. Rows that an interrupted call wrote are passed over; their clips are not read again."""

    def __init__(
        self, out: Any, splits: Iterable[str], plan: Mapping[str, Any], area: WorkArea, rows_per_shard: int
    ) -> None:
        self._stack, self._area = ExitStack(), area
        self._writers: dict[str, ShardWriter] = {}
        with ExitStack() as opening:
            for split in splits:
                writer = ShardWriter(out / split, plan={**plan, "split": split}, rows_per_shard=rows_per_shard)
                self._writers[split] = opening.enter_context(writer)
            self._stack = opening.pop_all()
        self.kept = {split: writer.count for split, writer in self._writers.items()}
        self._skip = dict(self.kept)
        self._pool = self._stack.enter_context(ThreadPoolExecutor(READERS))
        self._due: deque[tuple[str, Video, Pair, Future[tuple[bytes, bytes]]]] = deque()

    def add(self, split: str, video: Video, pairs: Iterable[Pair]) -> None:
        """Write a row of each of ``pairs``, behind those that were added before."""
        for pair in pairs:
            if self._skip[split]:
                self._skip[split] -= 1
                continue
            names = video.clip(pair.first).stored, video.clip(pair.second).stored
            self._due.append((split, video, pair, self._pool.submit(self._clips, *names)))
            while len(self._due) > AHEAD:
                self._write_next()

    def _clips(self, first: str, second: str) -> tuple[bytes, bytes]:
        return self._area.get(first), self._area.get(second)

    def _write_next(self) -> None:
        split, video, pair, future = self._due.popleft()
        first, second = future.result()
        answer = DEFAULT.write(pair.reasoning, pair.caption) if pair.reasoning else None
        self._writers[split].write(
            Row(
                row_id(video, pair),
                pair.kind,
                pair.question,
                pair.caption,
                first,
                second,
                f"{video.path}:{video.digest[:16]}",
                meta_of(video, pair),
                answer,
            )
        )

    def __enter__(self) -> RowWriters:
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            if error[0] is None:
                while self._due:
                    self._write_next()
        except BaseException:
            import sys

            self._stack.__exit__(*sys.exc_info())
            raise
        self._stack.__exit__(*error)


def taken_up(writers: Mapping[str, int]) -> Iterator[str]:
    """Yield a sentence for each split of which rows were kept."""
    for split, count in writers.items():
        if count:
            yield f"{count} rows of {split} are kept from an interrupted build"
