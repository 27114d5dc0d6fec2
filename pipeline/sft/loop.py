"""The train loop that Ray Train runs on every rank: FSDP2, AdamW, moving average, checkpoints, export.

Responsible for one rank's loop. Not responsible for the loss (the policies), data order (``items``), or the driver
(``run``).
"""

from __future__ import annotations

import importlib
import json
import math
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from actors.learner.average import Average
from actors.learner.checkpoint import load_tensors, optimizer_tensors, read_facts, save_tensors
from actors.learner.rank import POLICIES
from actors.learner.sharding import gather_state, shard
from actors.learner.spec import learning_rate
from actors.learner.supervised import accumulate
from actors.policy.protocol import set_compute_dtype, torch_dtype, trainable_parameters
from actors.records import derive_seed
from actors.vdm.flow_sde import FlowMatchingSpec
from cluster.errors import TrainingError
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
    options: dict[str, Any] = {"cache_bytes": settings.cache_mib * 2**20, "reference_frames": settings.reference_frames}
    options["conditioning"] = settings.conditioning
    options["supervised"] = FlowMatchingSpec(timesteps=settings.timesteps, weighting=settings.weighting)
    if kind == "vlm":
        fits = samples * settings.shape.row_bytes <= settings.cache_mib * 2**20
        options = {"cache_size": samples if fits else 64, "prompt": settings.prompt}
    return getattr(importlib.import_module(target), name).load(
        model,
        dtype="float32",
        lora=settings.lora if settings.lora.rank else None,
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
        torch.set_num_threads(max(1, int(settings.cpus)))
        captions, more = None, {}
        if self.kind == "vdm" and not settings.train_text_encoder:
            # First, so that the encoder has gone when the transformer comes.
            captions = frozen_captions(
                self.model, settings, config["shards"], Path(config["captions"]), self.rank, self.world, self.device
            )
            more = {"components": ("transformer", "vae_encoder")}
        self.policy = load_policy(self.kind, self.model, settings, self.samples, self.device, **more)
        if captions is not None:
            self.policy.embedder = captions
        mesh: DeviceMesh = init_device_mesh(self.device.type, (self.world,))
        dtype = torch_dtype(settings.dtype)
        set_compute_dtype(self.policy, dtype)
        self.nets = nn.ModuleDict({"module": self.policy.module})
        shard(self.policy.module, self.policy.fsdp_units, mesh, dtype, settings.activation_checkpointing)
        if settings.train_text_encoder:
            encoder = self.policy.train_text_encoder()
            shard(encoder, [], mesh, dtype, False)
            self.nets["text_encoder"] = encoder
        self.parameters = trainable_parameters(self.nets)
        optim = settings.optim
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay, foreach=True
        )
        self.average = Average(self.parameters, optim.ema) if optim.ema > 0 else None
        self.step = self.skipped = 0
        self.began: float | None = None  # when the steps since the last checkpoint began, on this rank's clock
        self.trained_before = 0.0  # seconds of training up to the last checkpoint, earlier starts included

    # --- one step ---------------------------------------------------------------------------------------------------

    def train_step(self, batch: list[tuple[Any, ...]]) -> tuple[float, float]:
        """Run one optimizer step; returns the batch's loss, over all ranks, and the global gradient norm."""
        settings = self.settings
        # Of the step, so that a run that was cut short draws the noise that it would have drawn.
        torch.manual_seed(derive_seed("sft", settings.seed, self.rank, self.step))
        total = accumulate(self.policy, self.nets.values(), batch, settings.micro_batch, self.parameters, self.world)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, settings.optim.max_grad_norm, foreach=True)
        norm_value = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)  # equal on all ranks
        if math.isfinite(norm_value):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(settings.optim, self.step, self.total)
            self.optimizer.step()
            if self.average is not None:
                self.average.update(self.step)
        else:
            self.skipped += 1
            if self.skipped > settings.optim.max_skipped_steps:
                raise TrainingError(
                    f"sft {self.kind}: {self.skipped} steps had a non-finite gradient (loss {total}), more than "
                    f"max_skipped_steps={settings.optim.max_skipped_steps}; lower the learning rate (now {settings.optim.lr:g})"
                )
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return total, norm_value

    def train_s(self) -> float:
        """Return the seconds trained, those before a restart included. Collective: rank 0's clock speaks for all."""
        here = 0.0 if self.began is None else time.monotonic() - self.began
        seconds = torch.tensor(self.trained_before + here, dtype=torch.float64, device=self.device)
        torch.distributed.broadcast(seconds, src=0)
        return float(seconds)

    def done(self) -> bool:
        """Return whether the last step is done or ``max_wall_s`` are over, on all ranks alike."""
        wall = self.settings.max_wall_s
        return self.step >= self.total or (wall is not None and self.train_s() >= wall)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _states(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the optimizer's state dict, and all tensors as they are stored."""
        model, optimizer = get_state_dict(
            self.nets, self.optimizer, options=StateDictOptions(ignore_frozen_params=True)
        )
        tensors: dict[str, Any] = {"model": model, "optimizer": optimizer_tensors(optimizer)}
        if self.average is not None:
            tensors["average"] = self.average.state()
        return optimizer, tensors

    def save(self) -> None:
        """Report a distributed checkpoint and its counters; Ray Train merges the ranks' files into one folder.

        The clock stops until the next step: writing is not training. Raises LockLostError where another run has taken the
        folder over.
        """
        if self.rank == 0 and self.lock is not None:
            require_token(Path(self.out), self.lock)
        with tempfile.TemporaryDirectory() as folder:
            counters = {"step": self.step, "skipped": self.skipped, "train_s": self.train_s()}
            self.trained_before, self.began = counters["train_s"], None
            save_tensors(self._states()[1], folder)
            if self.rank == 0:
                Path(folder, COUNTERS).write_text(json.dumps(counters) + "\n", "utf-8")
            ray.train.report(counters, checkpoint=ray.train.Checkpoint.from_directory(folder))

    def restore(self, checkpoint: ray.train.Checkpoint) -> None:
        """Continue from a checkpoint of this run, by any number of ranks. Raises CheckpointError for a damaged one."""
        with checkpoint.as_directory() as folder:
            counters = read_facts(Path(folder, COUNTERS), {"step": int, "skipped": int, "train_s": (int, float)})
            optimizer, state = self._states()
            load_tensors(state, folder)
            options = StateDictOptions(ignore_frozen_params=True, strict=False)
            set_state_dict(
                self.nets,
                self.optimizer,
                model_state_dict=state["model"],
                optim_state_dict=optimizer,
                options=options,
            )
        self.step, self.skipped, self.trained_before = counters["step"], counters["skipped"], counters["train_s"]

    def export(self) -> None:
        """Write the (averaged) weights as an ordinary folder, on rank 0."""
        gather = gather_state if self.average is None else self.average.gather
        states = {n: gather(net, trainable_only=self.settings.lora.rank > 0) for n, net in self.nets.items()}
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
    settings = loop.settings
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        loop.restore(checkpoint)
    items = Items(
        ray.train.get_dataset_shard("train"),
        loop.kind,
        settings,
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
        if len(losses) == settings.log_every or last:
            quarantined = torch.tensor(float(len(items.quarantined)), device=loop.device)
            torch.distributed.all_reduce(quarantined)
            metrics = {
                "step": float(loop.step),
                "loss": sum(losses) / len(losses),
                "grad_norm": norm,
                "lr": loop.optimizer.param_groups[0]["lr"],
                "skipped": float(loop.skipped),
                "quarantined": float(quarantined),
                "samples_per_s": settings.batch * len(losses) / max(time.monotonic() - started, 1e-9),
            }
            losses, started = [], time.monotonic()
            if loop.rank == 0:
                config["mailbox"].add.remote(metrics)
        if settings.checkpoint_every and loop.step % settings.checkpoint_every == 0 and not last:
            loop.save()
        if last:
            break
    loop.save()
    loop.export()
