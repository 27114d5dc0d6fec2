"""The reward pool's Ray actor: a scorer behind the worker protocol of ``actors.pool.protocol``.

The class is undecorated, so that it also runs in process; make an actor with ``ray.remote(RewardWorker).options(…)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from actors.failures import Outcome
from actors.offload import Offloader, module_tensors
from actors.pool.protocol import WorkerInfo, worker_info
from actors.records import ScoreRequest
from actors.scoring.clip import ClipScorer
from actors.scoring.model import Facts, RewardLoadError
from actors.scoring.scorer import Scorer
from rewards.errors import RewardError
from rewards.format import DEFAULT, AnswerFormat


class RewardWorker:
    """Scores answers. Its models are frozen, so every weights version is the same to it.

    ``components``: what the run will ask for; each is checked, and custom ones are imported, in :meth:`setup`, so
    that a wrong name stops the run at its start. ``custom``: alias → ``module:function`` (see docs/rewards.md).
    ``custom_timeout_s``, ``answers``: see ``Scorer``.
    """

    def __init__(
        self,
        name: str,
        clip_path: str,
        components: Sequence[str] = (),
        *,
        custom: Mapping[str, str] | None = None,
        clip_name: str | None = None,
        device: str = "cpu",
        dtype: str = "float32",
        batch: int = 64,
        cache_mib: float = 64.0,
        fvd_dim: int = 16,
        diagnostics: bool = True,
        custom_timeout_s: float = math.inf,
        answers: AnswerFormat = DEFAULT,
        threads: int = 1,
    ) -> None:
        self.name = name
        self.components = tuple(components)
        self._clip_options: dict[str, Any] = {"device": device, "dtype": dtype, "batch": batch, "name": clip_name}
        self._scorer_options: dict[str, Any] = {
            "custom": custom,
            "cache_mib": cache_mib,
            "fvd_dim": fvd_dim,
            "diagnostics": diagnostics,
            "custom_timeout_s": custom_timeout_s,
            "answers": answers,
        }
        self._clip_path = clip_path
        self._device = device
        self._threads = threads
        self._version = 0
        self._scorer: Scorer | None = None
        self._offloader = Offloader(torch.device(device))

    @property
    def scorer(self) -> Scorer:
        """The scorer; raises RuntimeError before :meth:`setup`."""
        if self._scorer is None:
            raise RuntimeError(f"reward worker {self.name}: process() before setup()")
        return self._scorer

    def setup(self) -> WorkerInfo:
        """Load CLIP and import the rewards. Raises CheckpointError or RewardLoadError for what cannot be loaded."""
        torch.set_num_threads(self._threads)
        clip = ClipScorer(self._clip_path, **self._clip_options)
        try:
            scorer = Scorer(clip, **self._scorer_options)
            scorer.check(self.components)
        except RewardError as error:
            raise RewardLoadError(str(error)) from error
        self._scorer = scorer
        return worker_info(self.name, self._device, clip.parameter_hash())

    def load_weights(self, version: int, payload: list[Any] | None) -> int:
        """Note ``version``; there is nothing to load. Raises ValueError for an actual payload."""
        if payload:
            raise ValueError(
                f"reward worker {self.name} holds frozen models and takes no weights, got version {version}"
            )
        self._version = version
        return version

    def process(self, requests: Sequence[ScoreRequest]) -> list[Outcome]:
        """Return ``Ok(Scores)`` or a Failure for each request, in order."""
        with self._offloader.used():
            return self.scorer.score(requests)

    def weights_hash(self) -> str:
        """Return the hash of CLIP's parameters and the version."""
        with self._offloader.used():
            return f"{self.scorer.clip.parameter_hash()}:{self._version}"

    def rest(self) -> int:
        """Move CLIP to host memory until it is next needed, by whatever needs it; returns the bytes freed."""
        return self._offloader.rest(lambda: module_tensors(self.scorer.clip.model))

    def ping(self) -> str:
        """Return the worker's name."""
        return self.name

    def facts(self) -> dict[str, Facts]:
        """Return what each of the worker's components looks at."""
        return self.scorer.facts(self.components)

    def fvd_extractor(self) -> str:
        """Return the name of the Fréchet features that this worker gives."""
        return self.scorer.fvd_extractor

    def stats(self) -> dict[str, float]:
        """Return the feature cache's hits, misses and bytes, and the captions that CLIP's limit cut."""
        cache = self.scorer.cache
        return {
            "cache_hits": float(cache.hits),
            "cache_misses": float(cache.misses),
            "cache_bytes": float(cache.bytes),
            "captions_truncated": float(self.scorer.clip.truncated),
        }
