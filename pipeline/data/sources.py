"""The run's two sample sources, from its configuration, and what a run learns from."""

from __future__ import annotations

from typing import Literal

from actors.records import derive_seed
from cluster.errors import StorageError
from pipeline.checkpoint import DataFacts, Inputs, model_digests
from pipeline.config import RunConfig
from pipeline.data.source import SampleSource, VideoShape
from pipeline.data.video import VideoLimits
from pipeline.fleet.models import resolve_adapter, resolve_model


def video_shape(config: RunConfig) -> VideoShape:
    """Return the shapes that clips are decoded to."""
    names = VideoShape.__dataclass_fields__
    return VideoShape(**{name: getattr(config.video, name) for name in names})


def video_limits(config: RunConfig) -> VideoLimits:
    """Return what is accepted from one source video."""
    data = config.data
    return VideoLimits(
        max_pixels=data.max_pixels,
        max_frames=data.max_source_frames,
        max_seconds=data.max_source_s,
        max_bytes=data.max_source_mib << 20,
        max_decode_s=data.max_decode_s,
    )


def training_source(config: RunConfig) -> SampleSource:
    """Return the shuffled, endless source of training samples.

    Raises DataError for a folder without shards, StorageError for a store that cannot be used.
    """
    return _source(config, "train", shuffle=True)


def evaluation_source(config: RunConfig) -> SampleSource:
    """Return the held-out samples in stored order."""
    return _source(config, "eval", shuffle=False)


def validation_source(config: RunConfig) -> SampleSource:
    """Return the fixed subset of data.val that ``evaluate.every`` asks, in the order in which it was chosen.

    A sample's rank depends on the run's seed and the sample's id alone, so that shards may be cut otherwise.
    """
    source = _source(config, "val", shuffle=False)
    ids = source.ids()
    ranked = sorted(range(len(ids)), key=lambda row: (derive_seed(config.seed, ids[row], "held out"), row))
    return source.only(ranked[: config.evaluate.subset])


def run_inputs(config: RunConfig, source: SampleSource) -> Inputs:
    """Return what the run of ``config`` learns from. Raises CheckpointError for a model or adapter that is not there."""
    models: dict[str, str | None] = {}
    tuned: tuple[Literal["vlm", "vdm"], ...] = ("vlm", "vdm")
    for role in tuned:
        models[role] = model = resolve_model(getattr(config.models, role), role)
        models[f"{role}_adapter"] = resolve_adapter(getattr(config.models, f"{role}_adapter"), role, model)
    models["clip"] = resolve_model(config.models.clip, "clip")
    return Inputs(DataFacts(str(source.folder), source.count, source.digest), model_digests(models))


def _source(config: RunConfig, key: str, *, shuffle: bool) -> SampleSource:
    data = config.data
    try:
        return SampleSource(
            getattr(data, key),
            video_shape(config),
            seed=data.seed,
            decoders=data.decoders,
            max_quarantine_ratio=data.max_quarantine_ratio,
            limits=video_limits(config),
            shuffle=shuffle,
        )
    except StorageError as error:
        raise StorageError(f"data.{key}: {error}") from error
