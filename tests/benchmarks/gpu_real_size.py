"""What one group costs at real size on one device: random weights, our policies and losses, no Ray and no download.

    python tests/benchmarks/gpu_real_size.py --out real_size.json            # one GPU, 352x640x33, G = 8
    python tests/benchmarks/gpu_real_size.py --size tiny --out tiny.json     # the bundled pair's size, on any CPU

Needs torch, transformers, diffusers and peft. Seconds are those of the second of two runs where a run is short, and of the
only one otherwise; memory is the peak that torch's allocator saw in the part. Achieved operations are those that
``actors.architectures.cost`` counts, over the seconds, beside the rate of a large bfloat16 matrix product on the same card.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from actors.architectures import Architecture, architecture, cost  # noqa: E402
from actors.learner.grpo import grpo_loss, normaliser  # noqa: E402
from actors.learner.sharding import checkpoint_units, unit_names  # noqa: E402
from actors.learner.trainable import LoraSpec, trainable_parameters  # noqa: E402
from actors.records import RenderRequest, SdeSpec, VdmExperience, VlmExperience  # noqa: E402
from actors.vdm.loading import Parts  # noqa: E402
from actors.vdm.policy import VdmPolicy  # noqa: E402
from actors.vdm.text import CaptionEmbedder  # noqa: E402
from actors.vlm import adapter as vlm_adapter  # noqa: E402
from actors.vlm.policy import VlmPolicy  # noqa: E402

TINY = ROOT / "pipeline" / "assets" / "tiny"
CAPTION = "the red circle moves up"


@dataclass(frozen=True)
class Size:
    """What is measured: models, the clip, the group, and how the learner cuts it."""

    vlm: str
    vdm: str
    clip: str
    frames: tuple[int, int, int]  # of a clip: number, height, width
    references: int
    input_frames: tuple[int, int, int]  # of the VLM's video
    group: int
    steps: int
    completion: int  # tokens
    text_tokens: int
    micro_batch: int
    vlm_micro_batch: int
    dtype: torch.dtype


REAL = Size(
    vlm="Qwen/Qwen2.5-VL-3B-Instruct",
    vdm="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    clip="openai/clip-vit-large-patch14",
    frames=(33, 352, 640),
    references=6,
    input_frames=(16, 252, 448),
    group=8,
    steps=10,
    completion=256,
    text_tokens=512,
    micro_batch=2,
    vlm_micro_batch=2,
    dtype=torch.bfloat16,
)
SIZES = {
    "real": REAL,
    "tiny": replace(
        REAL,
        vlm=str(TINY / "vlm"),
        vdm=str(TINY / "vdm"),
        clip=str(TINY / "clip"),
        frames=(9, 32, 32),
        references=2,
        input_frames=(9, 32, 32),
        steps=4,
        completion=16,
        text_tokens=16,
        micro_batch=4,
        vlm_micro_batch=4,
    ),
}


class Meter:
    """Seconds, peak memory and achieved operations of named parts."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self.parts: dict[str, dict[str, float]] = {}

    def run(self, name: str, work: Callable[[], Any], flops: float = 0.0, repeat: int = 1) -> Any:
        """Call ``work`` ``repeat`` times and note what the last call took."""
        result = None
        for _ in range(repeat):
            result = None
            gc.collect()
            if self.cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            started = time.perf_counter()
            result = work()
            if self.cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
        self.parts[name] = {"seconds": seconds, "tflop": flops / 1e12, "tflop_per_s": flops / seconds / 1e12}
        if self.cuda:
            self.parts[name]["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        print(name, {k: round(v, 4) for k, v in self.parts[name].items()}, flush=True)
        return result


def matmul_rate(device: torch.device, side: int, dtype: torch.dtype) -> float:
    """Return the operations per second of a square matrix product, the best of 10."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def frames_of(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3)).astype(np.uint8)


# --- the artist ------------------------------------------------------------------------------------------------------


def embedder(model: Architecture, size: Size, meter: Meter) -> CaptionEmbedder:
    """Embed the group's captions once, and let the encoder go: it is larger than everything else together."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY / "vdm" / "tokenizer")  # its ids are ids of any larger vocabulary
    encoder: Any = model.random("text_encoder", size.dtype, str(meter.device)).requires_grad_(False)
    made = CaptionEmbedder(encoder, tokenizer, max_tokens=size.text_tokens)
    tokens = len(tokenizer(CAPTION)["input_ids"])
    meter.run("embed_caption", lambda: made([CAPTION]), cost.text_encoder_flops(model, tokens).total)
    made.encoder = None
    return made


def artist(size: Size, meter: Meter) -> VdmPolicy:
    model = architecture(size.vdm, "vdm")
    captions = embedder(model, size, meter)
    device = str(meter.device)
    parts = Parts(
        folder=TINY,
        transformer=model.random("transformer", size.dtype, device),
        vae=model.random("vae", torch.float32, device),
        vae_config=model.components["vae"],
        has_encoder=True,
        has_decoder=True,
        text_encoder=None,
        tokenizer=None,
    )
    policy = VdmPolicy(parts, dtype=size.dtype, device=device, decode_batch=1)
    policy.embedder = captions
    policy.inject(LoraSpec(rank=8, alpha=32.0))
    return policy


def stage2(size: Size, meter: Meter) -> list[np.ndarray]:
    """Sample one group in full and in a window, decode, and make one update; returns the clips."""
    model = architecture(size.vdm, "vdm")
    policy = artist(size, meter)
    references = frames_of((size.references, *size.frames[1:]), 0)
    one = cost.transformer_flops(
        model, replace(cost.vdm_tokens(model, *size.frames, size.references), text=size.text_tokens)
    )
    encode = cost.encode_flops(model, 1, *size.frames[1:]).total * size.references
    meter.run("encode_references", lambda: policy.encode_references(references), encode)
    shape = policy.geometry.latent_shape(size.frames[0], *size.frames[1:], size.references)

    def requests(window: int) -> list[RenderRequest]:
        sde = SdeSpec("flow", 0.7, window_start=0, window_size=window)
        return [
            RenderRequest("s", i, CAPTION, references, size.frames[0], size.steps, 1.0, 1, i, sde)
            for i in range(size.group)
        ]

    work = one.total * size.steps * size.group
    meter.run("sample_full_sde", lambda: policy.sample_latents(requests(size.steps - 1), shape), work)
    latents, paths = meter.run("sample_window", lambda: policy.sample_latents(requests(2), shape), work)
    from actors.vdm import conditioning

    decode = cost.decode_flops(model, *size.frames).total * size.group
    clips = meter.run(
        "decode",
        lambda: [f for x in latents.split(1) for f in conditioning.decode_latents(policy.vae, x)],
        decode,
    )
    checkpoint_units(policy.module, unit_names(policy.module, policy.fsdp_units))
    items = [
        VdmExperience("s", i, CAPTION, references, path, (-1.0) ** i)
        for i, path in enumerate(paths)
        if path is not None
    ]
    flops = one.update(lora=True, checkpointing=True, kl=True).total * 2 * size.group
    update(policy, items, size.micro_batch, meter, "stage2_update", flops, clip=1e-3, kl=0.004, norm="sequence")
    return clips


# --- the thinker -----------------------------------------------------------------------------------------------------


def thinker(size: Size, meter: Meter) -> tuple[Architecture, VlmPolicy]:
    """A policy of the model's size that speaks the tiny pair's vocabulary: published tokenizers are downloads."""
    from transformers import (
        AutoTokenizer,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    tokenizer = AutoTokenizer.from_pretrained(TINY / "vlm")
    known = architecture(size.vlm, "vlm")
    names = ("image_pad", "video_pad", "vision_start", "vision_end")
    keys = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {key: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for key, name in zip(keys, names)}
    model = replace(known, components={"model": {**known.components["model"], **ids}})
    vision, old = model.components["model"]["vision_config"], model.components["model"]["model_type"] == "qwen2_5_vl"
    half = [0.5] * 3
    shape = {
        "patch_size": vision["patch_size"],
        "merge_size": vision["spatial_merge_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "image_mean": half,
        "image_std": half,
        "size": {"shortest_edge": 256, "longest_edge": 1 << 26},
    }
    video = Qwen2VLVideoProcessor if old else Qwen3VLVideoProcessor
    processor = (Qwen2_5_VLProcessor if old else Qwen3VLProcessor)(
        image_processor=Qwen2VLImageProcessor(**shape),
        video_processor=video(do_sample_frames=False, **shape),
        tokenizer=tokenizer,
        chat_template=(TINY / "vlm" / "chat_template.jinja").read_text(encoding="utf-8"),
    )
    module = model.random("model", size.dtype, str(meter.device))
    vlm_adapter.inject(module, LoraSpec(rank=8, alpha=32.0), None)
    return model, VlmPolicy(module, processor, device=str(meter.device))


def stage1(size: Size, meter: Meter) -> None:
    """One update on a group of completions of random words."""
    model, policy = thinker(size, meter)
    checkpoint_units(policy.module, unit_names(policy.module, policy.fsdp_units))
    rng, frames = np.random.default_rng(0), frames_of(size.input_frames, 1)
    banned = set(policy.banned_ids)
    words = np.array([i for i in range(len(policy.processor.tokenizer)) if i not in banned], dtype=np.int32)
    items = [
        VlmExperience(
            "s", i, "What comes next?", frames, 8.0, rng.choice(words, size.completion),
            np.zeros(size.completion, np.float32), (-1.0) ** i,
        )
        for i in range(size.group)
    ]  # fmt: skip
    text = int(policy.collate(items[:1]).model_inputs["input_ids"].shape[1]) - size.completion
    video = cost.vlm_tokens(model, *size.input_frames, text=0)
    tokens = replace(video, text=text - video.video)
    one = cost.completion_flops(model, tokens, size.completion)
    flops = one.update(lora=True, checkpointing=True, kl=True).total * size.group
    update(policy, items, size.vlm_micro_batch, meter, "stage1_update", flops, clip=0.2, kl=0.04, norm="sequence")


def update(
    policy: Any,
    items: list[Any],
    micro: int,
    meter: Meter,
    name: str,
    flops: float,
    *,
    clip: float,
    kl: float,
    norm: str,
) -> None:
    """Old log-probabilities, reference, loss, gradients and AdamW over ``items``, as the learner takes one step."""
    parameters = trainable_parameters(policy.module)
    optimizer = torch.optim.AdamW(parameters, lr=5e-5)
    batches = [items[i : i + micro] for i in range(0, len(items), micro)]

    def step() -> float:
        prepared = [(policy.collate(part), [i.advantage for i in part]) for part in batches]
        with torch.no_grad():
            old = [policy.forward(batch).logprobs for batch, _ in prepared]
        total = 0.0
        for (batch, advantages), before in zip(prepared, old):
            out = policy.forward(batch)
            with torch.no_grad(), policy.reference():
                reference = policy.forward(batch)
            loss, _ = grpo_loss(
                out.logprobs,
                before,
                torch.tensor(advantages, device=meter.device),
                out.mask,
                clip_low=clip,
                clip_high=clip,
                loss_norm=norm,
                normaliser=normaliser(out.mask, norm) * len(batches),
                kl=policy.kl(out, reference),
                beta=kl,
            )
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if not np.isfinite(total):
            raise RuntimeError(f"{name}: the loss is {total}")
        return total

    meter.run(name, step, flops, repeat=2)


# --- the scorer ------------------------------------------------------------------------------------------------------


def score(size: Size, meter: Meter, clips: list[np.ndarray]) -> None:
    """CLIP features of the group's frames, resized as CLIP's preprocessor does."""
    model = architecture(size.clip, "clip")
    module: Any = model.random("model", torch.float32, str(meter.device))
    side = int(model.components["model"]["vision_config"]["image_size"])
    frames = torch.from_numpy(np.concatenate(clips)).to(meter.device)

    @torch.inference_mode()
    def features() -> None:
        for part in frames.split(64):
            pixels = part.permute(0, 3, 1, 2).float() / 127.5 - 1
            pixels = torch.nn.functional.interpolate(pixels, (side, side), mode="bicubic", antialias=True)
            module.get_image_features(pixel_values=pixels)

    meter.run("clip_images", features, cost.clip_image_flops(model).total * len(frames), repeat=2)


def measure(size: Size, device: torch.device) -> dict[str, Any]:
    """Return every figure of ``size`` on ``device``."""
    torch.manual_seed(0)
    meter = Meter(device)
    rate = matmul_rate(device, 8192 if device.type == "cuda" else 512, size.dtype)
    clips = stage2(size, meter)
    gc.collect()
    score(size, meter, clips)
    gc.collect()
    stage1(size, meter)
    for part in meter.parts.values():
        part["of_matmul_rate"] = part["tflop_per_s"] * 1e12 / rate
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    facts = {key: str(value).replace(f"{ROOT}/", "") for key, value in vars(size).items()}
    return {
        "device": name,
        "torch": torch.__version__,
        "size": facts,
        "matmul_tflop_per_s": rate / 1e12,
        "parts": meter.parts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="real")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="JSON file to write; default: print only")
    arguments = parser.parse_args()
    if arguments.size == "real" and arguments.device == "cpu":
        parser.error("--size real on a CPU would take hours; use --size tiny, or a GPU")
    figures = measure(SIZES[arguments.size], torch.device(arguments.device))
    text = json.dumps(figures, indent=2) + "\n"
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
