"""What a person sees while a run works: a bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LOG_EVERY_S = 10.0


class Bar:
    """One task's progress, in either form."""

    def __init__(self, console: Console, progress: Progress | None, title: str, total: int) -> None:
        self._console, self._progress, self._title, self._total = console, progress, title, total
        self._task = progress.add_task(title, total=total, note="") if progress else None
        self._done = 0
        self._last_line = 0.0

    def advance(self, note: str = "", by: int = 1) -> None:
        """Count ``by`` more done; ``note`` says how it goes."""
        self._done += by
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=self._done, note=note)
            return
        now = time.monotonic()
        if now - self._last_line >= LOG_EVERY_S or self._done == self._total:
            self._last_line = now
            self._console.print(f"{self._title} {self._done}/{self._total} {note}", highlight=False)

    def say(self, line: str, style: str = "") -> None:
        """Print a line that stays: above the bar in a terminal, at once in a log."""
        self._console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def bar(console: Console, title: str, total: int, done: int = 0) -> Iterator[Bar]:
    """Show a task of ``total`` items, ``done`` of which were done before."""
    if not console.is_terminal:
        item = Bar(console, None, title, total)
        item._done = done
        yield item
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        item = Bar(console, progress, title, total)
        item._done = done
        yield item


def step_note(metrics: Mapping[str, float]) -> str:
    """Return the few figures that say how a stage goes."""
    shown = []
    for key, name in (
        ("reward/total_mean", "reward"),
        ("reward/rouge_l_mean", "ROUGE-L"),
        ("reward/clip_v_mean", "CLIP-V"),
        ("reward/clip_score_mean", "CLIPScore"),
    ):
        if key in metrics:
            shown.append(f"{name} {metrics[key]:.3f}")
    return " · ".join(shown)
