"""A small Trainable for the learner's tests: a residual network whose tokens' logits depend on the token before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from actors.learner.objectives.grpo import kl_estimate
from actors.learner.spec import LearnerSpec
from actors.policy import lora as lora_tools
from actors.policy.protocol import PolicyOutput
from actors.policy.settings import LoraSection
from actors.records import VideoQuestion, VlmExperience
from actors.weights.files import read_adapter, write_adapter
from actors.weights.transport import as_tensors, pack

VOCAB, WIDTH, BLOCKS = 12, 16, 2
POISON, RANDOM = 10, 11  # tokens that no random completion holds: after one comes NaN, after the other noise


def changed(spec: LearnerSpec, **settings: Any) -> LearnerSpec:
    """``spec`` with other ``settings`` of its group."""
    return replace(spec, settings=spec.settings.model_copy(update=settings))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class ToyPolicy:
    """``path`` is the seed of its weights. ``POISON`` in a completion makes its loss NaN, ``RANDOM`` its logits
    random.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.fsdp_units: list[nn.Module] = list(module.blocks)  # type: ignore[arg-type]

    @classmethod
    def load(
        cls,
        path: str,
        *,
        dtype: str = "float32",
        lora: LoraSection | None = None,
        seed: int = 0,
        adapter: str | None = None,
        device: str = "cpu",
    ) -> ToyPolicy:
        torch.manual_seed(int(path))
        net = Net().to(device)
        if lora is not None:
            lora_tools.inject_lora(net, lora, ("up", "down"), seed)
            if adapter is not None:
                lora_tools.load_adapter_tensors(net, as_tensors(read_adapter(adapter)))
        return cls(net)

    def collate(self, items: Sequence[VlmExperience]) -> Any:
        longest = max(len(i.token_ids) for i in items)
        tokens = torch.zeros(len(items), longest + 1, dtype=torch.long)
        mask = torch.zeros(len(items), longest, dtype=torch.bool)
        for row, item in enumerate(items):
            tokens[row, 1 : 1 + len(item.token_ids)] = torch.as_tensor(item.token_ids.astype(np.int64))
            mask[row, : len(item.token_ids)] = True
        return tokens, mask

    def forward(self, batch: Any) -> PolicyOutput:
        tokens, mask = batch
        logits = self.module(tokens[:, :-1]).float()
        before = tokens[:, :-1, None]
        logits = logits + torch.where(before == RANDOM, torch.randn(logits.shape), 0.0)
        logits = logits + torch.where(before == POISON, float("nan"), 0.0)
        table = torch.log_softmax(logits, -1)
        logprobs = table.gather(-1, tokens[:, 1:, None])[..., 0]
        entropy = -(table.exp() * table).sum(-1).detach()
        return PolicyOutput(torch.where(mask, logprobs, 0.0), mask, entropy=torch.where(mask, entropy, 0.0))

    def reference(self) -> AbstractContextManager[None]:
        return lora_tools.adapters_disabled(self.module)

    def kl(self, out: PolicyOutput, ref: PolicyOutput, estimator: str | None = None) -> Tensor:
        return kl_estimate(out.logprobs, ref.logprobs, estimator or "k3")

    def rollout_logprobs(self, items: Sequence[VlmExperience]) -> Tensor:
        values = torch.zeros(len(items), max(len(i.token_ids) for i in items))
        for row, item in enumerate(items):
            values[row, : len(item.token_ids)] = torch.as_tensor(item.rollout_logprobs)
        return values

    def export(self, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        tensors = lora_tools.peft_names(state if state is not None else self.module.state_dict())
        write_adapter(pack(0, "lora", tensors, lora_tools.adapter_config(self.module)), folder)


def experiences(groups: int, size: int, seed: int = 0, token: int | None = None) -> list[VlmExperience]:
    """Random completions of 1 to 6 tokens with random advantages; ``token`` stands at the start of the first one."""
    rng = np.random.default_rng(seed)
    items = []
    for g in range(groups):
        for i in range(size):
            ids = rng.integers(1, POISON, size=rng.integers(2, 7)).astype(np.int32)
            if token is not None and not items:
                ids[0] = token
            items.append(
                VlmExperience(
                    sample_id=f"s{g}",
                    index=i,
                    asked=VideoQuestion("?", np.zeros((1, 2, 2, 3), np.uint8), 8.0),
                    token_ids=ids,
                    rollout_logprobs=rng.normal(-2.0, 0.3, len(ids)).astype(np.float32),
                    advantage=float(rng.normal()),
                )
            )
    return items
