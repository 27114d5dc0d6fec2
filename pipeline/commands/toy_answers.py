"""Answers of the toy world that a reward is tried on: ordinary ones, and ones at the edges."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from actors.records import ScoreRequest
from actors.scoring.contract import NAME
from pipeline.data.toy import make_sample

COUNT = 8


def ordinary_answers() -> list[ScoreRequest]:
    """Return answers to one question, of other captions and clips; the first is the true one."""
    asked = make_sample(0, "val")
    answers = []
    for index in range(COUNT):
        other = make_sample(index, "val")
        answers.append(
            ScoreRequest(
                sample_id=asked.id,
                index=index,
                components=(NAME,),
                text=other.answer_text,
                caption=other.caption,
                reference_caption=asked.caption,
                target_frames=asked.target_frames,
                last_input_frame=asked.input_frames[-1],
                clip=other.target_frames,
                question=asked.question,
                input_frames=asked.input_frames,
            )
        )
    return answers


def odd_answers() -> dict[str, ScoreRequest]:
    """Return answers at the edges of what a run may draw or write, by what is odd."""
    answer = ordinary_answers()[1]
    clip = answer.target_frames
    noise = np.random.default_rng(0).integers(0, 256, clip.shape, dtype=np.uint8)
    return {
        "a frozen clip": replace(answer, clip=np.repeat(clip[:1], len(clip), axis=0)),
        "a black clip": replace(answer, clip=np.zeros_like(clip)),
        "noise": replace(answer, clip=noise),
        "a clip of one frame": replace(answer, clip=clip[:1]),
        "a long clip": replace(answer, clip=np.concatenate([clip] * 4)),
        "a very long caption": replace(answer, caption="and then the box moves " * 60),
        "a caption in Chinese": replace(answer, caption="红色的圆圈上升"),
        "a caption of one letter": replace(answer, caption="a"),
    }
