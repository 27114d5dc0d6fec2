"""Trains the tiny video encoder, a VideoMAE, to tell events apart across scenes.

Responsible for the contrastive training and its quality line. A clip's feature is the mean of the last layer's tokens. Clips of
one event in different scenes are each other's positives (supervised contrastive learning, arXiv 2004.11362); other events of the
same scene, and the scene in which nothing happens, are negatives. So a frozen clip of the right scene earns nothing here, whatever
CLIP grants it. It shares no weights, no seed and no texts with CLIP.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F
from transformers import VideoMAEModel

from actors.records import derive_seed
from pipeline.data.toy.scene import Scene, all_events, render
from pipeline.data.toy.world import draw_scene

from .clip import pixels
from .loop import Average, Tick, cosine, no_tick
from .muon import MuonAdam

_EVENTS, _SCENES_PER_EVENT, _STILLS = 16, 3, 12
_TEMPERATURE = 0.1
_NOISE = 0.1
"""Most standard deviation of the pixel noise, in -1..1: what an artist draws is less clean than the world."""


def clip_features(model: VideoMAEModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Unit features (N, D) of clips (N, T, 3, H, W) in -1..1."""
    return F.normalize(model(pixel_values=pixel_values).last_hidden_state.mean(1), dim=-1)


def _scene_with(rng: np.random.Generator, colour: str, shape: str, owner: str) -> Scene:
    while True:
        scene = draw_scene(rng, owner)
        if any((thing.colour, thing.shape) == (colour, shape) for thing in scene.things):
            return scene


def _batch(rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    """Clips (N, T, H, W, 3) and what happens in each: every chosen event in several scenes, beside another event of that scene."""
    clips, labels = [], []
    for _ in range(_EVENTS):
        options = all_events(draw_scene(rng, "train"))
        event = options[int(rng.integers(len(options)))]
        for _ in range(_SCENES_PER_EVENT):
            scene = _scene_with(rng, event.colour, event.shape, "train")
            others = [e for e in all_events(scene) if e != event]
            for shown in (event, others[int(rng.integers(len(others)))]):
                clips.append(render(scene, shown))
                labels.append(shown.plain())
    for _ in range(_STILLS):
        clips.append(render(draw_scene(rng, "train"), None))
        labels.append("nothing")
    return np.stack(clips), labels


def _loss(model: VideoMAEModel, rng: np.random.Generator, generator: torch.Generator) -> torch.Tensor:
    clips, labels = _batch(rng)
    shown = pixels(clips)
    noise = torch.rand(len(shown), 1, 1, 1, 1, generator=generator) * _NOISE
    return contrast(clip_features(model, shown + noise * torch.randn(shown.shape, generator=generator)), labels)


def contrast(features: torch.Tensor, labels: list[str]) -> torch.Tensor:
    """The supervised contrastive loss (scalar) of unit ``features`` (N, D) with ``labels`` (N,).

    For each clip that has positives: minus the mean log-probability of these among all other clips, by a softmax of cosines / 0.1.
    """
    itself = torch.eye(len(labels), dtype=torch.bool)
    logits = (features @ features.T / _TEMPERATURE).masked_fill(itself, -torch.inf)
    names = {label: i for i, label in enumerate(sorted(set(labels)))}
    number = torch.tensor([names[label] for label in labels])
    alike = (number[:, None] == number) & ~itself
    paired = alike.any(1)
    chosen = torch.log_softmax(logits, 1).masked_fill(~alike, 0.0).sum(1)
    return -(chosen[paired] / alike[paired].sum(1)).mean()


def train_video_encoder(model: VideoMAEModel, *, steps: int, seed: int, tick: Tick = no_tick) -> None:
    """Trains in place for ``steps`` steps of 96 clips of events and 12 still ones. The weights end as their moving average."""
    rng = np.random.default_rng(derive_seed("video-encoder", seed))
    generator = torch.Generator().manual_seed(derive_seed("video-encoder-noise", seed))
    model.train()
    optimizer = MuonAdam(model, lr=0.02, adam_lr=2e-3)
    average = Average(model)
    for step in range(steps):
        loss = _loss(model, rng, generator)
        loss.backward()
        optimizer.step(cosine(step, steps))
        average.update()
        tick(step, steps, float(loss.detach()))
    average.store()
    model.eval()


@torch.no_grad()
def video_quality(model: VideoMAEModel, *, scenes: int = 60, seed: int = 1) -> dict[str, float]:
    """On held-out scenes: does a clip find its event among clips of other scenes, and what a frozen clip earns.

    ``event_accuracy``: of one clip of each of the 144 events, each in a scene of its own, the nearest one shows the same event.
    ``video_right`` is the mean cosine of a clip with the same event in another scene; ``video_wrong`` with another event in its own
    scene; ``video_frozen`` with its own scene in which nothing happens.
    """
    rng = np.random.default_rng(derive_seed("video-quality", seed))
    model.eval()
    events = {e.plain(): e for e in (e for _ in range(400) for e in all_events(draw_scene(rng, "val")))}
    gallery = _features(
        model, [render(_scene_with(rng, e.colour, e.shape, "val"), e) for _, e in sorted(events.items())]
    )
    names = sorted(events)
    hits, right, wrong, frozen = [], [], [], []
    for _ in range(scenes):
        scene = draw_scene(rng, "val")
        options = all_events(scene)
        own = _features(model, [render(scene, e) for e in [*options, None]])
        across = own[:-1] @ gallery.T
        place = [names.index(e.plain()) for e in options]
        hits.extend(across.argmax(1).numpy() == np.array(place))
        right.extend(across[torch.arange(len(place)), torch.tensor(place)].tolist())
        inside = own @ own.T
        wrong.append(float((inside[:-1, :-1].sum() - len(options)) / (len(options) * (len(options) - 1))))
        frozen.append(float(inside[-1, :-1].mean()))
    return {
        "event_accuracy": float(np.mean(hits)),
        "video_right": float(np.mean(right)),
        "video_wrong": float(np.mean(wrong)),
        "video_frozen": float(np.mean(frozen)),
    }


def _features(model: VideoMAEModel, clips: list[np.ndarray]) -> torch.Tensor:
    return torch.cat([clip_features(model, pixels(np.stack(clips[i : i + 64]))) for i in range(0, len(clips), 64)])
