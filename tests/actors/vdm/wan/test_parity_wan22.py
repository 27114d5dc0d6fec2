"""Wan 2.2 TI2V against diffusers' stock pipelines: same weights, same noise, Euler steps. fp32.

Text to video by WanPipeline, which gives each token the clip's time; image to video by WanImageToVideoPipeline, whose clean first
latent frame of time 0 is what a reference frame is here. Rungs: caption, times, initial latents, one step, loop, decoded video.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline, WanPipeline
from torch import Tensor

from actors.records import RenderRequest
from actors.vdm import flow_sde
from actors.vdm.policy import VdmPolicy
from actors.vdm.sampling import check, sample_latents
from tests.actors.vdm.pipelines import TEXT_TOKENS, build

TOLERANCE = 1e-5
SHIFT = 5.0
CAPTIONS = ["the red circle rises", "blue square vanishes and the green circle grows"]


@dataclass(frozen=True)
class Case:
    """One comparison; ``given``: whether the first frame is."""

    size: tuple[int, int, int]  # frames, height, width
    batch: int
    guidance: float
    steps: int
    given: bool = False

    def __str__(self) -> str:
        first = ", first frame given" if self.given else ""
        return f"{'x'.join(map(str, self.size))} batch {self.batch} guidance {self.guidance:g}{first}"


CASES = (
    Case((9, 64, 32), batch=2, guidance=1.0, steps=4),
    Case((5, 32, 96), batch=1, guidance=4.0, steps=3),
    Case((9, 64, 32), batch=1, guidance=1.0, steps=3, given=True),
    Case((5, 64, 64), batch=2, guidance=3.0, steps=3, given=True),
)
RUNGS = ("caption", "times", "initial latents", "one step", "loop", "video")


def noise_of(case: Case) -> Tensor:
    """Noise of the clip, and in front of it of a first frame where one is given, which nobody sees."""
    frames = (case.size[0] - 1) // 4 + 1 + case.given
    shape = (48, frames, case.size[1] // 16, case.size[2] // 16)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(40 + i)) for i in range(case.batch)])


def first_frame(case: Case) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (int(case.given), *case.size[1:], 3), dtype=np.uint8)


def recorded(transformer: Any, run: Any) -> tuple[list[dict[str, Tensor]], Any]:
    """Return what ``run`` hands to the transformer, call by call, and what it returns."""
    calls: list[dict[str, Tensor]] = []
    names = ("hidden_states", "timestep", "encoder_hidden_states")
    hook = transformer.register_forward_pre_hook(
        lambda _m, _a, kwargs: calls.append({name: kwargs[name].detach().clone() for name in names}), with_kwargs=True
    )
    result = run()
    hook.remove()
    return calls, result


def rungs_of(case: Case, calls: list[dict[str, Tensor]], latents: Tensor, video: Tensor) -> dict[str, Tensor]:
    step = calls[:: 2 if case.guidance > 1 else 1]
    tokens = step[0]["hidden_states"][0, 0, :, ::2, ::2].numel()
    return {
        "caption": step[0]["encoder_hidden_states"],
        "times": torch.stack([call["timestep"].reshape(case.batch, -1).expand(-1, tokens) for call in step]),
        "initial latents": step[0]["hidden_states"],
        "one step": step[1]["hidden_states"],
        "loop": torch.cat([*[call["hidden_states"][:, :, case.given :] for call in step[2:]], latents]),
        "video": video,
    }


@torch.no_grad()
def our_rungs(case: Case, folder: str) -> dict[str, Tensor]:
    policy = VdmPolicy.load(folder, shift=SHIFT, max_text_tokens=TEXT_TOKENS)
    requests = [
        RenderRequest("s", i, c, first_frame(case), case.size[0], case.steps, case.guidance, noise_seed=40 + i)
        for i, c in enumerate(CAPTIONS[: case.batch])
    ]
    shape = check(policy, requests[0])

    def continued() -> Tensor:
        """The sampler's loop from the stock pipeline's noise, which it draws for the given frame too."""
        x, condition = noise_of(case)[:, :, 1:], policy.join(policy.encoded(requests), [case.guidance] * case.batch)
        for sigma, following in pairwise(flow_sde.sigma_grid(case.steps, SHIFT)):
            now, then = sigma.expand(case.batch), following.expand(case.batch)
            x = flow_sde.ode_step(x, policy.velocity(x, now, condition), now, then)
        return x

    draw = continued if case.given else lambda: sample_latents(policy, requests, shape)[0]
    calls, latents = recorded(policy.module, draw)
    return rungs_of(case, calls, latents, policy.family.decode(policy.vae, latents) * 0.5 + 0.5)


@torch.no_grad()
def stock_rungs(case: Case, folder: str) -> dict[str, Tensor]:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    pipe: Any = WanPipeline.from_pretrained(folder, scheduler=scheduler)
    options: dict[str, Any] = {
        "num_frames": case.size[0] + 4 * case.given,
        "height": case.size[1],
        "width": case.size[2],
    }
    options |= {"num_inference_steps": case.steps, "guidance_scale": case.guidance}
    # Embedded by WanPipeline for both: the other one's own cleaning of captions needs a package that is not installed.
    guided = case.guidance > 1
    text, nothing = pipe.encode_prompt(CAPTIONS[: case.batch], None, guided, max_sequence_length=TEXT_TOKENS)
    if case.given:
        parts = {name: getattr(pipe, name) for name in ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")}
        pipe = WanImageToVideoPipeline(**parts, expand_timesteps=True)
        options["image"] = PIL.Image.fromarray(first_frame(case)[0])
    pipe.set_progress_bar_config(disable=True)
    calls, latents = recorded(
        pipe.transformer,
        lambda: (
            pipe(
                prompt_embeds=text,
                negative_prompt_embeds=nothing,
                latents=noise_of(case),
                output_type="latent",
                **options,
            ).frames
        ),
    )
    latents = latents[:, :, case.given :]
    vae = pipe.vae.config
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.latents_mean, vae.latents_std))
    video = pipe.vae.decode(latents * std + mean, return_dict=False)[0] * 0.5 + 0.5
    return rungs_of(case, calls, latents, video)


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Both samplers' rungs of a case, computed once."""
    folder = str(build("wan2.2", tmp_path_factory.mktemp("wan22")))

    @cache
    def climb(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return our_rungs(case, folder), stock_rungs(case, folder)

    return climb


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_rung_equals_the_stock_pipelines(ladder: Any, case: Case, rung: str) -> None:
    ours, theirs = (side[rung] for side in ladder(case))
    assert ours.shape == theirs.shape and theirs.std() > 0
    error = float((ours - theirs).abs().max())
    print(f"{case}, {rung}: max error {error:.1e}")  # pytest -rP shows the ladder
    assert error <= (0.0 if rung == "times" else TOLERANCE)
