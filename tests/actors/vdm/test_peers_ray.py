"""A sampler of two processes draws what one process draws, whatever weights it is given, and leaves no process behind.

The reference is a policy of this process. Clips have two reference frames of time 0 before three noisy latent frames, 80 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import torch

from actors.failures import Failure, Ok
from actors.policy.lora import adapter_config
from actors.records import Clip, RenderRequest, SdeSpec
from actors.vdm.policy import VdmPolicy
from actors.vdm.sampling import sample
from actors.vdm.settings import VdmPoolSection
from actors.vdm.worker import VdmWorker
from actors.weights.transport import pack, send

Requests = Callable[..., RenderRequest]


@pytest.fixture(scope="module")
def shared(tiny: Path, ray_local: None) -> Iterator[tuple[Any, psutil.Process]]:
    """A worker that leads one peer, and the peer."""
    options = {"settings": VdmPoolSection(context_parallel=2)}
    worker = ray.remote(VdmWorker).options(num_cpus=0.5).remote("vdm-0", str(tiny), options=options)
    info = ray.get(worker.setup.remote(), timeout=280)
    (peer,) = peers(info.pid)
    yield worker, peer
    ray.kill(worker)


def peers(pid: int) -> list[psutil.Process]:
    """Return the processes that the worker ``pid`` leads."""
    return [child for child in psutil.Process(pid).children() if "spawn_main" in " ".join(child.cmdline())]


def call(method: Any, *arguments: Any) -> Any:
    return ray.get(method.remote(*arguments), timeout=120)


def batch(make_request: Requests) -> list[RenderRequest]:
    """Two clips of an ODE with where it ends, and two guided ones of an SDE with what is learnt from."""
    sde: dict[str, Any] = {"sde": SdeSpec("flow", 0.7, 0, 2), "guidance": 2.0}
    return [make_request(i, **how) for how in ({"ends": True}, sde) for i in range(2)]


def assert_same(found: list[Any], expected: list[Clip]) -> None:
    assert all(isinstance(outcome, Ok) for outcome in found), found
    for outcome, clip in zip(found, expected, strict=True):
        one, other = outcome.value.trajectory, clip.trajectory
        np.testing.assert_allclose(one.latents, other.latents, rtol=0, atol=1e-5)
        np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=1e-5)
        assert np.abs(outcome.value.frames.astype(int) - clip.frames).max() <= 1
        assert np.array_equal(outcome.value.condition.references, clip.condition.references)


def test_two_processes_draw_what_one_draws(shared, policy: VdmPolicy, make_request: Requests) -> None:
    requests = batch(make_request)
    expected = sample(policy, requests)
    assert [clip.trajectory.logprobs.shape for clip in expected] == [(0,), (0,), (2,), (2,)]
    assert_same(call(shared[0].process, requests), expected)


def test_weights_reach_both(shared, tiny: Path, policy: VdmPolicy, lora_policy: VdmPolicy, make_request: Requests):
    worker, requests = shared[0], batch(make_request)
    base = sample(policy, requests)

    def publish(version: int, kind: Any, tensors: Any, config: Any = None) -> list[Any]:
        assert call(worker.load_weights, version, send(pack(version, kind, tensors, config))) == version
        return call(worker.process, requests)

    adapted = sample(lora_policy, requests)
    moved = max(np.abs(a.trajectory.latents - b.trajectory.latents).max() for a, b in zip(adapted, base))
    assert moved > 1e-3, "the adapter changes what is drawn"
    assert_same(publish(1, "lora", lora_policy.adapter_state(), adapter_config(lora_policy.module)), adapted)
    full = VdmPolicy.load(tiny)
    with torch.no_grad():
        full.module.blocks[0].ffn.net[2].weight *= 1.5
    assert_same(publish(2, "full", full.module.state_dict()), sample(full, requests))
    assert call(worker.load_weights, 0, None) == 0
    assert call(worker.rest) > 0  # and what rests comes back, in both
    assert_same(call(worker.process, requests), base)


def test_a_clip_that_cannot_be_shared_fails_and_takes_the_peer_along(shared, make_request: Requests) -> None:
    worker, peer = shared
    odd = make_request(references=0, steps=1)
    odd = RenderRequest(**{**vars(odd), "reference_frames": np.zeros((0, 8, 8, 3), np.uint8)})
    (outcome,) = call(worker.process, [odd])
    assert isinstance(outcome, Failure) and outcome.kind == "bug"
    assert "pools.vdm.context_parallel=2 must divide a clip's tokens (3): use one of 1, 3" in outcome.message
    psutil.wait_procs([peer], timeout=20)
    assert not peer.is_running()
    with pytest.raises(Exception, match="draw failed"):  # so that the pool replaces the worker
        call(worker.ping)
    (outcome,) = call(worker.process, [make_request()])
    assert isinstance(outcome, Failure) and outcome.kind == "infrastructure"
