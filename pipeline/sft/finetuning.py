"""The driver of a supervised run: checks, Ray Train's ``TorchTrainer`` over Ray Data, figures back, ``sft.json``.

Only this side may log to MLflow, through ``on_metrics``.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
import ray.data
import ray.train
from ray.train.torch import TorchTrainer

from cluster.errors import ConfigError, TrainingError, VansError, WorkerTimeoutError
from cluster.resources import Ask, PlacementPlan, check, view
from cluster.session import connect, environment
from pipeline.checkpoint import model_digests
from pipeline.data.source import SampleSource
from pipeline.lock import held, hold
from pipeline.sft.rendezvous import RendezvousConfig
from pipeline.sft.settings import Kind, SftResult, SftSettings
from pipeline.support.location import Uri, local_path

log = logging.getLogger(__name__)

OnMetrics = Callable[[int, dict[str, float]], None]
_MAILBOX_S = 120.0


def train_rank(config: dict[str, Any]) -> None:
    """Run one rank. The models' libraries are imported here, by the ranks alone: Ray Train's controller has the function too."""
    from pipeline.sft.loop import train_loop

    train_loop(config)


def start_mailbox() -> Any:
    """Start the Ray actor that carries figures from rank 0 to the driver.

    Its class is local, so that Ray sends it by value and its process need not import torch with this module.
    """

    class Mailbox:
        def __init__(self) -> None:
            self.rows: list[dict[str, float]] = []

        def add(self, row: dict[str, float]) -> None:
            self.rows.append(row)

        def since(self, count: int) -> list[dict[str, float]]:
            return self.rows[count:]

    return ray.remote(num_cpus=0)(Mailbox).remote()


@dataclass(frozen=True)
class SftJob:
    """A supervised run whose arguments have been checked, and which may start."""

    kind: Kind
    model: str  # folder (absolute) or hub name
    source: SampleSource
    out: Path  # absolute
    settings: SftSettings

    @property
    def total_steps(self) -> int:
        """The last optimizer step; ``sys.maxsize`` where ``max_wall_s`` decides."""
        return self.settings.total_steps(self.source.count)


def run_sft(
    kind: Kind,
    model: str | Path,
    data: str | Path | Uri,
    out: str | Path,
    settings: SftSettings | None = None,
    *,
    on_metrics: OnMetrics | None = None,
) -> SftResult:
    """Fine-tune ``model`` on the Parquet shards in ``data``; ``out`` becomes an ordinary model (or adapter) folder.

    Joins the Ray of this process, or starts an embedded one. A run that was cut short continues from its last
    checkpoint when it is called again with the same arguments.

    Args:
        kind: ``vlm`` (question and video to answer) or ``vdm`` (caption and reference frames to video).
        model: transformers or diffusers folder, or hub name.
        data: folder of VNEP shards, path or URI.
        out: folder to write; with more than one node, on storage that all nodes share.
        settings: see :class:`SftSettings`.
        on_metrics: called with (step, metrics) while training runs, from a thread of this process.

    Raises:
        ConfigError: contradictory arguments. DataError: no usable data. PlacementError: no room for the ranks.
        TrainingError: training failed; the message has the rank's error.
    """
    job = prepare(kind, model, data, out, settings or SftSettings())
    with hold(job.out, f"sft {kind}"), connect():
        check_room(job)
        return carry_out(job, on_metrics)


def prepare(kind: Kind, model: str | Path, data: str | Path | Uri, out: str | Path, settings: SftSettings) -> SftJob:
    """Check everything about a run that can be told without a cluster; arguments and errors as :func:`run_sft`."""
    if kind not in ("vlm", "vdm"):
        raise ConfigError(f"sft: kind {kind!r} must be vlm or vdm")
    if settings.train_text_encoder and kind != "vdm":
        raise ConfigError("sft: train_text_encoder is for the vdm; a vlm has no text encoder of its own")
    target = local_path(out).resolve()
    origin = Path(model).resolve() if Path(model).exists() else model
    if target == origin:
        raise ConfigError(f"sft: out={target} is the model itself; write to another folder")
    source = SampleSource(
        data,
        settings.shape,
        seed=settings.seed,
        decoders=settings.decoders,
        max_quarantine_ratio=settings.max_quarantine_ratio,
        limits=settings.limits,
    )
    return SftJob(kind, str(origin), source, target, settings)


def carry_out(job: SftJob, on_metrics: OnMetrics | None = None) -> SftResult:
    """Train ``job`` on the Ray that is running, and write ``sft.json`` beside what it exports."""
    started = time.monotonic()
    job.out.mkdir(parents=True, exist_ok=True)
    history, counters = fit(job, on_metrics)
    if not history:
        previous = job.out / "sft.json"  # every step had been done before: the figures are the earlier run's
        history = json.loads(previous.read_text("utf-8"))["history"] if previous.is_file() else []
    result = SftResult(
        folder=job.out,
        steps=int(counters["step"]),
        samples=job.source.count,
        quarantined=int(history[-1]["quarantined"]) if history else 0,
        loss_first=history[0]["loss"] if history else float("nan"),
        loss_last=history[-1]["loss"] if history else float("nan"),
        history=history,
        train_s=counters["train_s"],
        wall_s=time.monotonic() - started,
    )
    facts = asdict(result) | {
        "folder": job.out.name,
        "kind": job.kind,
        "model": job.model,
        "settings": job.settings.facts(),
    }
    told = json.dumps(facts, indent=2, default=lambda section: section.model_dump(mode="json"))  # the adapter's section
    (job.out / "sft.json").write_text(told + "\n", "utf-8")
    return result


def check_room(job: SftJob) -> None:
    """Raise PlacementError where the cluster can never hold the ranks and decoders: Ray Train would wait for ever."""
    if job.settings.can_grow:
        return
    learner, source = job.settings.learner, job.source
    ranks = Ask("sft", learner.ranks, learner.cpus, learner.gpus, strategy=learner.placement, labels=learner.labels)
    check(PlacementPlan((ranks, Ask("decoders", job.settings.decoders, source.cpus_per_decoder))), view())


def run_name(job: SftJob) -> str:
    """Return the name by which Ray Train resumes a run: another one for other rows, settings, or files of model and adapter."""
    where = ("placement", "labels", "placement_timeout_s", "can_grow", "step_timeout_s")  # a run may go on elsewhere
    told = {key: value for key, value in job.settings.facts().items() if key not in where}
    models = model_digests({"model": job.model, "adapter": job.settings.adapter})
    facts = json.dumps([job.kind, job.model, models, job.source.digest, told], sort_keys=True, default=str)
    return f"sft-{job.kind}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"


def other_runs(job: SftJob) -> list[Path]:
    """Return the checkpoints of earlier runs in the folder of ``job``, where none of them is one that it continues."""
    found = sorted((job.out / "checkpoints").glob(f"sft-{job.kind}-*"))
    return [] if run_name(job) in {path.name for path in found} else found


def fit(job: SftJob, on_metrics: OnMetrics | None) -> tuple[list[dict[str, float]], dict[str, float]]:
    """Run Ray Train; returns the rows logged by this call, and the counters of the last checkpoint."""
    settings, source, name = job.settings, job.source, run_name(job)
    tuning, learner = settings.tuning, settings.learner
    if earlier := other_runs(job):
        told = "sft %s begins anew: %s was trained with other settings, data or files of the model"
        log.warning(told, job.kind, earlier[-1])
    mailbox = start_mailbox()
    config: dict[str, Any] = {
        "kind": job.kind,
        "model": job.model,
        "out": str(job.out),
        "settings": settings,
        "total_steps": job.total_steps,
        "samples": source.count,
        "shards": [str(path) for path in source.shards],
        "captions": str(job.out / "captions" / name),
        "mailbox": mailbox,
        "lock": lock.owner.token if (lock := held(job.out)) else None,
    }
    dataset = source.dataset()
    options = copy.deepcopy(dataset.context.execution_options)
    resources = {"CPU": learner.cpus} | ({"GPU": learner.gpus} if learner.gpus else {})
    trainer = TorchTrainer(
        train_rank,
        train_loop_config=config,
        torch_config=RendezvousConfig(timeout_s=round(learner.step_timeout_s)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=learner.ranks,
            use_gpu=learner.gpus > 0,
            resources_per_worker=resources,
            placement_strategy=learner.placement,
            label_selector=dict(learner.labels) or None,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=str(job.out / "checkpoints"),
            failure_config=ray.train.FailureConfig(
                max_failures=tuning.max_failures,
                controller_failure_limit=tuning.max_failures,  # Ray's default waits for room without an end
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
        ),
        datasets={"train": dataset},
        dataset_config=ray.train.DataConfig(execution_options=options),
    )
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    done = threading.Event()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="sft-metrics") as threads:
        rows = threads.submit(forward, mailbox, done, on_metrics)
        try:
            with environment(deadlines(settings)):
                trained = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise verdict(job.kind, error) from error
        finally:
            done.set()
            wait([rows])
            ray.kill(mailbox)
    return rows.result(), dict(trained.metrics or {})


def deadlines(settings: SftSettings) -> dict[str, str]:
    """Return the environment by which Ray Train learns how long to wait for room, and for a rank that does not answer."""
    return {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(settings.placement_timeout_s),
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(settings.learner.step_timeout_s),
    }


def forward(mailbox: Any, done: threading.Event, on_metrics: OnMetrics | None) -> list[dict[str, float]]:
    """Move rows from the mailbox to ``on_metrics`` until ``done``, and once more after it; returns them all."""
    rows: list[dict[str, float]] = []
    while True:
        last = done.wait(timeout=1.0)
        new = mailbox.since.remote(len(rows))
        if not ray.wait([new], timeout=_MAILBOX_S if last else 1.0)[0]:
            if last:
                raise WorkerTimeoutError(f"sft: the mailbox of the metrics did not answer within {_MAILBOX_S:.0f} s")
            continue
        for row in ray.get(new):
            rows.append(row)
            if on_metrics is not None:
                on_metrics(int(row["step"]), row)
        if last:
            return rows


def verdict(kind: str, error: Exception) -> VansError:
    """Return the rank's own error where it is one of ours, else a TrainingError that names rank and cause."""
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    for failure in failures.values():
        cause = failure
        while cause is not None:
            if isinstance(cause, VansError):
                return cause
            cause = getattr(cause, "cause", None) or cause.__cause__  # type: ignore[assignment]
    told = "; ".join(f"rank {rank}: {failure}" for rank, failure in sorted(failures.items())) or str(error)
    return TrainingError(f"sft {kind} failed: {told}")
