"""A model's name in the configuration: what is no model's folder is refused, and an artist that cannot draw the run's clips."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from actors.architectures import architecture
from cluster.errors import CheckpointError, ConfigError
from pipeline.config import load_config
from pipeline.fleet.models import Role, require_drawable, resolve_adapter, resolve_model

SHIPPED = (
    "toy",
    "real",
    "vans_paper",
    "vans_1gpu",
    "vans_8gpu",
    "vans_2node",
    "vans_qwen3vl",
    "vans_wan22",
    "vans_wan_i2v",
    "vans_ltx",
)
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


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_runs_artist_draws_its_clips(name: str) -> None:
    require_drawable(load_config(name))


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("vans_ltx", "video.num_frames=37", r"num_frames=37: .* takes 8k\+1 frames .*use 33 or 41"),
        ("vans_ltx", "video.height=368", "height=368 is not a multiple of 32"),
        ("vans_wan22", "video.width=624", "width=624 is not a multiple of 32"),
        ("vans_wan_i2v", "video.num_frames=33", r"num_frames=33: .* first 1 of them the input's, .*use 32 or 36"),
        ("vans_wan_i2v", "video.reference_frames=6", r"video\.reference_frames=6: .*use video\.reference_frames: 1"),
        ("vans_wan_i2v", "video.conditioning.references=clip", r"references=clip: .* reads no clip"),
        ("vans_paper", "video.num_frames=32", r"num_frames=32: .* takes 4k\+1 frames .*use 29 or 33"),
        ("vans_paper", "video.width=632", "width=632 is not a multiple of 16"),
    ],
)
def test_clips_of_another_size_are_refused_by_the_key(name: str, change: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"video does not fit models\.vdm=.*{reason}"):
        require_drawable(load_config(name, [change]))


def test_an_artist_of_two_transformers_is_refused(tmp_path: Path) -> None:
    """Wan 2.2 A14B: its second transformer draws the later steps, and nothing here would train it."""
    known = architecture("Wan-AI/Wan2.1-T2V-14B-Diffusers", "vdm")
    for part, config in known.components.items():
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(config))
    index = {
        "_class_name": "WanPipeline",
        "transformer_2": ["diffusers", "WanTransformer3DModel"],
        "boundary_ratio": 0.875,
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="two transformers"):
        require_drawable(load_config("vans_paper", [f"models.vdm={tmp_path}"]))


def test_a_name_that_is_only_on_the_hub_is_left_to_the_workers() -> None:
    require_drawable(load_config("vans_paper", ["models.vdm=someone/else", "video.num_frames=37"]))
