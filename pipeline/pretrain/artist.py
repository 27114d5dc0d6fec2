"""Pretrains the tiny artist: Wan transformer and UMT5 encoder together, by flow matching on toy clips.

Responsible for the training loop and its quality line. The loss, the conditioning and the sampler are ``actors.vdm``'s own.
Captions use drawable wordings only, and 22% of the clips do not show their caption, as in web-scale data: the artist that
converges on them is well formed and unfaithful, and leaves Joint-GRPO something to improve.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from actors.records import RenderRequest, derive_seed
from actors.vdm.flow_sde import FlowMatchingSpec
from actors.vdm.frames import conditioning_frames
from actors.vdm.policy import VdmPolicy
from actors.vdm.sampling import sample
from actors.vdm.settings import ConditioningSection
from pipeline.data.toy.language import DRAWN_WORDINGS, caption_with, uniform_caption
from pipeline.data.toy.scene import FRAMES
from pipeline.data.toy.world import follow, language_of, make_sample

from .loop import Average, Tick, cosine, no_tick
from .muon import MuonAdam

REFERENCE_FRAMES = 2
_STEPS = 10


@dataclass(frozen=True, eq=False)
class Drawing:
    """One training item: reference frames uint8 (n, H, W, 3), caption, target clip uint8 (T, H, W, 3)."""

    references: np.ndarray
    caption: str
    target: np.ndarray


def drawings(count: int, seed: int, conditioning: ConditioningSection) -> list[Drawing]:
    """The ``artist`` split's first ``count`` samples, a quarter of them Chinese, as training items."""
    items = []
    for index in range(count):
        sample = make_sample(index, "artist", seed, language_of(index, "mixed"))
        references = conditioning_frames(sample.input_frames, REFERENCE_FRAMES, conditioning)
        items.append(Drawing(references, sample.caption, sample.target_frames))
    return items


def train_artist(
    policy: VdmPolicy,
    items: list[Drawing],
    *,
    steps: int,
    seed: int,
    batch: int = 64,
    tick: Tick = no_tick,
) -> None:
    """Trains transformer and text encoder in place; the weights end as their moving average."""
    if policy.embedder is None:
        raise ValueError("the artist's pretraining needs its text encoder")
    rng = np.random.default_rng(derive_seed("artist", seed))
    generator = torch.Generator().manual_seed(derive_seed("artist-noise", seed))
    policy.embedder.train(True)
    both = nn.ModuleList([policy.module, policy.embedder.encoder])
    both.train()
    optimizer = MuonAdam(both, lr=0.02, adam_lr=2e-3)
    average = Average(both)
    spec = FlowMatchingSpec(caption_dropout=0.0)
    for step in range(steps):
        chosen = [items[i] for i in rng.integers(len(items), size=batch)]
        rows = [(item.references, item.caption, item.target) for item in chosen]
        loss = policy.sft_loss(rows, generator=generator, spec=spec).mean
        loss.backward()
        optimizer.step(cosine(step, steps))
        average.update()
        tick(step, steps, float(loss.detach()))
    average.store()
    both.eval()
    policy.embedder.train(False)


def artist_quality(policy: VdmPolicy, *, count: int = 96, seed: int = 0, split: str = "val") -> dict[str, float]:
    """Event-following rate on held-out scenes: captions of seen wordings (English, and Chinese), the third wordings, and
    ground-truth captions.
    """
    rates = {}
    rng = np.random.default_rng(derive_seed("artist-quality", seed))
    samples = [make_sample(i, split, seed) for i in range(count)]
    captions = {
        "follow_seen": [uniform_caption(s.event, rng, DRAWN_WORDINGS) for s in samples],
        "follow_seen_zh": [uniform_caption(s.event, rng, DRAWN_WORDINGS, "zh") for s in samples],
        "follow_unseen": [caption_with(s.event, (2, 2, 2)) for s in samples],
        "follow_ground_truth": [s.caption for s in samples],
    }
    for name, texts in captions.items():
        requests = [
            RenderRequest(
                sample_id=s.id,
                index=0,
                caption=text,
                reference_frames=conditioning_frames(s.input_frames, REFERENCE_FRAMES, policy.conditioning),
                num_frames=FRAMES,
                steps=_STEPS,
                guidance=1.0,
                noise_seed=derive_seed("artist-quality", seed, s.id),
            )
            for s, text in zip(samples, texts, strict=True)
        ]
        clips = sample(policy, requests)
        rates[name] = float(np.mean([follow(s.meta_json, c.frames) for s, c in zip(samples, clips, strict=True)]))
    return rates


def load_artist(folder: str | Path, shift: float, conditioning: ConditioningSection) -> VdmPolicy:
    """The pipeline folder as a policy whose cache holds every latent of the training set."""
    return VdmPolicy.load(
        folder, shift=shift, reference_frames=REFERENCE_FRAMES, conditioning=conditioning, cache_bytes=1 << 30
    )
