"""One clip's tokens on several ranks: context parallelism after DeepSpeed-Ulysses (arXiv 2309.14509), by diffusers' own hooks.

A rank computes every layer on its part of the tokens. Self-attention exchanges tokens for heads: each rank attends over the whole
clip with its part of the heads. Cross-attention exchanges nothing, since every rank has the whole caption. The output is put together
at the end, so all ranks of a clip return the same velocity.

diffusers' ``enable_parallelism`` asks for an accelerator per rank, so its hooks are put in place here. Its ring attention is left out:
it needs a log-sum-exp, and torch's own attention returns none.

Responsible for a module's hooks. Not responsible for what the ranks learn from (``actors.learner``), for a sampler's ranks (``peers``),
or for the times of tokens (``ExactTimes``).
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

from actors.learner.settings import LEARNER_SHARES, require_divisor
from cluster.errors import ConfigError

_CAPTION = ("encoder_hidden_states", "encoder_attention_mask")
"""Inputs that LTX's plan splits too. Its cross-attention's mask is of all heads, and fits no part of them."""
_CROSS_ATTENTION = "attn2"
"""Its name in the blocks of every family."""
_HOOK = "share_tokens"


class TokenSharing:
    """Groups of ``count`` neighbouring ranks of the default process group, each of which shares the tokens of its clips."""

    def __init__(self, count: int, device_type: str, key: str = LEARNER_SHARES) -> None:
        """Make the groups. Collective. ``key`` is the setting that ``count`` is from, for messages."""
        groups = dist.get_world_size() // count
        mesh = init_device_mesh(device_type, (groups, 1, count), mesh_dim_names=("data", "ring", "ulysses"))
        self.count, self._key = count, key
        self._config = ContextParallelConfig(ulysses_degree=count, mesh=mesh)
        self._config.setup(dist.get_rank(), dist.get_world_size(), mesh.device_type, mesh)
        self.part = mesh["ulysses"].get_local_rank()
        """Which part of the tokens is this rank's, from 0."""

    def share(self, modules: Sequence[nn.Module]) -> None:
        """Let the ranks of a group share the tokens of each call of the diffusers ``modules``.

        To be called before the modules are wrapped (checkpointing, ``fully_shard``), and again after layers of theirs were replaced
        (by an adapter's). Afterwards the ranks of a group must call a module with the same batch. Each returns the whole output.
        Each gets the part of every parameter's gradient that comes of its own tokens; the sum over the group is the gradient.

        Raises ConfigError as :func:`require_shareable`; and later, in a forward, where ``count`` does not divide the tokens.
        """
        for module in modules:
            require_shareable(module, self.count, self._key)
        for module in modules:
            HookRegistry.check_if_exists_or_initialize(module).remove_hook(_HOOK, recurse=True)
            for processor in _processors(module):
                processor._parallel_config = ParallelConfig(context_parallel_config=self._config)
            for name, entry in module._cp_plan.items():
                if isinstance(entry, dict):
                    cuts = {key: cut for key, cut in entry.items() if key not in _CAPTION}
                    hook: Any = _Split(cuts, self._config, self._key)
                else:
                    pieces = entry if isinstance(entry, (list, tuple)) else [entry]
                    hook = ContextParallelGatherHook(pieces, self._config)
                HookRegistry.check_if_exists_or_initialize(module.get_submodule(name)).register_hook(hook, _HOOK)


class _Split(ContextParallelSplitHook):
    """Cuts what has the dimensions of the plan, and leaves other inputs whole: times of clips instead of tokens."""

    def __init__(self, cuts: dict[Any, Any], config: ContextParallelConfig, key: str) -> None:
        super().__init__(cuts, config)
        self._key = key

    def _prepare_cp_input(self, x: Tensor, cp_input: ContextParallelInput) -> Tensor:
        if x.dim() != cp_input.expected_dims:
            return x
        count = self.parallel_config.ulysses_degree
        require_divisor(count, {"a clip's tokens": x.shape[cp_input.split_dim]}, self._key)
        return super()._prepare_cp_input(x, cp_input)


def require_shareable(module: nn.Module, count: int, key: str = LEARNER_SHARES) -> None:
    """Raise ConfigError, which names ``key``, unless ``count`` ranks can share the tokens of the diffusers ``module``.

    They cannot where its class has no plan (``_cp_plan``), ``count`` does not divide its attention heads, or its attention is of a
    kind that stays within a rank's own tokens.
    """
    if getattr(module, "_cp_plan", None) is None:
        raise ConfigError(
            f"{key}={count}: the artist's {type(module).__name__} has no plan (_cp_plan) in diffusers for how its "
            f"tokens are shared; use {key}: 1"
        )
    require_divisor(count, {"the artist's attention heads": module.config.num_attention_heads}, key)
    for processor in _processors(module):
        name = processor._attention_backend
        backend = AttentionBackendName(name) if name else _AttentionBackendRegistry.get_active_backend()[0]
        # Such an attention would stay within a rank's own tokens, without a word.
        if not _AttentionBackendRegistry._is_context_parallel_available(backend):
            raise ConfigError(
                f"{key}={count}: diffusers' attention {backend.value!r} cannot be shared among ranks; unset "
                "DIFFUSERS_ATTN_BACKEND, which chooses it, for torch's own"
            )


def _processors(module: nn.Module) -> list[Any]:
    """Return what computes the self-attentions of ``module``, in diffusers' words."""
    parts = [part for name, part in module.named_modules() if name.rpartition(".")[2] != _CROSS_ATTENTION]
    found = (getattr(part, "processor", None) for part in parts)
    return [processor for processor in found if hasattr(processor, "_parallel_config")]
