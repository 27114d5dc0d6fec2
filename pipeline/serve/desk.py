"""Where questions are taken and their answers made: the thinker's caption, then the artist's clip, each asked again where a
replica is lost.

A request repeats itself by its own seed, so what is asked twice has one answer. Not responsible for HTTP (``api``) or for what is
kept (``answers``).
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import AsyncIterable, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from actors.failures import Ok, Outcome
from actors.records import CompletionRequest, RenderRequest, Sample
from cluster.errors import VansError
from pipeline.config import RunConfig
from pipeline.config.stages import RenderSection
from pipeline.data.video import encode_mp4
from pipeline.serve.answers import Answer, Kept, Question
from pipeline.stages.question import Unanswered, caption_request, captioned, question_request, read_video

log = logging.getLogger("ray.serve")
RETRY_S = 0.5  # between two attempts, so that Ray Serve learns of a lost replica
PRUNE_S = 10.0


class Sent(Protocol):
    """A request that has been sent to a deployment."""

    def cancel(self) -> None:
        """Take the request back, where it has not been answered."""
        ...


class Completion(Awaitable[Outcome], Sent, Protocol):
    """What the thinker's handle returns (``ray.serve.handle.DeploymentResponse``)."""


class Drawing(AsyncIterable[float | Outcome], Sent, Protocol):
    """What the artist's handle returns (``DeploymentResponseGenerator``): the share of steps done after each, then the outcome."""


Request = TypeVar("Request", bound=Sent)


@dataclass(frozen=True)
class Pair:
    """The calls of a thinker and of an artist: what sends them a request."""

    complete: Callable[[CompletionRequest], Completion]
    draw: Callable[[RenderRequest], Drawing]


class Lost(VansError):
    """A request that no replica could answer."""


class Refused(VansError):
    """Questions beyond ``serve.limits``."""


class Desk:
    """Takes questions about one video at a time and answers them with one of its ``pairs``, the first where none is named."""

    def __init__(self, config: RunConfig, pairs: Mapping[str, Pair], root: Path) -> None:
        limits = config.serve.limits
        self.config = config
        self.kept = Kept(root, limits.keep_s, limits.keep_mib << 20)
        self.pairs = dict(pairs)
        self._decoding = asyncio.Semaphore(1)  # a video at a time: decoding holds its pictures in memory

    def questions(self, texts: Sequence[str]) -> list[str]:
        """Return ``texts`` without white space around them; raises Refused for an empty or too long one, and for too many."""
        limits = self.config.serve.limits
        asked = [text.strip() for text in texts]
        if not asked or not all(asked):
            raise Refused("question: it is empty; write what you want to know about the video")
        longest = max(map(len, asked))
        if longest > limits.question_chars:
            raise Refused(
                f"question: {longest} characters, at most {limits.question_chars} (serve.limits.question_chars)"
            )
        if len(asked) > limits.questions:
            raise Refused(
                f"{len(asked)} questions: at most {limits.questions} about one video (serve.limits.questions)"
            )
        return asked

    def busy(self) -> int | None:
        """Return in how many seconds there may be room for another video, None where there is some now."""
        return self.kept.wait_s() if self.kept.unfinished >= self.config.serve.limits.queue else None

    async def read(self, video: Path) -> Sample:
        """Return the frames of an upload; raises DataError where it is no video within ``data.max_*``."""
        async with self._decoding:
            return await asyncio.to_thread(read_video, self.config, video)

    def render(self, steps: int | None, guidance: float | None) -> RenderSection:
        """Return how a clip is drawn where a person asks for other steps or guidance than the run's own."""
        given = {"steps": steps, "guidance": guidance}
        return self.config.evaluate.render.model_copy(update={k: v for k, v in given.items() if v is not None})

    def open(
        self, sample: Sample, questions: list[str], seed: int, render: RenderSection, pair: str | None = None
    ) -> Answer:
        """Begin to answer ``questions`` about ``sample`` and return what there is of it. Raises Refused for an unknown pair."""
        pair = next(iter(self.pairs)) if pair is None else pair
        if pair not in self.pairs:
            raise Refused(f"pair={pair[:64]!r}: this server has {' and '.join(self.pairs)} (docs/serve.md)")
        facts = {"pair": pair, "seed": seed, "steps": render.steps, "guidance": render.guidance}
        answer = self.kept.new(questions, facts)
        # In a context of its own: to Ray Serve it is no part of the HTTP request, which ends now.
        answer.task = asyncio.get_running_loop().create_task(
            self._make(answer, sample, seed, render), context=contextvars.Context()
        )
        return answer

    def cancel(self, answer: Answer) -> None:
        """End ``answer`` where it is still being made: what waits is taken back, and so is a clip that is being drawn."""
        for question in answer.questions:
            answer.change(question, "cancelled", error="cancelled")
        if answer.task is not None:
            answer.task.cancel()

    async def prune(self) -> None:
        """Remove old answers, for ever."""
        while True:
            await asyncio.sleep(PRUNE_S)
            self.kept.prune()

    async def close(self) -> None:
        """Cancel all that is being made."""
        tasks = [answer.task for answer in self.kept if answer.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _make(self, answer: Answer, sample: Sample, seed: int, render: RenderSection) -> None:
        limit = self.config.serve.limits.answer_s
        try:
            async with asyncio.timeout(limit):
                shown = await asyncio.to_thread(encode_mp4, sample.context, self.config.video.fps, near_lossless=False)
                await asyncio.to_thread(answer.input.write_bytes, shown)
                await asyncio.gather(
                    *(self._one(answer, i, sample, seed, render) for i in range(len(answer.questions)))
                )
        except TimeoutError:
            for question in answer.questions:
                answer.change(question, "failed", error=f"not answered within {limit:g} s (serve.limits.answer_s)")
        finally:
            self.kept.end(answer)

    async def _one(self, answer: Answer, index: int, sample: Sample, seed: int, render: RenderSection) -> None:
        question = answer.questions[index]
        try:
            await self._steps(answer, question, index, sample, seed, render)
        except VansError as error:
            answer.change(question, "failed", error=str(error))
        except Exception as error:
            log.exception("a question could not be answered")
            answer.change(question, "failed", error=f"{type(error).__name__}: {error}")

    async def _steps(
        self, answer: Answer, question: Question, index: int, sample: Sample, seed: int, render: RenderSection
    ) -> None:
        config, pair = self.config, self.pairs[answer.settings["pair"]]
        answer.change(question, "thinking")
        asked = question_request(config, sample, question.text, seed)
        completions = await _asked(lambda: pair.complete(asked), _completed, config.pools.vlm.max_retries)
        said = captioned(question.text, completions[0].text, config.models.prompt.answers)
        if isinstance(said, Unanswered):
            raise Lost(said.reason)
        answer.change(question, "drawing", caption=said.caption, reasoning=said.thought)
        wanted = caption_request(config, sample, said.caption, index, render, seed)

        async def drawn(drawing: Drawing) -> Outcome | None:
            outcome = None
            async for item in drawing:
                if isinstance(item, float):
                    answer.change(question, "drawing", drawn=item)
                else:
                    outcome = item
            return outcome

        clip = await _asked(lambda: pair.draw(wanted), drawn, config.pools.vdm.max_retries)
        path = answer.folder / f"{index}.mp4"
        video = await asyncio.to_thread(encode_mp4, clip.frames, config.video.fps, near_lossless=False)
        await asyncio.to_thread(path.write_bytes, video)
        answer.change(question, "done", video=path)


async def _completed(completion: Completion) -> Outcome:
    return await completion


async def _asked(
    call: Callable[[], Request], receive: Callable[[Request], Awaitable[Outcome | None]], retries: int
) -> Any:
    """Return the value of what ``call`` asks for, as ``receive`` finds it in what comes back.

    It is asked again, ``retries`` times at most, after an infrastructure failure. Raises Lost with the reason.
    """
    from ray.exceptions import RayError, RayTaskError
    from ray.serve.exceptions import RayServeException

    reason = ""
    for attempt in range(retries + 1):
        if attempt:
            await asyncio.sleep(RETRY_S * attempt)
        sent = call()
        try:
            outcome = await receive(sent)
        except asyncio.CancelledError:
            sent.cancel()
            raise
        except RayTaskError as error:
            raise Lost(str(error.cause or error)) from error
        except (RayError, RayServeException) as error:
            reason = f"the replica was lost: {error}"
            log.warning("asked again, attempt %d: %s", attempt + 2, type(error).__name__)
            continue
        if isinstance(outcome, Ok):
            return outcome.value
        if outcome is None:
            reason = "the replica ended without an answer"
            continue
        if outcome.kind != "infrastructure":
            raise Lost(outcome.message)
        reason = outcome.message
    raise Lost(f"asked {retries + 1} times without an answer: {reason}")
