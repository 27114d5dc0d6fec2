"""The train loop that Ray Train runs on every rank: FSDP2, AdamW, moving average, checkpoints, export.

Responsible for one rank's loop. Not responsible for the loss (the policies), data order (``items``), or the driver
(``run``).
"""

from __future__ import annotations

import importlib
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from actors.learner.checkpoint import read_facts, save_tensors
from actors.learner.optimizer import Optimizer
from actors.learner.rank import POLICIES
from actors.learner.sharding import gather_state, shard
from actors.learner.supervised import accumulate
from actors.policy.protocol import set_compute_dtype, torch_dtype
from actors.records import derive_seed
from actors.vdm.flow_sde import FlowMatchingSpec
from pipeline.lock import require_token
from pipeline.sft.captions import frozen_captions
from pipeline.sft.items import Items, refusal
from pipeline.sft.settings import SftSettings

COUNTERS = "counters.json"


def load_policy(kind: str, model: str, settings: SftSettings, samples: int, device: torch.device, **more: Any) -> Any:
    """Load the policy of ``kind`` unsharded, with caches as large as the dataset where that is kept in memory; ``more``
    are other arguments of its load.
    """
    target, _, name = POLICIES[kind].partition(":")
    options: dict[str, Any] = {
        "cache_bytes": settings.tuning.cache_mib * 2**20,
        "reference_frames": settings.reference_frames,
        "conditioning": settings.conditioning,
        "supervised": FlowMatchingSpec(timesteps=settings.vdm.timesteps, weighting=settings.vdm.weighting),
    }
    if kind == "vlm":
        fits = samples * settings.shape.row_bytes <= settings.tuning.cache_mib * 2**20
        options = {"cache_size": samples if fits else 64, "prompt": settings.prompt}
    return getattr(importlib.import_module(target), name).load(
        model,
        dtype="float32",
        lora=settings.tuning.lora if settings.tuning.lora.rank else None,
        seed=settings.seed,
        adapter=settings.adapter,
        device=str(device),
        **(options | settings.policy_kwargs | more),
    )


class Loop:
    """One rank's training state."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.kind, self.model, self.out = config["kind"], config["model"], config["out"]
        self.settings: SftSettings = config["settings"]
        self.total, self.samples = config["total_steps"], config["samples"]
        self.lock: str | None = config["lock"]
        settings, context = self.settings, ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        torch.set_num_threads(max(1, int(settings.learner.cpus)))
        captions, more = None, {}
        if self.kind == "vdm" and not settings.train_text_encoder:
            # First, so that the encoder has gone when the transformer comes.
            captions = frozen_captions(
                self.model, settings, config["shards"], Path(config["captions"]), self.rank, self.world, self.device
            )
            more = {"components": ("transformer", "vae_encoder", "image_encoder")}
        self.policy = load_policy(self.kind, self.model, settings, self.samples, self.device, **more)
        if captions is not None:
            self.policy.embedder = captions
        mesh: DeviceMesh = init_device_mesh(self.device.type, (self.world,))
        dtype = torch_dtype(settings.learner.dtype)
        set_compute_dtype(self.policy, dtype)
        self.nets = nn.ModuleDict({"module": self.policy.module})
        shard(self.policy.module, self.policy.fsdp_units, mesh, dtype, settings.learner.activation_checkpointing)
        if settings.train_text_encoder:
            encoder = self.policy.train_text_encoder()
            shard(encoder, [], mesh, dtype, False)
            self.nets["text_encoder"] = encoder
        self.optimizer = Optimizer(self.nets, settings.tuning.optim, self.total, f"sft {self.kind}")
        self.began: float | None = None  # when the steps since the last checkpoint began, on this rank's clock
        self.trained_before = 0.0  # seconds of training up to the last checkpoint, earlier starts included

    # --- one step ---------------------------------------------------------------------------------------------------

    def train_step(self, batch: list[tuple[Any, ...]]) -> tuple[float, float]:
        """Run one optimizer step; returns the batch's loss, over all ranks, and the global gradient norm."""
        settings = self.settings
        # Of the step, so that a run that was cut short draws the noise that it would have drawn.
        torch.manual_seed(derive_seed("sft", settings.seed, self.rank, self.step))
        parameters = self.optimizer.parameters
        total = accumulate(self.policy, self.nets.values(), batch, settings.tuning.micro_batch, parameters, self.world)
        return total, self.optimizer.step(total).grad_norm

    @property
    def step(self) -> int:
        """Optimizer steps that were tried."""
        return self.optimizer.steps

    def train_s(self) -> float:
        """Return the seconds trained, those before a restart included. Collective: rank 0's clock speaks for all."""
        here = 0.0 if self.began is None else time.monotonic() - self.began
        seconds = torch.tensor(self.trained_before + here, dtype=torch.float64, device=self.device)
        torch.distributed.broadcast(seconds, src=0)
        return float(seconds)

    def done(self) -> bool:
        """Return whether the last step is done or ``max_wall_s`` are over, on all ranks alike."""
        wall = self.settings.tuning.max_wall_s
        return self.step >= self.total or (wall is not None and self.train_s() >= wall)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Report a distributed checkpoint and its counters; Ray Train merges the ranks' files into one folder.

        The clock stops until the next step: writing is not training. Raises LockLostError where another run has taken the
        folder over.
        """
        if self.rank == 0 and self.lock is not None:
            require_token(Path(self.out), self.lock)
        with tempfile.TemporaryDirectory() as folder:
            counters = {"step": self.step, "skipped": self.optimizer.skipped, "train_s": self.train_s()}
            self.trained_before, self.began = counters["train_s"], None
            save_tensors(self.optimizer.tensors(), folder)
            if self.rank == 0:
                Path(folder, COUNTERS).write_text(json.dumps(counters) + "\n", "utf-8")
            ray.train.report(counters, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def restore(self, checkpoint: ray.train.Checkpoint) -> None:
        """Continue from a checkpoint of this run, by any number of ranks. Raises CheckpointError for a damaged one."""
        with checkpoint.as_directory() as folder:
            counters = read_facts(Path(folder, COUNTERS), {"step": int, "skipped": int, "train_s": (int, float)})
            self.optimizer.restore(folder, {})
        self.optimizer.steps, self.optimizer.skipped = counters["step"], counters["skipped"]
        self.trained_before = counters["train_s"]

    def export(self) -> None:
        """Write the (averaged) weights as an ordinary folder, on rank 0."""
        average = self.optimizer.average
        gather = gather_state if average is None else average.gather
        states = {n: gather(net, trainable_only=self.settings.tuning.lora.rank > 0) for n, net in self.nets.items()}
        if self.rank == 0:
            policy = self.policy
            if "text_encoder" in states:  # a whole encoder to save, beside the sharded one
                policy = load_policy(self.kind, self.model, self.settings, 0, torch.device("cpu"))
                policy.train_text_encoder().load_state_dict(states["text_encoder"])
            policy.export(self.out, states["module"])
        torch.distributed.barrier()


def train_loop(config: dict[str, Any]) -> None:
    """Train to the last step, logging to the driver's mailbox; the entry point of Ray Train."""
    loop = Loop(config)
    tuning = loop.settings.tuning
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        loop.restore(checkpoint)
    items = Items(
        ray.train.get_dataset_shard("train"),
        loop.kind,
        loop.settings,
        config["shards"],
        loop.rank,
        loop.samples,
        partial(refusal, loop.kind, loop.policy),
    )
    losses: list[float] = []
    metrics: dict[str, float] = {}
    started = time.monotonic()
    for batch in () if loop.done() else items.batches(loop.step):
        if not losses:
            started = started if metrics else time.monotonic()  # the first batch waits for decoding
        if loop.began is None:
            loop.began = time.monotonic()
        loss, norm = loop.train_step(batch)
        losses.append(loss)
        last = loop.done()
        if len(losses) == tuning.log_every or last:
            quarantined = torch.tensor(float(len(items.quarantined)), device=loop.device)
            torch.distributed.all_reduce(quarantined)
            metrics = {
                "step": float(loop.step),
                "loss": sum(losses) / len(losses),
                "grad_norm": norm,
                "lr": loop.optimizer.adamw.param_groups[0]["lr"],
                "skipped": float(loop.optimizer.skipped),
                "quarantined": float(quarantined),
                "samples_per_s": tuning.batch * len(losses) / max(time.monotonic() - started, 1e-9),
            }
            losses, started = [], time.monotonic()
            if loop.rank == 0:
                config["mailbox"].add.remote(metrics)
        if tuning.checkpoint_every and loop.step % tuning.checkpoint_every == 0 and not last:
            loop.save()
        if last:
            break
    loop.save()
    loop.export()
