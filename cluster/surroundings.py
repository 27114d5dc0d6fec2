"""What the surroundings of a process may spoil: a home that is not there, a user without a name, a folder for temporary files whose
name is too long for sockets, and variables that Kubernetes makes of Services' names.

``settle`` puts them right for this process and what it starts; ``worker_hook`` does that in Ray's workers, which other machines start.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path

from cluster.packages import preference

LONGEST_TEMPORARY = 38
"""Longest name of a folder for temporary files: Ray's sockets below it need 69 of the 107 bytes that a socket's path may have."""
COLLECT_AFTER_S = 20.0
"""How long a process does without the garbage collector at its start, in seconds. It would go over all that the imports make, again
and again: a quarter of the time that torch, transformers, diffusers and vLLM take to import."""
_LINK = re.compile(r"(tcp|udp|sctp)://")

log = logging.getLogger(__name__)


def settle(environ: MutableMapping[str, str] = os.environ) -> None:
    """Correct ``environ``; nothing happens where all is well."""
    for name in service_links(environ):
        log.info("ignoring %s=%s, which Kubernetes made of a Service's name", name, environ.pop(name))
    _settle_home(environ)
    temporary = tempfile.gettempdir()
    if len(os.fsencode(temporary)) > LONGEST_TEMPORARY and os.access("/tmp", os.W_OK | os.X_OK):  # noqa: S108
        for name in ("RAY_TMPDIR", "VLLM_RPC_BASE_PATH"):  # of sockets; other files go where TMPDIR says
            environ.setdefault(name, "/tmp")  # noqa: S108


def service_links(environ: Mapping[str, str]) -> list[str]:
    """Return the variables such as ``VLLM_PORT=tcp://10.0.0.1:8000``, which stand for a Service called ``vllm``.

    Libraries take them for settings of their own: vLLM and MLflow read ``…_PORT`` as a number.
    """
    return [name for name, value in environ.items() if name.endswith("_PORT") and _LINK.match(value)]


def worker_hook(root: str | None) -> Callable[[], None]:
    """Return what Ray runs in each worker before anything else (see :func:`cluster.packages.preference`)."""
    prefer, import_first = preference(root), collector_later()

    def set_up() -> None:
        import os

        import_first()
        for name, value in list(os.environ.items()):
            if name.endswith("_PORT") and value.startswith(("tcp://", "udp://", "sctp://")):
                del os.environ[name]
        prefer()

    return set_up


def collector_later() -> Callable[[], None]:
    """Return what switches the garbage collector off in this process for ``COLLECT_AFTER_S``; it stands alone, as Ray's hook must."""
    seconds = COLLECT_AFTER_S

    def import_first() -> None:
        import gc
        import os
        import threading

        gc.disable()
        os.register_at_fork(after_in_child=gc.enable)  # which has no timer
        timer = threading.Timer(seconds, gc.enable)
        timer.daemon = True
        timer.start()

    return import_first


def _settle_home(environ: MutableMapping[str, str]) -> None:
    """Give a process a home and a user's name, where it has none: Ray keeps a token there, and caches are named after the user."""
    uid = os.getuid()
    home = environ.get("HOME") or os.path.expanduser("~")
    if not os.path.isabs(home) or not os.access(home, os.W_OK | os.X_OK):
        own = Path(tempfile.gettempdir()) / f"vans-home-{uid}"
        try:
            own.mkdir(mode=0o700, exist_ok=True)
            if own.stat().st_uid != uid or own.is_symlink():
                raise PermissionError(f"{own} is another user's")
        except OSError as error:
            log.warning("there is no home (HOME=%s) that can be written to: %s; set HOME", home, error)
        else:
            log.warning("HOME=%s cannot be written to; %s serves", environ.get("HOME", ""), own)
            environ["HOME"] = str(own)
    if not any(environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME")):
        import pwd

        try:
            pwd.getpwuid(uid)
        except KeyError:
            environ["USER"] = f"uid{uid}"
