"""What a person sees while a run works: a bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.spinner import Spinner

from pipeline.support import terminal

LOG_EVERY_S = 10.0


class Bar:
    """One task's progress, in either form."""

    def __init__(self, console: Console, progress: Progress | None, title: str, total: int | None) -> None:
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
            count = f"{self._done}/{self._total}" if self._total is not None else str(self._done)
            self._console.print(f"{self._title} {count} {note}", highlight=False)

    def follow(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that ``step`` steps are done, with the loss where ``metrics`` has one."""
        self.advance(f"loss {metrics['loss']:.4f}" if "loss" in metrics else "", by=step - self._done)

    def say(self, line: str, style: str = "") -> None:
        """Print a line that stays: above the bar in a terminal, at once in a log."""
        self._console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def bars(console: Console) -> Iterator[Callable[..., Bar]]:
    """Show several tasks at once; what is yielded makes a bar of (title, total, done=0)."""
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
    with terminal.drawing(console) as redirect:
        shown = (
            Progress(*columns, console=console, redirect_stdout=redirect, redirect_stderr=redirect)
            if console.is_terminal
            else None
        )
        with shown or nullcontext():

            def new(title: str, total: int | None, done: int = 0) -> Bar:
                item = Bar(console, shown, title, total)
                item._done = done
                return item

            yield new


@contextmanager
def waiting(console: Console, text: str) -> Iterator[None]:
    """Show ``text`` in a terminal for as long as the block takes."""
    spinner = Spinner("dots", text=text, style="status.spinner")
    with (
        terminal.drawing(console) as redirect,
        Live(
            spinner,
            console=console,
            refresh_per_second=12.5,
            transient=True,
            redirect_stdout=redirect,
            redirect_stderr=redirect,
        ),
    ):
        yield


@contextmanager
def bar(console: Console, title: str, total: int | None, done: int = 0) -> Iterator[Bar]:
    """Show a task of ``total`` items (None: nobody knows yet), ``done`` of which were done before."""
    with bars(console) as new:
        yield new(title, total, done)


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
