"""The video diffusion pool's Ray actor: a :class:`VdmPolicy` behind the worker protocol of ``actors.pool.protocol``.

Responsible for batching a call's requests and for classing what goes wrong with each of them. Which weights it serves is
``served``'s, the other processes of a worker with ``context_parallel`` are ``peers``'. The class is undecorated, so that it also
runs in process; make an actor with ``ray.remote(VdmWorker).options(…)``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from actors.failures import Failure, InfrastructureError, Ok, Outcome, failure_of
from actors.learner.sharding import free_address
from actors.pool.protocol import WorkerInfo, worker_info
from actors.records import Clip, RenderRequest
from actors.vdm import sampling
from actors.vdm.files import parameter_hash
from actors.vdm.peers import Peers
from actors.vdm.policy import VdmPolicy
from actors.vdm.served import LOOPBACK, Announced, Served, out_of_memory
from actors.vdm.trajectories import Encoded
from actors.weights.transport import fetch


class VdmWorker:
    """Renders clips. ``adapter``: a PEFT folder, part of the base weights; ``options``: :meth:`VdmPolicy.load`'s.

    With ``context_parallel`` N in its settings it leads N - 1 more processes, which share the tokens of each clip with this one.
    """

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
        self.name, self._device, self._threads = name, device, threads
        self._arguments = {"model_path": model_path, "adapter": adapter, "dtype": dtype, "device": device}
        self._options = dict(options or {})
        self._served = Served(name, options=self._options, **self._arguments)  # type: ignore[arg-type]
        self._peers: Peers | None = None
        self._arrival: str = "model folder"
        self._drawn = {"clips": 0, "latents": 0, "passes": 0}
        self._busy = threading.Lock()  # one call at a time uses the models; the actor's other thread answers ping()

    @property
    def policy(self) -> VdmPolicy:
        """The policy; raises RuntimeError before :meth:`setup`."""
        return self._served.policy

    def setup(self) -> WorkerInfo:
        """Load the pipeline, here and in the peers.

        Raises CheckpointError for a folder that is not one, ConfigError where its clips cannot be shared.
        """
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        settings = self._served.settings
        if settings.context_parallel == 1:
            self._served.load()
        else:
            others = self._arguments | {"options": self._options | {"components": ("transformer",)}}
            self._peers = Peers(self.name, settings.context_parallel - 1, self._threads, others)
            try:
                self._served.load()
                self._peers.wait(settings.start_timeout_s)
            except BaseException:
                self._peers.close()
                raise
            address = free_address(LOOPBACK)
            with self._together("join", address):
                self._served.join(address)
        return worker_info(self.name, self._device, self._base_hash())

    def load_weights(self, version: int, payload: list[Any] | None) -> int:
        """Put the published weights into the policy and return ``version``; None brings back the base weights."""
        weights = fetch(payload, self._device) if payload is not None else None
        with self._busy:
            if weights is None:
                with self._together("put", version, None):
                    self._served.put(version, None)
            elif self._peers is None:
                self._served.put(version, weights)
            else:
                with self._together("receive", version, Announced.of(weights)):
                    self._served.send(version, weights)
            self._arrival = weights.arrival if weights is not None else "model folder"
        return version

    def arrival(self) -> str:
        """Return how the weights that it serves have come: ``object store``, ``broadcast`` or ``model folder``."""
        return self._arrival

    def process(self, requests: Sequence[RenderRequest], on_step: sampling.OnStep | None = None) -> list[Outcome]:
        """Render what can be rendered in as few batches as possible; a failure is pinned to its own request.

        ``on_step`` is :func:`sampling.sample`'s. Where it raises ``sampling.NotWanted`` so does this: no request of the call is
        answered. With ``context_parallel`` it is not called: the processes that share a clip draw it to its end.
        """
        outcomes: list[Outcome | None] = [self._refuse(request) for request in requests]
        good = [i for i, refusal in enumerate(outcomes) if refusal is None]
        if good:
            with self._awake():
                rendered = self._render([requests[i] for i in good], on_step)
            for i, outcome in zip(good, rendered, strict=True):
                outcomes[i] = outcome
                if isinstance(outcome, Ok):
                    self._count(requests[i])
        return [outcome for outcome in outcomes if outcome is not None]

    def weights_hash(self) -> str:
        """Return the hash of all parameters but the adapter's, and the version served."""
        with self._awake():
            return f"{self._base_hash()}:{self.policy.version}"

    def counters(self) -> dict[str, float]:
        """Return what was done since the start: captions embedded and clips' reference frames encoded, and asked for; clips that
        were drawn, their latents (one for each denoising step), and the transformer's passes over one of them.
        """
        return self.policy.counters() | {name: float(count) for name, count in self._drawn.items()}

    def _count(self, request: RenderRequest) -> None:
        self._drawn["clips"] += 1
        self._drawn["latents"] += request.steps
        self._drawn["passes"] += request.steps * (2 if request.guidance > 1 else 1)

    def held(self) -> dict[str, int]:
        """Return the bytes of the parameters that this process holds, by component."""
        return self.policy.held()

    def rest(self) -> int:
        """Move the models to host memory until they are next needed, by whatever needs them; returns the bytes freed here."""
        with self._busy, self._together("rest"):
            return self._served.rest()

    def ping(self) -> str:
        """Return the worker's name; raises InfrastructureError where a peer is lost."""
        if self._peers is not None:
            self._peers.check()
        return self.name

    def shutdown(self) -> None:
        """End the peers."""
        if self._peers is None:
            return
        with self._busy:
            try:
                with self._together("leave"):
                    self._served.leave()
            finally:
                self._peers.close()

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """Hold the models, on their device."""
        with self._busy, self._served.awake():
            yield

    def _together(self, method: str, *arguments: Any) -> AbstractContextManager[None]:
        """Have the peers, where there are any, call a method of ``Served`` while this process does its own part within."""
        if self._peers is None:
            return nullcontext()
        settings = self._served.settings
        deadline = settings.request_timeout_s if method == "draw" else settings.start_timeout_s
        return self._peers.doing(method, *arguments, timeout_s=deadline)

    def _refuse(self, request: RenderRequest) -> Failure | None:
        try:
            sampling.check(self.policy, request)
        except Exception as error:  # noqa: BLE001 - classed and returned to the pool
            return failure_of(error)
        return None

    def _render(self, requests: list[RenderRequest], on_step: sampling.OnStep | None) -> list[Outcome]:
        try:
            return [Ok(clip) for clip in self._sample(requests, on_step)]
        except sampling.NotWanted:
            raise
        except Exception as error:  # noqa: BLE001 - classed and returned to the pool
            if len(requests) == 1:
                return [failure_of(error)]
        return [outcome for request in requests for outcome in self._render([request], on_step)]

    def _sample(self, requests: list[RenderRequest], on_step: sampling.OnStep | None) -> list[Clip]:
        try:
            return sampling.sample(self.policy, requests, self._draw, on_step)
        except torch.OutOfMemoryError as error:
            raise InfrastructureError(out_of_memory(self.name, len(requests), error)) from error

    def _draw(
        self,
        policy: VdmPolicy,
        requests: Sequence[RenderRequest],
        shape: sampling.Shape,
        encoded: Sequence[Encoded],
        on_step: sampling.OnStep | None,
    ) -> sampling.Drawn:
        if self._peers is None:
            return self._served.draw(requests, shape, encoded, on_step)
        # Peers neither embed nor encode, and the frames have told the shape.
        slim = [
            replace(request, reference_frames=request.reference_frames[:0], condition=item.record())
            for request, item in zip(requests, encoded, strict=True)
        ]
        with self._together("draw", slim, shape):
            return self._served.draw(requests, shape, encoded)

    def _base_hash(self) -> str:
        policy = self.policy
        encoder = policy.embedder.encoder if policy.embedder is not None else None
        images = policy.image_encoder.model if policy.image_encoder is not None else None
        frozen = {"vae": policy.vae, "text_encoder": encoder, "image_encoder": images}
        return parameter_hash({"transformer": policy.module, **frozen})
