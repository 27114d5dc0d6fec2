"""``vans serve``: parses the arguments of the command, and stays until it is stopped."""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from cluster.errors import ConfigError, VansError
from cluster.variables import SERVE_TOKEN
from pipeline.commands.program import Overrides, local, print_plain


def serve(
    run: Annotated[
        str | None, typer.Argument(help="Folder of a run whose exports are served, such as runs/demo.", metavar="[RUN]")
    ] = None,
    overrides: Overrides = None,
    config: Annotated[
        str, typer.Option(help="Without RUN: the run whose models, video shape and sampling are used.")
    ] = "toy",
    vlm: Annotated[str | None, typer.Option(help="VLM folder, or a PEFT adapter of the configuration's VLM.")] = None,
    vdm: Annotated[str | None, typer.Option(help="VDM folder, or a PEFT adapter of the configuration's VDM.")] = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Serve the run's newest export as soon as there is one, without a pause.")
    ] = False,
    before: Annotated[
        bool,
        typer.Option(
            "--before", help="Load the pair that the run began with too, for people to compare: twice the memory."
        ),
    ] = False,
    no_install: Annotated[
        bool, typer.Option("--no-install", help="Say what is missing instead of installing it.")
    ] = False,
) -> None:
    """Answer questions over HTTP, with both models loaded once, on Ray Serve (docs/serve.md). Ctrl-C ends it.

    Examples: `vans serve runs/demo`, `vans serve runs/demo --follow serve.vdm.replicas=2`,
    `vans serve --vlm runs/demo/vlm_adapter --vdm runs/demo/vdm_adapter serve.port=8080`
    """
    from pipeline.serve.extra import require_extra

    changes = list(overrides or [])
    if run is not None and "=" in run and not Path(run).is_dir():
        changes.insert(0, run)
        run = None
    require_extra(install=not no_install)
    _serve(None if run is None else local(run), changes, config, vlm, vdm, follow=follow, before=before)


def _serve(
    run: Path | None, overrides: list[str], config: str, vlm: str | None, vdm: str | None, *, follow: bool, before: bool
) -> None:
    from pipeline.config import load_config
    from pipeline.fleet.open import cluster_session
    from pipeline.serve.app import Followed, served
    from pipeline.serve.examples import held_out
    from pipeline.serve.exports import of_run, run_config, with_models
    from pipeline.support import terminal
    from pipeline.support.progress import waiting

    followed, began = None, None
    if run is None:
        if follow or before:
            flag = "--follow" if follow else "--before"
            raise typer.BadParameter("it goes with a RUN, of whose weights it speaks", param_hint=flag)
        chosen = with_models(load_config(config, overrides), vlm, vdm)
    elif vlm or vdm:
        raise typer.BadParameter("a RUN has its own; leave one of the two out", param_hint="--vlm, --vdm")
    else:
        own = run_config(run, overrides)
        chosen, exports = of_run(own, run)
        followed = Followed(own, run, exports) if follow else None
        began = with_models(own, None, None) if before else None
    token = _token(chosen.serve.host)
    require_free(chosen.serve.host, chosen.serve.port)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both end it in order
    try:
        with cluster_session(chosen), ExitStack() as stack:
            with waiting(terminal.console(), "loading the thinker and the artist"):
                address = stack.enter_context(served(chosen, token, followed, held_out(chosen, run), began))
            print_plain(f"open {address} in a browser (API: docs/serve.md); Ctrl-C ends it")
            while True:
                time.sleep(3600)
    except KeyboardInterrupt:
        print_plain("stopped")


def _token(host: str) -> str | None:
    """Return the token that people must have; raises ConfigError where one is needed and there is none."""
    from pipeline.serve.gate import is_loopback

    token = os.environ.get(SERVE_TOKEN, "").strip() or None
    if token is None and not is_loopback(host):
        raise ConfigError(
            f"serve.host={host} can be reached from other machines, and {SERVE_TOKEN} is not set: put a long random text "
            'in it (python -c "import secrets; print(secrets.token_urlsafe(32))"), or listen at 127.0.0.1'
        )
    return token


def require_free(host: str, port: int) -> None:
    """Raise VansError where nothing can listen at ``host`` and ``port``."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise VansError(
            f"nothing can listen at {host} port {port}: {error.strerror or error}. Choose another: serve.port={port + 1}"
        ) from error
