"""A model's name in the configuration: what is no model's folder is refused, with what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import CheckpointError
from pipeline.fleet.models import Role, resolve_adapter, resolve_model

IMPORT = r"made into folders by vans import-release \(docs/vans\.md\)"


@pytest.mark.parametrize("role", ["vlm", "vdm"])
def test_released_weights_are_no_model_and_no_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: Role
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "checkpoints" / f"{role}.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"")
    relative = f"checkpoints/{role}.safetensors"  # one slash, as a hub's name has
    with pytest.raises(CheckpointError, match=f"models.{role}='{relative}': this is a file; .*{IMPORT}"):
        resolve_model(relative, role)
    with pytest.raises(CheckpointError, match=f"models.{role}='checkpoints': this folder has no .*{IMPORT}"):
        resolve_model("checkpoints", role)
    for given in ("checkpoints", relative):
        with pytest.raises(
            CheckpointError, match=f"models.{role}_adapter='{given}': .*not a PEFT adapter folder.*{IMPORT}"
        ):
            resolve_adapter(given, role, "tiny")


def test_wan_as_first_published_is_named(tmp_path: Path) -> None:
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"Wan2\.1 as first published; the same weights are in .*1\.3B-Diffusers"):
        resolve_model(str(tmp_path), "vdm")
