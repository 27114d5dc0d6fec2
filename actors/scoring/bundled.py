"""Rewards with models that come with this project: similarity to the true clip in the features of another encoder than CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from actors.records import ScoreRequest
from actors.scoring.model import RewardLoadError, RewardModel
from rewards.alignment import aligned_similarity, warped_similarity
from rewards.similarity import clip_v

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from actors.scoring.encoders import FrameEncoder, VideoEncoder


class _Encoding(RewardModel):
    """What rewards that compare a clip with the true one in an encoder's features have in common."""

    needs = ("pair",)
    range = (-1.0, 1.0)
    _encoder: VideoEncoder | FrameEncoder | None = None

    def __init__(self, path: str, batch: int, cache_mib: float) -> None:
        self._path, self._batch, self._cache_mib = path, batch, cache_mib

    def parameters(self) -> int:
        """See :class:`RewardModel`."""
        from actors.scoring.encoders import parameters_of

        return parameters_of(self._path)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """The encoder."""
        return () if self._encoder is None else (self._encoder.model,)


class VideoSimilarity(_Encoding):
    """Cosine of a video encoder's features, clip against true clip, −1…1.

    ``path``: a folder or name of V-JEPA 2, VideoMAE, TimeSformer or X-CLIP. ``level``: ``clip``, one feature each; ``moments``:
    features in time, compared one by one. ``warp``: moments compared along the best warping of time. ``batch``: most clips in one
    pass on a GPU.
    """

    def __init__(
        self,
        path: str,
        level: Literal["clip", "moments"] = "clip",
        warp: bool = False,
        batch: int = 8,
        cache_mib: float = 64.0,
    ) -> None:
        if level not in ("clip", "moments"):
            raise RewardLoadError(f"level={level!r}: write clip or moments")
        if warp and level == "clip":
            raise RewardLoadError("warp=true compares features in time: set level: moments")
        super().__init__(path, batch, cache_mib)
        self._moments, self._warp = level == "moments", warp
        self._encoder: VideoEncoder | None = None

    def setup(self, device: str, dtype: str) -> None:
        """Load the encoder; CheckpointError for a folder that holds none."""
        from actors.scoring.encoders import VideoEncoder

        self._encoder = VideoEncoder(self._path, device, dtype, batch=self._batch, cache_mib=self._cache_mib)
        if self._moments and self._encoder.make.moments is None:
            raise RewardLoadError(
                f"level=moments: a {self._encoder.model.config.model_type} has one feature for a whole clip; set level: clip"
            )

    def score(self, requests: Sequence[ScoreRequest]) -> list[float]:
        """See :class:`RewardModel`."""
        assert self._encoder is not None
        features = self._encoder.features(_clips(requests), moments=self._moments)
        compare = warped_similarity if self._warp else aligned_similarity
        pairs = zip(features[: len(requests)], features[len(requests) :], strict=True)
        if self._moments:
            return [compare(ours, theirs) for ours, theirs in pairs]
        return [aligned_similarity(ours[None], theirs[None]) for ours, theirs in pairs]


class DinoSimilarity(_Encoding):
    """Mean cosine of DINOv2's pooled features, frame by frame after uniform resampling to the true frame count, −1…1.

    ``path``: a folder or name of a model of pictures that transformers' AutoModel reads, with a pooled output.
    """

    def __init__(self, path: str, batch: int = 8, cache_mib: float = 64.0) -> None:
        super().__init__(path, batch, cache_mib)
        self._encoder: FrameEncoder | None = None

    def setup(self, device: str, dtype: str) -> None:
        """Load the encoder; CheckpointError for a folder that holds none."""
        from actors.scoring.encoders import FrameEncoder

        self._encoder = FrameEncoder(self._path, device, dtype, batch=self._batch, cache_mib=self._cache_mib)

    def score(self, requests: Sequence[ScoreRequest]) -> list[float]:
        """See :class:`RewardModel`."""
        assert self._encoder is not None
        features = self._encoder.features(_clips(requests))
        pairs = zip(features[: len(requests)], features[len(requests) :], strict=True)
        return [clip_v(ours, theirs) for ours, theirs in pairs]


def _clips(requests: Sequence[ScoreRequest]) -> list[np.ndarray]:
    """Return the drawn clips of ``requests``, and behind them the true ones."""
    drawn = [request.clip for request in requests if request.clip is not None]
    return [*drawn, *(request.target_frames for request in requests)]
