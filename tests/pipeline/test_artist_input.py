"""What the artist is shown of an input video: training, SFT, evaluation and ``vans answer`` show it the same frames."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors.records import Completion, RenderRequest, Sample, Scores, Trajectory
from pipeline.commands.answer import load_video
from pipeline.config import RunConfig, load_config
from pipeline.data.decoder import Shard, VideoShape, block_items, decode_block
from pipeline.data.schema import Row, ShardWriter
from pipeline.data.sources import video_shape
from pipeline.data.video import VideoLimits, decode_video, encode_mp4
from pipeline.evaluate.predict import answer_one
from pipeline.sft import SftSettings
from pipeline.sft.items import training_item
from pipeline.stages.groups import Group, Member, RolloutBatch
from pipeline.stages.stage1 import Stage1
from pipeline.stages.stage2 import Anchor, Stage2, sde_spec, trajectory_experiences

GOOD = "<think> a </think> <ans> the ball rises </ans>"
CLIP = ("video.conditioning.references=clip", "video.num_frames=13")


class Asked(Exception):
    """Ends a path where the artist is asked."""


class Artist:
    def __init__(self) -> None:
        self.requests: list[RenderRequest] = []

    async def submit(self, request: RenderRequest) -> Any:
        self.requests.append(request)
        raise Asked


class Thinker:
    async def submit(self, request: Any) -> list[Completion]:
        return [Completion(GOOD, np.zeros(3, np.int32), np.zeros(3, np.float32), "stop", 0)] * request.n


def decoded(config: RunConfig, folder: Path) -> tuple[Path, Sample]:
    """An mp4 of 21 frames, and the sample that a shard with it is decoded to."""
    pictures = np.random.default_rng(0).integers(0, 256, (21, 32, 32, 3), dtype=np.uint8)
    video = folder / "clip.mp4"
    video.write_bytes(encode_mp4(pictures, 8.0))
    with ShardWriter(folder / "data") as writer:
        writer.write(Row("s", "predictive", "what ?", "the ball falls", *[video.read_bytes()] * 2, source="test"))
    (shard,) = (folder / "data").glob("*.parquet")
    place = {name: np.zeros(1, np.int64) for name in ("epoch", "position", "shard", "row", "group", "offset")}
    shape = video_shape(config)
    block = decode_block(place, (Shard.of(shard),), shape, VideoLimits())
    (sample,) = block_items(block, shape, [shard])
    assert isinstance(sample, Sample), sample
    return video, sample


def shown(config: RunConfig, sample: Sample) -> dict[str, np.ndarray]:
    """The frames that each path shows the artist."""
    found: dict[str, np.ndarray] = {}
    anchor = Anchor(GOOD, "the ball rises", 1.0)

    async def stage2(fleet: Any) -> Any:
        stage = Stage2(config, fleet)
        return await stage.group(sample, anchor, "0", sde_spec(config, stage.window, 0, sample.id))

    ways: dict[str, Any] = {
        "stage 1": lambda fleet: Stage1(config, fleet).group(sample, "0"),
        "stage 2": stage2,
        "evaluation": lambda fleet: answer_one(config, fleet, sample),
    }
    for name, way in ways.items():
        artist = Artist()
        with pytest.raises(Asked):
            asyncio.run(way(SimpleNamespace(vlm=Thinker(), vdm=artist, reward=None, conditions=None, scoring=None)))
        found[name] = artist.requests[0].reference_frames
    path: Any = SimpleNamespace(frames=None, weights_version=0, condition=None, trajectory=Trajectory(*[None] * 5))  # type: ignore[arg-type]
    member = Member(0, "c", Scores("s", 0, {}), None, path, 0)
    batch = RolloutBatch((Group(sample, (member,)),), (np.ones(1),), (np.ones(1),))
    found["learner"] = trajectory_experiences(batch, config.video)[0].reference_frames
    settings = SftSettings(
        reference_frames=config.video.reference_frames,
        conditioning=config.video.conditioning,
        shape=video_shape(config),
    )
    found["SFT"] = training_item("vdm", sample, settings)[0]
    return found


@pytest.mark.parametrize("overrides", [(), CLIP], ids=["frames", "clip"])
def test_every_path_shows_the_artist_the_same_frames(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    config = load_config("toy", [*overrides, "stage1.rollout.group_size=2", "stage2.rollout.group_size=2"])
    video, sample = decoded(config, tmp_path)
    whole = decode_video(video, 13 if overrides else config.video.input_frames, 32, 32)
    expected = whole if overrides else whole[[0, -1]]
    assert config.video.reference_frames == 2
    for way, frames in shown(config, sample).items():
        assert np.array_equal(frames, expected), way
    assert np.array_equal(load_video(config, video).context, sample.context)
    assert np.array_equal(sample.context[-1], whole[-1])  # the last input frame, which the copy alarm looks at
    assert len(sample.input_frames) == config.video.input_frames  # what the thinker sees is as it was


def test_a_shape_counts_the_clip_that_only_the_artist_sees() -> None:
    plain, clip = video_shape(load_config("toy")), video_shape(load_config("toy", CLIP))
    assert plain == VideoShape() and not plain.two_inputs and plain.context == 9
    assert clip.two_inputs and clip.context == 13
    assert clip.row_bytes == 3 * 32 * 32 * (9 + 13 + 13)
