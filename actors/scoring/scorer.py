"""Score requests to scores: which component needs what, features in common batches, one outcome per request.

No Ray: the reward worker and local evaluation run the same code. The formulas are in ``rewards``.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from actors.failures import BadSampleError, Failure, InfrastructureError, Outcome, attempt
from actors.policy.cache import Cache, content_key
from actors.records import ScoreRequest, Scores
from actors.scoring.asking import LARGEST, read_only
from actors.scoring.components import BUILT_IN, FEATURES, VIDEO_FEATURES
from actors.scoring.model import Facts, function_needs
from actors.scoring.trying import tried
from rewards.custom import CustomReward, call_reward, is_custom, load_reward
from rewards.errors import RewardError
from rewards.format import DEFAULT, AnswerFormat
from rewards.frechet import clip_frames_feature
from rewards.motion import motion_agreement
from rewards.signs import copying, frame_diagnostics
from rewards.similarity import clip_score, clip_t, clip_v
from rewards.structure import first_frame
from rewards.text import rouge_l

if TYPE_CHECKING:  # transformers, which takes seconds to load, is not needed to know which rewards there are
    from actors.scoring.clip import ClipScorer


@dataclass(frozen=True)
class _View:
    """One request with the CLIP features that its components need; float32 arrays, None for what nobody asked for."""

    request: ScoreRequest
    clip: Any = None  # (T', D)
    target: Any = None  # (T, D)
    last: Any = None  # (D,)
    caption: Any = None  # (D,)
    truth: Any = None  # (D,)
    truncated: bool = False  # the caption was cut at CLIP's limit
    answers: AnswerFormat = DEFAULT


_BUILT_IN: dict[str, Callable[[_View], float]] = {
    "format": lambda v: v.answers.reward(v.request.text),
    "rouge_l": lambda v: rouge_l(v.request.caption, v.request.reference_caption),
    "clip_v": lambda v: clip_v(v.clip, v.target),
    "clip_t": lambda v: clip_t(v.clip, v.caption),
    "clip_t_truth": lambda v: clip_t(v.clip, v.truth),
    "clip_score": lambda v: clip_score(v.clip, v.caption),
    "motion": lambda v: motion_agreement(_drawn(v), v.request.target_frames),
    "first_frame": lambda v: first_frame(_drawn(v), v.request.last_input_frame),
}


def _drawn(view: _View) -> np.ndarray:
    assert view.request.clip is not None
    return view.request.clip


def _needs(name: str) -> frozenset[str]:
    needs = FEATURES[name]
    return frozenset({"text"} | ({"clip"} & set(needs)) | ({"pair"} if "target" in needs else set()))


class Scorer:
    """Scores requests with one CLIP and any custom rewards.

    ``custom``: alias → ``module:function``; a component spelt as a dotted path needs no alias. ``fvd_dim``: width of
    the Fréchet features. ``diagnostics``: add the alarms to the scores of every request that has a clip.
    ``custom_timeout_s``: longest that a custom reward may take for one answer, all its tries together; ``wait_s``: before
    its second try, twice as long before the third. ``answers``: what the component ``format`` pays.
    """

    def __init__(
        self,
        clip: ClipScorer,
        *,
        custom: Mapping[str, str] | None = None,
        cache_mib: float = 64.0,
        fvd_dim: int = 16,
        diagnostics: bool = True,
        custom_timeout_s: float = math.inf,
        wait_s: float = 0.5,
        answers: AnswerFormat = DEFAULT,
    ) -> None:
        self.custom_timeout_s, self.wait_s, self.answers = custom_timeout_s, wait_s, answers
        self.clip = clip
        self.cache = Cache[np.ndarray](int(cache_mib * (1 << 20)))
        self.fvd_dim = fvd_dim
        self.diagnostics = diagnostics
        clashes = sorted(set(custom or {}) & {*BUILT_IN, VIDEO_FEATURES})
        if clashes:
            raise RewardError(f"custom rewards may not take the built-in names {clashes}")
        self._worked: set[str] = set()  # paths of the custom rewards that have given a value
        self._custom: dict[str, tuple[str, CustomReward]] = {n: (p, load_reward(p)) for n, p in (custom or {}).items()}

    @property
    def fvd_extractor(self) -> str:
        """Name of the Fréchet features, for ``rewards.frechet``."""
        return f"{self.clip.name}-frames-{self.fvd_dim}"

    def check(self, components: Sequence[str]) -> None:
        """Raise RewardError where a component is neither built in nor a custom reward that loads."""
        for name in components:
            if name in FEATURES or name in self._custom:
                continue
            if not is_custom(name):
                raise RewardError(
                    f"unknown reward component {name!r}; built in are {', '.join(BUILT_IN)}, "
                    "and your own is written module:function"
                )
            self._custom[name] = (name, load_reward(name))

    def facts(self, components: Sequence[str]) -> dict[str, Facts]:
        """Return what each of ``components`` looks at: a function what it names. Raises as :meth:`check`."""
        self.check(components)
        return {
            name: Facts(function_needs(self._custom[name][1]) if name in self._custom else _needs(name))
            for name in components
        }

    def score(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """Return one outcome per request, in order. A request that fails does not disturb the others."""
        outcomes: dict[int, Outcome] = {}
        sound: list[int] = []
        for i, request in enumerate(requests):
            failure = _guarded(partial(self._check_request, request))
            if isinstance(failure, Failure):
                outcomes[i] = failure
            else:
                sound.append(i)
        views = _guarded(lambda: self._views([requests[i] for i in sound]))
        for place, i in enumerate(sound):
            if isinstance(views, Failure) and len(sound) > 1:  # each for itself: only the one at fault fails
                outcomes[i] = self.score([requests[i]])[0]
            elif isinstance(views, Failure):
                outcomes[i] = views
            else:
                outcomes[i] = _guarded(partial(self._score, views.value[place]))
        return [outcomes[i] for i in range(len(requests))]

    def _check_request(self, request: ScoreRequest) -> None:
        try:
            self.check(request.components)
        except RewardError as error:  # a wrong name is the run's fault, not this sample's
            raise LookupError(str(error)) from error
        needed = {need for name in request.components for need in FEATURES.get(name, ())}
        if request.clip is None and "clip" in needed:
            raise ValueError(
                f"sample {request.sample_id}: components {request.components} need a clip, and there is none"
            )
        if "caption" in needed and not request.caption.strip():
            raise BadSampleError(f"sample {request.sample_id}: an empty caption has no CLIP text feature")
        for name, text in (("caption", request.caption), ("reference caption", request.reference_caption)):
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise BadSampleError(f"sample {request.sample_id}: the {name} is not Unicode text: {text[:80]!r}")
        frames = {
            "clip": request.clip,
            "target_frames": request.target_frames,
            "last_input_frame": request.last_input_frame[None],
        }
        for name, array in frames.items():
            if array is None or (request.clip is None and name != "clip"):
                continue
            if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3:
                raise BadSampleError(
                    f"sample {request.sample_id}: {name} must be uint8 RGB frames, not {array.dtype} {array.shape}"
                )
            if 0 in array.shape:
                raise BadSampleError(f"sample {request.sample_id}: {name} holds no picture, shape {array.shape}")

    def _views(self, requests: Sequence[ScoreRequest]) -> list[_View]:
        """Compute the features of all requests together: equal frames and equal captions once."""
        wanted: list[dict[str, Any]] = []
        frames: dict[str, np.ndarray] = {}
        texts: dict[str, str] = {}
        for request in requests:
            needs = {need for name in request.components for need in FEATURES.get(name, ())}
            if request.clip is not None and self.diagnostics:
                needs |= {"clip", "target", "last"}
            arrays: dict[str, Any] = {
                "clip": request.clip,
                "target": request.target_frames,
                "last": request.last_input_frame[None],
            }
            strings = {"caption": request.caption, "truth": request.reference_caption}
            keys: dict[str, Any] = {}
            for name in sorted(needs):
                if name in arrays:
                    keys[name] = content_key(arrays[name])
                    frames[keys[name]] = arrays[name]
                else:
                    keys[name] = strings[name]
                    texts[keys[name]] = strings[name]
            wanted.append(keys)
        features = self._frame_features(frames)
        vectors, truncated = self._text_features(texts)
        return [
            _View(
                request,
                clip=features.get(keys.get("clip")),
                target=features.get(keys.get("target")),
                last=features[keys["last"]][0] if "last" in keys else None,
                caption=vectors.get(keys.get("caption")),
                truth=vectors.get(keys.get("truth")),
                truncated=keys.get("caption") in truncated,
                answers=self.answers,
            )
            for request, keys in zip(requests, wanted, strict=True)
        ]

    def _frame_features(self, frames: Mapping[str, np.ndarray]) -> dict[Any, np.ndarray]:
        found = {key: self.cache.find(key) for key in frames}
        missing = [key for key, value in found.items() if value is None]
        for key, value in zip(missing, self.clip.image_features([frames[key] for key in missing]), strict=True):
            self.cache.put(key, value)
            found[key] = value
        return {key: value for key, value in found.items() if value is not None}

    def _text_features(self, texts: Mapping[str, str]) -> tuple[dict[Any, np.ndarray], set[str]]:
        vectors, cut = self.clip.text_features(list(texts.values()))
        return dict(zip(texts, vectors, strict=True)), {key for key, is_cut in zip(texts, cut, strict=True) if is_cut}

    def _score(self, view: _View) -> Scores:
        request = view.request
        values: dict[str, float] = {}
        features: dict[str, np.ndarray] = {}
        for name in request.components:
            if name == VIDEO_FEATURES:
                assert view.clip is not None and view.target is not None
                features["clip"] = clip_frames_feature(view.clip, self.fvd_dim)
                features["target"] = clip_frames_feature(view.target, self.fvd_dim)
                continue
            value = _BUILT_IN[name](view) if name in _BUILT_IN else self._custom_value(name, request)
            if not abs(value) <= LARGEST:
                raise BadSampleError(
                    f"component {name!r} of sample {request.sample_id}, answer {request.index}, is {value}"
                )
            values[name] = value
        return Scores(request.sample_id, request.index, values, self._diagnose(view), features)

    def _custom_value(self, name: str, request: ScoreRequest) -> float:
        """Call a user's reward. Whatever it does is the answer's failure: one odd clip must not end a run of days."""
        path, function = self._custom[name]
        arguments = _arguments(request)
        if math.isinf(self.custom_timeout_s):
            return self._tried(path, function, arguments)
        found: list[float | Exception] = []

        def call() -> None:
            try:
                found.append(self._tried(path, function, arguments))
            except Exception as error:  # noqa: BLE001 - raised below, in the thread that waits
                found.append(error)
            except BaseException as error:  # noqa: BLE001 - what would end a process ends no worker
                found.append(BadSampleError(f"reward {path!r} raised {type(error).__name__}: {error}"))

        # A thread cannot be ended: one that is late goes on by itself, and what it finds is not waited for.
        thread = threading.Thread(target=call, name=f"reward {path}", daemon=True)
        thread.start()
        thread.join(self.custom_timeout_s)
        if not found:
            raise BadSampleError(
                f"reward {path!r} took longer than {self.custom_timeout_s:g} s for one answer (half of "
                "pools.reward.request_timeout_s)"
            )
        value = found[0]
        if isinstance(value, Exception):
            raise value
        return value

    def _tried(self, path: str, function: CustomReward, arguments: dict[str, Any]) -> float:
        """Return the reward's value; BadSampleError says what it raised, after further tries where those may help."""
        value = tried(
            path, lambda: call_reward(path, function, arguments), worked=path in self._worked, wait_s=self.wait_s
        )
        self._worked.add(path)
        return value

    def _diagnose(self, view: _View) -> dict[str, float]:
        request = view.request
        if request.clip is None or not self.diagnostics:
            return {}
        own, excess = copying(view.clip, view.target, view.last)
        found = {**frame_diagnostics(request.clip, request.target_frames), "copy": own, "copy_excess": excess}
        if view.caption is not None:
            found["caption_truncated"] = float(view.truncated)
        return found


def _arguments(request: ScoreRequest) -> dict[str, Any]:
    """Return what a custom reward is called with; arrays are read-only it must not change its neighbours' input."""
    return {
        "sample_id": request.sample_id,
        "text": request.text,
        "caption": request.caption,
        "reference_caption": request.reference_caption,
        "clip": read_only(request.clip),
        "target_frames": read_only(request.target_frames),
        "last_input_frame": read_only(request.last_input_frame),
        "question": request.question,
        "input_frames": read_only(request.input_frames),
    }


def _guarded(function: Callable[[], Any]) -> Outcome:
    """Run ``function``; no score is the sample's fault, no memory the machine's, an error of our own code a bug."""

    def classed() -> Any:
        try:
            return function()
        except RewardError as error:
            raise BadSampleError(str(error)) from error
        except torch.OutOfMemoryError as error:
            raise InfrastructureError(str(error)) from error

    return attempt(classed)
