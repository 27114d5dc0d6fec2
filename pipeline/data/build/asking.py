"""How a stage asks a model: structured answers, one repair, each reply kept so that it is never paid for twice.

A stage hands over all that it wants to know of a video at once (:meth:`Asker.all`). Where the model is an endpoint, what has no
reply yet is sent; where it is vLLM within the cluster, :class:`PendingError` carries the asks out, and the stage is called again
when their replies are there (``engine``). Either way the same code decides what an answer is worth.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

from PIL import Image

from actors.endpoint.client import Endpoint
from actors.endpoint.forms import Form, jpeg_of, parse_form, picture_part, request_body
from actors.endpoint.settings import AskFailedError, Reply
from actors.records import derive_seed
from cluster.harmless import printable
from pipeline.data.build.models import Ask, ModelSection, Shown
from pipeline.data.build.store import WorkArea, digest_of
from pipeline.data.reading import VideoLimits
from pipeline.data.video import decode_timed, probe

ASKS = "asks"  # what replies are kept as
AGAIN = 1  # times that a refused, truncated or empty answer is asked for again, with another seed
RAW = 2000  # characters of an answer that are kept with what was lost


@dataclass(frozen=True)
class Request:
    """What a stage wants to know: ``form`` is the answer's, ``shown`` the clips that the model sees."""

    system: str
    text: str
    form: type[Form]
    shown: tuple[Shown, ...] = ()
    part: str = ""  # video and part, such as "film pair 3-4"; keeps equal prompts apart: another seed, and no ask sent twice at once


@dataclass(frozen=True)
class Rejected:
    """Why there is no answer: ``reason`` is one of few words, ``raw`` what the model wrote."""

    reason: str
    told: str
    raw: str = ""


class PendingError(Exception):
    """Asks whose replies have to be there before the stage can go on."""

    def __init__(self, asks: Sequence[Ask]) -> None:
        super().__init__(f"{len(asks)} asks wait for their replies")
        self.asks = list(asks)


class BudgetSpentError(Exception):
    """The budget is spent up, so nothing is asked any more."""


class Meter(Protocol):
    """Counts what is spent by all workers of a build, in all calls of the command."""

    def allows(self) -> bool:
        """Return whether anything may be asked."""
        ...

    def add(self, tokens: int, cost: float) -> None:
        """Count one reply."""
        ...


@dataclass
class Spent:
    """What a stage spent on a video."""

    asks: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    cost: float = 0.0


@dataclass
class _State:
    request: Request
    ask: Ask
    repaired: bool = False
    outcome: Any = None


@dataclass
class Asker:
    """Asks one model for one stage. ``name``: of the model in the recipe; ``threads``: asks at a time, of all threads that call."""

    stage: str
    name: str
    model: ModelSection
    area: WorkArea
    seed: int = 0
    threads: int = 1
    limits: VideoLimits = field(default_factory=VideoLimits)
    meter: Meter | None = None
    endpoint: Endpoint | None = None
    _local: threading.local = field(default_factory=threading.local, init=False, repr=False)

    def __post_init__(self) -> None:
        self._turns = threading.BoundedSemaphore(self.threads)

    def setup(self) -> None:
        """Open the connection; raises ConfigError where the key is missing on this node."""
        if self.model.base_url is not None and self.endpoint is None:
            self.endpoint = Endpoint(f"models.{self.name}", self.model)

    # --- a video's account ------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Begin a new account in this thread; :meth:`taken` returns it."""
        self._local.spent = Spent()

    def taken(self) -> Spent:
        """Return what was spent in this thread since :meth:`begin`, replies that were kept included."""
        found: Spent = self._local.spent
        return found

    # --- asking -----------------------------------------------------------------------------------------------------

    def all(self, requests: Sequence[Request]) -> list[Form | Rejected]:
        """Return the answer to each of ``requests``, of its form, or why there is none.

        Raises PendingError, BudgetSpentError, and ConfigError where the endpoint refuses any ask.
        """
        states = [_State(request, self._ask(request)) for request in requests]
        while waiting := [state for state in states if state.outcome is None]:
            for state, reply in zip(waiting, self._replies([state.ask for state in waiting])):
                self._judge(state, reply)
        return [state.outcome for state in states]

    def _ask(self, request: Request) -> Ask:
        system = request.system
        schema = request.form.model_json_schema()
        if self.model.structured != "json_schema":
            system += "\n" + json.dumps(schema, ensure_ascii=False)
        seed = derive_seed(self.seed, self.stage, request.part, request.text) % 2**31
        return Ask(self.stage, self.name, system, request.text, request.shown, schema, self.model.max_tokens, seed)

    def _judge(self, state: _State, reply: Reply | AskFailedError) -> None:
        """Set the state's outcome, or its next ask."""
        if isinstance(reply, AskFailedError):
            state.outcome = Rejected(reply.reason, reply.told)
            return
        ask = state.ask
        if reply.fault:
            if ask.attempt < AGAIN:
                longer = 2 * ask.max_tokens if reply.fault == "truncated" else ask.max_tokens
                state.ask = replace(ask, attempt=ask.attempt + 1, max_tokens=longer, seed=ask.seed ^ 1)
                return
            told = {
                "refused": "the model refuses to answer",
                "truncated": f"the answer does not end within {ask.max_tokens} tokens",
                "empty": "the answer is empty",
            }[reply.fault]
            state.outcome = Rejected(reply.fault, told, reply.text[:RAW])
            return
        try:
            state.outcome = parse_form(state.request.form, reply.text)
        except ValueError as error:
            if not state.repaired:
                state.repaired = True
                shown = printable(reply.text, RAW)
                repair = f"{ask.text}\n\n{_REPAIR.format(answer=shown, fault=error)}"
                state.ask = replace(ask, text=repair, attempt=0)
                return
            reason = "not JSON" if isinstance(error, json.JSONDecodeError) else "wrong form"
            state.outcome = Rejected(reason, f"after one repair: {error}", reply.text[:RAW])

    def _replies(self, asks: Sequence[Ask]) -> list[Reply | AskFailedError]:
        keys = [ask.key(self.model) for ask in asks]
        found: dict[str, Reply | AskFailedError] = {}
        for key in keys:
            if key not in found and (kept := self.area.read(ASKS, key)) is not None:
                found[key] = Reply(**kept)
        missing = {key: ask for key, ask in zip(keys, asks) if key not in found}
        if missing and self.endpoint is None:
            raise PendingError(list(missing.values()))
        if len(missing) > 1 and self.threads > 1:
            with ThreadPoolExecutor(min(self.threads, len(missing))) as pool:
                found.update(zip(missing, pool.map(self._sent, missing, missing.values())))
        else:
            found.update((key, self._sent(key, ask)) for key, ask in missing.items())
        account = self.taken()
        for key in keys:
            reply = found[key]
            account.asks += 1
            if isinstance(reply, Reply):
                account.tokens_in += reply.tokens_in
                account.tokens_out += reply.tokens_out
                account.seconds += reply.seconds
                account.cost += self.model.cost(reply.tokens_in, reply.tokens_out)
        return [found[key] for key in keys]

    def _sent(self, key: str, ask: Ask) -> Reply | AskFailedError:
        assert self.endpoint is not None
        with self._turns:
            if self.meter is not None and not self.meter.allows():
                raise BudgetSpentError
            try:
                reply = self.endpoint.send(body_of(ask, self.model, self.area, self.limits))
            except AskFailedError as error:
                return error
        self.area.write(ASKS, key, asdict(reply))
        if self.meter is not None:
            self.meter.add(reply.tokens_in + reply.tokens_out, self.model.cost(reply.tokens_in, reply.tokens_out))
        return reply


_REPAIR = (
    "Your last answer was:\n{answer}\n\nIt cannot be used: {fault}\n"
    "Answer again, with nothing but the JSON object that is asked for."
)


# --- what is sent -----------------------------------------------------------------------------------------------------


def body_of(ask: Ask, model: ModelSection, area: WorkArea, limits: VideoLimits) -> dict[str, Any]:
    """Return ``ask`` as a request of chat completions."""
    messages = messages_of(ask, model, area, limits)
    return request_body(model, messages, ask.schema, max_tokens=ask.max_tokens, seed=ask.seed)


def messages_of(ask: Ask, model: ModelSection, area: WorkArea, limits: VideoLimits) -> list[dict[str, Any]]:
    """Return the messages of ``ask``, its clips as mp4s or as frames."""
    content: list[dict[str, Any]] = []
    for shown in ask.shown:
        if model.sees == "video":
            content.append({"type": "text", "text": f"{shown.label}:"})
            content.append({"type": "video_url", "video_url": {"url": _data_uri("video/mp4", area.get(shown.clip))}})
            continue
        frames, seconds = frames_of(shown.clip, model, area, limits)
        content.append({"type": "text", "text": f"{shown.label} ({len(frames)} frames, 0.0 s to {seconds:.1f} s):"})
        content += [picture_part(frame) for frame in frames]
    content.append({"type": "text", "text": ask.text})
    return [{"role": "system", "content": ask.system}, {"role": "user", "content": content}]


def frames_of(clip: str, model: ModelSection, area: WorkArea, limits: VideoLimits) -> tuple[list[str], float]:
    """Return frames of a clip as base64 of JPEG, and the seconds from the first to the last; decoded once in a build."""
    key = digest_of("frames", clip, model.frames, model.frame_side)
    if (kept := area.read("frames", key)) is not None:
        return kept["frames"], kept["seconds"]
    data = area.get(clip)
    info = probe(data, limits)
    scale = min(1.0, model.frame_side / max(info.width, info.height))
    height, width = (max(16, round(side * scale)) for side in (info.height, info.width))
    pictures, seconds = decode_timed(data, model.frames, height, width, limits)
    frames = [jpeg_of(Image.fromarray(picture)) for picture in pictures]
    area.write("frames", key, {"frames": frames, "seconds": round(seconds, 3)})
    return frames, seconds


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
