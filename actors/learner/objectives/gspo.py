"""GSPO: one ratio for a whole answer (arXiv 2507.18071)."""

from __future__ import annotations

from typing import ClassVar

from actors.learner.objectives.grpo import Grpo, Level


class Gspo(Grpo):
    """GRPO with the ratio s = (π_θ(answer) / π_old(answer))^(1/tokens), the geometric mean of the tokens' ratios (eq. 5 and 7).

    The clip takes or leaves an answer as a whole. With ``loss_norm: sequence`` the loss is −mean over answers of
    min(s A, clip(s) A). Answers of one token learn as by GRPO.
    """

    level: ClassVar[Level] = "sequence"
