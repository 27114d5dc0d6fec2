"""Distributed checkpoints that hold numbers alone: safetensors shards, one file a rank, and nothing that unpickles.

torch.distributed.checkpoint plans who writes and reads what, so that any number of ranks restores what any other number
wrote. Its default storage keeps a pickled ``.metadata`` and pickled objects, which run whatever code the file's author
liked; here every fact is in the safetensors headers. Values that are no tensors do not belong here: whoever saves keeps
them beside it as JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from cluster.errors import CheckpointError

SHARDS = "shard-*.safetensors"


class _Reader(dcp.HuggingFaceStorageReader):
    """torch's reader of sharded safetensors, which notices a shard that is missing."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return what the shards hold together; raises CheckpointError where a tensor has a gap."""
        metadata: Metadata = super().read_metadata()
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            # The size is told by the outermost chunk, so that a hole is all that a missing file leaves.
            if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
                raise CheckpointError(f"{self.path}: a part of {name} is missing; was one of the shards lost?")
        return metadata


def save_tensors(state: Mapping[str, Any], folder: str | Path) -> None:
    """Write the tensors of the nested ``state`` (plain ones, or sharded over the ranks) into ``folder``. Collective.

    Tensors of the same name that are not sharded are written once. Shards that the folder holds already are removed.
    """
    alone = not dist.is_initialized()
    if alone or dist.get_rank() == 0:
        for path in Path(folder).glob(SHARDS):
            path.unlink()
    if not alone:
        dist.barrier()
    writer = dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    dcp.save(_apart(state, set()), storage_writer=writer, no_dist=alone)


def load_tensors(state: Mapping[str, Any], folder: str | Path) -> None:
    """Fill the tensors of the nested ``state`` in place from what ``save_tensors`` wrote. Collective.

    Raises CheckpointError where a tensor is missing or of another shape, or a file is damaged, on all ranks alike.
    """
    if not any(Path(folder).glob(SHARDS)):
        raise CheckpointError(f"{folder} holds no {SHARDS}, so it is not a checkpoint that this version wrote")
    try:
        dcp.load(dict(state), storage_reader=_Reader(str(folder)), no_dist=not dist.is_initialized())
    except dcp.CheckpointException as error:  # the ranks' errors, gathered
        found = [failure for failure, _ in error.failures.values()]
        own = next((failure for failure in found if isinstance(failure, CheckpointError)), None)
        raise own or CheckpointError(f"{folder} cannot be restored: {_first_line(found[0])}") from error
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise CheckpointError(f"{folder} cannot be restored: {_first_line(error)}") from error


def _apart(state: Mapping[str, Any], seen: set[int]) -> dict[str, Any]:
    """Return the nested ``state`` with copies of tensors whose memory an earlier one has (tied weights), which the format refuses."""
    result: dict[str, Any] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            value = _apart(value, seen)
        elif isinstance(value, Tensor):
            local = value.to_local() if isinstance(value, DTensor) else value
            place = local.untyped_storage().data_ptr()
            if place and place in seen:
                value = value.clone()
            seen.add(place)
        result[name] = value
    return result


def read_facts(path: Path, types: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """Return the JSON object at ``path``, which must have the keys of ``types``; raises CheckpointError."""
    try:
        facts = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is not such a checkpoint: {path.name} is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    for name, kind in types.items():
        if not isinstance(facts, dict) or not isinstance(facts.get(name), kind) or isinstance(facts[name], bool):
            found = facts.get(name) if isinstance(facts, dict) else type(facts).__name__
            raise CheckpointError(f"{path}: {name} is missing or no number: {found!r}")
    return facts


def optimizer_tensors(state: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of an optimizer's state dict, by parameter; its hyperparameters are the configuration's."""
    return {
        name: {key: value for key, value in values.items() if isinstance(value, torch.Tensor)}
        for name, values in state["state"].items()
    }


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:500]
