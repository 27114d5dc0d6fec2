"""Prompts and their completions as the rows of one forward pass; a prompt that several completions share is read once.

Responsible for: tokens, positions, who attends to whom, and where each completion token is predicted. Not responsible for: what
a prompt is (``actors.vlm.inputs``), or what is done with the logits (``actors.vlm.policy``).

A group's completions follow one prompt, and a learner's row of its own for each of them runs the vision tower and the language
model over the same video G times. Here the prompt stands once in its row, followed by all its completions: each attends to the
prompt and to itself, and has the positions it would have alone. Whatever a prompt's token computes depends on the prompt
alone, so log-probabilities and gradients are those of separate rows, up to the order of sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from actors.failures import BadSampleError
from actors.vlm.inputs import EncodedPrompt


@dataclass
class VlmBatch:
    """B completions, padded to T tokens, in R rows of S tokens: prompt, then completions, then padding."""

    model_inputs: dict[str, Any]  # what ``module`` is called with
    tokens: Tensor  # (B, T) int64 completion tokens, 0 in the padding
    mask: Tensor  # (B, T) bool
    rows: Tensor  # (B,) int64: the row that a completion is in
    predictors: Tensor  # (B, T) int64: which of its row's kept logits predicts each completion token


def join(
    prompts: Sequence[EncodedPrompt], completions: Sequence[Tensor], *, share: bool, device: torch.device
) -> VlmBatch:
    """Return completion i (int64, not empty) behind prompt i, for all i.

    With ``share``, completions of one and the same :class:`EncodedPrompt` object are in one row, without it each has its own.
    """
    members: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        members.setdefault(id(prompt) if share else i, []).append(i)
    rows = torch.empty(len(prompts), dtype=torch.long)
    starts = torch.empty(len(prompts), dtype=torch.long)  # where in its row a completion begins
    ids, positions, segments = [], [], []
    for row, group in enumerate(members.values()):
        prompt = prompts[group[0]]
        parts, places, owners = [prompt.input_ids], [prompt.positions], [torch.zeros_like(prompt.input_ids)]
        start = len(prompt.input_ids)
        for k, i in enumerate(group, start=1):
            length = len(completions[i])
            rows[i], starts[i] = row, start
            parts.append(completions[i])
            places.append((prompt.next_position + torch.arange(length)).expand(len(prompt.positions), -1))
            owners.append(torch.full((length,), k))
            start += length
        ids.append(torch.cat(parts))
        positions.append(torch.cat(places, dim=1).T)
        segments.append(torch.cat(owners))
    first_of_rows = [prompts[group[0]] for group in members.values()]
    longest = max(len(x) for x in ids)
    # The last token of a row predicts nothing. Logits are kept from the earliest to the latest position that does.
    first = min(len(p.input_ids) for p in first_of_rows) - 1
    tokens = pad_sequence(list(completions), batch_first=True)
    steps = torch.arange(tokens.shape[1])
    prompt_ends = torch.tensor([len(p.input_ids) for p in prompts]) - 1
    predictors = torch.where(steps[None] == 0, prompt_ends[:, None], starts[:, None] - 1 + steps[None]) - first
    mask = steps[None] < torch.tensor([len(c) for c in completions])[:, None]
    model_inputs = {
        "input_ids": pad_sequence(ids, batch_first=True).to(device),
        "attention_mask": _attention(segments, longest, alone=len(members) == len(prompts), device=device),
        "position_ids": _position_ids(positions).to(device),
        **{name: tensor.to(device) for name, tensor in _videos(first_of_rows).items()},
        "logits_to_keep": torch.arange(first, longest - 1, device=device),
        "use_cache": False,
    }
    return VlmBatch(
        model_inputs,
        tokens.to(device),
        mask.to(device),
        rows.to(device),
        predictors.clamp(max=longest - 2 - first).to(device),
    )


def _position_ids(positions: list[Tensor]) -> Tensor:
    """Return rows of (S, A) positions as a model takes them: (R, S) for one axis, (A, R, S) for several."""
    padded = pad_sequence(positions, batch_first=True).permute(2, 0, 1)
    return padded[0] if len(padded) == 1 else padded


def _videos(prompts: list[EncodedPrompt]) -> dict[str, Tensor]:
    """Return the prompts' videos as one batch, each input joined along its first axis.

    Raises:
        BadSampleError: the model takes a video as one tensor, and these are not of one shape.
    """
    joined = {}
    for name in prompts[0].visual:
        parts = [p.visual[name] for p in prompts]
        if len({part.shape[1:] for part in parts}) > 1:
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            raise BadSampleError(
                f"this make of thinker reads videos of one length and size in a batch, but {name} has the shapes {shapes}; give "
                "all samples as many frames (video.input_frames), or read them one by one"
            )
        joined[name] = torch.cat(parts)
    return joined


def _attention(segments: list[Tensor], longest: int, *, alone: bool, device: torch.device) -> Tensor:
    """Return who may be attended to: (R, S) int64, which the model makes causal; (R, 1, S, S) bool where completions share a row.

    ``segments``: 0 for a prompt's tokens, k for those of its completion k. Padding attends to itself, since a row without any
    key would be NaN.
    """
    owner = pad_sequence(segments, batch_first=True, padding_value=-1).to(device)  # (R, S)
    if alone:
        return (owner >= 0).long()
    causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    same = owner[:, :, None] == owner[:, None, :]
    return (causal & (same | (owner == 0)[:, None, :]))[:, None]
