"""The command line: ``vans`` and ``python -m pipeline``. Parses arguments, calls the rooms, prints; decides nothing.

Heavy libraries are imported inside the commands, so that ``vans --help`` answers at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster.manifests.shape import Site
from cluster.surroundings import collector_later
from pipeline.commands.data import data
from pipeline.commands.program import Config, Out, Overrides, Program, local, print_plain, wide_console
from pipeline.commands.release import import_release
from pipeline.commands.replay import replay
from pipeline.commands.report import report
from pipeline.commands.reward import reward
from pipeline.commands.serve import serve
from pipeline.commands.watching import profile, scale, status
from pipeline.support import terminal

_SITE = Site()  # the defaults of `vans manifests`

app = Program(
    name="vans",
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Answer questions about a video with a video: align a vision-language model and a video diffusion model by "
    "Joint-GRPO, on Ray.\n\nStart with `vans doctor`, then `vans demo`.",
)
app.add_typer(data, name="data")
app.add_typer(reward, name="reward")


def main() -> None:
    """Run the command line."""
    collector_later()()
    app()


@app.command()
def doctor(
    out: Annotated[
        Path, typer.Option("--out", parser=local, metavar="PATH", help="Folder that runs are to be written to.")
    ] = Path("runs"),
) -> None:
    """Say in one screen what works on this machine, and how to cure what does not.

    Examples: `vans doctor`, `vans doctor --out /scratch/runs`
    """
    from pipeline.commands.doctor import print_report, run_doctor

    raise typer.Exit(0 if print_report(run_doctor(out)) else 1)


@app.command()
def demo(
    out: Out = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of the whole demo.")] = 0,
    quick: Annotated[
        bool, typer.Option(help="A few steps only: shows that everything runs, not that it learns.")
    ] = False,
) -> None:
    """Align the bundled tiny pair on the toy world, both stages, and show what changed. Two cores, minutes.

    Examples: `vans demo`, `vans demo --seed 1 --out runs/demo-1`
    """
    from pipeline.commands.demo import run_demo

    run_demo(out, seed=seed, quick=quick)


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved configuration and the placement it needs.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in its folder from its last checkpoint.")
    ] = False,
    resume_if_any: Annotated[
        bool,
        typer.Option(
            "--resume-if-any",
            help="Continue the run if its folder has a checkpoint, else start it: for a job that may be queued again. "
            "Waits up to ten minutes for the job before, if that one has not ended.",
        ),
    ] = False,
    restart_data: Annotated[
        bool,
        typer.Option(
            "--restart-data",
            help="When it continues and `data.train` holds other rows than before: begin these data anew, with the models as "
            "they are.",
        ),
    ] = False,
) -> None:
    """Run Joint-GRPO: stage 1 tunes the thinker through the frozen artist, stage 2 the artist against the frozen thinker.

    Examples: `vans train toy`, `vans train run.yaml stage1.steps=200 pools.vdm.workers=4`, `vans train toy --dry-run`,
    `ray job submit --working-dir . -- python -m pipeline train toy`
    """
    from pipeline.config import load_config

    run = load_config(config, overrides or [])  # before torch loads: an error in the configuration is said at once
    if restart_data and not (resume or resume_if_any):
        raise typer.BadParameter("it goes with --resume or --resume-if-any", param_hint="--restart-data")
    if dry_run:
        from pipeline.run.start import print_plan

        print_plan(run)
    else:
        from pipeline.run.train import run_training

        run_training(run, resume=resume or ("if_any" if resume_if_any else False), restart_data=restart_data)


@app.command()
def plan(
    config: Config,
    overrides: Overrides = None,
    gpus: Annotated[
        str, typer.Option(help="GPUs x GiB, such as `8x80`, or nodes x GPUs x GiB, such as `2x8x80`.")
    ] = "8x80",
    card: Annotated[
        str | None, typer.Option(help="Whose rates are assumed: `a100`, `h100`, … Default: by the memory's size.")
    ] = None,
    tflops: Annotated[
        float | None, typer.Option(min=1e-3, help="bfloat16 TFLOP/s that a GPU achieves, in place of the assumed.")
    ] = None,
    measured: Annotated[
        Path | None,
        typer.Option(parser=local, metavar="RUN", help="Folder of a run whose recorded service times are used."),
    ] = None,
    search: Annotated[
        bool, typer.Option("--search", help="Try every number of GPUs, split, staleness and batch; print the best.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Say before anything starts where a run stands, whether it fits into the GPUs, and how long a step takes (docs/placement.md).

    Exit code 1 where it does not fit.

    Examples: `vans plan vans_paper --gpus 8x80`, `vans plan run.yaml learner.ranks=8 --gpus 2x8x80 --json`,
    `vans plan run.yaml --gpus 16x80 --measured runs/first`, `vans plan vans_paper --gpus 8x80 --search`
    """
    import json

    from cluster.hardware import parse_gpus, rates_of
    from pipeline.config import load_config
    from pipeline.plan import load_models, make_plan
    from pipeline.plan.measured import read_run
    from pipeline.plan.report import PLAN_WIDTH, search_as_json, show, show_search
    from pipeline.plan.report import as_json as values
    from pipeline.plan.search import pareto
    from pipeline.plan.search import search as ways
    from pipeline.support.importing import working_directory_importable

    working_directory_importable()  # a reward with a model says how large it is
    run, hardware = load_config(config, overrides or []), parse_gpus(gpus)
    rates = rates_of(hardware, card, tflops=tflops)
    models, recorded = load_models(run), read_run(measured, run) if measured else None
    if search:
        tried = ways(run, hardware, rates, models, recorded)
        best = pareto(tried)
        if as_json:
            print_plain(json.dumps(search_as_json(best), indent=1))
        else:
            show_search(best, len(tried), wide_console(PLAN_WIDTH))
        raise typer.Exit(0 if best else 1)
    found = make_plan(run, hardware, rates, models, recorded)
    if as_json:
        print_plain(json.dumps(values(found), indent=1))
    else:
        show(found, wide_console(PLAN_WIDTH))
    raise typer.Exit(0 if found.fits else 1)


for _command in (status, profile, report, replay, scale):
    app.command()(_command)


@app.command()
def manifests(
    config: Config,
    overrides: Overrides = None,
    kind: Annotated[
        str, typer.Option(help="`rayjob`, `raycluster`, `rayservice` (`vans serve`), `slurm` or `launcher`.")
    ] = "rayjob",
    out: Out = Path("manifests"),
    image: Annotated[str, typer.Option(help="Container image, built from `cluster/Dockerfile`.")] = _SITE.image,
    namespace: Annotated[str, typer.Option(help="Kubernetes namespace.")] = _SITE.namespace,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs of one machine.")] = _SITE.gpus_per_node,
    memory_per_gpu: Annotated[
        int, typer.Option(min=1, help="Host memory of a pod for each of its GPUs, in GiB.")
    ] = _SITE.memory_per_gpu_gib,
    shared: Annotated[str, typer.Option(help="Where storage that all nodes see is mounted.")] = _SITE.shared,
    storage: Annotated[str, typer.Option(help="Size of that storage in Kubernetes.")] = _SITE.storage,
    growth: Annotated[
        int, typer.Option(min=1, help="How many times its planned workers a pool may grow to.")
    ] = _SITE.growth,
    time_limit: Annotated[str, typer.Option(help="Time limit of the Slurm job.")] = _SITE.time_limit,
) -> None:
    """Write what puts a run on a cluster: KubeRay manifests, a Slurm script, or a file for Ray's cluster launcher (docs/cluster.md).

    Examples: `vans manifests vans_8gpu --image registry.example/vans:gpu --out k8s`, `vans manifests run.yaml --kind slurm`
    """
    from cluster.manifests import KINDS
    from pipeline.commands.manifests import write_manifests

    if kind not in KINDS:
        raise typer.BadParameter(f"{kind!r} is none of {', '.join(KINDS)}", param_hint="--kind")
    site = Site(
        image=image,
        namespace=namespace,
        gpus_per_node=gpus_per_node,
        memory_per_gpu_gib=memory_per_gpu,
        shared=shared.rstrip("/"),
        storage=storage,
        growth=growth,
        time_limit=time_limit,
    )
    for path in write_manifests(config, overrides or [], kind, out, site):  # type: ignore[arg-type]
        print_plain(f"wrote {path}")


@app.command()
def sft(
    kind: Annotated[str, typer.Argument(help="`vlm` or `vdm`.")],
    config: Config,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Overrides such as `sft.vlm.steps=2000`.", metavar="[KEY=VALUE]…"),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="PATH|URI", help="Folder of Parquet shards; default: the configuration's.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(parser=local, metavar="PATH", help="Folder to write to; default: the configuration's."),
    ] = None,
) -> None:
    """Fine-tune one model on (question, clip, answer) data, on Ray Train with FSDP2. Comes before `vans train`.

    Called again it continues from its last checkpoint. The run's section `sft` holds what is special to it.

    Examples: `vans sft vlm toy --data data/toy/sft --out runs/sft-vlm`,
    `vans sft vdm run.yaml sft.vdm.epochs=2 learner.ranks=8 learner.gpus=1`, then `vans train run.yaml models.vlm=runs/sft-vlm`
    """
    from pipeline.config import load_config
    from pipeline.sft.command import run_configured_sft
    from pipeline.support.location import parse_location

    if kind not in ("vlm", "vdm"):
        raise typer.BadParameter(f"{kind!r} is neither vlm nor vdm", param_hint="KIND")
    shards = None if data is None else parse_location(data)
    run_configured_sft(load_config(config, overrides or []), kind, data=shards, out=out)  # type: ignore[arg-type]


@app.command()
def pretrain(
    out: Out,
    seed: Annotated[int, typer.Option(help="Seed of everything.")] = 0,
    part: Annotated[
        list[str] | None,
        typer.Option(
            help="vae, artist, clip, thinker, video or sft: train this part alone, repeat it for more; default: all. The "
            "artist needs a VAE in --out."
        ),
    ] = None,
    conditioning: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="What the artist is conditioned on, as under video.conditioning (docs/configuration.md); repeat it.",
        ),
    ] = None,
) -> None:
    """Make the bundled models (pair, CLIP, video encoder) from random weights, each with a measured quality line. Tens of minutes.

    Examples: `vans pretrain --out runs/tiny`; an artist that sees the whole input clip, with the bundled VAE:
    `cp -r pipeline/assets/tiny runs/clip`, `vans pretrain --out runs/clip --part artist --part sft --conditioning references=clip
    --conditioning take=2 --conditioning time=shared`
    """
    from pipeline.config import load_config
    from pipeline.pretrain import PARTS, Effort
    from pipeline.pretrain import pretrain as run_pretrain

    video = load_config("toy", [f"video.conditioning.{pair}" for pair in conditioning or ()]).video
    run_pretrain(out, seed=seed, effort=Effort(conditioning=video.conditioning), parts=tuple(part or PARTS))


@app.command()
def evaluate(
    config: Config = "toy",
    overrides: Overrides = None,
    vlm: Annotated[str | None, typer.Option(help="VLM folder or hub name; default: the configuration's.")] = None,
    vdm: Annotated[str | None, typer.Option(help="VDM folder or hub name; default: the configuration's.")] = None,
    vlm_adapter: Annotated[str | None, typer.Option(help="PEFT adapter of the VLM.")] = None,
    vdm_adapter: Annotated[str | None, typer.Option(help="PEFT adapter of the VDM.")] = None,
    predictions: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DIR",
            help="Score this folder of answers instead; repeat it for more systems (docs/evaluation.md).",
        ),
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(help="Two systems, baseline first, to compare sample by sample; default: the first and the last."),
    ] = None,
    fvd_extractor: Annotated[
        str | None,
        typer.Option(
            metavar="[NAME=]FILE",
            help="TorchScript video network for the Fréchet distance, which is named after it; `i3d=FILE` makes it plain "
            "FVD. Loading it runs the code that is in the file: use only a file that you trust.",
        ),
    ] = None,
    out: Out = Path("runs/evaluate"),
) -> None:
    """Score a pair, or any systems' answers, on held-out samples: table, JSON, contact sheet.

    Examples: `vans evaluate toy`, `vans evaluate toy --vlm-adapter runs/toy/vlm_adapter --vdm-adapter runs/toy/vdm_adapter`,
    `vans evaluate toy --predictions cascade=answers/a --predictions ours=answers/b --compare cascade ours`,
    `vans evaluate toy --predictions answers/ --fvd-extractor i3d=i3d_torchscript.pt`
    """
    from pipeline.config import load_config
    from pipeline.config.load import override_of
    from pipeline.evaluate.evaluation import run_evaluation

    chosen = {"vlm": vlm, "vdm": vdm, "vlm_adapter": vlm_adapter, "vdm_adapter": vdm_adapter}
    extra = [override_of(f"models.{key}", value) for key, value in chosen.items() if value is not None]
    run_evaluation(
        load_config(config, [*(overrides or []), *extra]),
        out,
        predictions=predictions or (),
        fvd_extractor=fvd_extractor,
        compare=compare,
    )


@app.command()
def reproduce(
    out: Out = Path("runs/reproduce"),
    seeds: Annotated[int, typer.Option(min=1, help="Seeds 0 … N−1.")] = 3,
    experiment: Annotated[str, typer.Option(help="A YAML file, or the name of a bundled experiment.")] = "table",
    row: Annotated[
        list[str] | None, typer.Option(help="Only this row and those it is made of; repeat for more.")
    ] = None,
    split: Annotated[str, typer.Option(help="`test` for a report, `val` while choosing settings.")] = "test",
    quick: Annotated[bool, typer.Option(help="Two steps a stage: shows that every row runs.")] = False,
) -> None:
    """Run the paper's ablation table on the toy world: every row, several seeds, the paper's figures beside ours.

    Called again it continues: finished rows are kept, one that was cut short goes on from its checkpoint. Hours on two cores.

    Examples: `vans reproduce`, `vans reproduce --seeds 1 --row joint --out runs/one`, `vans reproduce --quick --out runs/quick`
    """
    from pipeline.reproduce import load_experiment, quickened
    from pipeline.reproduce import reproduce as run_table

    if split not in ("test", "val"):
        raise typer.BadParameter(f"{split!r} is neither test nor val", param_hint="--split")
    chosen = load_experiment(experiment)
    words = ["vans reproduce", f"--seeds {seeds}", f"--out {out}", *(f"--row {key}" for key in row or ())]
    words += [f"--experiment {experiment}"] * (experiment != "table") + [f"--split {split}"] * (split != "test")
    words += ["--quick"] * quick
    console = terminal.console()
    report = run_table(
        quickened(chosen) if quick else chosen,
        out,
        seeds=range(seeds),
        rows=row or (),
        split=split,
        command=" ".join(words),
        console=console,
    )
    from rich.markdown import Markdown

    console.print(Markdown(report.read_text(encoding="utf-8")))
    console.print(f"table, JSON, curves and contact sheet are in {report.parent}", highlight=False, markup=False)


@app.command()
def answer(
    video: Annotated[Path, typer.Option(parser=local, metavar="PATH", help="The input video.")],
    question: Annotated[list[str], typer.Option(help="A question; repeat it for several futures.")],
    out: Annotated[
        Path, typer.Option(parser=local, metavar="PATH", help="The mp4 to write; several questions number it.")
    ],
    config: Annotated[str, typer.Option(help="Run whose video shape and sampling are used.")] = "toy",
    vlm: Annotated[str | None, typer.Option(help="VLM folder, or a PEFT adapter of the configuration's VLM.")] = None,
    vdm: Annotated[str | None, typer.Option(help="VDM folder, or a PEFT adapter of the configuration's VDM.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
) -> None:
    """Answer a question about a video with a video: mp4, caption and a contact sheet.

    Example: `vans answer --vlm runs/demo/vlm_adapter --vdm runs/demo/vdm_adapter --video runs/demo/input.mp4
    --question "what is the next step ?" --out answer.mp4`
    """
    from pipeline.commands.answer import run_answer
    from pipeline.config import load_config

    run_answer(load_config(config), video, question, out, vlm=vlm, vdm=vdm, seed=seed)


app.command()(serve)
app.command("import-release")(import_release)


if __name__ == "__main__":
    sys.exit(app())
