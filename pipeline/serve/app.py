"""The server on Ray Serve: two deployments of the models, and the ingress that asks them.

Responsible for what stands where and how many of it. Not responsible for the cluster (``cluster.session``) or for what is asked
(``desk``).
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from cluster.errors import VansError
from pipeline.config import RunConfig
from pipeline.fleet.kinds import KINDS
from pipeline.serve.api import build
from pipeline.serve.desk import Desk, Pair
from pipeline.serve.examples import Example
from pipeline.serve.exports import Export, Policy
from pipeline.serve.replicas import Artist, Following, Thinker
from pipeline.serve.settings import DeploymentSection

NAME = "vans"
"""The application in Ray Serve."""
SERVED, BEFORE = "served", "before"
"""The two pairs that people may ask, by the names that the API has for them."""


@dataclass(frozen=True)
class Followed:
    """The run whose exports are followed: its own configuration and folder, and what is served from the start."""

    config: RunConfig
    run: Path
    exports: Mapping[Policy, Export]


@serve.ingress(None)
class Ingress:
    """One replica: what is known of answers is in its memory."""

    def __init__(
        self,
        config: RunConfig,
        token: str | None,
        root: str | None,
        examples: Sequence[Example],
        pairs: Mapping[str, tuple[DeploymentHandle, DeploymentHandle]],
    ) -> None:
        self._root = Path(tempfile.mkdtemp(prefix="vans-serve-", dir=root))
        self._token, self._examples = token, examples
        self._desk = Desk(
            config,
            {
                name: Pair(thinker.complete.remote, artist.options(stream=True).draw.remote)
                for name, (thinker, artist) in pairs.items()
            },
            self._root,
        )

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return build(self._desk, self._token, self._examples)

    def __del__(self) -> None:
        shutil.rmtree(self._root, ignore_errors=True)


def serving(config: RunConfig) -> RunConfig:
    """Return ``config`` as the replicas load it: no learner wants memory or sends weights, and each artist embeds for itself."""
    pools, own = config.pools, config.serve
    changes = {
        "vlm": {"rest": False, "gpus": own.vlm.gpus(pools.vlm)},
        "vdm": {"rest": False, "gpus": own.vdm.gpus(pools.vdm)},
        "embed": {"workers": 0},
    }
    updated = {name: getattr(pools, name).model_copy(update=values) for name, values in changes.items()}
    weights = config.weights.model_copy(update={"transport": "object_store"})
    return config.model_copy(update={"pools": pools.model_copy(update=updated), "weights": weights})


def application(
    config: RunConfig,
    token: str | None,
    root: str | None,
    followed: Followed | None = None,
    examples: Sequence[Example] = (),
    before: RunConfig | None = None,
) -> Any:
    """Return the application for ``serve.run``. Raises CheckpointError where a model is missing.

    ``before`` is a second pair, which people may ask for comparison: it has deployments of its own and changes no weights.
    """
    config = serving(config)
    pairs = {SERVED: (_deployment(config, Thinker, "vlm", followed), _deployment(config, Artist, "vdm", followed))}
    if before is not None:
        earlier = serving(before)
        pairs[BEFORE] = (
            _deployment(earlier, Thinker, "vlm", None, f"-{BEFORE}"),
            _deployment(earlier, Artist, "vdm", None, f"-{BEFORE}"),
        )
    ingress = serve.deployment(Ingress).options(
        name="ingress",
        num_replicas=1,
        max_ongoing_requests=1000,
        ray_actor_options={"num_cpus": 0.1},
        max_constructor_retry_count=1,
        graceful_shutdown_timeout_s=5,
    )
    return ingress.bind(config, token, root, examples, pairs)


def _deployment(
    config: RunConfig, replica: type, policy: Policy, followed: Followed | None, suffix: str = ""
) -> DeploymentHandle:
    """Return the bound deployment of one model, as ``serve`` and its pool's settings have it."""
    section: DeploymentSection = getattr(config.serve, policy)
    pool, scale = getattr(config.pools, policy), section.autoscale
    following = None
    if followed is not None:
        first = followed.exports.get(policy)
        following = Following(followed.config, followed.run.resolve(), policy, config.serve.follow_s, first)
    options: dict[str, Any] = {
        "name": replica.__name__.lower() + suffix,
        "max_ongoing_requests": section.max_ongoing_requests,
        "ray_actor_options": {"num_cpus": pool.cpus, "num_gpus": pool.gpus, "resources": pool.resources},
        "max_constructor_retry_count": 1,
        "graceful_shutdown_timeout_s": 5,
    }
    if scale.enabled:
        options["autoscaling_config"] = {
            "min_replicas": scale.min,
            "max_replicas": scale.max,
            "target_ongoing_requests": scale.target_ongoing_requests,
        }
    else:
        options["num_replicas"] = section.replicas
    bound: DeploymentHandle = (
        serve.deployment(replica).options(**options).bind(dict(KINDS[policy].arguments(config)), following)
    )
    return bound


@contextmanager
def served(
    config: RunConfig,
    token: str | None,
    followed: Followed | None = None,
    examples: Sequence[Example] = (),
    before: RunConfig | None = None,
) -> Iterator[str]:
    """Serve ``config`` for the length of the block, on the Ray that this process has joined, and yield the address.

    Raises VansError where a deployment does not start; its message has the reason.
    """
    host, port = config.serve.host, config.serve.port
    folder = tempfile.mkdtemp(prefix="vans-serve-")
    app = application(config, token, folder, followed, examples, before)
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
        try:
            serve.run(app, name=NAME, route_prefix="/")
        except RuntimeError as error:
            raise VansError(f"the server did not start: {error}") from error
        yield f"http://{f'[{host}]' if ':' in host else host}:{port}"
    finally:
        serve.delete(NAME)
        shutil.rmtree(folder, ignore_errors=True)
