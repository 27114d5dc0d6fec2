"""The Ray actor of one learner rank: loads the policy, joins the process group, and passes calls on to its
``Trainer``.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import Any

import ray
import torch
import torch.distributed as dist

from actors.learner.batches import RankPlan
from actors.learner.sharding import free_address, join_group
from actors.learner.spec import LearnerSpec
from actors.learner.trainable import Trainable
from actors.learner.trainer import RankReport, Trainer
from actors.records import Weights

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
        self.device = torch.device("cuda" if spec.gpus > 0 and torch.cuda.is_available() else "cpu")
        self.trainer: Trainer | None = None

    def where(self) -> tuple[str, int]:
        """Return this rank's node address and process id."""
        return ray.util.get_node_ip_address(), os.getpid()

    def pick_address(self) -> str:
        """Return an address on this node where the process group may meet."""
        return free_address(ray.util.get_node_ip_address())

    def setup(self, address: str) -> RankInfo:
        """Load the policy, join the group at ``address``, shard."""
        torch.set_num_threads(max(1, int(self.spec.cpus)))
        node, pid = self.where()
        policy = load_policy(self.spec, self.device)
        mesh = join_group(address, self.rank, self.spec.ranks, node, self.spec.step_timeout_s, self.device)
        self.trainer = Trainer(policy, self.spec, mesh, self.device)
        return RankInfo(self.rank, node, pid, str(self.device), self.trainer.initial_checksum)

    def update(self, plan: RankPlan, epochs: int) -> tuple[RankReport, int]:
        """Run the optimizer steps of ``plan``; returns this rank's figures and the weights version."""
        trainer = self._ready()
        return trainer.update(plan, epochs), trainer.version

    def publish(self, averaged: bool) -> tuple[Weights | None, int]:
        """Return the weights (rank 0) and their version, as two objects, so that the caller waits for the second
        only.
        """
        trainer = self._ready()
        return trainer.weights(averaged), trainer.version

    def save(self, folder: str) -> None:
        """See ``Trainer.save``."""
        self._ready().save(folder)

    def restore(self, folder: str) -> int:
        """See ``Trainer.restore``; returns the restored version."""
        self._ready().restore(folder)
        return self._ready().version

    def export(self, folder: str) -> None:
        """See ``Trainer.export``."""
        self._ready().export(folder)

    def base_hash(self) -> str:
        """See ``Trainer.base_hash``."""
        return self._ready().base_hash()

    def checksum(self) -> str:
        """See ``Trainer.checksum``."""
        return self._ready().checksum()

    def held(self) -> dict[str, int]:
        """Return the bytes of the parameters that this rank's policy holds, by component, where it can tell."""
        held = getattr(self._ready().policy, "held", None)
        return held() if held is not None else {}

    def leave(self) -> None:
        """Leave the process group in good order."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _ready(self) -> Trainer:
        if self.trainer is None:
            raise RuntimeError(f"{self.spec.name} rank {self.rank} is asked to work before its set-up")
        return self.trainer
