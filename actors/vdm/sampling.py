"""Drawing clips with a policy: as an ODE, or as an SDE whose trajectory is learnt from.

Responsible for the denoising loop, its noise and what a clip carries. Velocities are the policy's, steps ``flow_sde``'s.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from actors.failures import BadSampleError
from actors.records import Clip, RenderRequest, SdeSpec, Trajectory, derive_seed
from actors.vdm import flow_sde
from actors.vdm.policy import VdmPolicy
from actors.vdm.trajectories import Encoded
from cluster.errors import TrainingError

Shape = tuple[int, int, int, int]
"""Of latents: (C, F, h, w)."""
Drawn = tuple[Tensor, list[Trajectory | None]]
OnStep = Callable[[int, int], None]
"""Called after each integration step of a batch with how many steps are done, and of how many."""
Draw = Callable[[VdmPolicy, Sequence[RenderRequest], Shape, Sequence[Encoded], OnStep | None], Drawn]


class NotWanted(Exception):
    """Raised by an ``OnStep``: the clips that are being drawn are not wanted any more."""


def check(policy: VdmPolicy, request: RenderRequest) -> Shape:
    """Return the latent shape (C, F, h, w) of ``request``; BadSampleError says what is wrong with it."""
    frames, name = request.reference_frames, f"{request.sample_id}[{request.index}]"
    if frames.ndim != 4 or frames.dtype != np.uint8 or frames.shape[-1] != 3:
        raise BadSampleError(f"{name}: reference frames must be uint8 (n, H, W, 3), got {frames.dtype} {frames.shape}")
    wanted = policy.reference_frames if policy.conditioning.references == "frames" else None
    if wanted is not None and len(frames) != wanted:
        raise BadSampleError(f"{name}: {len(frames)} reference frames, this policy is set to {wanted}")
    if not request.caption.strip():
        raise BadSampleError(f"{name}: the caption is empty")
    if request.steps < 1 or not request.guidance >= 1.0:
        raise BadSampleError(
            f"{name}: steps={request.steps} must be at least 1 and guidance={request.guidance} at least 1"
        )
    if request.ends and request.sde is not None:
        raise BadSampleError(f"{name}: ends are those of an ODE, and the request asks for an SDE")
    if request.sde is not None:
        flow_sde.check_window(request.sde, request.steps)
    latents = policy.family.reference_latents(len(frames))
    return policy.geometry.latent_shape(request.num_frames, frames.shape[1], frames.shape[2], latents)


@torch.no_grad()
def sample(
    policy: VdmPolicy, requests: Sequence[RenderRequest], draw: Draw | None = None, on_step: OnStep | None = None
) -> list[Clip]:
    """Render ``requests``, in their order; those that agree in steps, sizes, guidance and SDE share a batch.

    Noise is drawn per request from its own seeds, so a clip depends on its batch by float noise only. A request
    with an SDE of positive level comes back with its trajectory. Raises BadSampleError for a request that can
    never succeed. ``draw`` does what :func:`sample_latents` does, which it is by default.

    ``on_step`` is called in each batch. What it raises ends the whole call: all of its requests are without a clip then, those
    of batches that were finished too. To cancel one request alone, call with that one alone.
    """
    groups: dict[tuple, list[int]] = defaultdict(list)
    for i, request in enumerate(requests):
        shape = check(policy, request)
        kind = request.steps, request.guidance, request.sde, request.ends
        groups[(shape, len(request.reference_frames), *kind)].append(i)
    clips: dict[int, Clip] = {}
    for (shape, *_), rows in groups.items():
        drawn = _sample_group(policy, [requests[i] for i in rows], shape, draw or sample_latents, on_step)
        clips.update(zip(rows, drawn, strict=True))
    return [clips[i] for i in range(len(requests))]


def _sample_group(
    policy: VdmPolicy, requests: list[RenderRequest], shape: Shape, draw: Draw, on_step: OnStep | None
) -> list[Clip]:
    encoded = policy.encoded(requests)
    latents, trajectories = draw(policy, requests, shape, encoded, on_step)
    for request, finite in zip(requests, latents.isfinite().flatten(1).all(dim=1).tolist(), strict=True):
        if not finite:
            raise TrainingError(
                f"{request.sample_id}[{request.index}]: sampling gave non-finite latents (weights v{policy.version})"
            )
    frames = policy.decode(latents)
    # What an SDE's clip was conditioned on goes with it, so that its learner needs no frozen models; whoever sent a
    # condition has it.
    made = [
        None if trajectory is None or r.condition is not None else item.record()
        for r, trajectory, item in zip(requests, trajectories, encoded, strict=True)
    ]
    return [
        Clip(r.sample_id, r.index, r.caption, clip, policy.version, trajectory, condition)
        for r, clip, trajectory, condition in zip(requests, frames, trajectories, made, strict=True)
    ]


@torch.no_grad()
def sample_latents(
    policy: VdmPolicy,
    requests: Sequence[RenderRequest],
    shape: Shape,
    encoded: Sequence[Encoded] | None = None,
    on_step: OnStep | None = None,
) -> Drawn:
    """Return the final latents (B, C, F, h, w) of requests that share everything but caption, frames and seeds.

    ``encoded`` is what the requests are conditioned on, where it has been made. ``on_step`` is called after each step; it
    changes nothing of the result, and what it raises ends the drawing.
    """
    first = requests[0]
    condition = policy.join(policy.encoded(requests) if encoded is None else encoded, [r.guidance for r in requests])
    sigmas = flow_sde.sigma_grid(first.steps, policy.shift, policy.grid).to(policy.device)
    x = normal([r.noise_seed for r in requests], shape, policy.device)
    window = _stochastic_steps(first.sde)
    before = x  # the state before the last step
    noises = (
        normal([derive_seed("sde", r.sde_seed) for r in requests], (len(window), *shape), policy.device)
        if window
        else x
    )
    states, logprobs = [], []
    for i in range(first.steps):
        sigma, following = sigmas[i].expand(len(x)), sigmas[i + 1].expand(len(x))
        v = policy.velocity(x, sigma, condition)
        before = x
        if first.sde is None or i not in window:
            x = flow_sde.ode_step(x, v, sigma, following)
        else:
            step = flow_sde.transition(x, v, sigma, following, sigmas[1], first.sde.schedule, first.sde.level)
            states.append(x)
            x = flow_sde.draw(step, noises[:, i - window.start])
            logprobs.append(flow_sde.step_logprob(x, step))
            if i == window.stop - 1:
                states.append(x)
        if on_step is not None:
            on_step(i + 1, first.steps)
    sde = first.sde
    if first.ends:
        states, logprobs, sde = [before, x], [], SdeSpec("flow", 0.0, first.steps - 1, 1)
    elif sde is None or not window:
        return x, [None] * len(requests)
    path = torch.stack(states, dim=1).cpu().numpy()
    logp = torch.stack(logprobs, dim=1).cpu().numpy() if logprobs else np.zeros((len(x), 0), np.float32)
    grid = sigmas.cpu().numpy()
    return x, [Trajectory(path[b], grid, logp[b], sde, r.guidance) for b, r in enumerate(requests)]


def normal(seeds: Sequence[int], shape: Sequence[int], device: torch.device) -> Tensor:
    """Return standard normal noise (B, *shape), each row from its own seed on the CPU: equal on every device."""
    rows = [torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device)


def _stochastic_steps(sde: SdeSpec | None) -> range:
    """Return the steps that draw noise: none at level 0, which is the ODE."""
    if sde is None or sde.level == 0:
        return range(0)
    return range(sde.window_start, sde.window_start + sde.window_size)
