"""Row 3: the VDM pool beside the stock diffusers pipeline, on distinct captions and on the captions of real stage-1 groups."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from scipy.stats import spearmanr

from actors.pool.pool import WorkerPool
from actors.pool.settings import PoolSection
from actors.records import Clip, CompletionRequest, RenderRequest, Sample, derive_seed
from actors.scoring.clip import ClipScorer
from actors.vdm.families import read_blueprint
from actors.vdm.family import token_timesteps
from actors.vdm.frames import select_reference_frames
from actors.vdm.settings import VdmPoolSection
from actors.vdm.worker import VdmWorker
from actors.vlm.engine import EngineSpec, VlmEngine
from pipeline.config import load_config
from pipeline.data.toy.world import make_sample
from pipeline.fleet.models import resolve_model
from rewards.format import parse_answer
from rewards.similarity import clip_v
from tests.benchmarks.bench import Check, Result, Size, interleave_async, medians, ratios, start_ray

GROUP = 8
STEPS = 10
SHIFT = 3.0


def stock() -> Any:
    """Return diffusers' pipeline of the bundled artist, with the schedule that ours samples by."""
    pipe = WanPipeline.from_pretrained(
        str(resolve_model("tiny", "vdm")), scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw_stock(pipe: Any, requests: list[RenderRequest]) -> np.ndarray:
    """Return uint8 frames (N, T, H, W, 3) of the captions of ``requests``, in batches of 32 as the pool's are."""
    found = []
    for start in range(0, len(requests), 32):
        part = requests[start : start + 32]
        with reference_frames(pipe, part):
            frames = pipe(
                [r.caption for r in part],
                generator=[torch.Generator().manual_seed(r.noise_seed) for r in part],
                num_frames=part[0].num_frames,
                height=32,
                width=32,
                num_inference_steps=STEPS,
                guidance_scale=1.0,
                max_sequence_length=16,
                output_type="np",
            ).frames
        found.append((np.asarray(frames) * 255).round().astype(np.uint8))
    return np.concatenate(found)


@contextmanager
def reference_frames(pipe: Any, requests: list[RenderRequest]) -> Iterator[None]:
    """Within it, the pipeline's transformer sees the reference frames of ``requests`` as ours does: it has no way for them."""
    n = len(requests[0].reference_frames)
    if not n:
        yield
        return
    device = torch.device("cpu")
    family = read_blueprint(Path(pipe.config._name_or_path)).family()
    latents = torch.stack([family.encode_condition(pipe.vae, r.reference_frames, device) for r in requests])

    def before(_module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        x, sigma = kwargs["hidden_states"], kwargs["timestep"].float() / 1000
        times = token_timesteps(sigma.expand(len(x)), n, x.shape[1:], family.geometry.patch)
        return args, kwargs | {"hidden_states": torch.cat([latents, x], dim=2), "timestep": times}

    hooks = (
        pipe.transformer.register_forward_pre_hook(before, with_kwargs=True),
        pipe.transformer.register_forward_hook(lambda _module, _args, out: (out[0][:, :, n:],)),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def distinct(count: int, turn: int) -> list[RenderRequest]:
    """Return requests whose captions all differ and that have no reference frames: what the stock pipeline can do."""
    none = np.zeros((0, 32, 32, 3), np.uint8)
    captions = [f"{make_sample(turn * count + i, 'train').caption} {turn} {i}" for i in range(count)]
    return [RenderRequest("s", i, c, none, 9, STEPS, 1.0, noise_seed=1000 * turn + i) for i, c in enumerate(captions)]


async def completed(samples: list[Sample]) -> list[list[str]]:
    """Return the captions that the bundled thinker really gives, eight for each sample; malformed answers have none."""
    engine = VlmEngine(EngineSpec(str(resolve_model("tiny", "vlm"))))
    await engine.start()
    try:
        asked = [CompletionRequest(s.id, s.asked, GROUP, seed=i, max_tokens=40) for i, s in enumerate(samples)]
        found = await asyncio.gather(*(engine.generate(r) for r in asked))
    finally:
        await asyncio.to_thread(engine.close)
    answers = [[parse_answer(c.text) for c in group] for group in found]
    return [[a.caption for a in group if a is not None] for group in answers]


def stage1_requests(
    samples: list[Sample], captions: list[list[str]], references: int, steps: int
) -> list[list[RenderRequest]]:
    """Return, group by group, what stage 1 has drawn for every completion: one noise in a group."""
    return [
        [
            RenderRequest(
                s.id,
                i,
                caption,
                select_reference_frames(s.context, references),
                9,
                steps,
                1.0,
                noise_seed=derive_seed(0, s.id),
            )
            for i, caption in enumerate(group)
        ]
        for s, group in zip(samples, captions, strict=True)
    ]


async def measure_pool(size: Size) -> Result:
    """Measure both, and how far fewer steps rank a group's captions alike."""
    count, prompts, repeats = (64, 16, 5) if size == "full" else (4, 2, 1)
    config, path = load_config("toy"), str(resolve_model("tiny", "vdm"))
    torch.set_num_threads(1)
    toys = [make_sample(i, "train") for i in range(prompts)]
    samples = [Sample(t.id, "predictive", t.question, t.caption, t.input_frames, t.target_frames) for t in toys]
    captions = await completed(samples)
    groups = stage1_requests(samples, captions, config.video.reference_frames, STEPS)
    every = [r for group in groups for r in group]
    pipe, actor = stock(), ray.remote(VdmWorker)
    spec = PoolSection(workers=1, max_batch=32)
    turn, epoch = 0, 0

    def make(name: str) -> Any:
        section = config.pools.vdm  # as the toy run sets them
        options = {
            "shift": SHIFT,
            "settings": VdmPoolSection(
                max_decode=section.max_decode, max_embed=section.max_embed, channels_last=section.channels_last
            ),
        }
        return actor.options(num_cpus=1, max_concurrency=2).remote(name, path, options=options)

    async with WorkerPool("vdm", make, spec) as pool:

        async def submit(requests: list[RenderRequest]) -> list[Clip]:
            return list(await asyncio.gather(*(pool.submit(r) for r in requests)))

        async def ours() -> float:
            nonlocal turn
            turn += 1
            requests = distinct(count, turn)
            began = time.perf_counter()
            await submit(requests)
            return count / (time.perf_counter() - began)

        async def theirs() -> float:
            requests = distinct(count, turn + 500)
            began = time.perf_counter()
            draw_stock(pipe, requests)
            return count / (time.perf_counter() - began)

        async def ours_real() -> float:
            nonlocal epoch
            epoch += 1
            began = time.perf_counter()
            chosen = [list({r.caption: r for r in group}.values()) for group in groups]  # as Stage1 with `dedupe`
            await submit([r for group in chosen for r in group])
            return len(every) / (time.perf_counter() - began)

        async def theirs_real() -> float:
            began = time.perf_counter()
            draw_stock(pipe, every)
            return len(every) / (time.perf_counter() - began)

        for same in (distinct(4, 9999), every[:4]):
            clips, expected = await submit(same), draw_stock(pipe, same)
            gaps = [int(np.abs(c.frames.astype(int) - e).max()) for c, e in zip(clips, expected, strict=True)]
            assert max(gaps) <= 1, f"the clips differ by {gaps} grey levels"
        plain = await interleave_async([ours, theirs], repeats)
        real = await interleave_async([ours_real, theirs_real], repeats)
        few = stage1_requests(samples, captions, config.video.reference_frames, config.stage1.render.steps)
        ranks = rank_correlations(
            samples, [(await submit(a), await submit(b)) for a, b in zip(few, groups, strict=True)]
        )
    checks = (
        Check("clips/s, distinct captions, pool ÷ WanPipeline", ratios(plain), "≥", 1.0),
        Check("captions of real groups answered/s, pool ÷ WanPipeline", ratios(real), "≥", 1.3),
    )
    figures = medians(plain, "distinct: clips/s, pool", "distinct: clips/s, WanPipeline")
    figures |= medians(real, "real groups: captions/s, pool", "real groups: captions/s, WanPipeline")
    figures |= {
        "real groups: completions with a caption": float(len(every)),
        "real groups: different captions in their groups": float(sum(len({r.caption for r in g}) for g in groups)),
        f"rank correlation in a group, CLIP-V after {config.stage1.render.steps} and {STEPS} steps": float(
            np.mean(ranks)
        ),
        "groups with different CLIP-V": float(len(ranks)),
    }
    notes = (
        "Distinct captions: no reference frames, the same noise, Euler schedule and ten steps on both sides; the clips are the same",
        "to one grey level. Real groups: eight completions of the bundled thinker for each sample, with reference frames. The stock",
        "pipeline cannot take them; a hook puts their latents before the transformer's input, so that its clips are the same as ours.",
        "Ours draws equal captions of a group once, and keeps embeddings and reference latents from round to round, as over epochs;",
        "how many captions differ is below: where nearly all do, there is nearly nothing to draw once. The rank correlation (Spearman)",
        "is that of a group's CLIP-V by the toy run's `stage1.render.steps` with that by ten steps.",
    )
    return Result(checks, figures, notes)


def rank_correlations(samples: list[Sample], drawn: list[tuple[list[Clip], list[Clip]]]) -> list[float]:
    """Return Spearman's correlation of the two ways' CLIP-V, for each group in which either has something to rank."""
    clip, found = ClipScorer(resolve_model("tiny", "clip")), []
    for s, (few, many) in zip(samples, drawn, strict=True):
        truth = clip.image_features([s.target_frames])[0]
        a, b = ([clip_v(f, truth) for f in clip.image_features([c.frames for c in clips])] for clips in (few, many))
        if len(set(a)) > 1 and len(set(b)) > 1:
            found.append(float(spearmanr(a, b).statistic))
    return found or [1.0]


def measure(size: Size) -> Result:
    """Measure with a pool of one worker."""
    start_ray()
    return asyncio.run(measure_pool(size))
