"""What the models are asked about a person's video: the same for the same bytes and seed, whatever the file is called."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline.config import load_config
from pipeline.data.toy import make_sample
from pipeline.data.video import encode_mp4
from pipeline.stages.question import caption_request, question_request, read_video


def test_seeds_are_of_the_bytes_and_not_of_the_name(tmp_path: Path) -> None:
    config = load_config("toy")
    here, copy, other = tmp_path / "a.mp4", tmp_path / "ein Knoten.bin", tmp_path / "b" / "a.mp4"
    other.parent.mkdir()
    here.write_bytes(encode_mp4(make_sample(0, "test").input_frames, 8.0))
    copy.write_bytes(here.read_bytes())
    other.write_bytes(encode_mp4(make_sample(1, "test").input_frames, 8.0))
    render = config.evaluate.render

    def seeds(video: Path, seed: int = 0) -> tuple[int, int]:
        sample = read_video(config, video)
        asked = question_request(config, sample, "what next ?", seed)
        drawn = caption_request(config, sample, "the disc grows", 0, render, seed)
        return asked.seed, drawn.noise_seed

    assert seeds(here) == seeds(copy)
    assert len({seeds(here), seeds(other), seeds(here, 1)}) == 3
    assert np.array_equal(read_video(config, here).input_frames, read_video(config, copy).input_frames)


def test_what_ifs_about_one_video_begin_with_the_same_noise(tmp_path: Path) -> None:
    config = load_config("toy")
    video = tmp_path / "a.mp4"
    video.write_bytes(encode_mp4(make_sample(0, "test").input_frames, 8.0))
    sample = read_video(config, video)
    first, second = (
        caption_request(config, sample, caption, i, config.evaluate.render, 0)
        for i, caption in enumerate(("the disc grows", "the disc sinks"))
    )
    assert first.noise_seed == second.noise_seed and first.caption != second.caption
