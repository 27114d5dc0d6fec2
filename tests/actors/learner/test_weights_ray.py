"""Weights through the object store and through an adapter folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from actors.weights import as_tensors, pack, read_adapter, receive, send, write_adapter
from cluster.errors import CheckpointError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]
NAME = "base_model.model.blocks.0.to_q.lora_A.weight"


def test_send_and_receive_are_exact_and_read_only() -> None:
    tensors = {NAME: torch.randn(4, 300), "b": torch.randn(3, 5).to(torch.bfloat16), "c": torch.randn(4, 4).T}
    weights = receive(send(pack(7, "lora", tensors, {"r": 4})))
    assert (weights.version, weights.kind, weights.adapter_config) == (7, "lora", {"r": 4})
    assert weights.bf16 == {"b"} and weights.tensors["b"].dtype == np.uint16
    assert not weights.tensors[NAME].flags.writeable  # shared memory
    for name, tensor in as_tensors(weights).items():
        torch.testing.assert_close(tensor, tensors[name], rtol=0, atol=0)
        tensor.add_(1.0)  # owns its memory
    torch.testing.assert_close(as_tensors(weights)[NAME], tensors[NAME], rtol=0, atol=0)


def test_adapter_folder_roundtrip_and_its_errors(tmp_path: Path) -> None:
    weights = pack(1, "lora", {NAME: torch.randn(4, 8), "x": torch.ones(2, dtype=torch.bfloat16)}, {"r": 4})
    folder = write_adapter(weights, tmp_path / "adapter")
    again = read_adapter(folder, version=1)
    assert again.adapter_config == {"r": 4} and again.bf16 == weights.bf16
    for name, array in weights.tensors.items():
        np.testing.assert_array_equal(again.tensors[name], array)
    with pytest.raises(CheckpointError, match="full weights"):
        write_adapter(pack(1, "full", {}), tmp_path / "full")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is missing"):
        read_adapter(tmp_path)
    (folder / "adapter_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(CheckpointError, match="damaged"):
        read_adapter(folder)
