"""Wan 2.1 image to video against diffusers' stock WanImageToVideoPipeline: same weights, same noise, Euler steps. fp32.

Both samplers run whole, and what their transformers are handed is recorded. Rungs: caption, image, times, first input (noise, mask,
condition), one step, loop, decoded video.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanPipeline
from torch import Tensor

from actors.records import RenderRequest
from actors.vdm.frames import video_to_frames
from actors.vdm.policy import VdmPolicy
from actors.vdm.sampling import check, sample, sample_latents
from tests.actors.vdm.pipelines import build

TOLERANCE = 1e-5
SHIFT = 3.0
CAPTIONS = ["the red circle rises", "blue square vanishes and the green circle grows"]


@dataclass(frozen=True)
class Case:
    """One comparison; ``size`` is the answer's frames, height and width: the stock pipeline draws the given frame beside them."""

    size: tuple[int, int, int]
    batch: int
    guidance: float
    steps: int

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.size))} batch {self.batch} guidance {self.guidance:g}"


CASES = (
    Case((8, 32, 48), batch=2, guidance=1.0, steps=4),
    Case((12, 64, 32), batch=1, guidance=4.0, steps=3),
    Case((4, 32, 32), batch=2, guidance=3.0, steps=3),
)
RUNGS = ("caption", "image", "times", "first input", "one step", "loop", "video")


def requests_of(case: Case) -> list[RenderRequest]:
    frames = np.random.default_rng(3).integers(0, 256, (1, *case.size[1:], 3), dtype=np.uint8)
    return [
        RenderRequest("s", i, caption, frames, case.size[0], case.steps, case.guidance, noise_seed=40 + i)
        for i, caption in enumerate(CAPTIONS[: case.batch])
    ]


def noise_of(case: Case) -> Tensor:
    shape = (16, case.size[0] // 4 + 1, case.size[1] // 8, case.size[2] // 8)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(40 + i)) for i in range(case.batch)])


def recorded(transformer: Any, run: Any) -> tuple[list[dict[str, Tensor]], Any]:
    """Return what ``run`` hands to the transformer, call by call, and what it returns."""
    calls: list[dict[str, Tensor]] = []
    names = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image")
    hook = transformer.register_forward_pre_hook(
        lambda _m, _a, kwargs: calls.append({name: kwargs[name].detach().clone() for name in names}), with_kwargs=True
    )
    result = run()
    hook.remove()
    return calls, result


def rungs_of(case: Case, calls: list[dict[str, Tensor]], latents: Tensor, video: Tensor) -> dict[str, Tensor]:
    step = calls[:: 2 if case.guidance > 1 else 1]
    return {
        "caption": torch.cat([call["encoder_hidden_states"] for call in calls[:2]]),
        "image": calls[-1]["encoder_hidden_states_image"],
        "times": torch.stack([call["timestep"] for call in step]),
        "first input": step[0]["hidden_states"],
        "one step": step[1]["hidden_states"],
        "loop": torch.cat([*[call["hidden_states"][:, :16] for call in step[2:]], latents]),
        "video": video,
    }


@torch.no_grad()
def our_rungs(case: Case, folder: str) -> dict[str, Tensor]:
    policy, requests = VdmPolicy.load(folder, shift=SHIFT), requests_of(case)
    shape = check(policy, requests[0])
    calls, latents = recorded(policy.module, lambda: sample_latents(policy, requests, shape)[0])
    video = policy.family.decode(policy.vae, latents)
    # An answer is what comes after the given frame, which the stock pipeline's clip begins with.
    answers = np.stack([clip.frames for clip in sample(policy, requests)])
    assert answers.shape[1] == case.size[0] and np.array_equal(answers, video_to_frames(video)[:, 1:])
    return rungs_of(case, calls, latents, video * 0.5 + 0.5)


@torch.no_grad()
def stock_rungs(case: Case, folder: str) -> dict[str, Tensor]:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    pipe: Any = WanImageToVideoPipeline.from_pretrained(folder, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    # Embedded by WanPipeline: the other one's own cleaning of captions needs a package that is not installed.
    parts = {name: getattr(pipe, name) for name in ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")}
    texts = CAPTIONS[: case.batch], None, case.guidance > 1
    text, nothing = WanPipeline(**parts).encode_prompt(*texts, max_sequence_length=512)
    frames, height, width = case.size

    def run(output: str) -> Tensor:
        return pipe(
            image=PIL.Image.fromarray(requests_of(case)[0].reference_frames[0]),
            prompt_embeds=text,
            negative_prompt_embeds=nothing,
            latents=noise_of(case),
            num_frames=frames + 1,
            height=height,
            width=width,
            num_inference_steps=case.steps,
            guidance_scale=case.guidance,
            output_type=output,
        ).frames

    calls, latents = recorded(pipe.transformer, lambda: run("latent"))
    return rungs_of(case, calls, latents, run("pt").transpose(1, 2))


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Both samplers' rungs of a case, computed once."""
    folder = str(build("wan i2v", tmp_path_factory.mktemp("wan_i2v")))

    @cache
    def climb(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return our_rungs(case, folder), stock_rungs(case, folder)

    return climb


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_rung_equals_the_stock_pipelines(ladder: Any, case: Case, rung: str) -> None:
    ours, theirs = (side[rung] for side in ladder(case))
    if rung == "video":
        ours = ours.clamp(0, 1)  # as the stock pipeline hands it out
    assert ours.shape == theirs.shape and theirs.std() > 0
    error = float((ours - theirs).abs().max())
    print(f"{case}, {rung}: max error {error:.1e}")  # pytest -rP shows the ladder
    assert error <= (0.0 if rung == "times" else TOLERANCE)
