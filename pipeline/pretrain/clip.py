"""Trains the tiny CLIP on single frames and texts of the toy world, all wordings, English and Chinese.

Responsible for the contrastive training and its quality line. It is what real CLIPs are, an image model. Its texts are of two
kinds, as on the web: what there is to see, and what has happened. The first kind makes features of one scene alike whatever
happens in it, so that a still picture of the right scene earns CLIP-V. The second kind belongs to the frames of an event's later
half alone, so that a clip earns CLIP-T by those, and a frozen clip earns none.

What a frame cannot show is not asked of it: an object that has faded away or turned white is not named by its colour.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from transformers import CLIPModel, CLIPProcessor

from actors.records import derive_seed
from pipeline.data.toy.language import Event, LanguageCode, sight, uniform_caption
from pipeline.data.toy.scene import SIZE, Scene, Thing, all_events, event_frames, render
from pipeline.data.toy.world import draw_scene

from .loop import Tick, cosine, no_tick
from .muon import MuonAdam

_SCENES, _EVENTS_PER_SCENE, _RESTING, _SIGHTS = 24, 5, 32, 2
_SIGHT_WEIGHT = 2.0
"""Against 1 for events. Above it a still picture of the scene earns more CLIP-V than a wrong event, as with real CLIPs."""
_CHINESE = 0.25
_CHANGED = 0.5
"""Progress from which a frame shows its event."""
_LAST_SEEN = {"fade": 5 / 6, "whiten": 5 / 6}
"""Progress to which the colour of an object can be told, of the events that end without it."""


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


@dataclass(frozen=True, eq=False)
class Frame:
    """One frame uint8 (H, W, 3) of ``scene``, in which ``event`` has come to pass by ``progress`` 0..1."""

    pixels: np.ndarray
    scene: Scene
    event: Event
    progress: float

    @property
    def shows_event(self) -> bool:
        """Whether the event can be told from the frame."""
        return _CHANGED <= self.progress <= _LAST_SEEN.get(self.event.verb, 1.0)

    def states(self) -> dict[tuple[str, str], set[str]]:
        """What can be said of each object that can be named: ``""`` (that it is there) and its states."""
        found = {}
        for thing in self.scene.things:
            name = (thing.colour, thing.shape)
            if name != (self.event.colour, self.event.shape) or self.progress < _CHANGED:
                found[name] = {"", _place(thing)}
            elif self.progress <= _LAST_SEEN.get(self.event.verb, 1.0):
                changed = {"grow": "large", "shrink": "small", "fade": "faint", "whiten": "pale"}
                found[name] = {"", changed.get(self.event.verb, "")}
        return found


def _place(thing: Thing) -> str:
    return f"{'top' if thing.y < SIZE / 2 else 'bottom'} {'left' if thing.x < SIZE / 2 else 'right'}"


def _frames(rng: np.random.Generator) -> list[Frame]:
    """Frames of several events of one scene, which are each other's hard negatives, and frames in which nothing has happened yet."""
    frames = []
    for number in range(_SCENES):
        scene = draw_scene(rng, "train")
        options = all_events(scene)
        for i in rng.permutation(len(options))[:_EVENTS_PER_SCENE]:
            last = round(6 * _LAST_SEEN.get(options[i].verb, 1.0))
            frames.append(clip_frame(scene, options[i], int(rng.integers(3, last + 1)) / 6))
        for _ in range(_RESTING * (number + 1) // _SCENES - _RESTING * number // _SCENES):
            frames.append(clip_frame(scene, options[int(rng.integers(len(options)))], int(rng.integers(0, 2)) / 6))
    return frames


def clip_frame(scene: Scene, event: Event, progress: float) -> Frame:
    """The frame of ``scene`` in which ``event`` has come to pass by ``progress``, 0..1."""
    return Frame(event_frames(scene, event, np.array([progress]))[0], scene, event, progress)


def _language(rng: np.random.Generator) -> LanguageCode:
    return "zh" if rng.random() < _CHINESE else "en"


def _sights(frames: list[Frame], rng: np.random.Generator) -> tuple[list[str], torch.Tensor]:
    """Texts (N,) of what some of ``frames`` (M,) show, a few objects and at most one state each, and where they are true (N, M)."""
    texts, truth = [], []
    states = [frame.states() for frame in frames]
    for frame in rng.permutation(len(frames))[: _SIGHTS * _SCENES]:
        seen = list(states[frame])
        named = [seen[i] for i in rng.permutation(len(seen))[: int(rng.integers(1, len(seen) + 1))]]
        claims = [(name, "") for name in named]
        if rng.random() < 0.5:
            claims[0] = (named[0], str(rng.choice(sorted(states[frame][named[0]]))))
        texts.append(sight([(*name, state) for name, state in claims], rng, _language(rng)))
        truth.append([all(state in shown.get(name, ()) for name, state in claims) for shown in states])
    return texts, torch.tensor(truth)


def _loss(model: CLIPModel, processor: CLIPProcessor, rng: np.random.Generator) -> torch.Tensor:
    frames = _frames(rng)
    image = frame_features(model, pixels(np.stack([frame.pixels for frame in frames])))
    told = [frame for frame in frames if frame.shows_event]
    events = [uniform_caption(frame.event, rng, language=_language(rng)) for frame in told]
    sights, seen = _sights(frames, rng)
    event, sighted = text_features(model, processor, events + sights).split([len(events), len(sights)])
    scale = model.logit_scale.exp().clamp(max=50.0)
    same = torch.tensor([[f.shows_event and f.event == t.event for f in frames] for t in told])
    return _contrast(scale * event @ image.T, same) + _SIGHT_WEIGHT * _contrast(scale * sighted @ image.T, seen)


def _contrast(logits: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """Symmetric cross entropy of (texts, frames) logits; ``same`` are the matching pairs, and a frame without one picks none."""
    rows, matched = same.float(), same.any(0)
    columns = rows[:, matched]
    return (
        F.cross_entropy(logits, rows / rows.sum(1, keepdim=True))
        + F.cross_entropy(logits[:, matched].T, (columns / columns.sum(0, keepdim=True)).T)
    ) / 2


def train_clip(model: CLIPModel, processor: CLIPProcessor, *, steps: int, seed: int, tick: Tick = no_tick) -> None:
    """Trains in place for ``steps`` steps of 120 frames that show an event and 32 that show none."""
    rng = np.random.default_rng(derive_seed("clip", seed))
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

    ``retrieval_in_scene`` is over 17 or 25 clips that differ in the event alone, ``retrieval_in_scene_zh`` the same by Chinese
    captions, ``retrieval_across_scenes`` over clips of other scenes. ``clip_t_right``, ``clip_t_still`` and ``clip_t_wrong`` are
    the mean cosines of a caption with its clip, with a frozen one and with other events of the scene; ``clip_v_still`` and
    ``clip_v_wrong`` are what a frozen clip and another event earn as CLIP-V.
    """
    rng = np.random.default_rng(seed)
    model.eval()
    hits, hits_zh, right, still, wrong, looks_still, looks_wrong = [], [], [], [], [], [], []
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
        chinese = [uniform_caption(e, rng, language="zh") for e in events]
        hits_zh.extend((text_features(model, processor, chinese) @ video.T).argmax(1).numpy() == np.arange(len(events)))
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
        "retrieval_in_scene_zh": float(np.mean(hits_zh)),
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
