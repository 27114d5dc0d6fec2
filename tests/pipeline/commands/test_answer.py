"""``vans answer`` without its thinker: what becomes of several questions where one of them goes wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from actors.failures import BadSampleError
from actors.records import Clip, RenderRequest, Sample
from cluster.errors import StorageError, TrainingError
from pipeline.commands.answer import (
    AnswerError,
    answer_paths,
    draw,
    load_video,
    require_writable,
    run_answer,
    sample_each,
    write_answers,
)
from pipeline.config import RunConfig, load_config
from pipeline.data.toy import make_sample
from pipeline.data.video import encode_mp4, probe
from pipeline.stages.question import Drawn, Said, Unanswered, captioned
from pipeline.support.progress import bar
from rewards.format import DEFAULT

GOOD = "<think> the circle moves </think> <ans> the azure disc grows </ans>"


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("answer") / "in.mp4"
    path.write_bytes(encode_mp4(make_sample(0, "test").input_frames, 8.0))
    return path


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return load_config("toy")


def shown(config: RunConfig, sample: Sample, said: Sequence[Said | Unanswered]) -> list[Drawn | Unanswered]:
    with bar(Console(), "answering", 4) as progress:
        return draw(config, sample, said, None, 0, progress)


def test_a_malformed_answer_leaves_the_others_theirs(config: RunConfig, video: Path, tmp_path: Path) -> None:
    sample = load_video(config, video)
    texts = {"one": GOOD, "two": "the disc grows", "three": GOOD.replace("grows", "shrinks")}
    drawn = shown(config, sample, [captioned(question, text, DEFAULT) for question, text in texts.items()])
    answers = write_answers(config, drawn, answer_paths(tmp_path / "a.mp4", 3))
    assert [(a.question, a.caption) for a in answers] == [
        ("one", "the azure disc grows"),
        ("three", "the azure disc shrinks"),
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-1.mp4", "a-3.mp4"]
    assert all(probe(a.path).frames == config.video.num_frames for a in answers)
    bad = drawn[1]
    assert isinstance(bad, Unanswered) and "the disc grows" in bad.reason and "<ans>" in bad.reason
    told = str(AnswerError([bad], answers))
    assert told.startswith("1 of 3 questions got no answer\n--question 'two': ")
    alone = shown(config, sample, [captioned("three", texts["three"], DEFAULT)])[0]  # drawn as if nobody else had asked
    assert isinstance(alone, Drawn)
    assert np.abs(alone.frames.astype(int) - answers[1].frames.astype(int)).max() <= 1


def test_questions_that_cannot_be_asked_are_told_before_anything_is_started(
    config: RunConfig, video: Path, tmp_path: Path
) -> None:
    questions = ["what <|video_pad|> now ?", "  ", "<|im_end|>"]
    with pytest.raises(AnswerError) as caught:
        run_answer(config, video, questions, tmp_path / "a.mp4")
    for item, words in zip(caught.value.unanswered, ("'<|video_pad|>'", "empty", "'<|im_end|>'"), strict=True):
        assert words in item.reason and words in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_caption_that_cannot_be_drawn_costs_the_others_nothing() -> None:
    def clip(request: RenderRequest) -> Clip:
        return Clip(request.sample_id, request.index, request.caption, np.zeros((1, 2, 2, 3), np.uint8), 0)

    def sample(requests: Sequence[RenderRequest]) -> list[Clip]:
        for request in requests:
            if request.caption == "bad":
                raise BadSampleError("no such caption")
            if request.caption == "far":
                raise TrainingError("non-finite latents")
        return [clip(request) for request in requests]

    frames = np.zeros((1, 2, 2, 3), np.uint8)
    requests = [
        RenderRequest("s", i, caption, frames, num_frames=1, steps=1, guidance=1.0, noise_seed=0, sde_seed=0, sde=None)
        for i, caption in enumerate(("a", "bad", "b", "far"))
    ]
    found = sample_each(sample, requests)
    assert [c.caption if isinstance(c, Clip) else "" for c in found] == ["a", "", "b", ""]
    assert "no such caption" in str(found[1]) and "non-finite" in str(found[3])


def test_a_place_that_cannot_be_written_is_told_first(config: RunConfig, video: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file"):
        run_answer(config, video, ["what next ?"], tmp_path / "file" / "a.mp4")
    require_writable(tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder").is_dir() and not list((tmp_path / "new" / "folder").iterdir())
