"""``vans report``: parses the arguments of the command, and says where the page is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.program import local, print_plain


def report(
    run: Annotated[str, typer.Argument(help="Folder of a run, such as runs/toy; it may go on or have ended.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", parser=local, metavar="PATH", help="Folder to write to; default: `report` in the run's."),
    ] = None,
    single: Annotated[
        bool, typer.Option("--single", help="One file with all clips in it, to send to somebody.")
    ] = False,
    show: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Write a run's page: what it was, its curves and alarms, every stored rollout, the evaluation (docs/rollouts.md).

    Static files: no server, no network. Call it again to see how a run goes on.

    Examples: `vans report runs/toy --open`, `vans report runs/demo --single --out demo-report`
    """
    from pipeline.report.page import write_page

    folder = local(run)
    path = write_page(folder, folder / "report" if out is None else out, single=single)
    print_plain(f"wrote {path}")
    if show:
        import webbrowser

        webbrowser.open(path.resolve().as_uri())
