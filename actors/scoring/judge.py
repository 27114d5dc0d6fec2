"""The reward ``judge``: a vision-language model that is shown a clip, what was asked and a rubric, and says how good the clip is.

It stands behind an OpenAI-compatible endpoint, or is a folder that vLLM serves in the reward's own workers. Its answer is held to a
JSON schema. What it refuses, or answers in another form, is a failure of the answer and no 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import Field

from actors.endpoint.client import Endpoint
from actors.endpoint.forms import Form, jpeg_of, parse_form, picture_part, request_body
from actors.endpoint.settings import AskFailedError, EndpointSection, Reply
from actors.policy.cache import Cache, content_key
from actors.records import ScoreRequest, derive_seed
from actors.scoring.model import RewardModel
from actors.settings import Positive

RUBRIC = (
    "0: the clip shows something else, or nothing that can be told. 5: it shows the event only in part, or wrongly ended. "
    "10: it shows the whole event clearly, in the scene that the input showed, with motion that could be real."
)
BEST = 10
_SYSTEM = (
    "You judge videos that were made as answers to questions about a video. You are strict, and you use the whole scale. "
    "You answer with one JSON object and nothing else."
)
_KEPT_BYTES = 1 << 20  # of verdicts, so that a batch that is asked again is not paid for again


class Verdict(Form):
    """What the judge says of one clip."""

    why: str = Field(description="One sentence.")
    score: int = Field(ge=0, le=BEST)


class Choice(Form):
    """What the judge says of two clips."""

    why: str = Field(description="One sentence.")
    better: Literal["A", "B", "equal"]


class JudgeSection(EndpointSection):
    """The options of ``judge``. Without ``base_url``, ``model`` is a folder, and each worker serves it by vLLM."""

    rubric: str = Field(RUBRIC, min_length=1, description="What earns how many of 10 points, or which clip is better.")
    samples: Positive = Field(1, description="Answers that are averaged; of a pair, as many in either order.")
    against: Literal["rubric", "truth"] = Field(
        "rubric", description="`rubric`: points for the clip. `truth`: it against the true clip, asked in both orders."
    )
    shows_input: bool = Field(False, description="Whether the judge sees the input video too.")
    frames: Positive = Field(8, description="Frames of a clip that it is shown, evenly spaced, both ends among them.")
    temperature: float = Field(0.7, ge=0, le=2, description="Sampling temperature.")
    max_tokens: Positive = Field(256, description="New tokens of an answer.")
    engine: dict[str, Any] = Field({}, description="Arguments of vLLM's engine, where there is no base_url.")


Send = Callable[[list[dict[str, Any]]], list[Reply | AskFailedError]]
"""Asks all of some requests of chat completions, and returns what each came to, in order."""
_NAMES = {"rubric": "score", "truth": "better"}


class UnjudgedError(RuntimeError):
    """The judge gave no verdict on an answer. The answer leaves its group."""


@dataclass(frozen=True)
class _Ask:
    """One question to the judge: the form of its answer, and what an answer of that form is worth, 0…1."""

    form: type[Form]
    body: dict[str, Any]
    worth: Callable[[Any], float]


class Judge(RewardModel):
    """A judge's points divided by 10, or the share of comparisons with the true clip that the clip wins, a tie being half."""

    range = (0.0, 1.0)

    def __init__(self, **options: Any) -> None:
        self.settings = JudgeSection(**options)
        self.needs = ("text", "clip", "question")
        self.needs += ("pair",) * (self.settings.against == "truth") + ("input_video",) * self.settings.shows_input
        self._send: Send | None = None
        self._kept: Cache[np.float64] = Cache(_KEPT_BYTES)
        self._spent = dict.fromkeys(("asks", "failed", "tokens_in", "tokens_out", "cost"), 0.0)

    def setup(self, device: str, dtype: str) -> None:
        """Connect to the endpoint, or start the engine. Raises ConfigError where there is none, or it refuses the key."""
        if self.settings.base_url is None:
            from actors.scoring.judge_engine import JudgeEngine

            self._send = JudgeEngine(self.settings, dtype).send
            return
        endpoint = Endpoint("judge", self.settings)
        endpoint.check()
        threads = ThreadPoolExecutor(self.settings.concurrency, thread_name_prefix="judge")
        self._send = lambda bodies: list(threads.map(partial(_sent, endpoint), bodies))

    def counters(self) -> dict[str, float]:
        """Return what was asked since the start: asks, those without a verdict, tokens, and their price."""
        return dict(self._spent)

    def score(self, requests: Sequence[ScoreRequest]) -> list[float]:
        """Return a value for each request; all of them are asked at once.

        Raises UnjudgedError where one has no verdict. The others are kept then, so that they are not paid for again.
        """
        assert self._send is not None
        values: list[np.float64 | UnjudgedError | None] = [self._kept.find(_key(request)) for request in requests]
        asks = [self._asks(request) if value is None else [] for request, value in zip(requests, values, strict=True)]
        replies = iter(self._send([ask.body for several in asks for ask in several]))
        for place, several in enumerate(asks):
            if several:
                found = [self._worth(ask, next(replies)) for ask in several]
                values[place] = self._mean(_key(requests[place]), found)
        for value in values:
            if isinstance(value, UnjudgedError):
                raise value
        return [float(value) for value in values]  # type: ignore[arg-type]

    def _mean(self, key: str, found: Sequence[float | UnjudgedError]) -> np.float64 | UnjudgedError:
        for value in found:
            if isinstance(value, UnjudgedError):
                return value
        return self._kept.put(key, np.float64(np.mean([float(value) for value in found])))  # type: ignore[arg-type]

    def _asks(self, request: ScoreRequest) -> list[_Ask]:
        asks = []
        for number in range(self.settings.samples):
            seed = derive_seed(request.sample_id, request.index, "judge", number) % 2**31
            if self.settings.against == "rubric":
                body = self._body(Verdict, request, {"The answer": request.clip}, seed)
                asks.append(_Ask(Verdict, body, lambda verdict: verdict.score / BEST))
                continue
            for ours, theirs in (("A", "B"), ("B", "A")):
                named = {ours: request.clip, theirs: request.target_frames}
                body = self._body(Choice, request, {f"Clip {name}": named[name] for name in "AB"}, seed)
                wins = {ours: 1.0, theirs: 0.0, "equal": 0.5}
                asks.append(_Ask(Choice, body, partial(_of_choice, wins)))
        return asks

    def _body(
        self, form: type[Form], request: ScoreRequest, clips: Mapping[str, np.ndarray | None], seed: int
    ) -> dict[str, Any]:
        messages = self._messages(request, clips)
        chosen = self.settings
        return request_body(chosen, messages, form.model_json_schema(), max_tokens=chosen.max_tokens, seed=seed)

    def _worth(self, ask: _Ask, reply: Reply | AskFailedError) -> float | UnjudgedError:
        """Return what the judge's reply is worth, or why there is no verdict; count it."""
        self._spent["asks"] += 1
        told = ""
        if isinstance(reply, AskFailedError):
            told = f"the judge did not answer ({reply.reason}): {reply.told}"
        else:
            self._spent["tokens_in"] += reply.tokens_in
            self._spent["tokens_out"] += reply.tokens_out
            self._spent["cost"] += self.settings.cost(reply.tokens_in, reply.tokens_out)
            if reply.fault:
                told = f"the judge's answer is {reply.fault}: {reply.text[:120]!r}"
            else:
                try:
                    return ask.worth(parse_form(ask.form, reply.text))
                except ValueError as error:
                    told = f"the judge's answer has another form ({error}): {reply.text[:120]!r}"
        self._spent["failed"] += 1
        return UnjudgedError(told)

    def _messages(self, request: ScoreRequest, clips: Mapping[str, np.ndarray | None]) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = []
        for label, frames in {"The input": request.input_frames, **clips}.items():
            if frames is not None:
                content.append({"type": "text", "text": f"{label}:"})
                content += [picture_part(jpeg) for jpeg in _pictures(frames, self.settings.frames)]
        score = f"0 to {BEST}" if self.settings.against == "rubric" else "A, B or equal"
        asked = (
            f"Question: {request.question}\nThe answer was to show: {request.caption}\n"
            f"What really happened: {request.reference_caption}\nRubric: {self.settings.rubric}\n"
            f'Answer with a JSON object of "why", one sentence, and "{_NAMES[self.settings.against]}", {score}.'
        )
        content.append({"type": "text", "text": asked})
        return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": content}]


def _sent(endpoint: Endpoint, body: dict[str, Any]) -> Reply | AskFailedError:
    try:
        return endpoint.send(body)
    except AskFailedError as error:
        return error


def _of_choice(wins: Mapping[str, float], choice: Choice) -> float:
    return wins[choice.better]


def _key(request: ScoreRequest) -> str:
    assert request.clip is not None
    told = f"{request.sample_id}/{request.index}/{request.question}/{request.caption}".encode()
    return content_key(np.frombuffer(told, np.uint8)) + content_key(request.clip)


def _pictures(frames: np.ndarray, count: int) -> list[str]:
    """Return ``count`` of ``frames`` (T, H, W, 3), evenly spaced, as base64 of JPEG."""
    chosen = frames[np.unique(np.linspace(0, len(frames) - 1, count).round().astype(int))]
    return [jpeg_of(Image.fromarray(np.ascontiguousarray(picture))) for picture in chosen]
