"""``vans import-release``: its arguments, and the table that it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.program import Out, local
from pipeline.support import terminal


def import_release(
    clone: Annotated[
        Path,
        typer.Argument(parser=local, metavar="CLONE", help="Clone of the authors' repository; it is read, not run."),
    ],
    vlm: Annotated[Path, typer.Option(parser=local, metavar="FILE", help="The released `vlm.safetensors`.")],
    vdm: Annotated[Path, typer.Option(parser=local, metavar="FILE", help="The released `vdm.safetensors`.")],
    base_vlm: Annotated[str, typer.Option(metavar="DIR|NAME", help="Qwen2.5-VL-3B-Instruct: a folder or hub name.")],
    base_vdm: Annotated[str, typer.Option(metavar="DIR|NAME", help="Wan2.1-T2V-1.3B-Diffusers: a folder or hub name.")],
    out: Out = Path("release"),
    run: Annotated[str, typer.Option(help="The run whose placement and training it takes.")] = "vans_paper",
) -> None:
    """Make the pair that VANS' authors released into folders and a run that every command takes (docs/vans.md).

    Example: `vans import-release VANS --vlm checkpoints/vlm.safetensors --vdm checkpoints/vdm.safetensors --base-vlm
    Qwen2.5-VL-3B-Instruct --base-vdm Wan2.1-T2V-1.3B-Diffusers --out release`
    """
    from rich.table import Table

    from pipeline.config.load import find_config
    from pipeline.release import import_release as do_import
    from pipeline.release.importing import REPORT, RUN
    from pipeline.release.tensors import summary

    find_config(run)  # before gigabytes are read
    done = do_import(clone, vlm, vdm, base_vlm, base_vdm, out, run)
    table = Table(title="what became of the released tensors")
    for heading in ("file", "of the", "tensors", "", "why"):
        table.add_column(heading, justify="right" if heading == "tensors" else "left")
    for row in summary(done.accounts):
        table.add_row(
            Path(row["file"]).name, row["part"], str(row["tensors"]), "used" if row["used"] else "not used", row["why"]
        )
    console = terminal.console()
    console.print(table)
    if done.kept:
        console.print(f"{done.kept} weights of the artist's transformer are the base's", highlight=False)
    for path in (*done.models.values(), str(done.folder / RUN), str(done.folder / REPORT)):
        if path.startswith(str(done.folder)):
            console.print(f"wrote {path}", highlight=False, markup=False, soft_wrap=True)
