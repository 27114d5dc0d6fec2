"""What goes into the transformer beside noise: sizes at their bounds, the clean tokens' times, reference frames."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan

from actors.failures import BadSampleError
from actors.vdm.families import Blueprint
from actors.vdm.family import token_timesteps
from actors.vdm.flow_sde import FlowMatchingSpec, noisy_pair, sample_sigmas
from actors.vdm.frames import frames_to_video, select_reference_frames, video_to_frames
from actors.vdm.shapes import Geometry

WAN = Geometry(channels=16, spatial=8, temporal=4, patch=(1, 2, 2), chunk=4, rope_max=32)


def test_latent_shape_by_hand() -> None:
    assert WAN.latent_shape(33, 256, 160, references=6) == (16, 9, 32, 20)
    assert WAN.latent_shape(1, 16, 16, references=0) == (16, 1, 2, 2)  # the smallest clip that there is


@pytest.mark.parametrize(
    ("axis", "fits", "too_much"),
    [
        ("time", {"num_frames": 105, "references": 5}, {"num_frames": 105, "references": 6}),  # 27 + 5 = 32 tokens
        ("height", {"height": 512}, {"height": 528}),  # 512 / 8 / 2 = 32 tokens
        ("width", {"width": 512}, {"width": 528}),
    ],
)
def test_a_clip_of_exactly_the_most_tokens_fits_and_one_more_does_not(
    axis: str, fits: dict[str, int], too_much: dict[str, int]
) -> None:
    small = {"num_frames": 5, "height": 32, "width": 32, "references": 1}
    WAN.latent_shape(**(small | fits))
    with pytest.raises(BadSampleError, match=r"33.* tokens; .*ends at 32"):
        WAN.latent_shape(**(small | too_much))


@pytest.mark.parametrize(
    ("temporal", "fits", "told"),
    [(4, (1, 5, 9), "5 or 9"), (2, (1, 5, 9), "5 or 9"), (1, (1, 5, 9), "5 or 9"), (8, (1, 9, 17), "1 or 9")],
)
def test_frames_are_a_multiple_of_the_chunk_and_of_the_compression(
    temporal: int, fits: tuple[int, ...], told: str
) -> None:
    vae, transformer = {"scale_factor_temporal": temporal}, {"patch_size": [1, 2, 2]}
    wan = Blueprint("here", {"_class_name": "WanPipeline"}, {"vae": vae, "transformer": transformer})
    geometry = wan.shapes.geometry
    for count in fits:
        assert geometry.latent_shape(count, 32, 32, 0)[1] == (count - 1) // temporal + 1
    for count in (-7, 0, 2, 3, 4, 6, 7, 8):
        with pytest.raises(BadSampleError, match=f"num_frames={count}:"):
            geometry.latent_shape(count, 32, 32, 0)
    with pytest.raises(BadSampleError, match=f"use {told}"):
        geometry.latent_shape(7, 32, 32, 0)


def test_a_wrong_number_of_frames_names_the_nearest_right_ones() -> None:
    for count, told in ((-3, "1 or 5"), (0, "1 or 5"), (2, "1 or 5"), (4, "1 or 5"), (6, "5 or 9"), (8, "5 or 9")):
        with pytest.raises(BadSampleError, match=f"num_frames={count}: .*use {told}$"):
            WAN.latent_shape(count, 32, 32, 0)


def test_the_vae_takes_four_frames_at_a_time_whatever_its_compression() -> None:
    """Why 3 frames are refused at a temporal factor of 2: the VAE encodes one of them and says nothing."""
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip
    with torch.no_grad():
        lengths = {n: vae.encode(torch.zeros(1, 3, n, 8, 8)).latent_dist.mode().shape[2] for n in (1, 3, 5)}
    assert lengths == {1: 1, 3: 1, 5: 3}


def test_sizes_that_do_not_fit_name_those_that_do() -> None:
    for name, told in (("height", "32 or 48"), ("width", "32 or 48")):
        size = {"height": 32, "width": 32} | {name: 47}
        with pytest.raises(BadSampleError, match=f"{name}=47 is not a multiple of 16 .*use {told}"):
            WAN.latent_shape(5, **size, references=0)
    with pytest.raises(BadSampleError, match=r"height=0 .*use 16 or 32"):
        WAN.latent_shape(5, 0, 32, 0)


def test_frames_that_do_not_fill_temporal_patches_are_refused() -> None:
    pairs = replace(WAN, patch=(2, 2, 2))
    assert pairs.latent_shape(5, 32, 32, references=2) == (16, 2, 4, 4)  # 4 latent frames are 2 tokens
    with pytest.raises(BadSampleError, match=r"3 reference .* multiple of patch 2"):
        pairs.latent_shape(5, 32, 32, references=3)
    assert replace(pairs, rope_max=2).latent_shape(5, 32, 32, references=2)[1] == 2  # tokens are counted, not frames


def test_clean_tokens_are_those_of_the_reference_frames() -> None:
    sigma = torch.tensor([0.5, 0.25])
    assert token_timesteps(sigma, 0, (16, 3, 4, 6), (1, 2, 2)).tolist() == [500.0, 250.0]
    times = token_timesteps(sigma, 2, (16, 3, 4, 6), (1, 2, 2))  # 2 x 3 tokens a frame
    assert times.shape == (2, 5 * 6)
    assert times[0].tolist() == [0.0] * 12 + [500.0] * 18 and times[1].tolist() == [0.0] * 12 + [250.0] * 18


def test_temporal_patches_hold_two_frames_of_clean_tokens() -> None:
    """patch_t = 2: four reference frames and two of the target are 2 + 1 tokens deep."""
    times = token_timesteps(torch.tensor([0.5]), 4, (16, 2, 4, 4), (2, 2, 2))
    assert times.tolist() == [[0.0] * 8 + [500.0] * 4]
    with pytest.raises(BadSampleError, match="3 reference frames do not fill temporal patches of 2"):
        token_timesteps(torch.tensor([0.5]), 3, (16, 2, 4, 4), (2, 2, 2))


def test_reference_frames_are_spread_evenly_and_end_with_the_last() -> None:
    frames = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    for n, picks in {
        0: [],
        1: [8],
        2: [0, 8],
        3: [0, 4, 8],
        4: [0, 3, 5, 8],
        5: [0, 2, 4, 6, 8],
        9: list(range(9)),
    }.items():
        assert select_reference_frames(frames, n)[:, 0, 0, 0].tolist() == picks
    assert select_reference_frames(frames[:2], 3)[:, 0, 0, 0].tolist() == [0, 0, 1]
    assert len(select_reference_frames(frames[:0], 0)) == 0  # none are asked of a video that has none
    with pytest.raises(BadSampleError, match="without frames has no 2 reference frames"):
        select_reference_frames(frames[:0], 2)


def test_pixels_come_back_and_what_is_beyond_is_cut() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5, 3), dtype=np.uint8)
    video = frames_to_video(frames)
    assert video.shape == (2, 3, 3, 4, 5) and video.min() >= -1 and video.max() <= 1
    assert float(frames_to_video(np.full((1, 1, 1, 3), 255, np.uint8)).min()) == 1.0
    assert np.array_equal(video_to_frames(video), frames)
    odd = torch.tensor([-7.0, 7.0, 0.0]).view(3, 1, 1, 1)
    assert video_to_frames(odd).ravel().tolist() == [0, 255, 128]
    for wrong in (frames.astype(np.float32), frames[..., :2]):
        with pytest.raises(BadSampleError, match="must be uint8"):
            frames_to_video(wrong)


def test_training_pairs_by_hand() -> None:
    clean, noise = torch.full((2, 1, 1, 1, 1), 3.0), torch.full((2, 1, 1, 1, 1), -1.0)
    noisy, velocity = noisy_pair(clean, noise, torch.tensor([0.25, 1.0]))
    assert noisy.flatten().tolist() == [0.75 * 3 - 0.25, -1.0] and velocity.flatten().tolist() == [-4.0, -4.0]


def test_training_sigmas_are_logit_normal_and_shifted() -> None:
    def sigmas(shift: float, **spec: float) -> torch.Tensor:
        return sample_sigmas(4000, FlowMatchingSpec(**spec), shift, torch.Generator().manual_seed(0))

    plain = sigmas(1.0)
    assert plain.dtype == torch.float32 and plain.min() > 0 and plain.max() < 1
    assert float(plain.median()) == pytest.approx(0.5, abs=0.02)
    torch.testing.assert_close(sigmas(3.0), 3 * plain / (1 + 2 * plain))
    logits = torch.logit(sigmas(1.0, logit_mean=1.0, logit_std=0.5).double())
    assert float(logits.mean()) == pytest.approx(1.0, abs=0.03) and float(logits.std()) == pytest.approx(0.5, abs=0.03)
