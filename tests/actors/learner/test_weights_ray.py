"""Weights through the object store and through an adapter folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.weights.files import read_adapter, read_weights, write_adapter
from actors.weights.transport import as_tensors, pack, receive, send
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
    with pytest.raises(CheckpointError, match=r"not a PEFT adapter folder"):
        read_adapter(tmp_path)
    (folder / "adapter_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(CheckpointError, match="damaged"):
        read_adapter(folder)


def test_an_exported_folder_is_read_as_what_it_holds(tmp_path: Path, tiny_vlm_dir: Path, tiny_vdm_dir: Path) -> None:
    from actors.policy.settings import LoraSection
    from actors.vdm.policy import VdmPolicy
    from actors.vlm.policy import VlmPolicy

    for name, policy in (
        ("vlm", VlmPolicy.load(tiny_vlm_dir)),
        ("vdm", VdmPolicy.load(tiny_vdm_dir, components=("transformer",))),
    ):
        policy.export(tmp_path / name)
        whole = read_weights(tmp_path / name, version=5)
        assert (whole.version, whole.kind) == (5, "full")
        own = policy.module.state_dict()
        tied = {n for n in own if n not in whole.tensors}  # the file holds a tied weight once
        assert whole.tensors and whole.tensors.keys() <= own.keys() and tied <= {"lm_head.weight"}
        for key, tensor in as_tensors(whole).items():
            assert torch.equal(tensor, own[key])

    model: Any = VlmPolicy.load(tiny_vlm_dir).module
    model.save_pretrained(tmp_path / "shards", max_shard_size="1MB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert read_weights(tmp_path / "shards").tensors.keys() == read_weights(tmp_path / "vlm").tensors.keys()

    VlmPolicy.load(tiny_vlm_dir, lora=LoraSection(rank=2, alpha=4.0)).export(tmp_path / "adapter")
    assert read_weights(tmp_path / "adapter").kind == "lora"
    (tmp_path / "adapter" / "adapter_config.json").unlink()  # its export was cut short
    with pytest.raises(CheckpointError, match="not a model folder"):
        read_weights(tmp_path / "adapter")
    next((tmp_path / "shards").glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="damaged model"):
        read_weights(tmp_path / "shards")
