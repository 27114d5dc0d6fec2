"""Checkpoints hold numbers alone: a file that would run code is never opened, a lost shard is an error and not zeros."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.learner.checkpoint import load_tensors, optimizer_tensors, read_facts, save_tensors
from cluster.errors import CheckpointError


def state(fill: float) -> dict:
    return {
        "model": {"a.weight": torch.full((4, 3), fill), "b": torch.tensor(fill)},
        "optimizer": {"a.weight": {"step": torch.tensor(fill), "exp_avg": torch.full((4, 3), 2 * fill)}},
        "rng": {"rank0": torch.arange(7, dtype=torch.uint8)},
    }


class Exploit:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_tensors_of_every_rank_and_type_come_back_without_a_pickle(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    save_tensors(state(1.5), folder)
    assert {path.suffix for path in folder.iterdir()} == {".safetensors"}
    (folder / ".metadata").write_bytes(pickle.dumps(Exploit(tmp_path / "ran")))
    (folder / "__0_0.distcp").write_bytes(pickle.dumps(Exploit(tmp_path / "ran")))
    found = state(0.0)
    load_tensors(found, folder)
    assert not (tmp_path / "ran").exists()
    torch.testing.assert_close(found, state(1.5))


def test_saving_again_leaves_no_shard_of_before(tmp_path: Path) -> None:
    save_file({"model.old": torch.ones(2)}, tmp_path / "shard-00007-model-00001-of-00001.safetensors")
    save_tensors(state(1.0), tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", ["absent", "rubbish", "cut", "missing", "shape", "gap"])
def test_a_damaged_checkpoint_is_an_error_of_ours(tmp_path: Path, damage: str) -> None:
    save_tensors(state(1.0), tmp_path)
    (shard,) = tmp_path.glob("*.safetensors")
    wanted = state(0.0)
    if damage == "absent":
        shard.unlink()
    elif damage == "rubbish":
        shard.write_bytes(b"\x80\x04rubbish" * 40)
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-20])
    elif damage == "missing":
        wanted["model"]["c"] = torch.zeros(2)
    elif damage == "shape":
        wanted["model"]["b"] = torch.zeros(5)
    else:  # the first of two shards is lost: the other one starts at row 4
        header = '{"model.a.weight": {"saved_offsets": [4, 0]}}'
        save_file({"model.a.weight": load_file(shard)["model.a.weight"]}, shard, {"DCP_SHARDING_INFO": header})
        wanted = {"model": {"a.weight": torch.zeros(8, 3)}}
    with pytest.raises(CheckpointError):
        load_tensors(wanted, tmp_path)


def test_an_optimizer_is_stored_without_its_settings() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], lr=1.0)
    parameter.sum().backward()
    optimizer.step()
    assert optimizer_tensors(optimizer.state_dict())[0].keys() == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"step": "1"}', '{"step": true}', "[" * 5000, '{"step": NaN}', "\udcff"]
)
def test_rubbish_instead_of_counters_is_an_error_of_ours(tmp_path: Path, text: str) -> None:
    path = tmp_path / "counters.json"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError):
        read_facts(path, {"step": int})
