"""One rank's learning, without Ray: a sharded policy, its optimizer, and the collective methods that all ranks call
together.

Responsible for gradients, the gate's verdict, skipped steps, checkpoints of its own state. Not responsible for how the
batch was cut (``batches``), the loss and its passes (``objectives``), processes and deadlines (``rank``, ``group``).
"""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh

from actors.learner.average import Behaviour
from actors.learner.batches import MicroBatch, RankPlan
from actors.learner.checkpoint import read_facts, save_tensors
from actors.learner.objectives.base import Prepared, RankReport, Step
from actors.learner.objectives.table import make_objective
from actors.learner.optimizer import Optimizer
from actors.learner.sharding import gather_state, parameter_hash, shard, sync_gradients
from actors.learner.spec import LearnerSpec
from actors.offload import Offloader, module_tensors
from actors.policy import lora
from actors.policy.protocol import (
    PolicyOutput,
    Trainable,
    scale_gradients,
    set_compute_dtype,
    torch_dtype,
)
from actors.records import Experience, VdmExperience, Weights
from actors.weights.transport import pack
from cluster.errors import CheckpointError, CheckpointWriteError, ConfigError, TrainingError
from cluster.storage import write_failure

STATE_FILE = "learner.json"


def step_names(experience: Experience) -> list[str]:
    """Return under which name each of its steps is compared: ``tNN`` a denoising step, ``pNNNN`` a token's position.

    Positions share buckets that are named after their first one, 0, 1, 2, 4, 8, …: fine where completions begin, and few
    however long they get.
    """
    if isinstance(experience, VdmExperience):
        first = experience.trajectory.sde.window_start
        return [f"t{first + k:02d}" for k in range(len(experience.trajectory.logprobs))]
    return [f"p{1 << (k.bit_length() - 1) if k else 0:04d}" for k in range(len(experience.token_ids))]


class Trainer:
    """A rank's policy and optimizer. Methods are collectives: all ranks call the same ones in the same order."""

    def __init__(self, policy: Trainable, spec: LearnerSpec, mesh: DeviceMesh, device: torch.device) -> None:
        self.policy, self.spec, self.device = policy, spec, device
        self.rank, self.world = mesh.get_local_rank(), mesh.size()
        self.sharers = spec.settings.sharers(spec.kind)  # ranks that run the same items, each a part of their tokens
        self.objective = make_objective(spec.objective, spec.learning, spec.longest)
        dtype = torch_dtype(spec.settings.dtype)
        policy.module.eval()
        set_compute_dtype(policy, dtype)
        self.initial_checksum = parameter_hash(policy.module, trainable=True)
        self.frozen = None
        if spec.learning.kl_beta > 0 and not lora.has_lora(policy.module):
            ids = {id(unit) for unit in policy.fsdp_units}
            names = [name for name, m in policy.module.named_modules() if id(m) in ids]
            self.frozen = copy.deepcopy(policy.module).requires_grad_(False)
            units = [self.frozen.get_submodule(n) for n in names]
        if self.sharers > 1:
            self._share_tokens()
        if self.frozen is not None:
            shard(self.frozen, units, mesh, dtype, checkpointing=False, offload=spec.settings.reference_offload)
        shard(policy.module, policy.fsdp_units, mesh, dtype, spec.settings.activation_checkpointing)
        self.optimizer = Optimizer(policy.module, spec.optim, spec.total_steps, spec.name)
        self.parameters = self.optimizer.parameters
        self.sampled = Behaviour(self.parameters) if self.objective.keeps_behaviour else None
        self._offloader = Offloader(device) if spec.settings.offload != "none" else None
        self.offload()

    @property
    def version(self) -> int:
        """The version of the trained weights: the number of updates that changed them."""
        return self.optimizer.applied

    def _share_tokens(self) -> None:
        """Let neighbouring ranks share the tokens of each item, in the reference too where that is a module of its own."""
        share = getattr(self.policy, "share_tokens", None)
        if share is None:
            raise ConfigError(
                f"learner.context_parallel={self.sharers}: {type(self.policy).__name__} cannot share an item's tokens among ranks; "
                "use learner.context_parallel: 1"
            )
        share(self.sharers, [m for m in (self.policy.module, self.frozen) if m is not None])

    # --- memory
    # -----------------------------------------------------------------------------------------------------------

    def offload(self) -> None:
        """Move to host memory what ``spec.settings.offload`` names; the next :meth:`resident` brings it back."""
        if self._offloader is not None:
            self._offloader.unload(self._offloaded())

    @contextmanager
    def resident(self) -> Iterator[None]:
        """Within it, everything is on the device: around each of the methods below, where the learner offloads."""
        if self._offloader is None:
            yield
            return
        self._offloader.load()
        try:
            yield
        finally:
            self.offload()

    def _offloaded(self) -> Iterator[Tensor]:
        """Yield what moves between host and device: the optimizer's state and the average, or the parameters too."""
        yield from self.optimizer.held()
        if self.sampled is not None:
            yield from self.sampled.values
        if self.spec.settings.offload == "all":
            yield from module_tensors(self.policy.module, self.frozen, *getattr(self.policy, "frozen_parts", ()))

    # --- learning
    # ---------------------------------------------------------------------------------------------------------

    def update(self, plan: RankPlan, epochs: int = 1) -> RankReport:
        """Run one optimizer step per entry of ``plan``, ``epochs`` times over.

        Old log-probabilities of all entries are made before the first step, and stay those of that policy in every
        epoch (PPO, arXiv 1707.06347).

        The first entry needs no pass of its own: nothing has been updated before it, so its old log-probabilities are
        those of its training pass. With ``old_logprobs="learner"`` it gets one wherever the ratio gate is due, which
        compares the two.

        Raises:
            TrainingError: ratio gate exceeded, too many skipped steps, or a batch without any step that counts; on all
                ranks alike, before any rank has stepped.
        """
        report = RankReport()
        counted = self._counters()
        prepared = [[self._prepare(micro) for micro in step] for step in plan]
        for name, value in self._counters().items():
            report.sums[name] += value - counted[name]
        order = prepared * epochs
        gate = self._gate_due(len(order))
        self.objective.before(self, prepared, gate, lambda item, out: self._compare(report, item, out))
        for index, step in enumerate(order):
            self._step(step, report, first=index == 0, gate=gate)
        if self.sampled is not None:
            self.sampled.follow(self.objective.behaviour_decay)
        report.common |= {"skipped": float(self.optimizer.skipped), "updates": float(len(order))}
        return report

    def _gate_due(self, coming: int) -> bool:
        """Return whether one of the ``coming`` optimizer steps is a multiple of ``gate_every``: the same after a restart."""
        if self.objective.gate_tolerance(self.spec.settings.dtype) is None:
            return False
        return -self.optimizer.steps % self.objective.settings.gate_every < coming

    def _counters(self) -> dict[str, float]:
        """Return what the policy counts of its inputs' processing, where it does."""
        counters = getattr(self.policy, "counters", None)
        return counters() if counters is not None else {}

    def _prepare(self, micro: MicroBatch) -> Prepared:
        items = micro.items
        advantages = torch.tensor([i.advantage for i in items], dtype=torch.float32, device=self.device)
        rollout = self.policy.rollout_logprobs(items).to(self.device, torch.float32)
        return Prepared(micro, self.policy.collate(items), advantages, rollout)

    def _step(self, step: list[Prepared], report: RankReport, first: bool, gate: bool) -> None:
        count = total = deviation = 0.0
        sums: dict[str, float] = defaultdict(float)
        here = Step(self.spec.seed, self.optimizer.steps, first, gate)
        self.optimizer.adamw.zero_grad(set_to_none=True)
        for k, item in enumerate(step):
            pieces, outputs = self._parts(item), []
            for p, piece in enumerate(pieces):
                sync_gradients(self.policy.module, k == len(step) - 1 and p == len(pieces) - 1)
                part = self.objective.part(self, item, piece, here)
                part.loss.backward()
                total += float(part.loss.detach())
                deviation = max(deviation, part.deviation)
                for name, value in part.sums.items():
                    sums[name] += value
                if part.output is not None:
                    outputs.append(part.output)
            if outputs and item.old is None:
                item.old = PolicyOutput.joined(outputs)
                self._compare(report, item, item.old)
            count += self.objective.count(item, outputs)
        if first:
            self._gate(deviation, report)
        self._apply(total, count, report)
        for name, value in sums.items():
            report.sums[name] += value

    def _parts(self, item: Prepared) -> list[tuple[slice, Any, Tensor | None]]:
        """Return what of ``item`` gets a forward and backward of its own: which of its steps, their batch, and how many
        steps each trajectory has in all (None where it is not cut).
        """
        split = getattr(self.policy, "split", None)
        if self.spec.settings.micro_steps is None or split is None:
            return [(slice(None), item.batch, None)]
        lengths = item.batch.mask.sum(-1)
        return [(steps, batch, lengths) for steps, batch in split(item.batch, self.spec.settings.micro_steps)]

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it, the policy is the reference: without its adapter, or the frozen copy."""
        if self.frozen is None:
            with self.policy.reference():
                yield
            return
        trained = self.policy.module
        self.policy.module = self.frozen
        try:
            yield
        finally:
            self.policy.module = trained

    @contextmanager
    def behaviour(self) -> Iterator[None]:
        """Within it, the policy has the weights that sampled; the learnt ones come back bit for bit."""
        if self.sampled is None:
            raise ValueError(
                f"{self.spec.name}: objective {self.spec.objective} keeps no copy of the weights that sampled"
            )
        with self.sampled.applied():
            yield

    def _gate(self, deviation: float, report: RankReport) -> None:
        """Nothing has been learnt from this batch yet, so the objective's gate must hold (ALGORITHM: ratio gate)."""
        tolerance = self.objective.gate_tolerance(self.spec.settings.dtype)
        (deviation,) = self._reduce([deviation], dist.ReduceOp.MAX)
        report.common[self.objective.gate_metric] = deviation
        if tolerance is not None and deviation > tolerance:
            raise TrainingError(
                f"{self.spec.name}: {self.objective.gate_name} reaches {deviation:.3g}, more than {tolerance:.3g} "
                f"({self.spec.objective}); two passes of the same policy must agree. Look for dropout or other randomness in the "
                f"policy, for stale weights, for other inputs than the sampler's, or use dtype float32 (now {self.spec.settings.dtype})"
            )

    def _apply(self, total: float, count: float, report: RankReport) -> None:
        # Ranks that share items have the same loss and count; the parts of the gradient add up as those of other items do.
        sum_total, sum_count = (s / self.sharers for s in self._reduce([total, count], dist.ReduceOp.SUM))
        if sum_count == 0:
            raise TrainingError(f"{self.spec.name}: no item of the batch has a step that counts (all masks are empty)")
        scale_gradients(self.parameters, self.world / sum_count)
        stepped = self.optimizer.step(sum_total)
        report.sums["loss"] += total / sum_count
        report.common["lr"] = stepped.lr
        if stepped.applied:
            if self.sampled is not None:
                self.sampled.same = False
            report.common["grad_norm"] = stepped.grad_norm
            report.sums["applied"] += self.sharers / self.world

    def _reduce(self, values: list[float], op: Any) -> list[float]:
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=op)
        return tensor.tolist()

    @torch.no_grad()
    def _compare(self, report: RankReport, item: Prepared, out: PolicyOutput) -> None:
        """Note |log-probability of the learner − of the sampler|, overall and by :func:`step_names`."""
        if not item.micro.real:
            return
        difference = torch.where(out.mask, out.logprobs.detach() - item.rollout, 0.0).abs()
        report.sums["logp_diff"] += float(difference.sum())
        report.sums["logp_diff_steps"] += float(out.mask.sum())
        report.maxima["logp_diff_max"] = max(report.maxima["logp_diff_max"], float(difference.max()))
        for row, experience in zip(difference.tolist(), item.micro.items):
            for name, value in zip(step_names(experience), row):
                report.sums[f"logp_diff_{name}"] += value
                report.sums[f"logp_diff_{name}_steps"] += 1.0

    # --- weights
    # ----------------------------------------------------------------------------------------------------------

    def weights(self, averaged: bool = False) -> Weights | None:
        """Return the trained weights on rank 0, None elsewhere: the adapter under PEFT's names, or the whole state
        dict. Rollouts need them as they are, or as the objective lets them sample; ``averaged`` asks for their moving average.
        """
        adapter = lora.has_lora(self.policy.module)
        state = self._gather(adapter, averaged)
        if self.rank != 0:
            return None
        if adapter:
            config = lora.adapter_config(self.policy.module, self.spec.model_path)
            return pack(self.version, "lora", lora.peft_names(state), config)
        return pack(self.version, "full", state)

    def _gather(self, adapter: bool, averaged: bool) -> dict[str, Tensor]:
        """Return the trained weights, or their average where one is kept, whole on rank 0."""
        values = self.optimizer.average if averaged else self.sampled
        if values is not None:
            return values.gather(self.policy.module, trainable_only=adapter)
        return gather_state(self.policy.module, trainable_only=adapter)

    def export(self, folder: str) -> None:
        """Write the policy's ordinary folder (adapter or whole model) on rank 0; all ranks return when it is there.

        It holds the moving average of the weights where one is kept: what is evaluated and used. CheckpointWriteError, on
        all ranks, where it cannot be written.
        """
        state = self._gather(lora.has_lora(self.policy.module), averaged=True)
        self._first_rank_writes(folder, lambda: self.policy.export(folder, state))

    def base_hash(self) -> str:
        """Return the hash of the frozen parameters; it must never change."""
        return parameter_hash(self.policy.module, trainable=False)

    def checksum(self) -> str:
        """Return the hash of the trained parameters as this rank sees them; all ranks must agree."""
        return parameter_hash(self.policy.module, trainable=True)

    # --- checkpoints
    # ------------------------------------------------------------------------------------------------------

    def save(self, folder: str) -> None:
        """Write trained weights, optimizer, RNG and counters as a distributed checkpoint that any number of ranks
        restores. CheckpointWriteError, on all ranks, where one of them cannot write.
        """
        try:
            save_tensors(self.optimizer.tensors() | self._own() | self._rng(), folder)
        except CheckpointException as error:  # raised on all ranks; no Exception, so Ray would not carry it
            raise self._unwritten(folder, error) from None
        counters = {"version": self.version, "steps": self.optimizer.steps, "skipped": self.optimizer.skipped}
        facts = self._facts() | counters
        text = json.dumps(facts | {"ranks": self.world}, indent=2) + "\n"
        self._first_rank_writes(folder, lambda: Path(folder, STATE_FILE).write_text(text, "utf-8"))

    def _first_rank_writes(self, folder: str, write: Callable[[], Any]) -> None:
        """Let rank 0 ``write``; all ranks return when it has, or all raise: none is left waiting for one that failed."""
        failure: Exception | None = None
        if self.rank == 0:
            try:
                write()
            except Exception as error:  # noqa: BLE001 - raised below, when the others know
                failure = error
        told = None if failure is None else write_failure(failure)
        bug, storage = self._reduce(
            [float(failure is not None and told is None), float(told is not None)], dist.ReduceOp.MAX
        )
        # All ranks raise the same kind, whichever of them is heard first.
        if storage:
            raise CheckpointWriteError(self._not_written(0, folder, told or "its own error says why")) from failure
        if bug:
            raise TrainingError(f"{self.spec.name}: writing {folder} failed on rank 0: {failure!r}") from failure

    def _unwritten(self, folder: str, error: CheckpointException) -> Exception:
        """Return what the ranks' failures come to: one of storage, or a bug."""
        told = {rank: write_failure(failure) for rank, (failure, _) in error.failures.items()}
        rank = next((rank for rank, text in told.items() if text), None)
        if rank is None:
            return TrainingError(f"{self.spec.name}: saving to {folder} failed: {error}")
        return CheckpointWriteError(self._not_written(rank, folder, told[rank] or ""))

    def _not_written(self, rank: int, folder: str, why: str) -> str:
        return f"{self.spec.name}: rank {rank} could not write to {folder}: {why}"

    def restore(self, folder: str) -> None:
        """Restore what ``save`` wrote. CheckpointError where the folder is not one, or is of another policy or
        adapter.
        """
        path = Path(folder, STATE_FILE)
        if not path.is_file():
            raise CheckpointError(f"{folder} is not a learner's checkpoint: {STATE_FILE} is missing")
        facts = read_facts(path, dict.fromkeys(("ranks", "version", "steps", "skipped"), int))
        for name, value in self._facts().items():
            if facts.get(name) != value:
                raise CheckpointError(
                    f"{folder} was saved with {name}={facts.get(name)}, this learner has {name}={value}"
                )
        read = self.optimizer.restore(folder, self._own() | (self._rng() if self.rank < facts["ranks"] else {}))
        if "rng" in read:
            torch.set_rng_state(read["rng"][f"rank{self.rank}"])
        self.optimizer.steps, self.optimizer.skipped = facts["steps"], facts["skipped"]

    def _own(self) -> dict[str, Any]:
        """Return what a checkpoint holds beside the optimizer's tensors, equal for any number of ranks."""
        return {} if self.sampled is None else {"behaviour": self.sampled.state()}

    def _rng(self) -> dict[str, Any]:
        return {"rng": {f"rank{self.rank}": torch.get_rng_state()}}

    def _facts(self) -> dict[str, Any]:
        spec = self.spec.lora
        adapter = None if spec is None else {"rank": spec.rank, "alpha": spec.alpha}
        facts = {"kind": self.spec.kind, "lora": adapter, "ema": self.spec.optim.ema}
        return facts | ({"behaviour": True} if self.sampled is not None else {})
