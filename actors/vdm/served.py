"""The artist as a process of a sampler serves it: loaded, given what is published, brought back to its base, at rest.

Responsible for which weights are in the policy, for where they lie, and for this process's part in what several do together.
Not responsible for requests (``worker``), nor for the other processes (``peers``). One thread at a time uses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from actors.failures import InfrastructureError
from actors.learner.sharding import join_group
from actors.offload import Offloader, module_tensors
from actors.records import RenderRequest
from actors.vdm import sampling
from actors.vdm.context_parallel import TokenSharing, require_shareable
from actors.vdm.policy import VdmPolicy
from actors.vdm.settings import SAMPLERS_SHARE, VdmPoolSection
from actors.vdm.trajectories import Encoded
from actors.weights.transport import Delivery
from cluster.errors import CheckpointError, ConfigError

LOOPBACK = "127.0.0.1"
"""The processes of a sampler are on one machine."""


@dataclass(frozen=True)
class Announced:
    """Weights that are about to be sent, without their values."""

    kind: Literal["lora", "full"]
    adapter_config: Mapping[str, Any]
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype, str]]
    """Shape, dtype and the type of the device they lie on, by name."""

    @classmethod
    def of(cls, weights: Delivery) -> Announced:
        """Return what to tell of ``weights``."""
        told = {name: (tuple(t.shape), t.dtype, t.device.type) for name, t in weights.tensors.items()}
        return cls(weights.kind, weights.adapter_config, told)


class Served:
    """A policy, and the base weights that it goes back to.

    who: names the process in messages. rank: its own among those that share a clip, on as many GPUs. The rest is
    :meth:`VdmPolicy.load`'s.
    """

    def __init__(
        self,
        who: str,
        model_path: str,
        *,
        rank: int = 0,
        adapter: str | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._who, self._rank = who, rank
        self._path, self._adapter, self._dtype = model_path, adapter, dtype
        self.device = torch.device(device, rank) if device == "cuda" else torch.device(device)
        self._options = dict(options or {})
        self.settings: VdmPoolSection = self._options.get("settings") or VdmPoolSection()
        self._policy: VdmPolicy | None = None
        self._offloader = Offloader(self.device)
        self._initial: dict[str, Tensor] = {}  # the adapter as set up: what "base weights" means while one is injected
        self._full = False
        self._sharing: TokenSharing | None = None

    @property
    def policy(self) -> VdmPolicy:
        """The policy; raises RuntimeError before :meth:`load`."""
        if self._policy is None:
            raise RuntimeError(f"{self._who}: used before setup()")
        return self._policy

    def load(self) -> None:
        """Load the pipeline. CheckpointError for a folder that is not one, ConfigError where its clips cannot be shared."""
        sharers = self.settings.context_parallel
        if sharers > 1 and self.device.type == "cuda" and torch.cuda.device_count() < sharers:
            raise ConfigError(
                f"{SAMPLERS_SHARE}={sharers}: {self._who} was given {torch.cuda.device_count()} GPU(s), and each of its processes "
                f"needs one; set pools.vdm.gpus: {sharers}"
            )
        self._policy = self._loaded()

    @contextmanager
    def awake(self) -> Iterator[VdmPolicy]:
        """Keep the models on their device."""
        with self._offloader.used():
            yield self.policy

    def rest(self) -> int:
        """Move the models to host memory until they are next needed, by whatever needs them; returns the bytes freed."""
        return self._offloader.rest(lambda: module_tensors(self.policy.module, *self.policy.frozen_parts))

    def put(self, version: int, weights: Delivery | None) -> None:
        """Put published weights into the policy; None brings back the base weights."""
        with self.awake():
            if weights is None:
                self._restore_base()
            else:
                self._apply(weights)
            self.policy.version = version

    # --- together with the sampler's other processes, rank 0 first

    def join(self, address: str) -> None:
        """Meet the others at ``address`` and share the tokens of each clip from now on. Collective."""
        settings = self.settings
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        # Longer than the pool waits for a call: it ends a worker that hangs, and the first reason is the better one.
        timeout_s = 60.0 + max(settings.request_timeout_s, settings.start_timeout_s)
        join_group(address, self._rank, settings.context_parallel, LOOPBACK, timeout_s, self.device)
        self._sharing = TokenSharing(settings.context_parallel, self.device.type, SAMPLERS_SHARE)
        self._share(self.policy)

    def leave(self) -> None:
        """Leave the others in good order. Collective."""
        dist.destroy_process_group()

    def send(self, version: int, weights: Delivery) -> None:
        """Give ``weights`` to the others, who are in :meth:`receive`, and put them into this policy. Collective."""
        for tensor in weights.tensors.values():
            dist.broadcast(tensor.detach().to(self.device).contiguous(), 0)
        self.put(version, weights)

    def receive(self, version: int, announced: Announced) -> None:
        """Put what the first process sends into this policy. Collective."""
        tensors = {}
        for name, (shape, dtype, lies) in announced.tensors.items():
            buffer = torch.empty(shape, dtype=dtype, device=self.device)
            dist.broadcast(buffer, 0)
            tensors[name] = buffer.to(lies)
        self.put(version, Delivery(announced.kind, tensors, dict(announced.adapter_config)))

    def draw(
        self,
        requests: Sequence[RenderRequest],
        shape: sampling.Shape,
        encoded: Sequence[Encoded] | None = None,
        on_step: sampling.OnStep | None = None,
    ) -> sampling.Drawn:
        """Return :func:`sampling.sample_latents`. Collective where clips are shared.

        InfrastructureError where the device's memory is too small.
        """
        try:
            with self.awake() as policy:
                return sampling.sample_latents(policy, requests, shape, encoded, on_step)
        except torch.OutOfMemoryError as error:
            raise InfrastructureError(out_of_memory(self._who, len(requests), error)) from error

    # --- inside

    def _loaded(self) -> VdmPolicy:
        policy = VdmPolicy.load(
            self._path, dtype=self._dtype, adapter=self._adapter, device=str(self.device), **self._options
        )
        if self.settings.context_parallel > 1:
            require_shareable(policy.module, self.settings.context_parallel, SAMPLERS_SHARE)
        self._share(policy)
        self._initial = _snapshot(policy) if policy.adapter is not None else {}
        return policy

    def _share(self, policy: VdmPolicy) -> None:
        if self._sharing is not None:
            policy.share_tokens(self._sharing.count, [policy.module], self._sharing)

    def _apply(self, weights: Delivery) -> None:
        tensors = weights.tensors
        if weights.kind == "full":
            if self._adapter is not None:
                raise CheckpointError(
                    f"{self._who}: full weights cannot be loaded into a model that starts from an adapter ({self._adapter})"
                )
            if self.policy.adapter is not None:
                self.load()
            self.policy.module.load_state_dict(tensors, strict=True)
            self._full = True
            return
        if self._full:  # an adapter belongs to the folder's own weights
            self._restore_base()
        policy, fresh = self.policy, self.policy.adapter is None
        policy.put_adapter(tensors, weights.adapter_config, f"{self._who}: the published weights")
        if fresh:  # without an adapter is what one with B = 0 computes
            self._initial = {n: torch.zeros_like(t) if ".lora_B." in n else t for n, t in _snapshot(policy).items()}
            self._share(policy)  # layers were replaced

    def _restore_base(self) -> None:
        if self._full:
            self.load()
            self._full = False
        elif self._initial:
            self.policy.load_adapter_state(self._initial)


def out_of_memory(who: str, clips: int, error: Exception) -> str:
    """Return what to tell of ``error``, in which ``who`` ran out of memory with ``clips`` clips."""
    return f"{who}: out of memory while rendering {clips} clips at once; lower pools.vdm.max_batch, or pools.vdm.max_decode: {error}"


def _snapshot(policy: VdmPolicy) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in policy.adapter_state().items()}
