"""The reward ``videoscore2``: the points that VideoScore2 (arXiv 2509.22799) writes for a clip and its caption.

It is a Qwen2.5-VL that reasons and then names three whole numbers from 1 to 5, by a prompt that it was trained with. The prompt is
its authors' and is not repeated here: it is read from a file.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.failures import BadSampleError
from actors.records import ScoreRequest
from actors.scoring.model import RewardLoadError, RewardModel

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

ASPECTS = {
    "quality": "visual quality",
    "alignment": "text-to-video alignment",
    "consistency": "physical/common-sense consistency",
}
"""What it gives points for, and how its answers call that."""
LEAST, MOST = 1.0, 5.0
CAPTION = "{caption}"


class VideoScore2(RewardModel):
    """Mean of the points for ``aspects``, 1 to 5; an answer without them is a failure, and no score.

    ``path``: a folder or name of the model; ``prompt``: a text file with ``{caption}`` in it; ``frames``: most frames that it sees,
    evenly spaced; ``fps``: how many of them it is told to be a second; ``max_tokens``: of its answer, which is decoded greedily.
    """

    needs = ("text", "clip")
    range = (LEAST, MOST)

    def __init__(
        self,
        path: str,
        prompt: str,
        aspects: Sequence[str] = tuple(ASPECTS),
        frames: int = 8,
        fps: float = 2.0,
        max_tokens: int = 1024,
    ) -> None:
        if not aspects or not set(aspects) <= ASPECTS.keys():
            raise RewardLoadError(f"aspects={list(aspects)}: give some of {', '.join(ASPECTS)}")
        if frames < 2 or fps <= 0 or max_tokens < 1:
            raise RewardLoadError(
                f"frames={frames}, fps={fps:g}, max_tokens={max_tokens}: at least 2, above 0, at least 1"
            )
        self._path, self._prompt, self._aspects = path, Path(prompt), tuple(aspects)
        self._frames, self._fps, self._max_tokens = frames, fps, max_tokens
        self._text = ""
        self._model: Any = None
        self._processor: Any = None

    def setup(self, device: str, dtype: str) -> None:
        """Read the prompt and load the model. Raises RewardLoadError for a prompt without ``{caption}``, CheckpointError."""
        from actors.vlm.loading import load_model

        try:
            self._text = self._prompt.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RewardLoadError(f"prompt={self._prompt}: cannot be read as text ({error})") from error
        if CAPTION not in self._text:
            raise RewardLoadError(f"prompt={self._prompt}: the file must say where the caption goes, by {CAPTION}")
        model, self._processor = load_model(self._path, dtype)
        self._model = model.to(device)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The model."""
        return () if self._model is None else (self._model,)

    def score(self, requests: Sequence[ScoreRequest]) -> list[float]:
        """See :class:`RewardModel`."""
        from actors.vlm.prompt import check_text, placeholders

        values = []
        for request in requests:
            try:
                check_text(self._processor.tokenizer, request.caption, "caption")
                if any(token in request.caption for token in placeholders(self._processor)):
                    raise BadSampleError("the caption has a token that stands for a picture")
            except BadSampleError as error:  # it would be read as more than words
                log.warning("sample %s: %s", request.sample_id, error)
                values.append(math.nan)
                continue
            values.append(points(self._answer(request), self._aspects))
        return values

    def _answer(self, request: ScoreRequest) -> str:
        """Return what the model writes about the clip of ``request``."""
        import torch

        from actors.vlm.inputs import check_frames

        assert request.clip is not None
        places = np.linspace(0, len(request.clip) - 1, min(self._frames, len(request.clip))).round().astype(int)
        frames = np.ascontiguousarray(request.clip[places])
        check_frames(frames)
        asked = self._text.replace(CAPTION, request.caption)
        messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": asked}]}]
        text = self._processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        told = {
            "fps": self._fps,
            "duration": len(frames) / self._fps,
            "total_num_frames": len(frames),
            "frames_indices": list(range(len(frames))),
            "video_backend": "opencv",
        }
        given = self._processor(
            text=[text], videos=[frames], video_metadata=[told], do_sample_frames=False, return_tensors="pt"
        ).to(self._model.device)
        given = {
            name: value.to(self._model.dtype) if value.is_floating_point() else value
            for name, value in given.items()
            if torch.is_tensor(value)
        }
        with torch.no_grad():
            written = self._model.generate(**given, max_new_tokens=self._max_tokens, do_sample=False)
        return str(
            self._processor.tokenizer.decode(written[0, given["input_ids"].shape[1] :], skip_special_tokens=True)
        )


def points(answer: str, aspects: Sequence[str] = tuple(ASPECTS)) -> float:
    """Return the mean of the points for ``aspects`` that ``answer`` names, the last time that it does; NaN where any is missing."""
    found = []
    for aspect in aspects:
        named = re.findall(rf"{re.escape(ASPECTS[aspect])}\W*?(\d+)", answer, re.IGNORECASE)
        value = float(named[-1]) if named else math.nan
        found.append(value if LEAST <= value <= MOST else math.nan)
    return sum(found) / len(found)
