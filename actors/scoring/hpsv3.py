"""The reward ``hpsv3``: HPSv3's score of a clip's frames for the caption (arXiv 2508.03789), by its authors' own package.

That package wants transformers 4.45, so the reward has workers with an environment of their own (``pools.rewards.hpsv3.env``). It is
imported there and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.records import ScoreRequest
from actors.scoring.model import RewardLoadError, RewardModel

if TYPE_CHECKING:
    from torch import nn

ENVIRONMENT = "pools.rewards.hpsv3.env.pip=[hpsv3==1.0.0]"


class HPSv3(RewardModel):
    """Mean over ``frames`` of a clip, evenly spaced, of the score that people would give the picture for the caption.

    It has no bounds; pictures that people like have about 10. ``checkpoint``: HPSv3.safetensors; ``config``: a YAML of the
    package's, which names the folder of its base model (by default the package's own file); ``batch``: most pictures in one pass.
    """

    needs = ("text", "clip")

    def __init__(self, checkpoint: str, config: str | None = None, frames: int = 3, batch: int = 8) -> None:
        if not checkpoint.endswith(".safetensors"):
            raise RewardLoadError(
                f"checkpoint={checkpoint!r}: a .safetensors file is read, since others would be unpickled"
            )
        if frames < 1 or batch < 1:
            raise RewardLoadError(f"frames={frames}, batch={batch}: both are at least 1")
        self._checkpoint, self._config, self._frames, self._batch = checkpoint, config, frames, batch
        self._inferencer: Any = None

    def setup(self, device: str, dtype: str) -> None:
        """Load the model; the package decides the dtype. Raises RewardLoadError where the package or the file is not there."""
        if not Path(self._checkpoint).is_file():
            raise RewardLoadError(f"there is no file {self._checkpoint}")
        try:
            from hpsv3 import HPSv3RewardInferencer
        except ImportError as error:
            raise RewardLoadError(
                f"the package hpsv3 cannot be imported ({error}); give its workers it: {ENVIRONMENT}"
            ) from error
        self._inferencer = HPSv3RewardInferencer(
            config_path=self._config, checkpoint_path=self._checkpoint, device=device
        )

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The scorer."""
        return () if self._inferencer is None else (self._inferencer.model,)

    def score(self, requests: Sequence[ScoreRequest]) -> list[float]:
        """See :class:`RewardModel`."""
        from PIL import Image

        pictures, captions = [], []
        for request in requests:
            assert request.clip is not None
            places = np.linspace(0, len(request.clip) - 1, self._frames).round().astype(int)
            pictures += [Image.fromarray(np.ascontiguousarray(request.clip[place])) for place in places]
            captions += [request.caption] * self._frames
        scores: list[float] = []
        for first in range(0, len(pictures), self._batch):
            part = slice(first, first + self._batch)
            # Mean and spread of each picture's score.
            found = self._inferencer.reward(image_paths=pictures[part], prompts=captions[part])
            scores += found[:, 0].float().tolist()
        return np.asarray(scores).reshape(len(requests), self._frames).mean(axis=1).tolist()
