"""The real artist's transformer with random weights on a CPU: it learns within the memory and operations of the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from actors.architectures import architecture, cost
from actors.learner.objectives.grpo import grpo_loss, normaliser
from actors.learner.sharding import checkpoint_units, unit_names
from actors.policy.protocol import trainable_parameters
from actors.policy.settings import LoraSection
from actors.records import SdeSpec, Trajectory, VdmExperience
from actors.vdm import flow_sde, trajectories
from actors.vdm.files import Parts
from actors.vdm.policy import VdmPolicy
from actors.vdm.text_encoder import padded
from actors.vdm.trajectories import Condition

NAME = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
FRAMES, SIDE, REFERENCES = 5, 96, 1
GIB = 2**30


def peak_rss() -> int:
    """Bytes of the largest resident set since the last ``reset_peak``."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def reset_peak() -> int:
    """Start a new measurement of the peak; returns the resident bytes now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_rss()


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_a_lora_step_of_wan_1_3b_fits_and_costs_what_the_plan_says() -> None:
    model = architecture(NAME, "vdm")
    before = reset_peak()
    parts = Parts(
        blueprint=model.blueprint,
        transformer=model.random("transformer", torch.bfloat16),
        vae=model.random("vae"),
        text_encoder=None,
        tokenizer=None,
    )
    policy = VdmPolicy(parts, dtype=torch.bfloat16)
    policy.inject(LoraSection(rank=8, alpha=32.0))
    checkpoint_units(policy.module, unit_names(policy.module, policy.fsdp_units))
    trained = trainable_parameters(policy.module)
    with torch.no_grad():
        for name, parameter in policy.module.named_parameters():
            if "lora_B" in name:  # zero at first, and then lora_A would have no gradient
                parameter.uniform_(-1e-3, 1e-3)
    # A trajectory of one stochastic step, as a sampler would hand it over.
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (REFERENCES, SIDE, SIDE, 3)).astype(np.uint8)
    shape = policy.geometry.latent_shape(FRAMES, SIDE, SIDE, REFERENCES)
    path = rng.standard_normal((2, *shape)).astype(np.float32)
    grid = flow_sde.sigma_grid(10, 3.0).numpy()
    spec = SdeSpec("flow", 0.7, window_start=2, window_size=1)
    item = VdmExperience("s", 0, "a cup falls", frames, Trajectory(path, grid, np.zeros(1, np.float32), spec, 1.0), 1.0)
    text = torch.randn(512, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    condition = Condition(padded([text], 512), policy.encode_references(frames)[None], None, torch.ones(1))
    batch = trajectories.collate([item], condition, policy.device)

    counter: Any = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # the counter knows no fused attention of the CPU
        out = policy.forward(batch)
        loss, _ = grpo_loss(
            out.logprobs,
            out.logprobs.detach(),
            torch.ones(1),
            out.mask,
            clip_low=1e-3,
            clip_high=1e-3,
            loss_norm="sequence",
            normaliser=normaliser(out.mask, "sequence"),
        )
        loss.backward()
    used = peak_rss() - before
    assert out.mean is not None and (out.logprobs.dtype, out.mean.dtype) == (torch.float32, torch.float32)
    assert bool(out.logprobs.isfinite().all())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in trained)
    assert sum(float(p.grad.float().abs().sum()) for p in trained) > 0
    assert len(trained) == 2 * 10 * 30 and sum(p.numel() for p in trained) == cost.lora_parameters(model, 8)

    tokens = model.shapes.tokens(FRAMES, SIDE, SIDE, REFERENCES)
    planned = model.shapes.transformer_flops(tokens).update(lora=True, checkpointing=True, kl=False, old_pass=False)
    real = counter.get_total_flops()
    print(
        f"tokens {tokens.total}: {real / 1e12:.3f} TFLOP, planned {planned.total / 1e12:.3f}; peak {used / GIB:.2f} GiB"
    )
    assert real == pytest.approx(planned.total, rel=0.05)
    stored = 2 * model.parameters("transformer") + 4 * model.parameters("vae")
    assert stored < used < 1.25 * stored + GIB
