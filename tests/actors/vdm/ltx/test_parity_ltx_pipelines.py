"""Parity ladder of the LTX family against diffusers' stock pipelines: same weights, same noise, same steps. fp32.

Both run whole, and what their transformers are handed is recorded, so each rung is what really happened. Rungs: caption, times,
initial latents, positions, one step, loop, decoded video. LTXPipeline and LTXConditionPipeline differ in how captions and positions
are read; the latter also begins a clip with clean frames, which are our reference latents.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTXConditionPipeline, LTXPipeline
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from torch import Tensor

from actors.records import RenderRequest
from actors.vdm import flow_sde
from actors.vdm.family import token_timesteps
from actors.vdm.policy import VdmPolicy
from actors.vdm.sampling import check, sample_latents
from actors.vdm.settings import ConditioningSection
from tests.actors.vdm.pipelines import TEXT_TOKENS, build

TOLERANCE = 1e-5
SHIFT, FPS = 2.5, 12.0
CAPTIONS = ["the red circle rises", "blue square vanishes and the green circle grows"]


@dataclass(frozen=True)
class Case:
    """One comparison. ``references``: frames at the beginning that are given, 0, 1 or a clip of 8k+1."""

    pipeline: str
    size: tuple[int, int, int]  # frames, height, width
    batch: int
    guidance: float
    steps: int
    references: int = 0

    def __str__(self) -> str:
        given = f", {self.references} frames given" if self.references else ""
        return f"{self.pipeline} {'x'.join(map(str, self.size))} batch {self.batch} guidance {self.guidance:g}{given}"

    @property
    def latents(self) -> int:
        """Latent frames that are given."""
        return (self.references + 7) // 8


CASES = (
    Case("ltx", (9, 32, 32), batch=2, guidance=1.0, steps=4),
    Case("ltx", (17, 32, 64), batch=1, guidance=3.0, steps=3),
    Case("ltx condition", (9, 32, 32), batch=2, guidance=3.0, steps=4),
    Case("ltx condition", (9, 32, 64), batch=1, guidance=1.0, steps=3, references=1),
    Case("ltx condition", (9, 32, 32), batch=1, guidance=3.0, steps=3, references=9),
)
RUNGS = ("caption", "times", "initial latents", "positions", "one step", "loop", "video")


class Recorder:
    """Keeps what a transformer and its position embedding are called with, and what positions come of it."""

    def __init__(self, transformer: Any) -> None:
        self.calls: list[dict[str, Tensor]] = []
        self.hooks = [
            transformer.register_forward_pre_hook(self._note, with_kwargs=True),
            transformer.rope.register_forward_hook(self._positions),
        ]

    def _note(self, _module: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        names = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask")
        self.calls.append({name: kwargs[name].detach().clone() for name in names})

    def _positions(self, _module: Any, _args: Any, out: tuple[Tensor, Tensor]) -> None:
        self.calls[-1]["positions"] = torch.stack(out)

    def __enter__(self) -> list[dict[str, Tensor]]:
        return self.calls

    def __exit__(self, *_: Any) -> None:
        for hook in self.hooks:
            hook.remove()


def rungs_of(case: Case, calls: list[dict[str, Tensor]], latents: Tensor, video: Tensor) -> dict[str, Tensor]:
    """Name what was recorded of the caption's branch: the last rows of a stock call, the first of our two calls."""
    step = [{name: value[-case.batch :] for name, value in call.items() if name != "positions"} for call in calls]
    mask = step[0]["encoder_attention_mask"]
    given = case.latents * (case.size[1] // 8) * (case.size[2] // 8)
    times = torch.stack(
        [call["timestep"].reshape(case.batch, -1).expand(-1, call["hidden_states"].shape[1]) for call in step]
    )
    return {
        "caption": step[0]["encoder_hidden_states"] * mask[..., None],
        "times": times,
        "initial latents": step[0]["hidden_states"],
        "positions": calls[0]["positions"][:, -case.batch :],
        "one step": step[1]["hidden_states"],
        "loop": torch.cat(
            [*[call["hidden_states"][:, given:] for call in step[2:]], latents.flatten(2).transpose(1, 2)]
        ),
        "video": video,
    }


def input_frames(case: Case) -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (case.references, *case.size[1:], 3), dtype=np.uint8)


def our_rungs(case: Case, folder: str) -> dict[str, Tensor]:
    conditioning = ConditioningSection(references="clip", take=case.latents) if case.references > 1 else None
    grid = "even" if case.pipeline == "ltx" else "diffusers"
    policy = VdmPolicy.load(
        folder, shift=SHIFT, grid=grid, fps=FPS, conditioning=conditioning, max_text_tokens=TEXT_TOKENS
    )
    frames, height, width = case.size
    requests = [
        RenderRequest(
            "s",
            i,
            c,
            input_frames(case).reshape(-1, height, width, 3),
            frames,
            case.steps,
            case.guidance,
            noise_seed=40 + i,
        )
        for i, c in enumerate(CAPTIONS[: case.batch])
    ]
    shape = check(policy, requests[0])
    with Recorder(policy.module) as calls:
        if case.references:
            latents = continued(case, policy, requests[0], shape)
        else:
            latents, _ = sample_latents(policy, requests, shape)
    torch.manual_seed(0)
    video = policy.family.decode(policy.vae, latents) * 0.5 + 0.5
    return rungs_of(case, calls[:: 2 if case.guidance > 1 else 1], latents, video)


@torch.no_grad()
def continued(case: Case, policy: VdmPolicy, request: RenderRequest, shape: tuple[int, int, int, int]) -> Tensor:
    """The sampler's loop from the noise of the stock pipeline, which draws it for the given frames too."""
    noise = torch.randn(shape[0], shape[1] + case.latents, *shape[2:], generator=torch.Generator().manual_seed(40))
    x, condition = noise[None, :, case.latents :], policy.join(policy.encoded([request]), [case.guidance])
    sigmas = flow_sde.sigma_grid(case.steps, SHIFT, policy.grid)
    for sigma, following in itertools.pairwise(sigmas):
        x = flow_sde.ode_step(x, policy.velocity(x, sigma[None], condition), sigma[None], following[None])
    return x


def stock_rungs(case: Case, folder: str) -> dict[str, Tensor]:
    frames, height, width = case.size
    total = frames + 8 * case.latents
    options: dict[str, Any] = {"num_frames": total, "height": height, "width": width, "frame_rate": FPS}
    options |= {"guidance_scale": case.guidance, "max_sequence_length": TEXT_TOKENS, "num_inference_steps": case.steps}
    if case.pipeline == "ltx":
        pipe = LTXPipeline.from_pretrained(folder, scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT))
    else:
        pipe = LTXConditionPipeline.from_pretrained(folder)  # takes the steps that it is given, with shift 1
        options["timesteps"] = (flow_sde.sigma_grid(case.steps, SHIFT, "diffusers")[:-1] * 1000).tolist()
        options["image_cond_noise_scale"] = 0.0
    given = [PIL.Image.fromarray(frame) for frame in input_frames(case)]
    if len(given) == 1:
        options["conditions"] = LTXVideoCondition(image=given[0], frame_index=0)
    elif given:
        options["conditions"] = LTXVideoCondition(video=given, frame_index=0)
    pipe.set_progress_bar_config(disable=True)

    def run(output_type: str) -> Tensor:
        generators = [torch.Generator().manual_seed(40 + i) for i in range(case.batch)]
        generator = generators if case.batch > 1 else generators[0]
        return pipe(prompt=CAPTIONS[: case.batch], generator=generator, output_type=output_type, **options).frames

    with Recorder(pipe.transformer) as calls:
        latents = run("latent")
    if case.pipeline == "ltx":
        latents = pipe._unpack_latents(latents, frames // 8 + 1, height // 8, width // 8)
    latents = latents[:, :, case.latents :]
    if (
        case.references
    ):  # the stock pipeline decodes the given frames too: ours are the target's, decoded by the stock VAE
        z = pipe._denormalize_latents(
            latents, pipe.vae.latents_mean, pipe.vae.latents_std, pipe.vae.config.scaling_factor
        )
        torch.manual_seed(0)
        with torch.no_grad():
            video = pipe.vae.decode(z, torch.zeros(case.batch), return_dict=False)[0] * 0.5 + 0.5
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            # The pipeline's own draws come from its generators: the decoder's noise begins at the seed.
            video = run("pt").transpose(1, 2)
        return rungs_of(case, calls, latents, video)
    return rungs_of(case, calls, latents, video.clamp(0, 1))


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Both samplers' rungs of a case, computed once."""
    folders = {name: build(name, tmp_path_factory.mktemp("ltx")) for name in ("ltx", "ltx condition")}

    @cache
    def climb(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        folder = str(folders[case.pipeline])
        return our_rungs(case, folder), stock_rungs(case, folder)

    return climb


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_rung_equals_the_stock_pipelines(ladder: Any, case: Case, rung: str) -> None:
    ours, theirs = (side[rung] for side in ladder(case))
    if rung == "video":
        ours = ours.clamp(0, 1)
    assert ours.shape == theirs.shape and theirs.std() > 0
    error = float((ours - theirs).abs().max())
    print(f"{case}, {rung}: max error {error:.1e}")  # pytest -rP shows the ladder
    exact = rung == "initial latents" and not case.references
    assert error <= (0.0 if exact else 1e-3 if rung == "times" else TOLERANCE)  # times reach 1000


def test_the_ladder_tells_another_frame_rate(ladder: Any, tmp_path: Path) -> None:
    """A clip of other seconds is another one, in both pipelines."""
    for name in ("ltx", "ltx condition"):
        folder = build(name, tmp_path / name)
        velocities = []
        for fps in (FPS, 2 * FPS):
            policy = VdmPolicy.load(folder, fps=fps)
            condition = policy.condition(CAPTIONS[:1], [np.zeros((0, 32, 32, 3), np.uint8)], [1.0])
            x = torch.randn(1, 12, 2, 4, 4, generator=torch.Generator().manual_seed(0))
            velocities.append(policy.velocity(x, torch.tensor([0.5]), condition))
        assert (velocities[0] - velocities[1]).abs().max() > 1e-3


def test_encoded_frames_are_the_stock_vaes_mode_normalised(tmp_path: Path) -> None:
    """The rung that SFT stands on; and a clip encoded whole differs from its frames encoded each alone."""
    folder = build("ltx", tmp_path)
    policy, pipe = VdmPolicy.load(folder), LTXPipeline.from_pretrained(folder)
    video = np.random.default_rng(0).integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    pixels = torch.from_numpy(video).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        raw = pipe.vae.encode(pixels).latent_dist.mode()
    vae = pipe.vae
    theirs = pipe._normalize_latents(raw, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
    assert (policy.encode_targets([video]) - theirs).abs().max() <= TOLERANCE
    assert policy.encode_references(video[:2]).shape == (12, 2, 4, 4)


def test_times_of_given_frames_are_zero_for_each_of_their_cells() -> None:
    times = token_timesteps(torch.tensor([0.5]), 1, (12, 2, 4, 4), (1, 1, 1))
    assert times.tolist() == [[0.0] * 16 + [500.0] * 32]
