"""The ways to learn, by the name that a stage's ``objective`` gives."""

from __future__ import annotations

from typing import Any

from actors.learner.objectives.awm import Awm
from actors.learner.objectives.base import Objective
from actors.learner.objectives.cispo import Cispo
from actors.learner.objectives.grpo import Grpo
from actors.learner.objectives.gspo import Gspo
from actors.learner.objectives.nft import Nft
from actors.learner.objectives.settings import ObjectiveSection

OBJECTIVES: dict[str, Any] = {"grpo": Grpo, "gspo": Gspo, "cispo": Cispo, "nft": Nft, "awm": Awm}


def make_objective(name: str, settings: ObjectiveSection, longest: int = 0) -> Objective:
    """Return the objective called ``name``; ValueError names the known ones."""
    if name not in OBJECTIVES:
        raise ValueError(f"objective={name!r} is unknown; use one of {', '.join(OBJECTIVES)}")
    made: Objective = OBJECTIVES[name](settings, longest)
    return made
