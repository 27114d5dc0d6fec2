"""The VDM worker: failures pinned to their requests (in process), and published weights through Ray's object store."""

from __future__ import annotations

import numpy as np
import pytest
import ray
import torch

from actors.failures import Failure, Ok
from actors.policy.lora import adapter_config
from actors.records import SdeSpec
from actors.vdm.policy import VdmPolicy
from actors.vdm.sampling import NotWanted, sample
from actors.vdm.worker import VdmWorker
from actors.weights.transport import pack, send
from cluster.errors import CheckpointError

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def worker(tiny, ray_local):
    actor = ray.remote(VdmWorker).options(num_cpus=0.5).remote("vdm-0", str(tiny))
    info = ray.get(actor.setup.remote(), timeout=280)
    assert info.name == "vdm-0" and info.device == "cpu" and len(info.model_hash) == 32
    yield actor
    ray.kill(actor)


def call(method, *arguments):
    return ray.get(method.remote(*arguments), timeout=120)


def test_good_requests_are_answered_and_bad_ones_classed(worker, make_request):
    requests = [make_request(0), make_request(1, num_frames=10), make_request(2, sde=SdeSpec("flow", 0.7, 0, 1))]
    outcomes = call(worker.process, requests)
    assert isinstance(outcomes[0], Ok) and outcomes[0].value.index == 0
    assert isinstance(outcomes[1], Failure) and outcomes[1].kind == "data" and "use 9 or 13" in outcomes[1].message
    assert isinstance(outcomes[2], Ok) and outcomes[2].value.trajectory.latents.shape == (2, 16, 3, 4, 4)
    assert call(worker.ping) == "vdm-0" and call(worker.process, []) == []


def test_published_adapters_come_and_go_and_the_base_stays(worker, lora_policy, policy, make_request):
    request = make_request(3)
    base_hash = call(worker.weights_hash)
    base = call(worker.process, [request])[0].value
    refs = send(pack(7, "lora", lora_policy.adapter_state(), adapter_config(lora_policy.module)))
    assert call(worker.load_weights, 7, refs) == 7
    tuned = call(worker.process, [request])[0].value
    assert tuned.weights_version == 7 and base.weights_version == 0
    assert np.array_equal(tuned.frames, sample(lora_policy, [request])[0].frames)
    assert not np.array_equal(tuned.frames, base.frames)
    assert call(worker.weights_hash) == base_hash.split(":")[0] + ":7"
    call(worker.load_weights, 0, None)
    assert np.array_equal(call(worker.process, [request])[0].value.frames, base.frames)
    assert call(worker.weights_hash) == base_hash


def test_an_adapter_of_another_shape_is_refused(worker, tiny):
    from actors.policy.settings import LoraSection

    call(worker.load_weights, 1, send(_adapter(tiny, LoraSection(rank=4, alpha=8.0))))
    with pytest.raises(CheckpointError, match="does not fit the injected one"):
        call(worker.load_weights, 2, send(_adapter(tiny, LoraSection(rank=2, alpha=8.0))))
    call(worker.load_weights, 0, None)


def test_full_weights_come_and_go(tiny, ray_local, make_request):
    local = VdmWorker("vdm-1", str(tiny))
    local.setup()
    before, frames = local.weights_hash(), local.process([make_request()])[0].value.frames
    tuned = VdmPolicy.load(tiny)
    with torch.no_grad():
        tuned.module.proj_out.bias += 0.1
    local.load_weights(3, send(pack(3, "full", tuned.module.state_dict())))
    clip = local.process([make_request()])[0].value
    assert clip.weights_version == 3 and np.array_equal(clip.frames, sample(tuned, [make_request()])[0].frames)
    assert local.weights_hash().split(":")[0] != before.split(":")[0]
    local.load_weights(0, None)
    assert np.array_equal(local.process([make_request()])[0].value.frames, frames) and local.weights_hash() == before


def test_full_weights_and_adapters_replace_each_other(tiny, ray_local, make_request):
    from actors.policy.settings import LoraSection

    local = VdmWorker("vdm-1", str(tiny))
    local.setup()
    base = local.weights_hash().split(":")[0]
    tuned = VdmPolicy.load(tiny)
    with torch.no_grad():
        tuned.module.proj_out.bias += 0.1
    adapter, whole = _adapter(tiny, LoraSection(rank=4, alpha=8.0)), pack(0, "full", tuned.module.state_dict())
    local.load_weights(1, send(adapter))
    adapted = local.process([make_request()])[0].value.frames
    local.load_weights(2, send(whole))
    assert np.array_equal(local.process([make_request()])[0].value.frames, sample(tuned, [make_request()])[0].frames)
    local.load_weights(3, send(adapter))  # on the folder's own weights, not on the ones before
    assert np.array_equal(local.process([make_request()])[0].value.frames, adapted)
    assert local.weights_hash() == f"{base}:3"


def test_weights_that_make_nan_fail_by_name_and_alone(tiny, make_request):
    local = VdmWorker("vdm-2", str(tiny))
    local.setup()
    clean = local.process([make_request(0, caption="blue square"), make_request(1)])
    poisoned = local.policy.embed(["blue square"])
    embed = local.policy.embedder
    embed._cache.put("blue square", torch.full_like(poisoned[0], float("nan")))
    outcomes = local.process([make_request(0, caption="blue square"), make_request(1)])
    assert (
        isinstance(outcomes[0], Failure) and outcomes[0].kind == "bug" and "s[0]: sampling gave" in outcomes[0].message
    )
    assert isinstance(outcomes[1], Ok) and isinstance(clean[0], Ok)


def test_a_call_that_is_not_wanted_any_more_is_not_tried_again_and_the_next_is_answered(tiny, make_request):
    local = VdmWorker("vdm-2", str(tiny))
    local.setup()
    seen = []

    def on_step(done: int, steps: int) -> None:
        seen.append(done)
        raise NotWanted

    with pytest.raises(NotWanted):
        local.process([make_request(0), make_request(1)], on_step)
    assert seen == [1]
    assert all(isinstance(outcome, Ok) for outcome in local.process([make_request(0), make_request(1)]))


def _adapter(tiny, spec):
    policy = VdmPolicy.load(tiny, lora=spec)
    return pack(1, "lora", policy.adapter_state(), adapter_config(policy.module))


def test_a_resting_worker_wakes_for_whatever_needs_it(worker, lora_policy, make_request):
    request = make_request(3)
    base_hash, base = call(worker.weights_hash), call(worker.process, [request])[0].value.frames
    call(worker.rest)
    assert call(worker.ping) == "vdm-0"
    assert np.array_equal(call(worker.process, [request])[0].value.frames, base)
    call(worker.rest)
    call(worker.rest)
    assert call(worker.weights_hash) == base_hash
    call(worker.rest)
    refs = send(pack(7, "lora", lora_policy.adapter_state(), adapter_config(lora_policy.module)))
    call(worker.load_weights, 7, refs)
    call(worker.rest)
    tuned = call(worker.process, [request])[0].value.frames
    assert np.array_equal(tuned, sample(lora_policy, [request])[0].frames)
    call(worker.load_weights, 0, None)


def test_rest_frees_the_models_memory(tiny, make_request):
    local = VdmWorker("vdm-2", str(tiny))
    local.setup()
    parameters = list(local.policy.module.parameters())
    # On a CPU they lie in the file that is mapped; on a GPU in memory of torch's own, as here.
    for parameter in parameters:
        parameter.data = parameter.data.clone()
    held = sum(p.nbytes for p in parameters)
    assert local.rest() >= held and all(p.untyped_storage().nbytes() == 0 for p in parameters)
    assert isinstance(local.process([make_request()])[0], Ok)
    assert sum(p.untyped_storage().nbytes() for p in parameters) >= held
