"""What one group costs at real size on one device: random weights, our policies and losses, no Ray and no download. Beside it
what the switches of the artist are worth there, the stock pipeline, and the learner itself with its one-rank process group.

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
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from actors.architectures import Architecture, architecture, cost  # noqa: E402
from actors.learner.batches import plan_batch  # noqa: E402
from actors.learner.objectives.grpo import grpo_loss, normaliser  # noqa: E402
from actors.learner.objectives.settings import GrpoSection  # noqa: E402
from actors.learner.settings import LearnerSection  # noqa: E402
from actors.learner.sharding import checkpoint_units, unit_names  # noqa: E402
from actors.learner.spec import LearnerSpec  # noqa: E402
from actors.learner.trainer import Trainer  # noqa: E402
from actors.policy.protocol import trainable_parameters  # noqa: E402
from actors.policy.settings import LoraSection  # noqa: E402
from actors.records import RenderRequest, SdeSpec, VdmExperience, VideoQuestion, VlmExperience  # noqa: E402
from actors.vdm.files import Parts  # noqa: E402
from actors.vdm.policy import VdmPolicy  # noqa: E402
from actors.vdm.sampling import sample, sample_latents  # noqa: E402
from actors.vdm.settings import VdmPoolSection  # noqa: E402
from actors.vdm.text_encoder import CaptionEmbedder  # noqa: E402
from actors.vlm import adapter as vlm_adapter  # noqa: E402
from actors.vlm.policy import VlmPolicy  # noqa: E402
from tests.benchmarks.gpu_meter import CAPTION, SIZES, TINY, Meter, Size, frames_of, matmul_rate  # noqa: E402
from tests.benchmarks.gpu_switches import compare_compiled, compare_stock, compare_switches  # noqa: E402

# --- the artist ------------------------------------------------------------------------------------------------------


def embedder(model: Architecture, size: Size, meter: Meter) -> CaptionEmbedder:
    """Embed the group's captions once, and let the encoder go: it is larger than everything else together."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TINY / "vdm" / "tokenizer")  # its ids are ids of any larger vocabulary
    encoder: Any = model.random("text_encoder", size.dtype, str(meter.device)).requires_grad_(False)
    made = CaptionEmbedder(encoder, tokenizer, model.blueprint.family().reading, max_tokens=size.text_tokens)
    tokens = len(tokenizer(CAPTION)["input_ids"])
    meter.run("embed_caption", lambda: made([CAPTION]), model.shapes.text_encoder_flops(tokens).total)
    made.encoder = None
    return made


def artist(size: Size, meter: Meter) -> VdmPolicy:
    model = architecture(size.vdm, "vdm")
    captions = embedder(model, size, meter)
    device = str(meter.device)
    parts = Parts(
        blueprint=model.blueprint,
        transformer=model.random("transformer", size.dtype, device),
        vae=model.random("vae", torch.float32, device),
        text_encoder=None,
        tokenizer=None,
    )
    policy = VdmPolicy(parts, dtype=size.dtype, device=device, settings=VdmPoolSection(max_decode=1))
    policy.embedder = captions
    policy.inject(LoraSection(rank=8, alpha=32.0))
    return policy


def stage2(size: Size, meter: Meter) -> list[np.ndarray]:
    """Sample one group in full and in a window, decode, and make one update; returns the clips."""
    model = architecture(size.vdm, "vdm")
    policy = artist(size, meter)
    references = frames_of((size.references, *size.frames[1:]), 0)
    one = model.shapes.transformer_flops(
        replace(model.shapes.tokens(*size.frames, size.references), text=size.text_tokens)
    )
    encode = model.shapes.encode_flops(1, *size.frames[1:]).total * size.references
    meter.run("encode_references", lambda: policy.encode_references(references), encode)
    shape = policy.geometry.latent_shape(size.frames[0], *size.frames[1:], size.references)

    def requests(window: int) -> list[RenderRequest]:
        sde = SdeSpec("flow", 0.7, window_start=0, window_size=window)
        return [
            RenderRequest("s", i, CAPTION, references, size.frames[0], size.steps, 1.0, 1, i, sde)
            for i in range(size.group)
        ]

    work = one.total * size.steps * size.group
    meter.run("sample_full_sde", lambda: sample_latents(policy, requests(size.steps - 1), shape), work)
    latents, paths = meter.run("sample_window", lambda: sample_latents(policy, requests(2), shape), work)
    decode = model.shapes.decode_flops(*size.frames).total * size.group
    clips = meter.run(
        "decode",
        lambda: list(policy.decode(latents)),
        decode,
    )
    compare_switches(policy, size, meter, references, latents)
    compare_stock(policy, size, meter)
    checkpoint_units(policy.module, unit_names(policy.module, policy.fsdp_units))
    for name, window, found, repeat in (("stage2_update", 2, paths, 2), ("stage2_update_all_steps", 0, None, 1)):
        window = window or size.steps - 1
        if found is None:  # drawn only now: its states are larger than those of the window
            _, found = sample_latents(policy, requests(window), shape)
        items = [
            VdmExperience("s", i, CAPTION, references, path, (-1.0) ** i)
            for i, path in enumerate(found)
            if path is not None
        ]
        flops = one.update(lora=True, checkpointing=True, kl=True).total * window * size.group
        options = {"clip": 1e-3, "kl": 0.004, "norm": "sequence", "repeat": repeat}
        update(policy, items, size.micro_batch, meter, name, flops, **options)
        gc.collect()
    window, every = meter.parts["stage2_update"]["seconds"], meter.parts["stage2_update_all_steps"]["seconds"]
    meter.compared["window_update"] = {"other_over_ours": every / window}
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
    vlm_adapter.inject(module, LoraSection(rank=8, alpha=32.0), None)
    return model, VlmPolicy(module, processor, device=str(meter.device))


def stage1(size: Size, meter: Meter) -> None:
    """One update on a group of completions of random words: each with its prompt, and all of them behind one prompt."""
    model, policy = thinker(size, meter)
    checkpoint_units(policy.module, unit_names(policy.module, policy.fsdp_units))
    rng, frames = np.random.default_rng(0), frames_of(size.input_frames, 1)
    banned = set(policy.banned_ids)
    words = np.array([i for i in range(len(policy.processor.tokenizer)) if i not in banned], dtype=np.int32)
    items = [
        VlmExperience(
            "s", i, VideoQuestion("What comes next?", frames, 8.0), rng.choice(words, size.completion),
            np.zeros(size.completion, np.float32), (-1.0) ** i,
        )
        for i in range(size.group)
    ]  # fmt: skip
    text = int(policy.collate(items[:1]).model_inputs["input_ids"].shape[1]) - size.completion
    video = cost.vlm_tokens(model, *size.input_frames, text=0)
    tokens = replace(video, text=text - video.video)
    for name, micro, shared in (
        ("stage1_update", size.vlm_micro_batch, 1),
        ("stage1_update_shared", size.group, size.group),
    ):
        policy.shared_prompts = shared > 1
        one = cost.completion_flops(model, tokens, size.completion, shared)
        flops = one.update(lora=True, checkpointing=True, kl=True).total * size.group
        update(policy, items, micro, meter, name, flops, clip=0.2, kl=0.04, norm="sequence")


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
    repeat: int = 2,
) -> None:
    """Old log-probabilities, reference, loss, gradients and AdamW over ``items``, as the learner takes one step."""
    parameters = trainable_parameters(policy.module)
    optimizer = torch.optim.AdamW(parameters, lr=5e-5)
    batches = [items[i : i + micro] for i in range(0, len(items), micro)]
    gaps: dict[str, float] = {}

    def step() -> float:
        prepared = [(policy.collate(part), [i.advantage for i in part]) for part in batches]
        with torch.no_grad():
            old = [policy.forward(batch).logprobs for batch, _ in prepared]
        total = 0.0
        for (batch, advantages), before in zip(prepared, old):
            out = policy.forward(batch)
            with torch.no_grad(), policy.reference():
                reference = policy.forward(batch)
            gaps["largest_gap_of_two_passes"] = max(
                gaps.get("largest_gap_of_two_passes", 0.0), float((out.logprobs.detach() - before).abs().max())
            )
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

    if isinstance(items[0], VdmExperience):  # the learner's batch is smaller than the sampler's
        with torch.no_grad():
            each = [
                (policy.forward(policy.collate(part)).logprobs - policy.rollout_logprobs(part)).abs()
                for part in batches
            ]
        gaps["mean_gap_to_the_sampler"] = float(torch.cat(each).mean())
        gaps["largest_gap_to_the_sampler"] = float(torch.cat(each).max())
    meter.run(name, step, flops, repeat=repeat)
    meter.parts[name] |= gaps


# --- the learner -----------------------------------------------------------------------------------------------------


def learner(meter: Meter) -> dict[str, float]:
    """One rank of the learner on the tiny artist: FSDP2 over NCCL (gloo on a CPU), two updates, a checkpoint, and back."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    lora, frames = LoraSection(rank=8, alpha=16.0), frames_of((2, 32, 32), 2)
    sampler = VdmPolicy.load(TINY / "vdm", lora=lora, device=str(meter.device))
    sde = SdeSpec("flow", 0.7, window_start=0, window_size=2)
    requests = [RenderRequest("s", i, CAPTION, frames, 9, 6, 1.0, 1, i, sde) for i in range(8)]
    items = [
        VdmExperience("s", c.index, CAPTION, frames, c.trajectory, (-1.0) ** i)
        for i, c in enumerate(sample(sampler, requests))
        if c.trajectory is not None
    ]
    (plan,) = plan_batch(items, ranks=1, micro_batch=8, updates=1)
    grpo = GrpoSection(clip_low=1e-3, clip_high=1e-3, kl_beta=0.1, loss_norm="sequence")
    spec = LearnerSpec("vdm", str(TINY / "vdm"), LearnerSection(ranks=1), lora=lora, learning=grpo)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl" if meter.cuda else "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        try:
            trainer = Trainer(
                VdmPolicy.load(TINY / "vdm", lora=lora, device=str(meter.device)),
                spec,
                init_device_mesh(meter.device.type, (1,)),
                meter.device,
            )
            first = trainer.update(plan)
            trainer.save(f"{folder}/kept")
            kept = trainer.checksum()
            trainer.update(plan)
            moved = trainer.checksum()
            trainer.restore(f"{folder}/kept")
            weights = trainer.weights()
            figures = {
                "ratio_max_dev": first.common["ratio_max_dev"],
                "logp_diff_max": first.maxima["logp_diff_max"],
                "grad_norm": first.common["grad_norm"],
                "kl": first.sums["kl"],
                "moved": float(moved != kept),
                "restored": float(trainer.checksum() == kept),
                "published_tensors": float(len(weights.tensors)) if weights is not None else 0.0,
            }
        finally:
            dist.destroy_process_group()
    print("learner", figures, flush=True)
    return figures


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


def measure(size: Size, device: torch.device, only: str = "all") -> dict[str, Any]:
    """Return every figure of ``size`` on ``device``, or those of stage 1 or of compiled blocks alone."""
    torch.manual_seed(0)
    meter = Meter(device)
    one_rank = learner(meter)
    rate = matmul_rate(device, 8192 if device.type == "cuda" else 512, size.dtype)
    if only == "compile":
        compare_compiled(artist(size, meter), size, meter)
    if only == "all":
        clips = stage2(size, meter)
        gc.collect()
        score(size, meter, clips)
        gc.collect()
    if only in ("all", "stage1"):
        stage1(size, meter)
    for part in meter.parts.values():
        if "tflop_per_s" in part:
            part["of_matmul_rate"] = part["tflop_per_s"] * 1e12 / rate
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    facts = {key: str(value).replace(f"{ROOT}/", "") for key, value in vars(size).items()}
    return {
        "device": name,
        "torch": torch.__version__,
        "size": facts,
        "matmul_tflop_per_s": rate / 1e12,
        "parts": meter.parts,
        "compared": meter.compared,
        "learner": one_rank,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="real")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", choices=("all", "stage1", "compile"), default="all")
    parser.add_argument(
        "--vlm-micro-batch", type=int, help="completions of a forward and backward; default: the size's"
    )
    parser.add_argument("--out", type=Path, help="JSON file to write; default: print only")
    arguments = parser.parse_args()
    if arguments.size == "real" and arguments.device == "cpu":
        parser.error("--size real on a CPU would take hours; use --size tiny, or a GPU")
    size = SIZES[arguments.size]
    if arguments.vlm_micro_batch:
        size = replace(size, vlm_micro_batch=arguments.vlm_micro_batch)
    figures = measure(size, torch.device(arguments.device), arguments.only)
    text = json.dumps(figures, indent=2) + "\n"
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
