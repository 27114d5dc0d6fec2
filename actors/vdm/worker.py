"""The video diffusion pool's Ray actor: a :class:`VdmPolicy` behind the worker protocol of ``actors.pool.protocol``.

Responsible for batching a call's requests, for classing what goes wrong with each of them, and for putting published
weights into the policy. The class is undecorated, so that it also runs in process; make an actor with
``ray.remote(VdmWorker).options(…)``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from actors.failures import Failure, InfrastructureError, Ok, Outcome, attempt, failure_of
from actors.offload import Offloader, module_tensors
from actors.pool.protocol import WorkerInfo, worker_info
from actors.records import Clip, RenderRequest
from actors.vdm import sampling
from actors.vdm.files import parameter_hash
from actors.vdm.policy import VdmPolicy
from actors.weights.transport import Delivery, fetch
from cluster.errors import CheckpointError


class VdmWorker:
    """Renders clips. ``adapter``: a PEFT folder, part of the base weights; ``options``: :meth:`VdmPolicy.load`'s."""

    def __init__(
        self,
        name: str,
        model_path: str,
        *,
        adapter: str | None = None,
        dtype: str = "float32",
        device: str = "cpu",
        threads: int | None = 1,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.name, self._path, self._adapter, self._dtype, self._device = name, model_path, adapter, dtype, device
        self._threads = threads
        self._options = dict(options or {})
        self._policy: VdmPolicy | None = None
        self._offloader = Offloader(torch.device(device))
        self._initial: dict[str, Tensor] = {}  # the adapter as set up: what "base weights" means while one is injected
        self._full = False
        self._arrival: str = "model folder"
        self._busy = threading.Lock()  # one call at a time uses the models; the actor's other thread answers ping()

    @property
    def policy(self) -> VdmPolicy:
        """The policy; raises RuntimeError before :meth:`setup`."""
        if self._policy is None:
            raise RuntimeError(f"VDM worker {self.name}: used before setup()")
        return self._policy

    def setup(self) -> WorkerInfo:
        """Load the pipeline. Raises CheckpointError for a folder that is not one."""
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        self._policy = self._load()
        return worker_info(self.name, self._device, self._base_hash())

    def load_weights(self, version: int, payload: list[Any] | None) -> int:
        """Put the published weights into the policy and return ``version``; None brings back the base weights."""
        weights = fetch(payload, self._device) if payload is not None else None
        with self._awake():
            if weights is None:
                self._restore_base()
            else:
                self._apply(weights)
            self.policy.version = version
            self._arrival = weights.arrival if weights is not None else "model folder"
        return version

    def arrival(self) -> str:
        """Return how the weights that it serves have come: ``object store``, ``broadcast`` or ``model folder``."""
        return self._arrival

    def process(self, requests: Sequence[RenderRequest]) -> list[Outcome]:
        """Render what can be rendered in as few batches as possible; a failure is pinned to its own request."""
        outcomes: list[Outcome | None] = [self._refuse(request) for request in requests]
        good = [i for i, refusal in enumerate(outcomes) if refusal is None]
        if good:
            with self._awake():
                rendered = self._render([requests[i] for i in good])
            for i, outcome in zip(good, rendered, strict=True):
                outcomes[i] = outcome
        return [outcome for outcome in outcomes if outcome is not None]

    def weights_hash(self) -> str:
        """Return the hash of all parameters but the adapter's, and the version served."""
        with self._awake():
            return f"{self._base_hash()}:{self.policy.version}"

    def counters(self) -> dict[str, float]:
        """Return how many captions were embedded and clips' reference frames encoded, and asked for, since the start."""
        return self.policy.counters()

    def held(self) -> dict[str, int]:
        """Return the bytes of the parameters that this process holds, by component."""
        return self.policy.held()

    def rest(self) -> int:
        """Move the models to host memory until they are next needed, by whatever needs them; returns the bytes freed."""
        return self._offloader.rest(lambda: module_tensors(self.policy.module, *self.policy.frozen_parts))

    def ping(self) -> str:
        """Return the worker's name."""
        return self.name

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """Hold the models, on their device."""
        with self._busy, self._offloader.used():
            yield

    def _load(self) -> VdmPolicy:
        policy = VdmPolicy.load(
            self._path, dtype=self._dtype, adapter=self._adapter, device=self._device, **self._options
        )
        self._initial = _snapshot(policy) if policy.adapter is not None else {}
        return policy

    def _refuse(self, request: RenderRequest) -> Failure | None:
        try:
            sampling.check(self.policy, request)
        except Exception as error:  # noqa: BLE001 - classed and returned to the pool
            return failure_of(error)
        return None

    def _render(self, requests: list[RenderRequest]) -> list[Outcome]:
        try:
            return [Ok(clip) for clip in self._sample(requests)]
        except Exception as error:  # noqa: BLE001 - classed and returned to the pool
            if len(requests) == 1:
                return [failure_of(error)]
        return [attempt(lambda r=request: self._sample([r])[0]) for request in requests]  # type: ignore[misc]

    def _sample(self, requests: list[RenderRequest]) -> list[Clip]:
        try:
            return sampling.sample(self.policy, requests)
        except torch.OutOfMemoryError as error:
            raise InfrastructureError(
                f"{self.name}: out of memory while rendering {len(requests)} clips at once; "
                f"lower pools.vdm.max_batch, or pools.vdm.max_decode: {error}"
            ) from error

    def _apply(self, weights: Delivery) -> None:
        tensors = weights.tensors
        if weights.kind == "full":
            if self._adapter is not None:
                raise CheckpointError(
                    f"{self.name}: full weights cannot be loaded into a model that starts from an adapter ({self._adapter})"
                )
            if self.policy.adapter is not None:
                self._policy = self._load()
            self.policy.module.load_state_dict(tensors, strict=True)
            self._full = True
            return
        if self._full:  # an adapter belongs to the folder's own weights
            self._restore_base()
        policy, fresh = self.policy, self.policy.adapter is None
        policy.put_adapter(tensors, weights.adapter_config, f"{self.name}: the published weights")
        if fresh:  # without an adapter is what one with B = 0 computes
            self._initial = {n: torch.zeros_like(t) if ".lora_B." in n else t for n, t in _snapshot(policy).items()}

    def _restore_base(self) -> None:
        if self._full:
            self._policy, self._full = self._load(), False
        elif self._initial:
            self.policy.load_adapter_state(self._initial)

    def _base_hash(self) -> str:
        policy = self.policy
        encoder = policy.embedder.encoder if policy.embedder is not None else None
        images = policy.image_encoder.model if policy.image_encoder is not None else None
        frozen = {"vae": policy.vae, "text_encoder": encoder, "image_encoder": images}
        return parameter_hash({"transformer": policy.module, **frozen})


def _snapshot(policy: VdmPolicy) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in policy.adapter_state().items()}
