"""Trains the tiny CLIP on clips and captions of the toy world, all wordings.

Responsible for the contrastive training and its quality line. A clip's feature is the mean over frames of unit frame
features, so that its product with a text feature is exactly the CLIP-T that the metrics report.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor

from pipeline.data.toy.language import Event, uniform_caption
from pipeline.data.toy.scene import FRAMES, all_events, render
from pipeline.data.toy.world import draw_scene

from .loop import Tick, cosine, no_tick
from .muon import MuonAdam

_SCENES, _EVENTS_PER_SCENE, _STILLS = 20, 4, 12
_FRAMES_SEEN = 4


def pixels(frames: np.ndarray) -> torch.Tensor:
    """uint8 (..., H, W, 3) to float32 (..., 3, H, W) in -1..1, as the image processor does for frames of the right size."""
    return torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, -3).float() / 127.5 - 1.0


def frame_features(model: CLIPModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Unit features (N, D) of images (N, 3, H, W)."""
    pooled = model.vision_model(pixel_values=pixel_values).pooler_output
    return F.normalize(model.visual_projection(pooled), dim=-1)


def text_features(model: CLIPModel, processor: CLIPProcessor, texts: list[str]) -> torch.Tensor:
    """Unit features (N, D) of captions."""
    tokens = processor.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    pooled = model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
    return F.normalize(model.text_projection(pooled), dim=-1)


def _batch(rng: np.random.Generator) -> tuple[np.ndarray, list[Event]]:
    """Clips (B + stills, T', H, W, 3) and the events of the first B. Events of one scene are each other's hard negatives."""
    clips, events = [], []
    scenes = [draw_scene(rng, "train") for _ in range(_SCENES)]
    for scene in scenes:
        options = all_events(scene)
        for i in rng.permutation(len(options))[:_EVENTS_PER_SCENE]:
            clips.append(render(scene, options[i]))
            events.append(options[i])
    clips.extend(render(scene, None) for scene in scenes[:_STILLS])
    # One frame from each part of the clip, so that four stand for nine.
    picks = np.sort(rng.permutation(FRAMES)[:_FRAMES_SEEN])
    return np.stack(clips)[:, picks], events


def _loss(model: CLIPModel, processor: CLIPProcessor, rng: np.random.Generator) -> torch.Tensor:
    clips, events = _batch(rng)
    n, t = clips.shape[:2]
    video = frame_features(model, pixels(clips).flatten(0, 1)).reshape(n, t, -1).mean(1)
    text = text_features(model, processor, [uniform_caption(e, rng) for e in events])
    logits = model.logit_scale.exp().clamp(max=50.0) * text @ video.T
    same = torch.tensor([[a == b for b in events] for a in events])
    targets = same.float() / same.sum(1, keepdim=True)
    # Text picks its clip among all clips and stills; a clip picks its text.
    padded = F.pad(targets, (0, n - len(events)))
    return (F.cross_entropy(logits, padded) + F.cross_entropy(logits[:, : len(events)].T, targets.T)) / 2


def train_clip(model: CLIPModel, processor: CLIPProcessor, *, steps: int, seed: int, tick: Tick = no_tick) -> None:
    """Trains in place for ``steps`` steps of 80 captioned clips and 12 still ones."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    model.train()
    optimizer = MuonAdam(model, lr=0.02, adam_lr=2e-3)
    for step in range(steps):
        loss = _loss(model, processor, rng)
        loss.backward()
        optimizer.step(cosine(step, steps))
        tick(step, steps, float(loss.detach()))
    model.eval()


@torch.no_grad()
def clip_quality(model: CLIPModel, processor: CLIPProcessor, *, scenes: int = 60, seed: int = 1) -> dict[str, float]:
    """On held-out scenes: does a caption pick its clip among all outcomes of its scene, and how cosines compare.

    ``retrieval`` is over 17 or 25 clips that differ in the event alone, ``retrieval_90`` over 90 clips of other scenes.
    """
    rng = np.random.default_rng(seed)
    model.eval()
    hits, right, still, wrong = [], [], [], []
    chosen_clips, chosen_texts, chosen_events = [], [], []
    for _ in range(scenes):
        scene = draw_scene(rng, "val")
        events = all_events(scene)
        clips = np.stack([render(scene, e) for e in [*events, None]])
        video = _clip_features(model, clips)
        captions = [uniform_caption(e, rng) for e in events]
        cosines = text_features(model, processor, captions) @ video.T
        picked = cosines.argmax(1).numpy()
        hits.extend(picked == np.arange(len(events)))
        diagonal = cosines.diagonal()
        right.extend(diagonal.tolist())
        still.extend(cosines[:, -1].tolist())
        wrong.append(float((cosines[:, :-1].sum() - diagonal.sum()) / (len(events) * (len(events) - 1))))
        one = int(rng.integers(len(events)))
        chosen_clips.append(video[one])
        chosen_texts.append(captions[one])
        chosen_events.append(events[one])
    cosines = text_features(model, processor, chosen_texts) @ torch.stack(chosen_clips).T
    across = [chosen_events[int(cosines[i].argmax())] == event for i, event in enumerate(chosen_events)]
    return {
        "retrieval_in_scene": float(np.mean(hits)),
        "retrieval_across_scenes": float(np.mean(across)),
        "clip_t_right": float(np.mean(right)),
        "clip_t_still": float(np.mean(still)),
        "clip_t_wrong": float(np.mean(wrong)),
    }


def _clip_features(model: CLIPModel, clips: np.ndarray) -> torch.Tensor:
    n, t = clips.shape[:2]
    return frame_features(model, pixels(clips).flatten(0, 1)).reshape(n, t, -1).mean(1)
