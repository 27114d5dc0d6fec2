"""Where Ray Train's ranks meet: on rank 0's own address, and only for so long.

Ray's own backend lets torch serve the store on all interfaces; the learner group of RL does not, so this joins ranks as that does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ray
import ray.train.torch
import torch.distributed as dist
from ray.train.backend import Backend
from ray.train.torch import TorchConfig
from ray.util import get_node_ip_address

from actors.learner.sharding import free_address, join_group

LEAVE_S = 30.0


@dataclass
class RendezvousConfig(TorchConfig):
    """Ray Train's torch backend with the learner's rendezvous: gloo carries CPU tensors, NCCL CUDA ones.

    ``timeout_s`` bounds the meeting and each collective. Rank and device are told as by ``TorchConfig``.
    """

    @property
    def backend_cls(self) -> type[Backend]:
        """The class that joins and leaves the group."""
        return RendezvousBackend


class RendezvousBackend(Backend):
    """Joins the ranks of a worker group, and lets them leave."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: RendezvousConfig) -> None:
        """Let all ranks meet at an address of rank 0's node."""
        address = worker_group.execute_single(0, _node_address)
        world = len(worker_group)
        joined = [
            worker_group.execute_single_async(rank, _join, address, rank, world, float(backend_config.timeout_s))
            for rank in range(world)
        ]
        ray.get(joined, timeout=backend_config.timeout_s + LEAVE_S)

    def on_shutdown(self, worker_group: Any, backend_config: RendezvousConfig) -> None:
        """Let the ranks leave in good order; those that do not are ended by Ray Train."""
        ray.wait(worker_group.execute_async(_leave), num_returns=len(worker_group), timeout=LEAVE_S)


def _node_address() -> str:
    return free_address(get_node_ip_address())


def _join(address: str, rank: int, world: int, timeout_s: float) -> None:
    join_group(address, rank, world, get_node_ip_address(), timeout_s, ray.train.torch.get_device())


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
