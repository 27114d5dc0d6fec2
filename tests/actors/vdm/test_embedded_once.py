"""Captions and reference frames are made into tensors once, elsewhere: clips and log-probabilities are bitwise the same."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from actors.failures import Failure, Ok
from actors.policy.settings import LoraSection
from actors.records import EmbedRequest, EncodeRequest, RenderRequest, SdeSpec, VdmExperience
from actors.vdm.embed_worker import EmbedWorker
from actors.vdm.policy import VdmPolicy
from actors.vdm.sampling import sample
from actors.vdm.settings import Tiling, VdmPoolSection
from actors.vdm.worker import VdmWorker
from cluster.errors import CheckpointError, ConfigError
from pipeline.fleet.conditions import Conditions

SAMPLER = ("transformer", "vae_decoder")
LEARNER = ("transformer",)
SDE = SdeSpec("flow", 0.7, 0, 2)


@dataclass
class Embedder:
    """A pool of one worker in this process that remembers what it was asked for, and in how many turns it answers."""

    worker: EmbedWorker
    asked: Counter = field(default_factory=Counter)

    async def submit(self, request: Any) -> Any:
        key = request.caption if isinstance(request, EmbedRequest) else "frames"
        self.asked[key] += 1
        await asyncio.sleep(0.01)
        (outcome,) = self.worker.process([request])
        if isinstance(outcome, Failure):
            raise ValueError(outcome.message)
        return outcome.value


@pytest.fixture(scope="module")
def embedder(tiny) -> EmbedWorker:
    worker = EmbedWorker("embed-0", str(tiny))
    worker.setup()
    return worker


def conditioned(embedder: EmbedWorker, requests: list[RenderRequest]) -> list[RenderRequest]:
    import dataclasses

    conditions = Conditions(Embedder(embedder).submit, 1 << 20)

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(conditions.of(request) for request in requests))

    found = asyncio.run(all_of_them())
    return [dataclasses.replace(r, condition=c) for r, c in zip(requests, found, strict=True)]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("references", [0, 2])
def test_a_sampler_without_frozen_models_draws_bitwise_the_same(tiny, embedder, make_request, guidance, references):
    captions = ["the red circle rises", "blue square", "the green circle"]
    requests = [
        make_request(i, references=references, caption=c, guidance=guidance, sde=SDE) for i, c in enumerate(captions)
    ]
    whole = VdmWorker("vdm-0", str(tiny))
    bare = VdmWorker("vdm-1", str(tiny), options={"components": SAMPLER})
    for worker in (whole, bare):
        worker.setup()
    here = [outcome.value for outcome in whole.process(requests)]
    there = [outcome.value for outcome in bare.process(conditioned(embedder, requests))]
    for a, b in zip(here, there, strict=True):
        assert np.array_equal(a.frames, b.frames)
        assert np.array_equal(a.trajectory.latents, b.trajectory.latents)
        assert np.array_equal(a.trajectory.logprobs, b.trajectory.logprobs)
        assert a.condition is not None and b.condition is None  # who sent it has it
    assert bare.counters()["captions_asked"] == 0 and whole.counters()["captions"] == 3 + (guidance != 1.0)
    latents = sum(request.steps for request in requests)
    for counts in (whole.counters(), bare.counters()):
        assert (counts["clips"], counts["latents"], counts["passes"]) == (3, latents, latents * (1 + (guidance != 1.0)))
    assert "text_encoder" in whole.held() and set(bare.held()) == set(SAMPLER)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_learner_of_the_transformer_alone_repeats_the_sampler(lora_policy, tiny, make_request, guidance):
    requests = [make_request(i, guidance=guidance, sde=SDE) for i in range(3)]
    items = [
        VdmExperience(c.sample_id, c.index, c.caption, r.reference_frames, c.trajectory, 1.0, c.condition)
        for c, r in zip(sample(lora_policy, requests), requests, strict=True)
    ]
    learner = VdmPolicy.load(tiny, lora=LoraSection(rank=4, alpha=8.0), components=LEARNER)
    learner.load_adapter_state(lora_policy.adapter_state())
    out = learner.forward(learner.collate(items))
    assert torch.equal(out.logprobs.detach(), learner.rollout_logprobs(items))
    assert set(learner.held()) == {"transformer"}
    bare = VdmExperience("s", 0, "red", requests[0].reference_frames, items[0].trajectory, 1.0)
    with pytest.raises(CheckpointError, match="came without their embeddings"):
        learner.collate([bare])


def test_an_ode_clip_carries_no_condition(policy, make_request):
    assert sample(policy, [make_request()])[0].condition is None


def test_a_group_asks_once_and_so_does_the_run(embedder, make_request):
    pool = Embedder(embedder)
    conditions = Conditions(pool.submit, 1 << 20)
    requests = [make_request(i, caption=c, guidance=3.0) for i, c in enumerate(["red", "red", "blue", "red"])]

    async def story() -> None:
        first = asyncio.create_task(conditions.of(requests[0]))
        others = [asyncio.create_task(conditions.of(request)) for request in requests[1:]]
        await asyncio.sleep(0.0005)
        first.cancel()  # whoever asked first may go: the others still wait for the same answers
        found = await asyncio.gather(*others)
        again = await conditions.of(requests[1])
        assert again.text is found[0].text and again.references is found[1].references
        assert np.array_equal(again.negative, found[1].negative)

    asyncio.run(story())
    assert pool.asked == {"red": 1, "blue": 1, None: 1, "frames": 1}
    # Four members and one more: each asks for a caption, the negative prompt and the frames.
    assert conditions.counters() == {"captions": 3, "captions_asked": 10, "references": 1, "references_asked": 5}


def test_what_failed_is_asked_again_and_what_fell_out_is_made_again(embedder, make_request):
    pool = Embedder(embedder)
    conditions = Conditions(pool.submit, 1)  # room for one entry

    async def story() -> None:
        with pytest.raises(ValueError, match="caption is empty"):
            await conditions.of(make_request(caption=" "))
        for caption in ("red", "blue", "red"):
            await conditions.of(make_request(caption=caption, references=0))

    asyncio.run(story())
    assert pool.asked["red"] == 2 and pool.asked["blue"] == 1


def test_the_embed_worker_pins_failures_and_holds_no_transformer(embedder, make_request):
    frames = make_request().reference_frames
    outcomes = embedder.process(
        [
            EmbedRequest("red"),
            EmbedRequest(""),
            EncodeRequest("s", frames.astype(np.float32), 9),
            EncodeRequest("s", frames, 9),
        ]
    )
    assert [type(o) for o in outcomes] == [Ok, Failure, Failure, Ok]
    assert outcomes[1].kind == outcomes[2].kind == "data"
    assert set(embedder.held()) == {"text_encoder", "vae_encoder"}
    with pytest.raises(ValueError, match="takes no weights"):
        embedder.load_weights(1, [object()])


def test_clips_decoded_in_parts_and_text_let_go_change_nothing(tiny, policy, make_request):
    requests = [make_request(i, noise_seed=i) for i in range(3)]
    one_by_one = VdmPolicy.load(tiny, settings=VdmPoolSection(max_decode=1))
    one_by_one.embed([r.caption for r in requests])
    one_by_one.drop_text_encoder()
    assert "text_encoder" not in one_by_one.held()
    for a, b in zip(sample(one_by_one, requests), sample(policy, requests), strict=True):
        assert np.abs(a.frames.astype(int) - b.frames).max() <= 1  # another batch of the VAE: float noise only
    with pytest.raises(CheckpointError, match="has been let go"):
        one_by_one.embed(["another caption"])


def test_tiles_need_less_memory_and_show_the_same(tiny):
    """Beyond 256 pixels the VAE works tile by tile; tiles overlap, so the picture stays."""
    latents = torch.randn(1, 16, 1, 4, 40, generator=torch.Generator().manual_seed(0))
    plain, tiled = (VdmPolicy.load(tiny, tiling=tiling) for tiling in (None, Tiling()))
    seen: list[int] = []
    hook = tiled.vae.decoder.register_forward_pre_hook(lambda _m, args: seen.append(args[0].shape[-1]))
    frames = [p.decode(latents).astype(int) for p in (plain, tiled)]
    hook.remove()
    assert frames[0].shape == frames[1].shape == (1, 1, 32, 320, 3)
    assert max(seen) == 32  # latent columns at a time: 256 pixels
    # The decoder's attention sees a tile instead of the frame, so pixels differ a little everywhere.
    assert np.abs(frames[0] - frames[1]).mean() < 0.1 * frames[0].std()


def test_tiles_are_as_large_as_they_are_set(tiny):
    tiled = VdmPolicy.load(tiny, tiling=Tiling((32, 128), (32, 64)))
    seen: list[tuple[int, ...]] = []
    hook = tiled.vae.decoder.register_forward_pre_hook(lambda _m, args: seen.append(tuple(args[0].shape[-2:])))
    tiled.decode(torch.randn(1, 16, 1, 8, 40, generator=torch.Generator().manual_seed(0)))
    hook.remove()
    assert {shape[0] for shape in seen} == {4}  # rows of a latent of 8 pixels
    assert max(shape[1] for shape in seen) == 16 and len(seen) == 2 * 5
    with pytest.raises(ConfigError, match="one latent of 8 pixels a side, and 60 is no multiple"):
        VdmPolicy.load(tiny, tiling=Tiling((32, 128), (32, 60)))


def test_an_adapter_that_reaches_into_the_text_encoder_is_refused(lora_policy, tiny, tmp_path):
    from safetensors.torch import load_file, save_file

    lora_policy.export(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(load_file(file) | {"base_model.model.text_encoder.q.lora_A.weight": torch.zeros(4, 32)}, file)
    with pytest.raises(CheckpointError, match="1 tensors for the text encoder"):
        VdmPolicy.load(tiny, adapter=tmp_path, components=LEARNER)
