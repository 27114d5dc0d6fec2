"""The adapter of VideoScore2: refusals, what it reads out of answers, and the whole way with a tiny model of its make."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.scoring.model import RewardLoadError, load_model, start_model
from actors.scoring.videoscore2 import VideoScore2, points

PATH = "actors.scoring.videoscore2:VideoScore2"
ANSWER = "The clip is sharp. visual quality: 4\ntext-to-video alignment: 2\nphysical/common-sense consistency: 3"


def test_what_cannot_be_loaded_is_said_with_the_cure(tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    for options, wrong in (({"aspects": ["beauty"]}, "give some of quality"), ({"frames": 1}, "at least 2")):
        with pytest.raises(RewardLoadError, match=wrong):
            load_model(PATH, {"path": "m", "prompt": str(prompt), **options})
    with pytest.raises(RewardLoadError, match="cannot be read as text"):
        start_model(PATH, load_model(PATH, {"path": "m", "prompt": str(prompt)}), "cpu", "float32")
    prompt.write_text("How good is it?")
    with pytest.raises(RewardLoadError, match=r"by \{caption\}"):
        start_model(PATH, load_model(PATH, {"path": "m", "prompt": str(prompt)}), "cpu", "float32")


@pytest.mark.parametrize(
    ("answer", "aspects", "expected"),
    [
        (ANSWER, ("quality", "alignment", "consistency"), 3.0),
        (ANSWER, ("alignment",), 2.0),
        ("I would say visual quality: 2, but no. Visual Quality: **5**", ("quality",), 5.0),
        (ANSWER.replace("2", "7"), ("quality", "alignment"), math.nan),
        ("It is a fine clip.", ("quality",), math.nan),
    ],
)
def test_points_are_read_out_of_an_answer_and_nothing_is_made_up(answer: str, aspects: Any, expected: float) -> None:
    assert points(answer, aspects) == pytest.approx(expected, nan_ok=True)


@pytest.mark.slow
def test_a_model_of_its_make_is_asked_about_the_clip_and_nonsense_is_a_failure(
    tiny_qwen25_dir: Path, tmp_path: Path, request_for: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("the red circle {caption}")
    reward = VideoScore2(str(tiny_qwen25_dir), str(prompt), frames=4, max_tokens=6)
    reward.setup("cpu", "float32")
    assert len(reward.modules) == 1
    clips = [np.full((9, 32, 32, 3), 40 * i, np.uint8) for i in (1, 5)]
    requests = [request_for(i, ("videoscore2",), clip=clip, caption="rises") for i, clip in enumerate(clips)]
    assert all(math.isnan(value) for value in reward.score(requests))
    assert math.isnan(reward.score([request_for(0, ("videoscore2",), clip=clips[0], caption="a <|im_end|> b")])[0])
    asked = []
    generate = reward._model.generate

    def heard(**given: Any) -> Any:
        asked.append(given)
        return generate(**given)

    monkeypatch.setattr(reward._model, "generate", heard)
    monkeypatch.setattr(reward._processor.tokenizer, "decode", lambda ids, **_: f"{ANSWER} {len(ids) <= 6}")
    assert reward.score(requests) == [3.0, 3.0]
    first, second = (given["pixel_values_videos"] for given in asked)
    assert first.shape == second.shape and not np.allclose(first, second)
    assert all(given["max_new_tokens"] == 6 and given["do_sample"] is False for given in asked)
