"""``vans sft``: a supervised run as a person starts it, with progress on the console and its figures in MLflow."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Literal

from rich.console import Console

from pipeline.config.schema import TrackingSection
from pipeline.progress import bar
from pipeline.sft.run import run_sft
from pipeline.sft.settings import SftResult, SftSettings
from pipeline.tracking import Tracker


def run_tracked_sft(
    kind: Literal["vlm", "vdm"],
    model: str | Path,
    data: Path,
    out: Path,
    settings: SftSettings,
    *,
    tracking: TrackingSection | None = None,
    console: Console | None = None,
) -> SftResult:
    """As :func:`pipeline.sft.run_sft`, shown on the console and logged to MLflow (by default a sqlite file in ``out``)."""
    console = console or Console()
    params = {"sft.kind": kind, "sft.model": str(model), "sft.data": str(data)}
    params |= {f"sft.{name}": str(value) for name, value in asdict(settings).items()}
    with Tracker.open(f"sft-{kind}", out, tracking or TrackingSection(), params) as tracker:
        tracker.log_dataset(data)
        with bar(console, f"sft {kind}", settings.steps) as progress:

            def show(step: int, metrics: dict[str, float]) -> None:
                progress.follow(step, metrics)
                tracker.log_metrics({f"sft/{n}": v for n, v in metrics.items() if n != "step"}, step)

            result = run_sft(kind, model, data, out, settings, on_metrics=show)
        tracker.log_checkpoint(out)
    console.print(
        f"loss {result.loss_first:.4f} → {result.loss_last:.4f} in {result.steps} steps, {result.wall_s:.0f} s; "
        f"{result.quarantined} of {result.samples} rows could not be used\n"
        f"model     {out}\ncurves    mlflow ui --backend-store-uri {tracker.uri}",
        highlight=False,
        soft_wrap=True,
    )
    return result
