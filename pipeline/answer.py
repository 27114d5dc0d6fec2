"""``vans answer``: one video, one or more questions, one future per question: caption, mp4, contact sheet.

Runs both models in this process, without Ray: the same engine and the same sampler that the pools hold.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console

from actors.records import Clip, Completion, CompletionRequest, Sample, derive_seed
from cluster.errors import DataError, VansError
from pipeline.config import RunConfig
from pipeline.data.decoder import shown_rate
from pipeline.data.video import decode_timed, decode_video, encode_mp4
from pipeline.evaluate.sheets import Strip, contact_sheet
from pipeline.models import resolve_adapter, resolve_model
from pipeline.sources import video_limits
from pipeline.stages.rendering import render_request
from pipeline.text import in_markup
from rewards.format import parse_answer


@dataclass(frozen=True)
class VideoAnswer:
    """One future: what was said, and the clip that shows it."""

    question: str
    text: str
    caption: str
    frames: np.ndarray  # uint8 (T, H, W, 3)
    path: Path


def run_answer(
    config: RunConfig,
    video: Path,
    questions: Sequence[str],
    out: Path,
    *,
    vlm: str | None = None,
    vdm: str | None = None,
    seed: int = 0,
) -> list[VideoAnswer]:
    """Answer ``questions`` about ``video``; writes mp4 files and a contact sheet beside ``out`` and prints the captions."""
    console = Console()
    sample = load_video(config, video)
    answers = asyncio.run(_answer(config, sample, list(questions), answer_paths(out, len(questions)), vlm, vdm, seed))
    out.parent.mkdir(parents=True, exist_ok=True)
    for item in answers:
        item.path.write_bytes(encode_mp4(item.frames, config.video.fps, near_lossless=False))
        told = f"[bold]{in_markup(item.question)}[/]\n  {in_markup(item.caption)}\n  {in_markup(str(item.path))}"
        console.print(told, highlight=False)
    sheet = out.with_suffix(".png")
    strips = [Strip("input", sample.context), *(Strip(f"{a.question}\n{a.caption}", a.frames) for a in answers)]
    contact_sheet([(video.name, strips)], sheet)
    console.print(f"contact sheet: {sheet}", highlight=False, markup=False)
    return answers


def answer_paths(out: Path, count: int) -> list[Path]:
    """Return the mp4 of each question: ``out`` for one, ``out-1.mp4`` … for several."""
    if out.suffix != ".mp4":
        raise VansError(f"--out {out}: the answer is an mp4 file, so the name must end in .mp4")
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{i + 1}") for i in range(count)]


def load_video(config: RunConfig, video: Path) -> Sample:
    """Decode ``video`` at the sizes the two models see. Raises DataError for a video without frames or a broken one."""
    if not video.is_file():
        raise DataError(f"--video {video}: no such file")
    shape, limits = config.video, video_limits(config)
    try:
        seen, seconds = decode_timed(video, shape.input_frames, shape.vlm_height, shape.vlm_width, limits)
        context = decode_video(video, shape.input_frames, shape.height, shape.width, limits)
    except DataError as error:
        raise DataError(f"--video {video}: {error}") from error
    fps = shown_rate(len(seen), seconds, shape.fps)
    return Sample(video.stem, "predictive", "", "", seen, context, fps=fps, context_frames=context)


def completion_request(config: RunConfig, sample: Sample, question: str, seed: int) -> CompletionRequest:
    """Return what the engine is asked: ``question`` about the video of ``sample``."""
    text = config.evaluate.text
    return CompletionRequest(
        sample_id=sample.id,
        asked=replace(sample, question=question).asked,
        n=1,
        seed=derive_seed(seed, sample.id, question),
        temperature=text.temperature,
        max_tokens=text.max_tokens,
    )


async def _answer(
    config: RunConfig,
    sample: Sample,
    questions: list[str],
    paths: list[Path],
    vlm: str | None,
    vdm: str | None,
    seed: int,
) -> list[VideoAnswer]:
    from actors.vdm.policy import VdmPolicy
    from actors.vlm.engine import EngineSpec, VlmEngine

    vlm_model, vlm_adapter = split_model(config, "vlm", vlm)
    vdm_model, vdm_adapter = split_model(config, "vdm", vdm)
    section, pool = config.evaluate, config.pools.vlm
    spec = EngineSpec(
        vlm_model,
        dtype=pool.dtype,
        max_model_len=pool.max_model_len,
        kv_cache_mib=pool.kv_cache_mib,
        gpu_memory_utilization=pool.gpu_memory_utilization,
        tensor_parallel=pool.tensor_parallel,
        enforce_eager=pool.enforce_eager,
        grouped_lora=pool.grouped_lora,
        text_at_end=pool.text_at_end,
        adapter=vlm_adapter,
    )
    engine = VlmEngine(spec)
    await engine.start()
    try:
        texts: list[list[Completion]] = await asyncio.gather(
            *(engine.generate(completion_request(config, sample, question, seed)) for question in questions)
        )
    finally:
        await asyncio.to_thread(engine.close)
    captions = [
        caption_of(question, completions[0].text) for question, completions in zip(questions, texts, strict=True)
    ]
    artist = VdmPolicy.load(
        vdm_model,
        dtype=config.pools.vdm.dtype,
        adapter=vdm_adapter,
        shift=config.models.flow_shift,
        shared_times=config.models.shared_times,
        decode_batch=config.pools.vdm.max_decode,
        vae_tiling=config.video.vae_tiling,
    )
    guided = section.render.guidance != 1.0
    artist.embed([*captions, *([artist.negative_prompt] if guided else [])])
    artist.drop_text_encoder()  # the largest of the models, and done
    noise = derive_seed(seed, sample.id, "noise")
    clips: list[Clip] = artist.sample(
        [
            render_request(config, sample, caption, i, section.render, noise_seed=noise)
            for i, caption in enumerate(captions)
        ]
    )
    return [
        VideoAnswer(question, completions[0].text, caption, clip.frames, path)
        for question, completions, caption, clip, path in zip(questions, texts, captions, clips, paths, strict=True)
    ]


def split_model(config: RunConfig, role: Literal["vlm", "vdm"], given: str | None) -> tuple[str, str | None]:
    """Return (model folder, adapter folder or None): ``given`` may be a whole model or a PEFT adapter of the configured one."""
    base = getattr(config.models, role)
    adapter = getattr(config.models, f"{role}_adapter")
    if given is None:
        given = adapter
    elif not (Path(given).expanduser() / "adapter_config.json").is_file():
        return resolve_model(given, role), None
    model = resolve_model(base, role)
    return model, resolve_adapter(given, role, model)


def caption_of(question: str, text: str) -> str:
    """Return the caption inside ``text``; raises VansError when the model did not keep the format."""
    answer = parse_answer(text)
    if answer is None:
        raise VansError(
            f"the model's answer to {question!r} is not <think>…</think><ans>…</ans>, so there is nothing to draw: {text!r}"
        )
    return answer.caption
