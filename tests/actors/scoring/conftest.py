"""A scorer on the tiny CLIP, and requests about toy samples."""

from collections.abc import Callable
from pathlib import Path

import pytest

from actors.records import ScoreRequest
from actors.scoring.clip import ClipScorer
from pipeline.data.toy import make_sample

MakeRequest = Callable[..., ScoreRequest]


@pytest.fixture(scope="session")
def clip(tiny_clip_dir: Path) -> ClipScorer:
    """The tiny CLIP with random weights."""
    return ClipScorer(tiny_clip_dir)


@pytest.fixture(scope="session")
def request_for() -> MakeRequest:
    """Make a request about toy sample ``i``; by default its clip is the ground truth."""

    def make(i: int, components: tuple[str, ...], **changes: object) -> ScoreRequest:
        s = make_sample(i, "test")
        fields: dict = {
            "sample_id": s.id,
            "index": i,
            "components": components,
            "text": s.answer_text,
            "caption": s.caption,
            "reference_caption": s.caption,
            "target_frames": s.target_frames,
            "last_input_frame": s.input_frames[-1],
            "clip": s.target_frames,
        }
        return ScoreRequest(**(fields | changes))

    return make
