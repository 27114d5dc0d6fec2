"""What the switches of the artist are worth at real size, beside the stock pipeline."""

from __future__ import annotations

import copy
import time
from typing import Any

import numpy as np
import torch

from actors.records import RenderRequest
from actors.vdm.policy import VdmPolicy, channels_last
from actors.vdm.sampling import normal, sample_latents
from tests.benchmarks.gpu_meter import CAPTION, Meter, Size, frames_of


def compare_switches(
    policy: VdmPolicy, size: Size, meter: Meter, references: np.ndarray, latents: torch.Tensor
) -> None:
    """Two times of a clip embedded once or token by token; the decoder with channels last or not."""
    captions, clips = [CAPTION] * size.group, [references] * size.group
    condition = policy.condition(captions, clips, [1.0] * size.group)
    sigma = torch.full((size.group,), 0.7, device=meter.device)

    @torch.no_grad()
    def velocity(shared: bool) -> torch.Tensor:
        policy.family.times.shared = shared
        return policy.velocity(latents, sigma, condition).cpu()

    meter.compare("shared_times", lambda: velocity(True), lambda: velocity(False), size.rounds)
    policy.family.times.shared = True
    last = copy.deepcopy(policy.vae)
    channels_last(last.decoder)
    meter.compare(
        "channels_last",
        lambda: policy.family.decode(last, latents[:1]).cpu(),
        lambda: policy.family.decode(policy.vae, latents[:1]).cpu(),
        size.rounds,
    )


def compare_compiled(policy: VdmPolicy, size: Size, meter: Meter) -> None:
    """The transformer's blocks compiled by torch, and as they are."""
    references = frames_of((size.references, *size.frames[1:]), 0)
    condition = policy.condition([CAPTION] * size.group, [references] * size.group, [1.0] * size.group)
    shape = policy.geometry.latent_shape(size.frames[0], *size.frames[1:], size.references)
    latents, sigma = (
        normal(list(range(size.group)), shape, policy.device),
        torch.full((size.group,), 0.7, device=meter.device),
    )
    plain = policy.module
    compiled = copy.deepcopy(plain)

    @torch.no_grad()
    def velocity(module: Any) -> torch.Tensor:
        policy.module = module
        return policy.velocity(latents, sigma, condition).cpu()

    started = time.perf_counter()
    compiled.compile_repeated_blocks()
    velocity(compiled)
    meter.parts["compile"] = {"seconds": time.perf_counter() - started}
    meter.compare("compiled_blocks", lambda: velocity(compiled), lambda: velocity(plain), size.rounds)


def compare_stock(policy: VdmPolicy, size: Size, meter: Meter) -> None:
    """Our sampler and diffusers' pipeline, from the same noise and embeddings, without reference frames, to latents."""
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    pipe: Any = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=policy.vae,
        transformer=policy.module,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=policy.shift),
    )
    pipe.set_progress_bar_config(disable=True)
    none = np.zeros((0, *size.frames[1:], 3), np.uint8)
    requests = [
        RenderRequest("s", i, CAPTION, none, size.frames[0], size.steps, 1.0, noise_seed=i) for i in range(size.group)
    ]
    shape = policy.geometry.latent_shape(size.frames[0], *size.frames[1:], 0)
    text = policy.embed([CAPTION] * size.group)

    @torch.no_grad()
    def stock() -> torch.Tensor:
        return pipe(
            prompt_embeds=text,
            latents=normal(list(range(size.group)), shape, policy.device),
            num_frames=size.frames[0],
            height=size.frames[1],
            width=size.frames[2],
            num_inference_steps=size.steps,
            guidance_scale=1.0,
            output_type="latent",
        ).frames.cpu()

    meter.compare("stock_pipeline", lambda: sample_latents(policy, requests, shape)[0].cpu(), stock, size.rounds)
