"""What is Wan image to video's own: the given frame, what is refused, and that each way by which the frame comes in matters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.architectures import architecture
from actors.failures import BadSampleError
from actors.records import RenderRequest
from actors.vdm.flow_sde import FlowMatchingSpec
from actors.vdm.frames import frames_to_video
from actors.vdm.policy import VdmPolicy
from actors.vdm.sampling import check
from actors.vdm.settings import ConditioningSection
from cluster.errors import CheckpointError, ConfigError
from pipeline.config import load_config
from pipeline.fleet.models import require_drawable
from tests.actors.vdm.pipelines import build

CLIP = np.random.default_rng(1).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
GIVEN, ANSWER = CLIP[:1], CLIP[1:]
REQUEST = RenderRequest("s", 0, "the red circle rises", GIVEN, len(ANSWER), 3, 1.0, noise_seed=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("wan i2v", tmp_path_factory.mktemp("wan_i2v"))


@pytest.fixture(scope="module")
def policy(folder: Path) -> VdmPolicy:
    return VdmPolicy.load(folder)


def test_an_answers_latents_are_those_of_the_clip_that_begins_with_the_given_frame(policy: VdmPolicy) -> None:
    """So SFT trains on what the model draws: the given frame, then the answer."""
    found = policy.encode_targets([ANSWER], [GIVEN])
    whole = policy.family.encode(policy.vae, frames_to_video(CLIP)[None])
    assert torch.equal(found, whole) and found.shape[1:] == check(policy, REQUEST) == (16, 3, 4, 4)
    assert policy.decode(found).shape == (1, *ANSWER.shape) and policy.geometry.frames(3) == len(ANSWER)
    other = policy.encode_targets([ANSWER], [255 - GIVEN])
    assert not torch.equal(other, found)  # cached by both


def test_the_supervised_loss_is_of_the_whole_clip(policy: VdmPolicy) -> None:
    row, spec = (GIVEN, REQUEST.caption, ANSWER), FlowMatchingSpec(caption_dropout=0.0)
    losses = [
        float(policy.sft_loss([each], generator=torch.Generator().manual_seed(0), spec=spec).total.detach())
        for each in (row, row, (255 - GIVEN, *row[1:]))
    ]
    assert losses[0] == losses[1] != losses[2] and np.isfinite(losses).all()


@pytest.mark.parametrize("way", ["references", "image", "text"])
def test_each_way_by_which_the_frame_comes_in_is_seen(policy: VdmPolicy, way: str) -> None:
    x = torch.randn(1, *check(policy, REQUEST), generator=torch.Generator().manual_seed(0))
    inverted = replace(REQUEST, reference_frames=255 - GIVEN, caption="blue square")
    here, there = (policy.join(policy.encoded([request]), [1.0]) for request in (REQUEST, inverted))
    mixed = replace(here, **{way: getattr(there, way)})
    plain, changed = (policy.velocity(x, torch.tensor([0.7]), condition) for condition in (here, mixed))
    assert plain.shape == x.shape and (plain - changed).abs().max() > 1e-3


def test_the_condition_is_as_long_as_the_clip(policy: VdmPolicy) -> None:
    short, long = (policy.encode_references(GIVEN, frames) for frames in (4, 12))
    assert short.shape == (16, 2, 4, 4) and long.shape == (16, 4, 4, 4)
    assert torch.allclose(long[:, :2], short, atol=1e-5)  # causal
    with pytest.raises(BadSampleError, match="num_frames is missing"):
        policy.encode_references(CLIP[1:2])
    bare = VdmPolicy.load(policy.blueprint.folder, components=("transformer", "vae_encoder"))
    with pytest.raises(CheckpointError, match="without the component 'image_encoder'"):
        bare.frames.image(GIVEN)


@pytest.mark.parametrize(
    ("frames", "conditioning", "reason"),
    [
        (2, {}, r"video\.reference_frames=2: .* use video\.reference_frames: 1"),
        (0, {}, r"video\.reference_frames=0: .* use video\.reference_frames: 1"),
        (
            9,
            {"references": "clip"},
            r"video\.conditioning\.references=clip: .* use video\.conditioning\.references: frames",
        ),
    ],
)
def test_a_condition_that_it_cannot_take_is_refused_by_the_key(
    folder: Path, frames: int, conditioning: dict[str, Any], reason: str
) -> None:
    policy = VdmPolicy.load(folder, conditioning=ConditioningSection(**conditioning))
    with pytest.raises(BadSampleError, match=reason):
        check(policy, replace(REQUEST, reference_frames=CLIP[:frames]))
    if frames:
        changes = [f"models.vdm={folder}", "video.num_frames=8", f"video.reference_frames={frames}"]
        changes += [f"video.conditioning.{key}={value}" for key, value in conditioning.items()]
        with pytest.raises(ConfigError, match=f"does not fit models.vdm.*{reason}"):
            require_drawable(load_config("toy", changes))


def test_frames_are_refused_before_a_start(folder: Path) -> None:
    changes = [f"models.vdm={folder}", "video.reference_frames=1"]
    with pytest.raises(ConfigError, match=r"num_frames=9: .*the first 1 of them the input's.* use 8 or 12"):
        require_drawable(load_config("toy", changes))
    require_drawable(load_config("toy", [*changes, "video.num_frames=8"]))


REFUSED: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str]] = {
    "Wan 2.2 A14B": (
        lambda index, _: index.update(
            transformer_2=["diffusers", "WanTransformer3DModel"],
            boundary_ratio=0.9,
            image_encoder=[None, None],
            image_processor=[None, None],
        ),
        "two transformers",
    ),
    "TI2V": (lambda index, _: index.update(expand_timesteps=True), "clean latent of time 0 .*WanPipeline"),
    "no image encoder": (lambda index, _: index.update(image_encoder=[None, None]), "has no image encoder"),
    "first and last frame": (lambda _, transformer: transformer.update(pos_embed_seq_len=514), "to a given last one"),
    "another encoder": (lambda _, transformer: transformer.update(image_dim=32), "width 32 .*makes 24"),
    "text to video": (lambda _, transformer: transformer.update(in_channels=16), "takes 16 latent channels; .* are 36"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_image_to_video_of_another_kind_is_refused_with_the_reason(folder: Path, tmp_path: Path, case: str) -> None:
    change, reason = REFUSED[case]
    other = shutil.copytree(folder, tmp_path / "other")
    files = [other / "model_index.json", other / "transformer" / "config.json"]
    values = [json.loads(file.read_text()) for file in files]
    change(*values)
    for file, value in zip(files, values, strict=True):
        file.write_text(json.dumps(value))
    if case == "Wan 2.2 A14B":
        shutil.rmtree(other / "image_encoder")
        shutil.rmtree(other / "image_processor")
    for load in (lambda: VdmPolicy.load(other), lambda: architecture(other, "vdm").shapes):
        with pytest.raises(CheckpointError, match=reason):
            load()


def test_a_folder_without_its_processor_or_encoder_says_what_is_missing(folder: Path, tmp_path: Path) -> None:
    for part in ("image_processor", "image_encoder"):
        other = shutil.copytree(folder, tmp_path / part)
        shutil.rmtree(other / part)
        with pytest.raises(CheckpointError, match=part):
            VdmPolicy.load(other)
