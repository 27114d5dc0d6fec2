"""The run's connection to Ray: joins a cluster, or starts an embedded one on this machine and ends it again.

Responsible for addresses, environment of the workers, signal handlers and shutdown. Resources are
``cluster.resources``.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster import ports
from cluster.errors import VansError
from cluster.notices import notices
from cluster.packages import PACKAGES
from cluster.resources import ClusterView, view
from cluster.surroundings import LONGEST_TEMPORARY, settle, worker_hook

log = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent

WORKER_ENV = {
    "OMP_NUM_THREADS": "1",
    "PYTHONSAFEPATH": "1",  # what workers start with `python -m` must not import from the working directory
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
}
"""Environment of workers unless the driver's own says otherwise. One thread each: workers share cores, and two threads
that compete for one are many times slower than one."""

_FORWARDED = (
    "HF_HUB_OFFLINE",
    "TORCH_COMPILE_DISABLE",
    "VLLM_LOGGING_LEVEL",
    "VLLM_CPU_KVSPACE",
    "VANS_STRICT_METRICS",
    "AWS_ENDPOINT_URL",  # where S3 is, not who asks: credentials are the nodes' own
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
)
"""Switches of the driver that workers on other nodes are to have too."""

_AUTHENTICATE = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (or RAY_AUTH_TOKEN) to the head's (docs/security.md)"
_SETUP_HOOK = "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray in the driver of a submitted job


_QUIET = {"logging_level": logging.ERROR, "log_to_driver": False}
_START_ERRORS = (RuntimeError, ValueError, ConnectionError, OSError)


class ClusterError(VansError):
    """The Ray cluster could not be joined or started."""


@dataclass(frozen=True)
class Session:
    """A live connection."""

    address: str
    """GCS address, host:port."""
    embedded: bool
    """Whether this run started the cluster, and will end it."""

    def view(self) -> ClusterView:
        """Return what the cluster has."""
        return view()


@contextmanager
def connect(
    address: str | None = None,
    *,
    local_cpus: int | None = None,
    local_gpus: int | None = None,
    object_store_mib: int = 512,
    env: Mapping[str, str] | None = None,
) -> Iterator[Session]:
    """Join the cluster at ``address``, or start an embedded one, for the length of the ``with`` block.

    The environment's ``RAY_ADDRESS`` wins over ``address``. ``None`` and ``"local"`` start an embedded cluster that
    listens on the loopback interface only, without a dashboard: ``local_cpus`` CPU slots (default 4 × cores, because
    tiny models share them), ``local_gpus`` GPUs (default: those found), an object store of ``object_store_mib`` MiB.
    ``"auto"`` joins the one on this machine. A Ray that this process has already initialised is used as it is and left
    running.

    Workers get ``env`` over ``WORKER_ENV``, and can import this project's packages from a clone, an editable install or
    a submitted job's working directory. What workers and nodes print stays in Ray's files (``cluster.notices``).

    Raises ClusterError when there is nothing at the address.
    """
    import ray

    if ray.is_initialized():
        yield Session(ray.get_runtime_context().gcs_address, embedded=False)
        return
    settle()
    where = resolve_address(address, os.environ)
    options: dict[str, Any] = {
        **_QUIET,
        "runtime_env": runtime_env(os.environ, env or {}, embedded=where is None),
    }
    # Ray puts its own handler in the place of whoever wanted to know of SIGTERM.
    handler = signal.getsignal(signal.SIGTERM)
    with notices(logs_folder):
        try:
            if where is None:
                _start_embedded(local_cpus, local_gpus, object_store_mib, options)
            else:
                _join(where, options)
            _restore(handler)
            session = Session(ray.get_runtime_context().gcs_address, embedded=where is None)
            log.info("Ray %s at %s", "started" if session.embedded else "joined", session.address)
            yield session
        finally:
            ray.shutdown()
            _restore(handler)


@contextmanager
def join(address: str, *, token: bool = False) -> Iterator[Session]:
    """Join the cluster at ``address`` to talk to what runs there: no workers are started from here, so nothing is uploaded.

    ``token``: the cluster is known to want Ray's token. Ray itself shows its token at an address that it was given only
    where RAY_AUTH_MODE says so, although it gives one to every cluster that it starts.

    Raises ClusterError when there is nothing at the address, or it does not let this process in.
    """
    import ray

    where = resolve_address(address, {})
    if where is None:
        raise ClusterError(f"Ray address {address!r}: give host:port (the head's, usually {ports.GCS}) or auto")
    if ray.is_initialized():  # it is not ours to end
        mine = ray.get_runtime_context().gcs_address
        if where not in (mine, "auto"):
            if where.rpartition(":")[2].isdigit():
                _require_answer(where)
            raise ClusterError(
                f"This process is in the Ray cluster at {mine}, and cannot join the one at {where} as well"
            )
        yield Session(mine, embedded=False)
        return
    if token and "RAY_AUTH_MODE" not in os.environ:
        from ray._raylet import Config

        os.environ["RAY_AUTH_MODE"] = "token"
        Config.initialize("")  # Ray reads the variable when it is imported
    with notices(logs_folder):
        try:
            _join(where, dict(_QUIET))
            yield Session(ray.get_runtime_context().gcs_address, embedded=False)
        finally:
            ray.shutdown()


def logs_folder() -> str:
    """Return the folder in which each node of the joined cluster keeps Ray's logs of this session."""
    from ray._private import worker

    return str(worker._global_node.get_logs_dir_path())


def require_loopback() -> None:
    """Raise ClusterError where this machine cannot talk to itself, as the processes of Ray, torch and vLLM do.

    They would try for minutes. A container without any network has its loopback interface down.
    """
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            socket.create_connection(server.getsockname(), timeout=5).close()
    except OSError as error:
        raise ClusterError(
            f"127.0.0.1 does not answer ({error}), and the processes of a run talk over it: bring the loopback interface up "
            "(`ip link set lo up`)"
        ) from error


def resolve_address(address: str | None, environ: Mapping[str, str]) -> str | None:
    """Return the address to join, or None to start an embedded cluster.

    Raises ClusterError for addresses that a driver cannot join.
    """
    source, where = "cluster.address", address
    if environ.get("RAY_ADDRESS"):
        source, where = "RAY_ADDRESS", environ["RAY_ADDRESS"]
    if where is None or where == "local":
        return None
    if where.startswith(("http://", "https://")):
        raise ClusterError(
            f"{source}={where} is a dashboard's address, which takes jobs: `ray job submit --address {where} "
            f"--working-dir . -- python -m pipeline train …`. To join the cluster from here give host:{ports.GCS}, or auto on "
            "its own machine."
        )
    if where.startswith("ray://"):
        raise ClusterError(
            f"{source}={where}: Ray Client cannot host a run; use `ray job submit`, or host:{ports.GCS} on one of its nodes"
        )
    return where


def runtime_env(environ: Mapping[str, str], env: Mapping[str, str], *, embedded: bool) -> dict[str, Any]:
    """Return the runtime environment of the workers (pure; ``environ`` is the driver's environment).

    Embedded workers inherit the driver's environment and read this clone's files. A submitted job brings its working
    directory along, and Ray refuses a variable that the job has set. Otherwise a clone's packages are uploaded to the
    cluster.
    """
    inherited = {name: environ[name] for name in (*WORKER_ENV, *_FORWARDED) if name in environ}
    variables = {**WORKER_ENV, **inherited, **env}
    job = json.loads(environ[_JOB_CONFIG]).get("runtime_env") or {} if environ.get(_JOB_CONFIG) else {}
    variables = {name: value for name, value in variables.items() if name not in job.get("env_vars", {})}
    result: dict[str, Any] = {"env_vars": variables}
    if not ({"worker_process_setup_hook"} & job.keys() or _SETUP_HOOK in environ):  # Ray takes one
        result["worker_process_setup_hook"] = worker_hook(str(ROOT) if embedded else None)
    clone = (ROOT / "pyproject.toml").is_file()  # installed packages are found anyway
    if clone and embedded:
        path = [str(ROOT), *environ.get("PYTHONPATH", "").split(os.pathsep)]
        variables["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(entry for entry in path if entry))
    elif clone and not {"working_dir", "py_modules"} & job.keys():
        result["py_modules"] = [str(ROOT / package) for package in PACKAGES]
    return result


def _start_embedded(cpus: int | None, gpus: int | None, object_store_mib: int, options: dict[str, Any]) -> None:
    import ray

    require_loopback()
    slots = cpus if cpus is not None else 4 * (os.cpu_count() or 1)
    # Ray's +15 would leave the workers what anything else on this machine does not want: a set-up of 20 s takes minutes.
    niceness = os.environ.get("RAY_worker_niceness", "0")  # noqa: SIM112 - Ray spells it so
    temporary = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    if len(os.fsencode(temporary)) > LONGEST_TEMPORARY:
        raise ClusterError(
            f"{temporary} (TMPDIR, RAY_TMPDIR) is too long a name for the sockets that Ray makes below it: set RAY_TMPDIR to a "
            f"folder of at most {LONGEST_TEMPORARY} bytes"
        )
    # An environment that pip cannot build is not built better the next time, and each time copies gigabytes.
    tries = os.environ.get("RUNTIME_ENV_RETRY_TIMES", "1")
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": niceness, "RUNTIME_ENV_RETRY_TIMES": tries}
    with _loopback(), environment(settings):
        _private_token()
        for again in (True, False):
            try:
                ray.init(
                    address="local",
                    num_cpus=slots,
                    num_gpus=gpus,
                    object_store_memory=object_store_mib * 2**20,
                    include_dashboard=False,
                    **options,
                )
                return
            except Exception as error:
                # Ray's agents have 15 s and its node 30 s to come up, which cannot be set; one busy core needs longer, but
                # not twice: by then the files are in memory. What Ray raises then is no class of its own.
                if type(error) is Exception and again:
                    log.warning("Ray did not come up in the time that it gives itself; it is started once more")
                    ray.shutdown()
                    continue
                if type(error) is not Exception and not isinstance(error, _START_ERRORS):
                    raise
                raise ClusterError(f"The embedded Ray cluster ({slots} CPU slots) did not start: {error}") from error


def _private_token() -> None:
    """Take others' permission to read the token that Ray keeps in the user's home; the umask would have allowed it.

    ``ray.init`` makes that file where there is none, when it starts a cluster: whoever can read it may run code there.
    """
    if (
        os.environ.get("RAY_AUTH_MODE", "token").lower() != "token"
        or {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys()
    ):
        return
    path = Path.home() / ".ray" / "auth_token"
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        if path.exists():
            path.chmod(0o600)
        else:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(secrets.token_hex(32))
    except OSError as error:  # a home that cannot be written to, or another process was first: Ray says what it needs
        log.warning("Ray's token %s could not be made private: %s", path, error)


def _join(address: str, options: dict[str, Any]) -> None:
    import ray
    from ray.exceptions import AuthenticationError, RayError
    from ray.util import get_node_ip_address

    host, _, port = address.rpartition(":")
    mode: AbstractContextManager[None] = nullcontext()
    if address != "auto":
        if not host or not port.isdigit():
            raise ClusterError(
                f"Ray address {address!r}: give host:port (the head's, usually {ports.GCS}), auto or local"
            )
        _require_answer(address)  # Ray itself keeps trying for minutes
        if host in ("localhost", "127.0.0.1") and _unreachable(get_node_ip_address(), int(port)):
            mode = _loopback()  # Ray would replace the loopback address by one at which a private head does not listen
    with mode:
        try:
            ray.init(address=address, **options)
        except (RayError, RuntimeError, ValueError, ConnectionError, OSError) as error:
            # A refused token reaches us as a lost connection; that something listens there is known by now.
            refused = isinstance(error, AuthenticationError | ConnectionError)
            hint = (
                f". It answers, so it may ask for a token that this process does not have: {_AUTHENTICATE}"
                if refused
                else ""
            )
            raise ClusterError(f"The Ray cluster at {address} could not be joined: {error}{hint}") from error


def _require_answer(address: str) -> None:
    host, _, port = address.rpartition(":")
    problem = _unreachable(host, int(port))
    if problem is not None:
        raise ClusterError(f"No Ray cluster answers at {address} ({problem}). Is its head running on this port?")


def _unreachable(host: str, port: int) -> str | None:
    """Return why nothing answers there, or None."""
    try:
        socket.create_connection((host.strip("[]"), port), timeout=5).close()
    except OSError as error:
        return str(error)
    return None


@contextmanager
def _loopback() -> Iterator[None]:
    """Make Ray use 127.0.0.1 as this node's address and listen there only, as it does by itself on macOS and Windows.

    Ray has no option for it on Linux; the variable is for the processes that it starts, the constant for this one.
    """
    from ray._private import ray_constants

    remembered = ray_constants.ENABLE_RAY_CLUSTER
    with environment({"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}):
        ray_constants.ENABLE_RAY_CLUSTER = False
        try:
            yield
        finally:
            ray_constants.ENABLE_RAY_CLUSTER = remembered


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set ``variables`` for the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _restore(handler: Any) -> None:
    if handler is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
