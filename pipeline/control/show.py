"""A run's pools for people: tables in a terminal, refreshed with ``--watch``."""

from __future__ import annotations

import time

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.control.client import FRESH_S, RunClient
from pipeline.control.snapshot import NO_ROOM, PoolView, Resize, RunView
from pipeline.support import terminal

REFRESH_S = 1.0
STYLES = {
    "ready": "green",
    NO_ROOM: "yellow",
    "starting": "cyan",
    "restarting": "yellow",
    "stale": "cyan",
    "suspect": "red",
    "dead": "red",
}


def watch(client: RunClient, console: Console) -> None:
    """Show the pools until Ctrl-C; the run's end is a ControlError."""
    with (
        terminal.drawing(console) as redirect,
        Live(console=console, auto_refresh=False, redirect_stdout=redirect, redirect_stderr=redirect) as live,
    ):
        try:
            while True:
                live.update(tables(*client.view()), refresh=True)
                time.sleep(REFRESH_S)
        except KeyboardInterrupt:
            return


def tables(view: RunView, age_s: float) -> RenderableType:
    """Return the pools of ``view`` and their workers."""
    parts: list[RenderableType] = [Text(f"run {view.run}, {clock(view.at)}", style="bold")]
    if age_s > max(FRESH_S, 5 * view.every_s):
        parts.append(
            Text(f"as of {age_s:.0f} s ago: the run has not been heard of since; it is held up, or it hangs", "yellow")
        )
    parts += [_pools(view.pools), _workers(view.pools)]
    waiting = sum(pool.no_room for pool in view.pools)
    if waiting:
        parts.append(
            Text(f"{waiting} worker(s) wait for room; free in the cluster: {view.free or 'nothing'}", style="yellow")
        )
    parts += [Text(_sentence(resize), style="dim") for resize in view.resizes]
    return Group(*parts)


def clock(at: float) -> str:
    """Return the local time of ``at``, seconds since the epoch."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


def _pools(pools: tuple[PoolView, ...]) -> Table:
    heads = ("pool", "ready", "weights", "queue", "oldest", "wait", "call", "req/min", "busy", "restarts", "autoscale")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in heads:
        table.add_column(head, justify="left" if head == "pool" else "right", no_wrap=True)
    for pool in pools:
        f = pool.figures
        table.add_row(
            pool.name,
            f"{f['ready']:.0f} of {pool.target}",
            f"v{f['version']:.0f}",
            f"{f['queue_len']:.0f}",
            _seconds(f["oldest_wait_s"]),
            _seconds(f["queue_wait_s"]),
            _seconds(f["service_s"]),
            f"{f['requests_per_min']:.0f}",
            f"{f['busy_ratio']:.0%}",
            f"{f['restarts']:.0f}",
            pool.autoscale,
        )
    return table


def _workers(pools: tuple[PoolView, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("worker", "state", "node", "weights", "calls", "answered"):
        table.add_column(head, justify="left" if head in ("worker", "state", "node") else "right", no_wrap=True)
    for worker in (worker for pool in pools for worker in pool.workers):
        table.add_row(
            worker.name,
            Text(worker.state, style=STYLES.get(worker.state, "")),
            worker.node or "–",
            "–" if worker.version is None else f"v{worker.version}",
            str(worker.inflight),
            str(worker.requests_done),
        )
    return table


def _sentence(resize: Resize) -> str:
    return f"{clock(resize.at)}  {resize.pool}: {resize.before} → {resize.after} workers, {resize.by}"


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s" if value < 100 else f"{value:.0f} s"
