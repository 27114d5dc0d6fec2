"""Trains the tiny CLIP on clips and captions of the toy world, all wordings.

Responsible for the contrastive training and its quality line. A clip's feature is the mean over frames of unit frame
features, so that its product with a text feature is exactly the CLIP-T that the metrics report.

Texts are of two kinds, as on the web: what happens, and what there is to see. The second kind makes features of one scene alike
whatever happens in it, so that a still picture of the right scene earns some CLIP-V, as real CLIPs grant it, while its CLIP-T with a
caption of an event stays low.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor

from pipeline.data.toy.language import COLOURS, SHAPES, Event, uniform_caption
from pipeline.data.toy.scene import FRAMES, Scene, all_events, render
from pipeline.data.toy.world import draw_scene

from .loop import Tick, cosine, no_tick
from .muon import MuonAdam

_SCENES, _EVENTS_PER_SCENE, _STILLS = 20, 4, 20
_SCENE_WEIGHT = 2.0
"""Against 1 for events. Above it a still picture of the scene earns more CLIP-V than a wrong event, as with real CLIPs."""
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


def scene_text(scene: Scene, rng: np.random.Generator) -> str:
    """What there is to see, in any order and wording: ``the red disc the azure block``."""
    things = [scene.things[i] for i in rng.permutation(len(scene.things))]
    words = [(COLOURS[t.colour][int(rng.integers(3))], SHAPES[t.shape][int(rng.integers(3))]) for t in things]
    return " ".join(f"the {colour} {shape}" for colour, shape in words)


@dataclass(frozen=True, eq=False)
class _Batch:
    """Clips (N, T', H, W, 3), the first of them with ``events``, and which of ``scenes`` each clip (N,) shows."""

    clips: np.ndarray
    events: list[Event]
    scenes: list[Scene]
    shown: list[int]


def _batch(rng: np.random.Generator) -> _Batch:
    """Events of one scene are each other's hard negatives, and so is the scene in which nothing happens."""
    clips, events, shown = [], [], []
    scenes = [draw_scene(rng, "train") for _ in range(_SCENES)]
    for number, scene in enumerate(scenes):
        options = all_events(scene)
        for i in rng.permutation(len(options))[:_EVENTS_PER_SCENE]:
            clips.append(render(scene, options[i]))
            events.append(options[i])
            shown.append(number)
    clips.extend(render(scene, None) for scene in scenes[:_STILLS])
    # One frame from each part of the clip, so that four stand for nine.
    picks = np.sort(rng.permutation(FRAMES)[:_FRAMES_SEEN])
    return _Batch(np.stack(clips)[:, picks], events, scenes, [*shown, *range(_STILLS)])


def _loss(model: CLIPModel, processor: CLIPProcessor, rng: np.random.Generator) -> torch.Tensor:
    batch = _batch(rng)
    n, t = batch.clips.shape[:2]
    video = frame_features(model, pixels(batch.clips).flatten(0, 1)).reshape(n, t, -1).mean(1)
    texts = [uniform_caption(e, rng) for e in batch.events] + [scene_text(s, rng) for s in batch.scenes]
    count = len(batch.events)
    event, scene = text_features(model, processor, texts).split([count, len(batch.scenes)])
    scale = model.logit_scale.exp().clamp(max=50.0)
    # A text picks its clips among all clips and stills; a clip picks its texts.
    same = torch.tensor([[a == b for b in batch.events] for a in batch.events])
    happens = _contrast(scale * event @ video.T, F.pad(same, (0, n - count)))
    keys = [s.key() for s in batch.scenes]
    seen = torch.tensor([[key == keys[i] for i in batch.shown] for key in keys])
    return happens + _SCENE_WEIGHT * _contrast(scale * scene @ video.T, seen)


def _contrast(logits: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """Symmetric cross entropy of (texts, clips) logits; ``same`` are the matching pairs, and a clip without one picks none."""
    rows, matched = same.float(), same.any(0)
    columns = rows[:, matched]
    return (
        F.cross_entropy(logits, rows / rows.sum(1, keepdim=True))
        + F.cross_entropy(logits[:, matched].T, (columns / columns.sum(0, keepdim=True)).T)
    ) / 2


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

    ``retrieval_in_scene`` is over 17 or 25 clips that differ in the event alone, ``retrieval_across_scenes`` over clips of other
    scenes. ``clip_v_still`` and ``clip_v_wrong`` are what a still clip and another event in the scene earn as CLIP-V.
    """
    rng = np.random.default_rng(seed)
    model.eval()
    hits, right, still, wrong, looks_still, looks_wrong = [], [], [], [], [], []
    chosen_clips, chosen_texts, chosen_events = [], [], []
    for _ in range(scenes):
        scene = draw_scene(rng, "val")
        events = all_events(scene)
        clips = np.stack([render(scene, e) for e in [*events, None]])
        frames = _frame_features(model, clips)
        video = frames.mean(1)
        alike = torch.einsum("atd,btd->ab", frames, frames) / frames.shape[1]  # CLIP-V of each clip with each
        looks_still.append(float(alike[-1, :-1].mean()))
        looks_wrong.append(float((alike[:-1, :-1].sum() - len(events)) / (len(events) * (len(events) - 1))))
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
        "clip_v_still": float(np.mean(looks_still)),
        "clip_v_wrong": float(np.mean(looks_wrong)),
    }


def _frame_features(model: CLIPModel, clips: np.ndarray) -> torch.Tensor:
    n, t = clips.shape[:2]
    return frame_features(model, pixels(clips).flatten(0, 1)).reshape(n, t, -1)
