"""What is known of each answer while it is made and after: states, captions, clips, and how long they are kept.

No Ray and no HTTP. One event loop changes them; files are the clips alone.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

State = Literal["queued", "thinking", "drawing", "done", "failed", "cancelled"]
ENDED: tuple[State, ...] = ("done", "failed", "cancelled")


@dataclass(eq=False)
class Question:
    """One question about a video, and how far its answer is."""

    text: str
    state: State = "queued"
    caption: str | None = None
    reasoning: str | None = None
    error: str | None = None
    video: Path | None = None
    drawn: float = 0.0
    """The share of the clip's denoising steps that are done."""

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in ENDED

    @property
    def progress(self) -> float:
        """How much of it is there, 0 to 1: the caption is one half, the clip's steps are the other; 1 when it has ended."""
        return 1.0 if self.ended else 0.5 + self.drawn / 2 if self.state == "drawing" else 0.0


@dataclass(eq=False)
class Answer:
    """All questions about one video. ``folder`` holds the clips; ``settings`` are their pair, seed, steps and guidance."""

    id: str
    questions: list[Question]
    settings: dict[str, Any]
    folder: Path
    created: float
    ended: float | None = None
    task: asyncio.Task[None] | None = None
    _version: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def input(self) -> Path:
        """The clip of the input as the artist sees it: as large as the answers, and at their rate."""
        return self.folder / "input.mp4"

    @property
    def state(self) -> State:
        """The state of the questions together: done where one of them is and all have ended."""
        states = [question.state for question in self.questions]
        if all(state in ENDED for state in states):
            return next(state for state in ENDED if state in states)
        return next((s for s in ("drawing", "thinking") if s in states), "queued")  # type: ignore[return-value]

    @property
    def progress(self) -> float:
        """How much of it is there, 0 to 1."""
        return sum(question.progress for question in self.questions) / len(self.questions)

    def change(self, question: Question, state: State, **facts: Any) -> None:
        """Set the state and other facts of ``question``, and wake whoever watches. What has ended stays as it is."""
        if question.ended:
            return
        for name, value in facts.items():
            setattr(question, name, value)
        question.state = state
        self._version += 1
        self._changed.set()
        self._changed = asyncio.Event()

    async def changes(self) -> AsyncIterator[Answer]:
        """Yield this answer now and after each change, until it has ended. Changes that come together are one."""
        while True:
            changed, version = self._changed, self._version
            yield self
            if all(question.ended for question in self.questions) and version == self._version:
                return
            if version == self._version:
                await changed.wait()

    def as_json(self) -> dict[str, Any]:
        """Return it as the API shows it."""
        return {
            "id": self.id,
            "state": self.state,
            "progress": self.progress,
            **self.settings,
            "input": f"/v1/answers/{self.id}/input.mp4",
            "sheet": f"/v1/answers/{self.id}/sheet.png",
            "questions": [self._question(number, question) for number, question in enumerate(self.questions)],
        }

    def _question(self, number: int, question: Question) -> dict[str, Any]:
        return {
            "question": question.text,
            "state": question.state,
            "progress": question.progress,
            "caption": question.caption,
            "reasoning": question.reasoning,
            "error": question.error,
            "video": f"/v1/answers/{self.id}/video.mp4?question={number}" if question.video else None,
        }


class Kept:
    """The answers of a server. Those that have ended go when they are older than ``seconds``, or their clips exceed ``most_bytes``."""

    def __init__(
        self, root: Path, seconds: float, most_bytes: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.root, self._seconds, self._most, self._clock = root, seconds, most_bytes, clock
        self._answers: dict[str, Answer] = {}
        self._took: list[float] = []

    def __iter__(self) -> Iterator[Answer]:
        return iter(list(self._answers.values()))

    @property
    def unfinished(self) -> int:
        """Answers that are being made."""
        return sum(answer.ended is None for answer in self._answers.values())

    def get(self, name: str) -> Answer | None:
        """Return an answer by its id, where it is still kept."""
        return self._answers.get(name)

    def new(self, questions: list[str], settings: dict[str, Any]) -> Answer:
        """Return an answer with an id that cannot be guessed, and a folder of its own."""
        name = secrets.token_urlsafe(16)
        folder = self.root / name
        folder.mkdir()
        answer = Answer(name, [Question(text) for text in questions], settings, folder, self._clock())
        self._answers[name] = answer
        return answer

    def end(self, answer: Answer) -> None:
        """Note that nothing more is done for ``answer``, and make room."""
        answer.ended = self._clock()
        if answer.state == "done":
            self._took = [*self._took[-19:], answer.ended - answer.created]
        self.prune()

    def forget(self, answer: Answer) -> None:
        """Remove ``answer`` and its clips."""
        self._answers.pop(answer.id, None)
        shutil.rmtree(answer.folder, ignore_errors=True)

    def prune(self) -> None:
        """Remove what is too old or too much; the newest that has ended is kept whatever its size."""
        ended = sorted((a for a in self if a.ended is not None), key=lambda a: a.ended or 0.0, reverse=True)
        held = 0
        for number, answer in enumerate(ended):
            held += sum(path.stat().st_size for path in answer.folder.glob("*.*"))
            old = self._clock() - (answer.ended or 0.0) > self._seconds
            if old or (number and held > self._most):
                self.forget(answer)

    def wait_s(self) -> int:
        """Return in how many seconds a place may be free: the median time of the last answers, at least one second."""
        return max(1, round(sorted(self._took)[len(self._took) // 2])) if self._took else 5
