"""Memory of each process of a run on its GPU, part by part. Pure arithmetic over the configuration and the architectures.

The parts of a learner's memory are those of ``actors.architectures.cost``; what a forward without gradients needs at its largest
moment is estimated here. Allocators' fragments come on top: a GPU counts as full at ``USABLE`` of its memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from actors.architectures import cost as costs
from actors.architectures import memory as training
from actors.learner.batches import prompts_read
from cluster.hardware import GIB
from pipeline.config import RunConfig
from pipeline.fleet.kinds import section_of
from pipeline.fleet.open import pool_sections
from pipeline.fleet.rewards import reward_models
from pipeline.plan.models import BYTES, Models

USABLE = 0.95
CONTEXT = 0.6 * GIB
"""Assumed: what a process takes on a GPU for CUDA itself and its libraries' kernels."""
VLLM_BATCH_TOKENS = 8192
"""Assumed: tokens that vLLM prefills at once on a large GPU."""
VLLM_SEQUENCES = 256
LOADING = "loading"

PARTS = (
    "weights",
    "gathered",
    "gradients",
    "optimizer",
    "reference",
    "activations",
    "KV cache",
    "caches",
    "CUDA context",
)


@dataclass(frozen=True)
class Process:
    """One process of a role on one GPU: bytes by part, and the bytes it needs for a moment while it loads."""

    role: str
    does: str
    parts: Mapping[str, float]
    loading: float = 0.0
    """Peak before sharding, where that is more."""
    rests: bool = False
    """Whether it moves what it holds to host memory while another role works (``pools.<pool>.rest``, ``learner.offload``)."""
    keeps: float = CONTEXT
    """Bytes that stay on the GPU while it rests."""

    @property
    def total(self) -> float:
        """Peak of its memory."""
        return max(sum(self.parts.values()), self.loading)

    @property
    def idle(self) -> float:
        """Bytes that it holds while another role works; memory that was used once stays with a process that does not rest."""
        return self.keeps if self.rests else self.total

    @property
    def moved(self) -> float:
        """Bytes that leave the GPU when it rests and come back; caches and activations are made anew."""
        held = sum(self.parts.get(part, 0.0) for part in ("weights", "optimizer", "reference"))
        return max(0.0, held - (self.keeps - CONTEXT)) if self.rests else 0.0


def processes(config: RunConfig, models: Models, gib: float) -> tuple[Process, ...]:
    """Return one process of each kind that the run has, on GPUs of ``gib`` GiB; one of a role without a GPU as if it had one."""
    learners = [
        (policy, section)
        for policy, section in (("vlm", config.stage1), ("vdm", config.stage2))
        if section.steps or config.training == "all_in_one"
    ]
    return (
        *(_worker(name, config, models, gib) for name in pool_sections(config)),
        *(_vlm_learner(config, models) if policy == "vlm" else _vdm_learner(config, models) for policy, _ in learners),
    )


def sampling_bytes(models: Models, clips: int, dtype: str) -> float:
    """Return the bytes of the largest moment of one transformer call on ``clips`` clips, without gradients."""
    return clips * models.vdm.shapes.sampling_bytes(models.clip_tokens, BYTES[dtype])


def _worker(name: str, config: RunConfig, models: Models, gib: float) -> Process:
    """Return a worker of the pool ``name``; of one that this module does not know, what every process on a GPU takes.

    Of a reward with a model the weights are counted, where they are known, and no activations.
    """
    known = {"embed": _embedder, "vdm": _sampler, "reward": _scorer}
    if name == "vlm":
        return _engine(config, models, gib)
    if name in known:
        return known[name](config, models)
    rests, parts = section_of(config, name).rest, {"CUDA context": CONTEXT}
    count = models.judges.get(name)
    if isinstance(count, int):
        _, model = reward_models(config)[name]
        return Process(name, "reward's model", {"weights": float(count * BYTES[model.dtype]), **parts}, rests=rests)
    return Process(name, f"{name} worker", parts, rests=rests)


def _engine(config: RunConfig, models: Models, gib: float) -> Process:
    pool = config.pools.vlm
    element, shards = BYTES[pool.dtype], pool.tensor_parallel
    c = models.vlm.components["model"]
    text = c.get("text_config", c)
    hidden, mlp, vocabulary = (int(text[key]) for key in ("hidden_size", "intermediate_size", "vocab_size"))
    rank = config.stage1.lora.rank
    adapters = 2 * costs.lora_parameters(models.vlm, max(rank, 8)) * element if rank else 0
    weights = (models.parameters["vlm", "model"] * element + adapters) / shards
    batch = min(VLLM_BATCH_TOKENS, VLLM_SEQUENCES * pool.max_model_len)
    vision = models.prompt.patches * 6 * int(c["vision_config"].get("intermediate_size", 4 * hidden)) * element
    logits = min(VLLM_SEQUENCES, pool.max_inflight * config.stage1.rollout.group_size) * vocabulary * 4 * 3
    activations = (batch * (2 * mlp + 6 * hidden) * element) / shards + vision + logits
    rest = pool.gpu_memory_utilization * gib * GIB - weights - activations - CONTEXT
    cache = pool.kv_cache_mib * 2.0**20 if pool.kv_cache_mib is not None else max(rest, 0.0)
    parts = {"weights": weights, "activations": activations, "KV cache": cache, "CUDA context": CONTEXT}
    return Process("vlm", "vLLM engine", parts, rests=pool.rest)


def sequences_in_cache(config: RunConfig, models: Models, cache: float) -> float:
    """Return how many sequences of the run's longest prompt and completion the KV ``cache`` of one GPU holds at a time."""
    pool = config.pools.vlm
    longest = models.prompt.prompt + max(config.stage1.text.max_tokens, config.stage2.text.max_tokens)
    each = costs.kv_cache_bytes(models.vlm, longest, BYTES[pool.dtype]) / pool.tensor_parallel
    return cache / each


def _sampler(config: RunConfig, models: Models) -> Process:
    pool, video = config.pools.vdm, config.video
    element = BYTES[pool.dtype]
    group = max(config.stage1.rollout.group_size, config.stage2.rollout.group_size)
    prompts = max(config.stage1.rollout.prompts_per_step, config.stage2.rollout.prompts_per_step)
    clips = min(pool.max_batch, math.ceil(prompts * group / pool.workers))
    height, width = _tile(config, models)
    shapes = models.vdm.shapes
    moments = [
        sampling_bytes(models, clips, pool.dtype) / pool.context_parallel,
        shapes.decoding_bytes(video.num_frames, height, width) * min(clips, pool.max_decode),
    ]
    weights = element * models.parameters["vdm", "transformer"] + 4.0 * models.parameters["vdm", "vae"]
    if not config.pools.embed.workers:
        weights += element * models.parameters["vdm", "text_encoder"] + _image_encoder(models)
        moments.append(_encoding_bytes(config, models))
    rank = config.stage2.lora.rank
    weights += costs.lora_parameters(models.vdm, rank) * element if rank else 0
    parts = {"weights": weights, "activations": max(moments), "caches": 2.0 * CACHE, "CUDA context": CONTEXT}
    does = f"sampler, {clips} clip(s) at a time"
    if pool.context_parallel > 1:
        does += f" on {pool.context_parallel} GPUs, the first of them"  # the others have no VAE
    return Process("vdm", does, parts, rests=pool.rest)


CACHE = 256 * 2**20
"""Most bytes of caption embeddings, and of frame latents, that a policy keeps (``VdmPolicy``)."""


def _embedder(config: RunConfig, models: Models) -> Process:
    pool = config.pools.embed
    parameters = models.parameters
    weights = BYTES[pool.dtype] * parameters["vdm", "text_encoder"] + 4.0 * parameters["vdm", "vae"]
    weights += _image_encoder(models)
    activations = _encoding_bytes(config, models)
    parts = {"weights": weights, "activations": activations, "CUDA context": CONTEXT}
    does = "text encoder, VAE encoder" + (", image encoder" if _image_encoder(models) else "")
    return Process("embed", does, parts, rests=pool.rest)


def _image_encoder(models: Models) -> float:
    """Return the bytes of the artist's image encoder, float32; 0 where it has none."""
    return 4.0 * models.parameters.get(("vdm", "image_encoder"), 0)


def _encoding_bytes(config: RunConfig, models: Models) -> float:
    """Return the bytes of the largest moment of encoding what a clip is conditioned on."""
    video = config.video
    references = video.reference_frames if video.conditioning.references == "frames" else 0
    return models.vdm.shapes.encoding_bytes(video.num_frames, *_tile(config, models), references)


def _tile(config: RunConfig, models: Models) -> tuple[int, int]:
    """Return height and width of what the VAE works on at once."""
    video, side = config.video, models.vdm.shapes.tile
    height, width = video.vae_tile or (side, side)
    return (min(video.height, height), min(video.width, width)) if video.vae_tiling else (video.height, video.width)


def _scorer(config: RunConfig, models: Models) -> Process:
    vision = models.clip.components["model"]["vision_config"]
    tokens = (int(vision["image_size"]) // int(vision["patch_size"])) ** 2 + 1
    frames = 64  # ClipScorer's batch
    activations = frames * tokens * (6 * int(vision["hidden_size"]) + 2 * int(vision["intermediate_size"])) * 4.0
    weights = 4.0 * models.parameters["clip", "model"]
    parts = {"weights": weights, "activations": activations, "CUDA context": CONTEXT}
    return Process("reward", "CLIP", parts, rests=config.pools.reward.rest)


def _vlm_learner(config: RunConfig, models: Models) -> Process:
    learner, stage = config.learner, config.stage1
    count = models.parameters["vlm", "model"]
    items = min(learner.at_once("vlm"), _items_per_rank(config, "stage1"))
    prompts = max(_prompts_read(config)) if learner.shared_prompts else items
    completion = stage.text.max_tokens
    found = training.learner_bytes(
        models.vlm,
        tokens=prompts * models.prompt.prompt + items * completion,
        parameters=count,
        lora_rank=stage.lora.rank,
        ranks=learner.ranks,
        element=BYTES[learner.dtype],
        checkpointing=learner.activation_checkpointing,
        logits=items * completion,
        kl=stage.learning.kl_beta > 0,
    )
    return _learner(config, f"VLM learner, {items} completion(s) at a time", found, 4.0 * count, stage.optim.ema > 0)


def _prompts_read(config: RunConfig) -> list[int]:
    """Return the prompts in each micro-batch of one of stage 1's optimizer steps."""
    learner, size = config.learner, config.stage1.rollout.group_size
    return prompts_read(_groups(config), size, ranks=learner.ranks, micro_batch=learner.at_once("vlm"))


def _groups(config: RunConfig) -> int:
    return max(1, config.stage1.rollout.prompts_per_step // config.stage1.learning.updates_per_batch)


def completions_of_a_row(config: RunConfig) -> float:
    """Return how many completions the VLM's learner reads behind one prompt, on average."""
    if not config.learner.shared_prompts:
        return 1.0
    return _groups(config) * config.stage1.rollout.group_size / sum(_prompts_read(config))


def _vdm_learner(config: RunConfig, models: Models) -> Process:
    learner, stage = config.learner, config.stage2
    count = models.parameters["vdm", "transformer"]
    items, sharers = min(learner.micro_batch, _items_per_rank(config, "stage2")), learner.sharers("vdm")
    passes = 1  # of a forward-process objective: one noise level, without guidance
    if stage.learning.samples == "steps":
        passes = min(stage.sde.window_size, learner.micro_steps or stage.sde.window_size)
        passes *= 2 if stage.render.guidance > 1 else 1
    found = training.learner_bytes(
        models.vdm,
        tokens=math.ceil(items * models.clip_tokens.total / sharers),
        parameters=count,
        lora_rank=stage.lora.rank,
        ranks=learner.ranks,
        element=BYTES[learner.dtype],
        checkpointing=learner.activation_checkpointing,
        passes=passes,
        kl=stage.learning.kl_beta > 0,
        text=items * models.clip_tokens.text,
    )
    does = f"VDM learner, {items} trajectory(ies) at a time" + (f" on {sharers} ranks" if sharers > 1 else "")
    return _learner(config, does, found, 4.0 * count, stage.optim.ema > 0)


def _learner(config: RunConfig, does: str, found: training.TrainingBytes, loading: float, average: bool) -> Process:
    offload = config.learner.offload
    parts = {
        "weights": found.parameters,
        "gathered": found.gathered,
        "gradients": found.gradients,
        "optimizer": found.optimizer + (found.optimizer / 2 if average else 0.0),
        "reference": 0.0 if config.learner.reference_offload else found.reference,
        "activations": found.activations,
        "CUDA context": CONTEXT,
    }
    return Process(
        "learner",
        does,
        {name: size for name, size in parts.items() if size},
        loading=loading + CONTEXT,
        rests=offload != "none",
        keeps=CONTEXT + (parts["weights"] + parts["reference"] if offload == "optimizer" else 0.0),
    )


def _items_per_rank(config: RunConfig, stage: str) -> int:
    rollout = getattr(config, stage).rollout
    apart = config.learner.ranks // config.learner.sharers("vlm" if stage == "stage1" else "vdm")
    return math.ceil(rollout.prompts_per_step * rollout.group_size / apart)
