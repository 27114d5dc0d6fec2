"""Parity ladder of the artist with VANS as it was released: its own transformer, VAE, prompter, pipeline and ``training_loss``.

``released`` has the tiny artist, ``tests/golden`` what the release's code made of it. Rungs: names, prompt embedding, reference
latents, one velocity, ten guided steps, decoded frames, supervised loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers, convert_wan_vae_to_diffusers
from safetensors.torch import load_file
from torch import Tensor

from actors.records import RenderRequest
from actors.vdm.flow_sde import FlowMatchingSpec, sigma_grid
from actors.vdm.policy import VdmPolicy
from actors.vdm.sampling import check, sample, sample_latents
from actors.vdm.settings import ConditioningSection
from tests.actors.vdm import released as r

BAR = 1e-5
CLIP = ConditioningSection(references="clip", take=6, time="shared")
SUPERVISED = FlowMatchingSpec(caption_dropout=0.0, timesteps="uniform", weighting="bell")


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(r.GOLDEN / "release_vdm.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return r.save(tmp_path_factory.mktemp("released"))


@pytest.fixture(scope="module")
def artist(folder: Path) -> VdmPolicy:
    options: dict[str, Any] = {
        "shift": r.SHIFT,
        "grid": "even",
        "negative_prompt": r.NEGATIVE,
        "supervised": SUPERVISED,
    }
    return VdmPolicy.load(folder, conditioning=CLIP, **options)


@pytest.fixture(scope="module")
def request_() -> RenderRequest:
    frames = r.pixels("input clip", r.INPUT_FRAMES)
    return RenderRequest("s", 0, r.CAPTION, frames, r.FRAMES, r.STEPS, r.GUIDANCE, noise_seed=r.NOISE_SEED)


def distance(ours: Tensor, theirs: Tensor, what: str) -> float:
    """Return the largest difference over the largest value."""
    assert ours.shape == theirs.shape and theirs.std() > 0
    relative = float((ours - theirs).abs().max() / theirs.abs().max())
    print(f"{what}: {relative:.1e}")  # pytest -rP shows the ladder
    return relative


def shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def test_names_and_shapes_are_diffusers_after_its_own_converter() -> None:
    parts = {
        "transformer": (r.transformer(), convert_wan_transformer_to_diffusers),
        "vae": (r.vae(), convert_wan_vae_to_diffusers),
    }
    for part, (model, convert) in parts.items():
        state = r.released_state(part)
        assert shapes(convert(state)) == shapes(model.state_dict()), part


def test_caption_ids_and_embedding(artist: VdmPolicy, golden: dict[str, Tensor]) -> None:
    assert artist.embedder is not None and artist.embedder.max_tokens == 512
    assert artist.embedder.tokenizer(r.CAPTION)["input_ids"] == golden["token_ids"].tolist()
    embedded = artist.embed([r.CAPTION])[0]
    length = len(golden["caption"])
    assert distance(embedded[:length], golden["caption"], "caption") <= BAR
    assert embedded.shape == (512, 32) and not embedded[length:].any()


def test_printers_quotes_are_straightened_before_the_tokenizer(artist: VdmPolicy, golden: dict[str, Tensor]) -> None:
    """By ftfy, as Wan cleans prompts: language models write such quotes, and a tokenizer has other tokens for them."""
    assert artist.embedder is not None
    printed, typed = artist.embed([r.PRINTED, r.TYPED])
    assert torch.equal(printed, typed)
    assert artist.embedder.tokenizer(r.TYPED)["input_ids"] == golden["printed_ids"].tolist()


def test_reference_and_target_latents(artist: VdmPolicy, golden: dict[str, Tensor], request_: RenderRequest) -> None:
    assert distance(artist.encode_references(request_.reference_frames), golden["references"], "references") <= BAR
    target = artist.encode_targets([r.pixels("target clip", r.FRAMES)])[0]
    assert distance(target, golden["target"], "target") <= BAR


@torch.no_grad()
def test_one_velocity_with_six_references_and_shared_time(
    artist: VdmPolicy, folder: Path, golden: dict[str, Tensor], request_: RenderRequest
) -> None:
    """What is left is diffusers' sinusoid of the time, which is float32 and the release's float64."""
    sigma, x = golden["velocity_sigma"][None], golden["velocity_at"][None]
    assert sigma == sigma_grid(r.STEPS, r.SHIFT, "even")[2]
    for caption, name in ((r.CAPTION, "velocity"), (r.NEGATIVE, "velocity_negative")):
        condition = artist.condition([caption], [request_.reference_frames], [1.0])
        assert distance(artist.velocity(x, sigma, condition)[0], golden[name], name) <= BAR
    apart = VdmPolicy.load(folder, conditioning=CLIP.model_copy(update={"time": "zero"}))
    assert distance(apart.velocity(x, sigma, condition)[0], golden["velocity_negative"], "with time zero") > 1e-2


def test_ten_guided_steps(artist: VdmPolicy, golden: dict[str, Tensor], request_: RenderRequest) -> None:
    latents, _ = sample_latents(artist, [request_], check(artist, request_))
    assert distance(latents[0], golden["latents"], "ten steps") <= BAR
    weaker = dataclasses.replace(request_, guidance=4.9)
    assert distance(sample_latents(artist, [weaker], latents.shape[1:])[0][0], golden["latents"], "guidance 4.9") > 1e-3


def test_decoded_frames_and_their_levels(artist: VdmPolicy, golden: dict[str, Tensor], request_: RenderRequest) -> None:
    """The release cuts a level off behind its point; diffusers and we round it."""
    video = artist.family.decode(artist.vae, golden["latents"][None])
    assert distance(video.flatten()[::7], golden["video"], "video") <= BAR
    levels, cut = (video * 127.5 + 127.5).flatten()[::7], golden["frames"]
    assert ((levels - cut) > -1e-2).all() and ((levels - cut) < 1.01).all() and float((levels - cut).mean()) > 0.3
    (clip,) = sample(artist, [request_])  # the steps before are its own
    ours = torch.from_numpy(clip.frames).movedim(-1, 0).flatten()[::7]
    assert ((levels - ours).abs() < 0.51).all()


@torch.no_grad()
def test_supervised_loss(artist: VdmPolicy, golden: dict[str, Tensor], request_: RenderRequest) -> None:
    batch = [(request_.reference_frames, r.CAPTION, r.pixels("target clip", r.FRAMES))]
    ours = [artist.sft_loss(batch, generator=torch.Generator().manual_seed(seed)).total for seed in range(r.LOSS_SEEDS)]
    for i, (found, theirs) in enumerate(zip(torch.stack(ours), golden["losses"], strict=True)):
        print(f"loss of seed {i}: {float((found - theirs).abs() / theirs):.1e}")
        assert float(found) == pytest.approx(float(theirs), rel=BAR)
