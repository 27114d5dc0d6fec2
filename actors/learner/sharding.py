"""Sharding a policy with FSDP2, and looking at a sharded module as a whole: gathering, hashing.

Order (measured, see the design's facts): LoRA is injected by the policy, then blocks are wrapped for activation
checkpointing, then ``fully_shard`` wraps each block and last the module. Every function here that is called a
collective must be called by all ranks.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.fsdp import FSDPModule
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


def free_address(host: str) -> str:
    """Return ``tcp://host:port`` with a port that is free on this machine now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return f"tcp://{host}:{probe.getsockname()[1]}"


def join_group(address: str, rank: int, world: int, host: str, timeout_s: float, device: torch.device) -> DeviceMesh:
    """Join the process group and return a one-dimensional mesh over all ranks. Collective.

    gloo carries CPU tensors, NCCL CUDA ones. gloo picks a network interface by the host's name, which is often wrong on
    machines with several, so it is pointed at the one that has ``host``'s address.
    """
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        for interface, addresses in psutil.net_if_addrs().items():
            if any(a.address == host for a in addresses):
                os.environ["GLOO_SOCKET_IFNAME"] = interface
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    store = _rendezvous(address, rank, world, timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return init_device_mesh(device.type, (world,))


def _rendezvous(address: str, rank: int, world: int, timeout: timedelta) -> dist.TCPStore:
    """Return the store at ``tcp://host:port``, which rank 0 serves on that address alone (torch would on all of them)."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    listener = None
    if rank == 0:
        listener = socket.create_server((host, int(port)), backlog=max(128, world)).detach()  # the store closes it
    return dist.TCPStore(
        host,
        int(port),
        world,
        is_master=rank == 0,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener,
    )


def unit_names(module: nn.Module, units: Iterable[nn.Module]) -> list[str]:
    """Return the names in ``module`` of the units of gathering and of activation checkpointing, in module order.

    ValueError where one of ``units`` is no submodule.
    """
    wanted = {id(unit) for unit in units}
    names = [name for name, m in module.named_modules() if id(m) in wanted]
    if len(names) != len(wanted):
        raise ValueError(
            f"{len(wanted) - len(names)} of {len(wanted)} fsdp_units are not submodules of the policy's module"
        )
    return names


def checkpoint_units(module: nn.Module, names: Iterable[str]) -> None:
    """Let the submodules ``names`` keep only their inputs for the backward pass, which then runs them once more."""
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, checkpoint_wrapper(module.get_submodule(name)))


def shard(
    module: nn.Module,
    units: Iterable[nn.Module],
    mesh: DeviceMesh,
    dtype: torch.dtype,
    checkpointing: bool,
    *,
    offload: bool = False,
) -> list[str]:
    """Shard ``module`` in place over ``mesh`` with ``units`` (submodules of it) as the units of gathering.

    Parameters stay in their own dtype; with a ``dtype`` other than float32 they are gathered and computed with in it,
    and gradients are reduced in float32. ``offload``: shards rest in host memory, and reach the device for their forward
    only; nothing to do on a CPU. Returns the units' names.
    """
    names = unit_names(module, units)
    if checkpointing:
        checkpoint_units(module, names)
    policy = MixedPrecisionPolicy()
    if dtype != torch.float32:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
    if offload and mesh.device_type != "cpu":
        options["offload_policy"] = CPUOffloadPolicy()
    for name in names:
        fully_shard(module.get_submodule(name), **options)
    fully_shard(module, **options)
    return names


def sync_gradients(module: nn.Module, enabled: bool) -> None:
    """Reduce gradients over ranks in the next backward, or keep them local until the last micro-batch."""
    assert isinstance(module, FSDPModule)
    module.set_requires_gradient_sync(enabled)


def whole(tensor: Tensor) -> Tensor:
    """Return a parameter as a whole CPU tensor, gathered from all ranks where it is sharded. Collective."""
    value = tensor.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).cpu()


def gather_state(module: nn.Module, trainable_only: bool) -> dict[str, Tensor]:
    """Return the module's state dict as whole CPU tensors on rank 0, and an empty one on the others. Collective."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trainable_only)
    return get_model_state_dict(module, options=options)


def parameter_hash(module: nn.Module, *, trainable: bool) -> str:
    """Return a hash of the trained, or of the frozen, parameters: names, shapes and bytes. Collective where sharded.

    It does not depend on the number of ranks: parameters are gathered one at a time.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad != trainable:
            continue
        value = whole(parameter).contiguous()
        digest.update(f"{name.replace('_checkpoint_wrapped_module.', '')} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
