"""``vans replay``: parses the arguments of the command, and shows the comparison."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.commands.program import local, print_plain, wide_console


def replay(
    run: Annotated[
        str, typer.Argument(help="Folder of a run that stored its tensors (tracking.rollouts.replay=true).")
    ],
    step: Annotated[int, typer.Argument(min=0, help="A step that follows a checkpoint, or 0.")],
    stage: Annotated[str | None, typer.Option(help="Needed where two stages have stored that step.")] = None,
) -> None:
    """Feed a stored step to the learner alone, and compare its figures with the run's (docs/rollouts.md).

    Exit code 1 where one differs; in a run with `deterministic=true` none may.

    Examples: `vans replay runs/toy 20`, `vans replay runs/toy 0 --stage stage2`
    """
    from rich.table import Table

    from pipeline.run.replay import replay as run_replay

    found = run_replay(local(run), step, stage)
    table = Table(title=f"{found.stage} step {found.step}, from {found.begun}", title_justify="left")
    for name in ("figure", "run", "replay", "difference"):
        table.add_column(name, justify="left" if name == "figure" else "right")
    for figure in found.figures:
        known = figure.run is not None and figure.replay is not None
        apart = "0" if figure.equal else f"{figure.replay - figure.run:+.3g}" if known else "–"  # type: ignore[operator]
        table.add_row(figure.name, *("–" if v is None else f"{v:.9g}" for v in (figure.run, figure.replay)), apart)
    wide_console(120).print(table)
    same = sum(figure.equal for figure in found.figures)
    print_plain(f"{same} of {len(found.figures)} figures are the run's to the last bit")
    raise typer.Exit(0 if found.equal else 1)
