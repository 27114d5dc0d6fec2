"""``vans sft``: a supervised run as a person starts it, with progress on the console and its figures in MLflow."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from cluster.harmless import redacted
from cluster.session import connect
from pipeline.config import RunConfig
from pipeline.config.machinery import TrackingSection
from pipeline.config.training import SftModelSection
from pipeline.fleet.models import require_drawable, resolve_adapter, resolve_model
from pipeline.fleet.open import cluster_session
from pipeline.lock import hold
from pipeline.sft.finetuning import SftJob, carry_out, check_room, prepare
from pipeline.sft.settings import Kind, SftResult, sft_settings
from pipeline.support import terminal
from pipeline.support.location import Uri
from pipeline.support.progress import bar
from pipeline.tracking import Tracker


def run_configured_sft(
    config: RunConfig,
    kind: Kind,
    *,
    data: Path | Uri | None = None,
    out: Path | None = None,
    console: Console | None = None,
) -> SftResult:
    """Tune the model of ``kind`` as ``config`` says; ``data`` and ``out`` win over its section ``sft``.

    Raises as :func:`pipeline.sft.run_sft`, CheckpointError for a model or adapter that is not there, and ConfigError for clips that
    the artist cannot draw.
    """
    if kind == "vdm":
        require_drawable(config)
    section: SftModelSection = getattr(config.sft, kind)
    settings = sft_settings(config, kind)
    model = resolve_model(getattr(config.models, kind), kind)
    job = prepare(
        kind,
        model,
        data or section.data or config.data.train,
        out or section.out or config.out / f"sft-{kind}",
        replace(settings, adapter=resolve_adapter(settings.adapter, kind, model)),
    )
    with hold(job.out, f"vans sft {kind}"), cluster_session(config):
        terminal.keep_log_in(job.out)
        return run_tracked_sft(job, tracking=config.tracking, console=console)


def run_tracked_sft(
    job: SftJob, *, tracking: TrackingSection | None = None, console: Console | None = None
) -> SftResult:
    """As :func:`pipeline.sft.run_sft`, shown on the console and logged to MLflow (by default a sqlite file in ``out``)."""
    console = console or terminal.console()
    params = {"sft.kind": job.kind, "sft.model": job.model, "sft.data": str(job.source.folder)}
    params |= {f"sft.{name}": str(value) for name, value in job.settings.facts().items()}
    total = job.total_steps if job.total_steps < sys.maxsize else None
    with hold(job.out, f"vans sft {job.kind}"), connect():
        check_room(job)  # before there is a run to be seen in MLflow
        with Tracker.open(f"sft-{job.kind}", job.out, tracking or TrackingSection(), params) as tracker:
            tracker.log_dataset(job.source.folder, job.source.digest, job.source.count)
            with bar(console, f"sft {job.kind}", total) as progress:

                def show(step: int, metrics: dict[str, float]) -> None:
                    progress.follow(step, metrics)
                    tracker.log_metrics({f"sft/{n}": v for n, v in metrics.items() if n != "step"}, step)

                result = carry_out(job, show)
            tracker.log_checkpoint(job.out)
    console.print(
        f"loss {result.loss_first:.4f} → {result.loss_last:.4f} in {result.steps} steps, {result.train_s:.0f} s; "
        f"{result.quarantined} of {result.samples} rows could not be used\n"
        f"model     {job.out}\ncurves    mlflow ui --backend-store-uri {shlex.quote(redacted(tracker.uri))}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return result
