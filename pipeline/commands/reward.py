"""``vans reward``: what an author asks of an own reward before a run does."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.commands.program import Program, wide_console

reward = Program(help="Rewards of one's own.")

STYLES = {"kept": "green", "weak": "yellow", "broken": "bold red"}


@reward.callback()
def _reward() -> None:
    """Rewards of one's own (docs/tutorials/reward.md)."""


@reward.command("check")
def check(
    path: Annotated[
        str, typer.Argument(metavar="PATH", help="`module:Class` or `module:function`, or a bundled name.")
    ],
    option: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="An option of the class, as YAML; repeat it for more.")
    ] = None,
    device: Annotated[str, typer.Option(help="`cpu` or `cuda`.")] = "cpu",
    dtype: Annotated[str, typer.Option(help="`float32`, `bfloat16` or `float16`.")] = "float32",
) -> None:
    """Try a reward on answers of the toy world: determinism, batch independence, range, NaN, pickling, speed.

    Exit code 1 where a promise that a run relies on is broken.

    Examples: `vans reward check my_rewards:redness`, `vans reward check last_frame:LastFrame --option path=FOLDER --device cuda`
    """
    from rich.table import Table

    from actors.scoring.contract import check_reward
    from pipeline.commands.toy_answers import odd_answers, ordinary_answers
    from pipeline.config.load import apply_override
    from pipeline.fleet.rewards import BUNDLED
    from pipeline.support.importing import working_directory_importable

    options: dict[str, object] = {}
    for text in option or ():
        apply_override(options, text)
    working_directory_importable()
    path = BUNDLED.get(path, path)
    found = check_reward(path, ordinary_answers(), odd_answers(), options=options, device=device, dtype=dtype)
    table = Table("promise", "", "found", title=path)
    for promise in found:
        table.add_row(promise.name, f"[{STYLES[promise.verdict]}]{promise.verdict}[/]", promise.found)
    wide_console(120).print(table)
    raise typer.Exit(1 if any(promise.verdict == "broken" for promise in found) else 0)
