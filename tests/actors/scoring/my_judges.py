"""Rewards with models, as a user writes them: each in a few lines, some of them wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from actors.records import ScoreRequest
from actors.scoring.model import GroupReward, RewardModel


class Length(RewardModel):
    """Length of the caption over ``most``; a text reward without torch modules."""

    range = (0.0, 1.0)

    def __init__(self, most: int = 40) -> None:
        self.most = most

    def score(self, requests: Sequence[ScoreRequest]) -> list[float]:
        return [min(1.0, len(r.caption) / self.most) for r in requests]


class Brightness(RewardModel):
    """A network of one layer over the clip's mean colour; it notes what it was given."""

    needs = ("clip",)
    range = (0.0, 1.0)

    def setup(self, device: str, dtype: str) -> None:
        self.net = nn.Linear(3, 1, bias=False)
        nn.init.constant_(self.net.weight, 1 / 3)
        self.net.to(device, getattr(torch, dtype))
        self.given: list[ScoreRequest] = []

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return (self.net,)

    @torch.inference_mode()
    def score(self, requests: Sequence[ScoreRequest]) -> torch.Tensor:
        self.given += requests
        means = np.stack([r.clip.mean(axis=(0, 1, 2)) / 255 for r in requests if r.clip is not None])
        return self.net(torch.from_numpy(means).to(self.net.weight))[:, 0]


class Watcher(RewardModel):
    """Sees question, input video and true clip: 1 where all are there."""

    needs = ("pair", "question", "input_video")
    range = (0.0, 1.0)

    def score(self, requests: Sequence[ScoreRequest]) -> list[float]:
        return [
            float(bool(r.question) and r.input_frames is not None and len(r.target_frames) > 0 and r.clip is not None)
            for r in requests
        ]


class Variety(GroupReward):
    """Share of the group's other captions that differ from one's own."""

    range = (0.0, 1.0)

    def score_group(self, answers: Sequence[ScoreRequest]) -> list[float]:
        others = max(1, len(answers) - 1)
        return [sum(a.caption != b.caption for b in answers) / others for a in answers]


class Odd(RewardModel):
    """Does what ``how`` says; a caption of "odd" decides for which answer."""

    range = (0.0, 1.0)

    def __init__(self, how: str) -> None:
        self.how, self.calls, self.state = how, 0, 0.0

    def setup(self, device: str, dtype: str) -> None:
        if self.how == "no_file":
            Path("/no/such/weights.bin").read_bytes()

    def score(self, requests: Sequence[ScoreRequest]) -> Any:
        self.calls += 1
        odd = any(r.caption == "odd" for r in requests)
        if self.how == "late_file":
            Path("/no/such/weights.bin").read_bytes()
        if self.how == "late_import":
            import no_such_package_anywhere  # noqa: F401  # type: ignore[import-not-found]
        if self.how == "few":
            return [0.5] * (len(requests) - 1)
        if self.how == "one_number":
            return 0.5
        if self.how == "raises" and odd:
            raise ZeroDivisionError("this clip is odd")
        if self.how == "away" and self.calls < 4:
            raise ConnectionError("the judge is away")
        if self.how == "batch":
            return [len(requests) / 10] * len(requests)
        if self.how == "drifts":
            self.state += 0.01
            return [self.state] * len(requests)
        value = {"nan": math.nan, "eleven": 11.0, "text": "0.5"}.get(self.how, 0.5)
        return [value if r.caption == "odd" else 0.5 for r in requests]
