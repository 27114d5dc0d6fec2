"""What the learner needs from a policy: the :class:`Trainable` protocol and the values that cross it.

Responsible for: names and shapes only. Not responsible for: any maths (``objectives``), any model (``actors.vlm``,
``actors.vdm``), sharding or optimisation (``rank``).

How the learner uses a policy, which is what an implementation must allow for:

1. ``Policy.load(path, dtype=..., lora=..., seed=..., adapter=..., device=..., **policy_kwargs)`` builds it **unsharded and equal
   on all ranks** (``lora_A`` drawn from ``seed``, ``lora_B`` zero; see ``actors.policy.lora.inject_lora``).
2. Each of ``fsdp_units`` may be wrapped for activation checkpointing and is then wrapped by ``fully_shard``, and last
   ``module`` itself. Parameters turn into DTensors, so afterwards the policy must reach the network only by calling
   ``self.module(...)`` (a method of it would bypass the all-gather), and must not touch ``weight.data``.
3. ``forward`` reads ``self.module`` anew at each call: where full weights are trained with a KL, the learner itself
   swaps a frozen copy in for the reference pass. ``reference()`` is asked for only when the policy carries LoRA.
4. Randomness is forbidden in ``forward`` (no dropout): the ratio gate compares two passes bit for bit.
5. ``collate`` may pad to the longest item of its batch; the learner makes old and new log-probabilities from the same
   micro-batches, so padding agrees.
6. SFT of the VDM may train its text encoder jointly: the policy then has an attribute ``text_encoder`` (a module called
   as ``self.text_encoder(...)``), and ``sft_loss`` embeds captions with gradients, uncached, while any of the encoder's
   parameters requires grad.
7. A policy whose steps have a forward each may have ``split(batch, steps)``, which cuts a batch along T into
   ``[(slice of T, batch), …]`` of at most ``steps`` steps: with ``LearnerSpec.micro_steps`` each part gets a forward and
   backward of its own, and the activations of one part at a time are kept. All ranks must get equally many parts.
8. A policy whose items are long sequences may have ``share_tokens(count, modules)``: afterwards groups of ``count`` neighbouring
   ranks, which run the same items, each compute a part of their tokens in ``modules`` (``module``, and the learner's frozen copy of
   it). Outputs are whole and equal in a group; the gradients of its ranks add up to the gradient. It is called before 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from actors.records import Experience


@dataclass
class PolicyOutput:
    """Log-probabilities of given actions under one policy: B trajectories of T steps (tokens, or SDE steps)."""

    logprobs: Tensor  # (B, T) float32, differentiable; 0 where the mask is False
    mask: Tensor  # (B, T) bool, True where an action was taken by the policy
    mean: Tensor | None = None  # (B, T, ...) float32, mean of the Gaussian step (flow policies)
    std: Tensor | None = None  # (B, T) float32, standard deviation of the Gaussian step (flow policies)
    entropy: Tensor | None = None  # (B, T) float32, detached; 0 where the mask is False

    def steps(self, cut: slice) -> PolicyOutput:
        """Return the steps ``cut`` of it: log-probabilities, mask and means."""
        return PolicyOutput(
            self.logprobs[:, cut], self.mask[:, cut], mean=None if self.mean is None else self.mean[:, cut]
        )

    @classmethod
    def joined(cls, parts: Sequence[PolicyOutput]) -> PolicyOutput:
        """Return consecutive parts as one: log-probabilities, mask and means, where all have them."""
        means = [part.mean for part in parts if part.mean is not None]
        return cls(
            torch.cat([part.logprobs for part in parts], dim=1),
            torch.cat([part.mask for part in parts], dim=1),
            mean=torch.cat(means, dim=1) if len(means) == len(parts) else None,
        )


@dataclass
class SupervisedLoss:
    """The supervised loss of a part of a batch, as a sum, so that the parts of a batch add up however it is cut."""

    total: Tensor  # scalar, differentiable: the sum over what is counted
    count: int  # answer tokens (VLM) or clips (VDM)
    metrics: dict[str, float]  # means over this part

    @property
    def mean(self) -> Tensor:
        """The loss per token or clip of this part alone."""
        return self.total / self.count


@runtime_checkable
class Trainable(Protocol):
    """A policy that the learner can train. See the module's text for the order of calls."""

    module: (
        nn.Module
    )  # the trained network: LoRA is inside, fully_shard wraps it, the optimizer trains its requires_grad parameters
    # Where the policy casts what it hands to ``module``, it has an attribute ``compute_dtype``; see ``set_compute_dtype``.
    fsdp_units: list[nn.Module]  # its transformer blocks: units of sharding and of activation checkpointing

    def collate(self, items: Sequence[Experience]) -> Any:
        """Return ``items`` as one padded batch on the policy's device."""

    def forward(self, batch: Any) -> PolicyOutput:
        """Return log-probabilities of the batch's actions under the current weights, differentiable, fp32."""

    def reference(self) -> AbstractContextManager[None]:
        """Within it, ``forward`` runs the reference policy: the adapter is disabled. Raises ValueError without LoRA."""

    def kl(self, out: PolicyOutput, ref: PolicyOutput, estimator: str | None = None) -> Tensor:
        """Return KL(current || reference) per step, (B, T), 0 where masked.

        Tokens: an estimate, ``grpo.kl_estimate`` with ``estimator`` (None: k3). Flow: the closed form from the means;
        an estimator would only add variance to it, so any but None or ``closed`` is a ValueError.
        """

    def rollout_logprobs(self, items: Sequence[Experience]) -> Tensor:
        """Return the sampler's log-probabilities, (B, T) float32, padded as ``collate`` pads, 0 in the padding."""

    def sft_loss(self, batch: Sequence[tuple[Any, ...]]) -> SupervisedLoss:
        """Return the supervised loss of decoded samples, summed, and what it is to be divided by.

        VLM: (:class:`VideoQuestion`, answer text).
        VDM: (reference frames uint8 (n,H,W,3), caption, target frames uint8 (T,H,W,3)).
        """

    def export(self, folder: str | Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write the trained weights as an ordinary folder, safetensors only.

        With LoRA: a PEFT adapter folder (``adapter_config.json``, ``adapter_model.safetensors``). Without: a whole
        model folder that ``from_pretrained`` loads. ``state`` is ``module``'s gathered state dict (unsharded CPU
        tensors under ``module``'s own names; only the trained ones with LoRA); None takes it from ``module``, which
        then must not be sharded.
        """


def scale_gradients(parameters: Iterable[nn.Parameter], scale: float) -> None:
    """Multiply the gradients by ``scale``.

    A batch's loss is a sum over ranks and micro-batches, divided by a count that is known after the last of them. Gradients
    are linear in it, so the division is done on them. ``fully_shard`` has averaged them over ranks, so the scale of a
    mean over the whole batch is ranks / count.
    """
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(scale)


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters the optimizer owns, in module order (equal on all ranks)."""
    return [p for p in module.parameters() if p.requires_grad]


def set_compute_dtype(policy: Trainable, dtype: torch.dtype) -> None:
    """Tell ``policy`` in which dtype its sharded module computes, whatever its parameters are stored in.

    The learner loads float32 and computes in its own dtype; the sampler loads what it computes in. Both must hand their
    network the same rounded inputs. Policies that leave casting to the network have nothing to be told.
    """
    if hasattr(policy, "compute_dtype"):
        policy.compute_dtype = dtype


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype called ``name`` ("float32", "bfloat16", "float16"); ValueError names the choices."""
    choices = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in choices:
        raise ValueError(f"dtype={name!r} is unknown; use one of {', '.join(choices)}")
    return choices[name]
