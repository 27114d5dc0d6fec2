"""GSPO and CISPO by hand, and where they must equal GRPO; TRL's own figures are in test_parity_trl."""

from __future__ import annotations

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from actors.learner.objectives.grpo import importance_weights
from actors.learner.objectives.settings import CispoSection, GrpoSection, GspoSection, TokenGrpoSection
from actors.learner.objectives.table import OBJECTIVES, make_objective
from pipeline.config import parse_config

KINDS = {"grpo": TokenGrpoSection, "gspo": GspoSection, "cispo": CispoSection}


def loss_of(
    name: str,
    settings: GrpoSection,
    new: list[list[float]],
    old: list[list[float]],
    advantages: list[float],
    mask: Tensor,
) -> tuple[float, Tensor]:
    """Return the normalised loss and its gradient with respect to the new log-probabilities."""
    objective = make_objective(name, settings, longest=len(new[0]))
    logprobs = torch.tensor(new, dtype=torch.float64, requires_grad=True)
    before = torch.tensor(old, dtype=torch.float64)
    total, _ = objective.loss(logprobs, before, torch.tensor(advantages).double(), mask, rollout_logprobs=before)  # type: ignore[attr-defined]
    value = total / objective.normaliser(mask)  # type: ignore[attr-defined]
    (gradient,) = torch.autograd.grad(value, logprobs)
    return float(value), gradient


def test_gspo_takes_one_ratio_for_an_answer() -> None:
    """Ratios e^0.3 and e^-0.1 of two tokens: the answer's is e^0.1 (arXiv 2507.18071, eq. 7)."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    value, gradient = loss_of("gspo", GspoSection(clip_high=0.5), [[-1.0, -2.0]], [[-1.3, -1.9]], [2.0], mask)
    assert value == pytest.approx(-2.0 * math.exp(0.1))
    assert gradient.tolist()[0] == pytest.approx([-math.exp(0.1)] * 2)  # s·A·(1/2) for each token
    value, gradient = loss_of("gspo", GspoSection(clip_high=0.05), [[-1.0, -2.0]], [[-1.3, -1.9]], [2.0], mask)
    assert value == pytest.approx(-2.0 * 1.05) and not gradient.any()  # clipped as a whole, the second token too


def test_gspo_of_one_token_is_grpo() -> None:
    mask = torch.tensor([[True, False], [True, False]])
    arguments = ([[-1.0, 9.0], [-0.2, 9.0]], [[-1.1, -9.0], [-0.9, 5.0]], [1.0, -1.0], mask)
    same = {"clip_low": 0.2, "clip_high": 0.2, "loss_norm": "sequence"}
    one, two = (loss_of(name, KINDS[name](**same), *arguments) for name in ("gspo", "grpo"))
    assert one[0] == pytest.approx(two[0]) and torch.equal(one[1], two[1])


def test_cispo_keeps_the_gradient_of_a_token_beyond_the_clip() -> None:
    """Ratio e^1 above 1 + 0.2, A > 0: GRPO gives nothing, CISPO 1.2·A (arXiv 2506.13585, eq. 4)."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    arguments = ([[-1.0]], [[-2.0]], [0.5], mask)
    assert not loss_of("grpo", TokenGrpoSection(clip_high=0.2), *arguments)[1].any()
    value, gradient = loss_of("cispo", CispoSection(clip_high=0.2), *arguments)
    assert gradient.item() == pytest.approx(-1.2 * 0.5) and value == pytest.approx(1.2 * 0.5)


@pytest.mark.parametrize("name", ["gspo", "cispo"])
def test_before_the_first_update_the_gradient_is_grpos(name: str) -> None:
    """Ratios are 1: one answer of GSPO has the gradient of the mean over its tokens, CISPO that of the policy gradient."""
    mask = torch.tensor([[True, True, True], [True, False, False]])
    old = [[-1.0, -0.5, -2.0], [-0.1, 7.0, 7.0]]
    arguments = (old, old, [1.5, -0.5], mask)
    one, two = (loss_of(key, KINDS[key](loss_norm="sequence"), *arguments)[1] for key in (name, "grpo"))
    torch.testing.assert_close(one, two)


@pytest.mark.parametrize("name", KINDS)
def test_padding_that_is_no_number_reaches_neither_value_nor_gradient(name: str) -> None:
    mask = torch.tensor([[True, False]])
    value, gradient = loss_of(name, KINDS[name](), [[-1.0, math.nan]], [[-1.1, math.inf]], [1.0], mask)
    assert math.isfinite(value) and torch.isfinite(gradient).all() and gradient[0, 1] == 0


def test_sequence_corrections_weigh_the_whole_answer() -> None:
    """Products e^0.4 and e^-0.2 of two answers, cap 1.3."""
    old, rollout = torch.tensor([[-1.0, -1.0], [-1.0, -1.0]]), torch.tensor([[-1.1, -1.3], [-0.9, -0.9]])
    mask = torch.ones(2, 2, dtype=torch.bool)
    low = math.exp(-0.2)
    for correction, first in (("sequence_tis", 1.3), ("sequence_mask", 0.0)):
        weights = importance_weights(old, rollout, mask, 1.3, correction)
        torch.testing.assert_close(weights, torch.tensor([[first, first], [low, low]]))
    assert importance_weights(old, rollout, mask, 1.3)[0].tolist() == pytest.approx([math.exp(0.1), 1.3])
    half = torch.tensor([[True, False], [True, True]])  # what is masked is no part of the product, and keeps weight 1
    torch.testing.assert_close(
        importance_weights(old, rollout, half, 1.3, "sequence_mask")[0], torch.tensor([math.exp(0.1), 1.0])
    )
    with pytest.raises(ValueError, match="sequence_tis"):
        importance_weights(old, rollout, mask, 1.3, "tis")


@pytest.mark.parametrize(("correction", "cap", "cut"), [("token_tis", 0.5, 2.0), ("sequence_tis", 1.1, 2.0)])
def test_padding_is_never_counted_as_truncated(correction: str, cap: float, cut: float) -> None:
    """Ratios e^0.1 of two tokens: with cap 0.5 each is cut, with cap 1.1 their product; a third place is padding."""
    settings = TokenGrpoSection(old_logprobs="rollout", rollout_correction=correction, importance_cap=cap)
    old, rollout = torch.tensor([[-1.0, -1.0, 9.0]]), torch.tensor([[-1.1, -1.1, -9.0]])
    mask = torch.tensor([[True, True, False]])
    _, stats = make_objective("grpo", settings).loss(old, old, torch.ones(1), mask, rollout_logprobs=rollout)  # type: ignore[attr-defined]
    assert (stats.truncated, stats.steps) == (cut, 2.0)


def test_objectives_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="grpo, gspo, cispo, nft, awm"):
        make_objective("ppo", GrpoSection())
    with pytest.raises(ValueError, match="longest"):
        make_objective("grpo", GrpoSection(loss_norm="constant"))
    with pytest.raises(ValidationError, match="closed"):
        GrpoSection(kl_estimator="k4")


@pytest.mark.parametrize(("name", "tolerance"), [("grpo", 0.04), ("gspo", 6e-5), ("cispo", 0.04)])
def test_the_gate_believes_a_fifth_of_the_clip_range(name: str, tolerance: float) -> None:
    assert make_objective(name, KINDS[name]()).gate_tolerance("float32") == pytest.approx(tolerance)


def test_a_stage_learns_by_the_section_of_its_objectives_name() -> None:
    run = parse_config({"stage1": {"objective": "gspo", "gspo": {"kl_beta": 0.3}, "grpo": {"kl_beta": 0.1}}})
    assert run.stage1.learning.kl_beta == 0.3 and run.stage1.learning is run.stage1.gspo
    assert parse_config({}).stage1.learning.kl_beta == 0.0
    assert set(OBJECTIVES) == {*KINDS, "nft", "awm"}
