"""The thinker's pictures in a budget of pixels: their sizes, their pixels, and rows of different sizes in one block."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from actors.records import Sample
from cluster.errors import ConfigError, DataError
from pipeline.commands.answer import load_video
from pipeline.config import load_config
from pipeline.data.decoder import Shard, block_items, decode_block
from pipeline.data.schema import Row, ShardWriter
from pipeline.data.sources import video_shape
from pipeline.data.video import PixelBudget, VideoLimits, decode_budget, decode_video, encode_mp4
from pipeline.plan.models import load_models

RELEASED = PixelBudget(128 * 28 * 28, 768 * 28 * 28, 28)
SMALL = ["video.vlm_pixels=[3000, 6000]", "video.vlm_multiple=16", "video.input_frames=6"]


@given(st.integers(28, 3000), st.integers(28, 3000))
def test_sizes_are_those_of_qwens_own_rule(height: int, width: int) -> None:
    sides = RELEASED.size(height, width)
    assert sides == smart_resize(height, width, 28, RELEASED.least, RELEASED.most)
    assert not sides[0] % 28 and not sides[1] % 28 and sides[0] * sides[1] <= RELEASED.most


def test_sizes_by_hand() -> None:
    assert RELEASED.size(352, 640) == (364, 644)  # within the budget: the nearest multiples
    assert RELEASED.size(1080, 1920) == (560, 1008)  # 602112 pixels at most
    assert RELEASED.size(32, 32) == (336, 336)  # 100352 at least
    with pytest.raises(DataError, match="shown as 5000x20, too long and thin"):
        RELEASED.size(20, 5000)


def clip(height: int, width: int, frames: int = 11, seed: int = 0) -> bytes:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (frames, height // 8, width // 8, 3), dtype=np.uint8)
    return encode_mp4(coarse.repeat(8, axis=1).repeat(8, axis=2), 8.0)


def test_pixels_are_the_releases_bicubic_of_evenly_spaced_frames() -> None:
    """torchvision, bicubic with antialiasing on uint8, as the release resizes; both ends are among the six frames."""
    data = clip(96, 160)
    frames, seconds = decode_budget(data, 6, PixelBudget(3000, 6000, 16))
    assert frames.shape == (6, 48, 96, 3) and seconds == pytest.approx(10 / 8)
    whole = torch.from_numpy(decode_video(data, 11, 96, 160)[::2]).permute(0, 3, 1, 2)
    expected = resize(whole, [48, 96], InterpolationMode.BICUBIC, antialias=True).permute(0, 2, 3, 1).numpy()
    assert np.abs(frames.astype(int) - expected).max() <= 1


def test_rows_of_different_shapes_share_a_block_and_the_artist_sees_them_as_before(tmp_path: Path) -> None:
    config, plain = load_config("toy", SMALL), load_config("toy", ["video.input_frames=6"])
    videos = {"wide": clip(96, 160), "tall": clip(128, 64, seed=1), "square": clip(32, 32, seed=2)}
    with ShardWriter(tmp_path / "data") as writer:
        for name, data in videos.items():
            writer.write(Row(name, "predictive", "what ?", "it falls", data, videos["square"], source="test"))
    (shard,) = (tmp_path / "data").glob("*.parquet")
    place = {name: np.zeros(3, np.int64) for name in ("epoch", "position", "shard", "group")}
    place |= {"row": np.arange(3), "offset": np.arange(3)}
    found = {}
    for run in (config, plain):
        shape = video_shape(run)
        block = decode_block(dict(place), (Shard.of(shard),), shape, VideoLimits())
        assert all(len(column) == 3 for column in block.values())  # columns that Ray Data keeps as plain tensors
        found[run is config] = [s for s in block_items(block, shape, [shard]) if isinstance(s, Sample)]
    for sample, before in zip(found[True], found[False], strict=True):
        data = videos[sample.id]
        assert np.array_equal(sample.input_frames, decode_budget(data, 6, PixelBudget(3000, 6000, 16))[0])
        assert sample.fps == before.fps and np.array_equal(sample.context, before.context)
        (tmp_path / "v.mp4").write_bytes(data)
        assert np.array_equal(load_video(config, tmp_path / "v.mp4").input_frames, sample.input_frames)
    assert [s.input_frames.shape[1:3] for s in found[True]] == [(48, 96), (96, 48), (64, 64)]


def test_a_plan_counts_the_largest_pictures() -> None:
    released = ["models.vlm=Qwen/Qwen2.5-VL-3B-Instruct", "video.input_frames=6", "video.vlm_pixels=[100352, 602112]"]
    assert load_models(load_config("toy", released)).prompt.patches == 3 * 4 * 27**2  # 756x756 in patches of two frames
    assert video_shape(load_config("toy", released)).row_bytes == 3 * (6 * 602112 + (9 + 6) * 32 * 32)


@pytest.mark.parametrize("pixels", ["[6000, 3000]", "[1, 255]"])
def test_a_budget_without_a_size_is_refused(pixels: str) -> None:
    with pytest.raises(ConfigError, match=r"video.*vlm_pixels=.* leaves no size"):
        load_config("toy", [f"video.vlm_pixels={pixels}", "video.vlm_multiple=16"])


def test_the_rate_that_the_thinker_is_told_is_the_videos_own_or_the_runs(tmp_path: Path) -> None:
    """2 a second makes each of Qwen2.5-VL's steps one second, as the release has it of any video (its parity test, positions)."""
    (tmp_path / "v.mp4").write_bytes(clip(96, 160))
    told = load_config("toy", [*SMALL, "video.vlm_fps=2"])
    assert (
        load_video(load_config("toy", SMALL), tmp_path / "v.mp4").asked.fps == 4.0
    )  # six frames over 10/8 of a second
    assert load_video(told, tmp_path / "v.mp4").asked.fps == 2.0
    with ShardWriter(tmp_path / "data") as writer:
        writer.write(Row("wide", "predictive", "what ?", "it falls", clip(96, 160), clip(32, 32), source="test"))
    (shard,) = (tmp_path / "data").glob("*.parquet")
    place = {name: np.zeros(1, np.int64) for name in ("epoch", "position", "shard", "group", "row", "offset")}
    block = decode_block(place, (Shard.of(shard),), video_shape(told), VideoLimits())
    (sample,) = block_items(block, video_shape(told), [shard])
    assert isinstance(sample, Sample) and sample.asked.fps == 2.0
    with pytest.raises(ConfigError, match="vlm_fps"):
        load_config("toy", ["video.vlm_fps=0"])
