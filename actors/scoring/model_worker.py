"""The Ray actor of a reward that has a model: it behind the worker protocol of ``actors.pool.protocol``.

The class is undecorated, so that it also runs in process. It needs no torch where the reward has no torch modules: a reward may
have an environment of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from actors.failures import Outcome
from actors.pool.protocol import WorkerInfo, worker_info
from actors.records import GroupScoreRequest, ScoreRequest
from actors.scoring.asking import ModelScorer
from actors.scoring.model import Facts, facts_of, load_model, modules_of, start_model


class ModelWorker:
    """Scores answers by one reward. Its model is frozen, so every weights version is the same to it.

    ``component``: the reward's name in ``rewards.weights``; ``path``: ``module:Class``; ``options``: of its constructor.
    """

    def __init__(
        self,
        name: str,
        component: str,
        path: str,
        options: Mapping[str, Any] | None = None,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        threads: int = 1,
    ) -> None:
        self.name = name
        self._component, self._path, self._options = component, path, dict(options or {})
        self._device, self._dtype, self._threads = device, dtype, threads
        self._version = 0
        self._scorer: ModelScorer | None = None
        self._offloader: Any = None

    @property
    def scorer(self) -> ModelScorer:
        """What asks the reward; raises RuntimeError before :meth:`setup`."""
        if self._scorer is None:
            raise RuntimeError(f"reward worker {self.name}: process() before setup()")
        return self._scorer

    def setup(self) -> WorkerInfo:
        """Load the reward. Raises RewardLoadError for one that cannot be loaded."""
        with contextlib.suppress(ImportError):
            import torch

            torch.set_num_threads(self._threads)
        model = load_model(self._path, self._options)
        start_model(self._path, model, self._device, self._dtype)
        # After the set-up: what a reward looks at may follow from its model.
        self._scorer = ModelScorer(self._component, self._path, model, facts_of(self._path, model))
        if modules_of(model):
            import torch

            from actors.offload import Offloader

            self._offloader = Offloader(torch.device(self._device))
        return worker_info(self.name, self._device, self._hash())

    def load_weights(self, version: int, payload: list[Any] | None) -> int:
        """Note ``version``; there is nothing to load. Raises ValueError for an actual payload."""
        if payload:
            raise ValueError(
                f"reward worker {self.name} holds a frozen model and takes no weights, got version {version}"
            )
        self._version = version
        return version

    def process(self, requests: Sequence[ScoreRequest | GroupScoreRequest]) -> list[Outcome]:
        """Return ``Ok(Scores)``, of a group a tuple of them, or a Failure for each request, in order."""
        with self._used():
            if self.scorer.facts.group:
                return self.scorer.score_groups([r for r in requests if isinstance(r, GroupScoreRequest)])
            return self.scorer.score([r for r in requests if isinstance(r, ScoreRequest)])

    def facts(self) -> dict[str, Facts]:
        """Return what the reward says of itself, under its name."""
        return {self._component: self.scorer.facts}

    def counters(self) -> dict[str, float]:
        """Return what the reward counts of what it spends; nothing where it counts nothing."""
        counters = getattr(self.scorer.model, "counters", None)
        return dict(counters()) if callable(counters) else {}

    def weights_hash(self) -> str:
        """Return the hash of the modules' parameters and buffers, and the version."""
        with self._used():
            return f"{self._hash()}:{self._version}"

    def rest(self) -> int:
        """Move the modules to host memory until they are next needed; returns the bytes freed."""
        if self._offloader is None:
            return 0
        from actors.offload import module_tensors

        return int(self._offloader.rest(lambda: module_tensors(*modules_of(self.scorer.model))))

    def ping(self) -> str:
        """Return the worker's name."""
        return self.name

    def _used(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._offloader is None else self._offloader.used()

    def _hash(self) -> str:
        modules = modules_of(self.scorer.model)
        if not modules:
            return ""
        from actors.scoring.hashing import modules_hash

        return modules_hash(*modules)
