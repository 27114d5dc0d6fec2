"""The Ray actor of one learner rank: loads the policy, joins the process group, and passes calls on to its
``Trainer``.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import torch
import torch.distributed as dist

from actors.learner.batches import RankPlan
from actors.learner.sharding import free_address, join_group
from actors.learner.spec import LearnerSpec
from actors.learner.trainer import RankReport, Trainer
from actors.policy.protocol import Trainable
from actors.records import Weights
from actors.weights.broadcast import Broadcast, Offer, snapshot

log = logging.getLogger(__name__)

POLICIES = {"vlm": "actors.vlm.policy:VlmPolicy", "vdm": "actors.vdm.policy:VdmPolicy"}


def load_policy(spec: LearnerSpec, device: torch.device) -> Trainable:
    """Load the policy that ``spec.kind`` names, unsharded, in float32 (FSDP2 casts for compute)."""
    target, _, name = POLICIES.get(spec.kind, spec.kind).partition(":")
    if not name:
        raise ValueError(
            f"learner kind {spec.kind!r} is unknown; use {', '.join(POLICIES)} or a dotted path module:Class"
        )
    policy_class: Any = getattr(importlib.import_module(target), name)
    torch.manual_seed(spec.seed)
    return policy_class.load(
        spec.model_path,
        dtype="float32",
        lora=spec.lora,
        seed=spec.seed,
        adapter=spec.adapter_path,
        device=str(device),
        **spec.policy_kwargs,
    )


@dataclass(frozen=True)
class RankInfo:
    """Where a rank lives, and the checksum of its trained parameters before sharding (equal on all ranks)."""

    rank: int
    node: str
    pid: int
    device: str
    checksum: str


class LearnerRank:
    """One rank. Ray runs its methods one at a time; all but ``where`` and ``pick_address`` are collectives."""

    def __init__(self, spec: LearnerSpec, rank: int) -> None:
        self.spec, self.rank = spec, rank
        self.device = torch.device("cuda" if spec.settings.gpus > 0 and torch.cuda.is_available() else "cpu")
        self.trainer: Trainer | None = None
        self._broadcast: Broadcast | None = None

    def where(self) -> tuple[str, int]:
        """Return this rank's node address and process id."""
        return ray.util.get_node_ip_address(), os.getpid()

    def pick_address(self) -> str:
        """Return an address on this node where the process group may meet."""
        return free_address(ray.util.get_node_ip_address())

    def setup(self, address: str) -> RankInfo:
        """Load the policy, join the group at ``address``, shard."""
        torch.set_num_threads(max(1, int(self.spec.settings.cpus)))
        node, pid = self.where()
        policy = load_policy(self.spec, self.device)
        mesh = join_group(
            address, self.rank, self.spec.settings.ranks, node, self.spec.settings.step_timeout_s, self.device
        )
        self.trainer = Trainer(policy, self.spec, mesh, self.device)
        return RankInfo(self.rank, node, pid, str(self.device), self.trainer.initial_checksum)

    def update(self, plan: RankPlan, epochs: int) -> tuple[RankReport, int]:
        """Run the optimizer steps of ``plan``; returns this rank's figures and the weights version."""
        with self._working() as trainer:
            return trainer.update(plan, epochs), trainer.version

    def publish(self, averaged: bool, receivers: int = 0) -> tuple[Weights | None, tuple[int, Offer | None]]:
        """Return the weights (rank 0); and their version with the offer of a broadcast, where there is one.

        As two objects, so that the caller waits for the second only.
        """
        with self._working() as trainer:
            weights = trainer.weights(averaged)
            if self.spec.settings.offload == "all" and self.device.type == "cpu" and weights is not None:
                weights = snapshot(weights)  # they share the parameters' memory, which is freed now
            return weights, (trainer.version, self._offer(weights, receivers))

    def _offer(self, weights: Weights | None, receivers: int) -> Offer | None:
        """Offer full weights by broadcast where the run wants it; the offer before is over."""
        spec, previous = self.spec.broadcast, self._broadcast
        if spec is None or weights is None or weights.kind != "full" or receivers < 1:
            return None
        if previous is not None and not previous.close():
            log.warning("the broadcast of version %d still hangs; there are no more", previous.offer.version)
            return None
        self._broadcast = Broadcast(weights, self.where()[0], receivers, spec, self.device)
        return self._broadcast.offer

    def save(self, folder: str) -> None:
        """See ``Trainer.save``."""
        with self._working() as trainer:
            trainer.save(folder)

    def restore(self, folder: str) -> int:
        """See ``Trainer.restore``; returns the restored version."""
        with self._working() as trainer:
            trainer.restore(folder)
            return trainer.version

    def export(self, folder: str) -> None:
        """See ``Trainer.export``."""
        with self._working() as trainer:
            trainer.export(folder)

    def base_hash(self) -> str:
        """See ``Trainer.base_hash``."""
        with self._working() as trainer:
            return trainer.base_hash()

    def checksum(self) -> str:
        """See ``Trainer.checksum``."""
        with self._working() as trainer:
            return trainer.checksum()

    def held(self) -> dict[str, int]:
        """Return the bytes of the parameters that this rank's policy holds, by component, where it can tell."""
        with self._working() as trainer:
            held = getattr(trainer.policy, "held", None)
            return held() if held is not None else {}

    def leave(self) -> None:
        """Leave the process group in good order."""
        if self._broadcast is not None:
            self._broadcast.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    @contextmanager
    def _working(self) -> Iterator[Trainer]:
        """Yield the trainer with everything on its device."""
        if self.trainer is None:
            raise RuntimeError(f"{self.spec.name} rank {self.rank} is asked to work before its set-up")
        with self.trainer.resident():
            yield self.trainer
