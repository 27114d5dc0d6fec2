"""One clip's tokens on several ranks: context parallelism after DeepSpeed-Ulysses (arXiv 2309.14509), by diffusers' own hooks.

A rank computes every layer on its part of the tokens. Self-attention exchanges tokens for heads: each rank attends over the whole
clip with its part of the heads. Cross-attention exchanges nothing, since every rank has the whole caption. The output is put together
at the end, so all ranks of a clip return the same velocity.

diffusers' ``enable_parallelism`` asks for an accelerator per rank, so its hooks are put in place here. Its ring attention is left out:
it needs a log-sum-exp, and torch's own attention returns none.

Responsible for a module's hooks. Not responsible for what the ranks learn from (``actors.learner``), or for the times of tokens
(``ExactTimes``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.hooks import HookRegistry
from diffusers.hooks.context_parallel import ContextParallelGatherHook, ContextParallelSplitHook
from diffusers.models._modeling_parallel import ContextParallelInput, ParallelConfig
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from actors.learner.settings import require_divisor
from cluster.errors import ConfigError

_CAPTION = ("encoder_hidden_states", "encoder_attention_mask")
"""Inputs that LTX's plan splits too. Its cross-attention's mask is of all heads, and fits no part of them."""
_CROSS_ATTENTION = "attn2"
"""Its name in the blocks of every family."""


def share_tokens(modules: Sequence[nn.Module], count: int, device_type: str) -> int:
    """Let groups of ``count`` neighbouring ranks share the tokens of each call of the diffusers ``modules``. Collective.

    To be called before the modules are wrapped (checkpointing, ``fully_shard``). Afterwards the ranks of a group must call a module
    with the same batch. Each returns the whole output. Each gets the part of every parameter's gradient that comes of its own tokens;
    the sum over the group is the gradient. Returns which part of the tokens is this rank's, from 0.

    Raises ConfigError where a module's class has no plan (``_cp_plan``), ``count`` does not divide its attention heads, or its
    attention cannot be shared; and later, in a forward, where ``count`` does not divide the tokens.
    """
    for module in modules:
        _require_shareable(module, count)
    groups = dist.get_world_size() // count
    mesh = init_device_mesh(device_type, (groups, 1, count), mesh_dim_names=("data", "ring", "ulysses"))
    config = ContextParallelConfig(ulysses_degree=count, mesh=mesh)
    config.setup(dist.get_rank(), dist.get_world_size(), mesh.device_type, mesh)
    for module in modules:
        for processor in _processors(module):
            processor._parallel_config = ParallelConfig(context_parallel_config=config)
        for name, entry in module._cp_plan.items():
            if isinstance(entry, dict):
                hook: Any = _Split({key: cut for key, cut in entry.items() if key not in _CAPTION}, config)
            else:
                hook = ContextParallelGatherHook(entry if isinstance(entry, (list, tuple)) else [entry], config)
            HookRegistry.check_if_exists_or_initialize(module.get_submodule(name)).register_hook(hook, "share_tokens")
    return mesh["ulysses"].get_local_rank()


class _Split(ContextParallelSplitHook):
    """Cuts what has the dimensions of the plan, and leaves other inputs whole: times of clips instead of tokens."""

    def _prepare_cp_input(self, x: Tensor, cp_input: ContextParallelInput) -> Tensor:
        if x.dim() != cp_input.expected_dims:
            return x
        require_divisor(self.parallel_config.ulysses_degree, {"a clip's tokens": x.shape[cp_input.split_dim]})
        return super()._prepare_cp_input(x, cp_input)


def _require_shareable(module: nn.Module, count: int) -> None:
    if getattr(module, "_cp_plan", None) is None:
        raise ConfigError(
            f"learner.context_parallel={count}: the artist's {type(module).__name__} has no plan (_cp_plan) in diffusers for how its "
            "tokens are shared; use learner.context_parallel: 1"
        )
    require_divisor(count, {"the artist's attention heads": module.config.num_attention_heads})
    for processor in _processors(module):
        name = processor._attention_backend
        backend = AttentionBackendName(name) if name else _AttentionBackendRegistry.get_active_backend()[0]
        # Such an attention would stay within a rank's own tokens, without a word.
        if not _AttentionBackendRegistry._is_context_parallel_available(backend):
            raise ConfigError(
                f"learner.context_parallel={count}: diffusers' attention {backend.value!r} cannot be shared among ranks; unset "
                "DIFFUSERS_ATTN_BACKEND, which chooses it, for torch's own"
            )


def _processors(module: nn.Module) -> list[Any]:
    """Return what computes the self-attentions of ``module``, in diffusers' words."""
    parts = [part for name, part in module.named_modules() if name.rpartition(".")[2] != _CROSS_ATTENTION]
    found = (getattr(part, "processor", None) for part in parts)
    return [processor for processor in found if hasattr(processor, "_parallel_config")]
