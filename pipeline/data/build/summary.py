"""What a build tells at its end: rows, what was lost where and why, tokens, seconds and cost by stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from cluster.harmless import printable
from pipeline.data.build.asking import Spent
from pipeline.data.build.funnel import Count
from pipeline.data.build.video import Video
from pipeline.support.location import Uri


@dataclass
class Summary:
    """Sums over the videos of a build, in their order; nothing of a single video is kept."""

    out: Path | Uri
    total: int  # source videos
    count: Count  # of what was lost, for the funnel
    videos: int = 0  # that went through all stages
    rows: Counter[str] = field(default_factory=Counter)  # by split
    lost: Counter[tuple[str, str, str]] = field(
        default_factory=Counter
    )  # by stage, what (video, clip, pair) and reason
    example: dict[tuple[str, str, str], str] = field(default_factory=dict)  # the first one's sentence
    spent: dict[str, Spent] = field(default_factory=dict)  # by stage
    notes: list[str] = field(default_factory=list)
    whole: bool = True
    seconds: float = 0.0

    def add(self, video: Video, spent: Mapping[str, Mapping[str, Any]]) -> None:
        """Count a video and what was spent on it."""
        self.videos += 1
        self.count.add(video)
        for lost in video.lost:
            key = (lost.stage, lost.what.partition(" ")[0], lost.reason)
            self.lost[key] += 1
            self.example.setdefault(key, f"{video.name}, {lost.what}: {lost.told}")
        for stage, account in spent.items():
            sums = self.spent.setdefault(stage, Spent())
            for name, value in account.items():
                setattr(sums, name, getattr(sums, name) + value)

    def print(self, console: Any) -> None:
        """Print it as tables."""
        rows = ", ".join(f"{count} {split}" for split, count in self.rows.items()) or "none"
        console.print(
            f"{self.out}: {self.videos} of {self.total} videos, rows: {rows}; {self.seconds:.0f} s",
            highlight=False,
            markup=False,
        )
        if self.lost:
            table = Table(title="lost", title_justify="left")
            for name in ("stage", "what", "reason", "count", "the first"):
                table.add_column(name, justify="right" if name == "count" else "left")
            for (stage, what, reason), count in self.lost.items():
                told = printable(self.example[stage, what, reason], 200)
                table.add_row(*map(printable, (stage, what, reason)), str(count), told)
            console.print(table, markup=False)
        asked = {stage: account for stage, account in self.spent.items() if account.asks}
        if asked:
            table = Table(title="asked, all calls of this build together", title_justify="left")
            for name in ("stage", "asks", "tokens in", "tokens out", "seconds", "cost"):
                table.add_column(name, justify="left" if name == "stage" else "right")
            for stage, account in asked.items():
                table.add_row(
                    printable(stage),
                    str(account.asks),
                    str(account.tokens_in),
                    str(account.tokens_out),
                    f"{account.seconds:.1f}",
                    f"{account.cost:.4f}",
                )
            console.print(table, markup=False)
        for note in self.notes:
            console.print(printable(note), highlight=False, markup=False, soft_wrap=True)
