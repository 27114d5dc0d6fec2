"""The toy world's pictures: scenes of anti-aliased coloured shapes and the clips of events in them.

Responsible for pixels only: what a scene looks like and how an event unfolds. Pure numpy, no randomness.
Clips are uint8 (T, H, W, 3), RGB, 0..255, with T = 9 (4k+1, as the causal Wan VAE needs) and H = W = 32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .language import VERBS, Event

FRAMES = 9
FPS = 8.0
SIZE = 32

_RGB: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 30),
    "green": (30, 170, 50),
    "blue": (45, 70, 235),
    "yellow": (240, 215, 30),
    "purple": (175, 40, 190),
    "cyan": (40, 205, 215),
}
_WHITE = np.array((255.0, 255.0, 255.0))
BACKGROUNDS: dict[str, tuple[int, int, int]] = {"night": (18, 20, 28), "slate": (70, 72, 80)}
UNSEEN_BACKGROUNDS: dict[str, tuple[int, int, int]] = {"moss": (52, 74, 56)}
"""Backgrounds of no scene that is drawn: what was trained on the others is asked about them (docs/reproduce.md)."""
_GROUND = BACKGROUNDS | UNSEEN_BACKGROUNDS
SLOTS: tuple[tuple[float, float], ...] = ((8.0, 8.0), (24.0, 8.0), (8.0, 24.0), (24.0, 24.0))
"""Centres (x, y) in pixels of the four places where objects rest: a grid, which a small VAE learns well in minutes."""

_RADIUS = {"circle": 5.6, "square": 5.0, "triangle": 6.8}
_SHIFT = 6.0
_GROW, _SHRINK = 1.65, 0.4
_SPEED = 1.0 / 6.0
"""Progress of an event per frame of a target clip; it is complete in frame 6 and held."""


@dataclass(frozen=True)
class Thing:
    """One object at rest. ``x``, ``y`` are its centre in pixels."""

    colour: str
    shape: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """What stands still before an event: a background and 2 or 3 things, distinct in (colour, shape)."""

    background: str
    things: tuple[Thing, ...]

    def key(self) -> tuple[tuple[str, str], ...]:
        """What identifies a scene when splits are drawn: its objects, wherever they stand."""
        return tuple(sorted((t.colour, t.shape) for t in self.things))


def _coverage(shape: str, dx: np.ndarray, dy: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Share of each pixel that the shape covers, 0..1, from its signed distance (one pixel of soft edge)."""
    if shape == "circle":
        distance = np.hypot(dx, dy) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - radius
    else:
        # Equilateral, point up, inside three half-planes at the inradius; shifted down so that it looks centred.
        dy = dy - radius * 0.15
        slant = np.abs(dx) * 0.8660254 - dy * 0.5
        distance = np.maximum(dy, slant) - radius * 0.5
    return np.clip(0.5 - distance, 0.0, 1.0) * np.clip(radius, 0.0, 1.0)


def _paint(scene: Scene, progress: dict[int, tuple[str, np.ndarray]], frames: int) -> np.ndarray:
    """Paints ``frames`` frames; ``progress[i] = (verb, p)`` moves thing i along its event by p (frames,), 0..1."""
    grid = np.arange(SIZE, dtype=np.float64) + 0.5
    clip = np.broadcast_to(np.array(_GROUND[scene.background], dtype=np.float64), (frames, SIZE, SIZE, 3)).copy()
    # What happens is painted last, on top, so that no event hides behind a neighbour.
    for index in sorted(range(len(scene.things)), key=lambda i: (i in progress, i)):
        thing = scene.things[index]
        verb, p = progress.get(index, ("", np.zeros(frames)))
        x = thing.x + _SHIFT * p * ((verb == "right") - (verb == "left"))
        y = thing.y + _SHIFT * p * ((verb == "fall") - (verb == "rise"))
        scale = 1.0 + p * ((_GROW - 1.0) * (verb == "grow") - (1.0 - _SHRINK) * (verb == "shrink"))
        radius = _RADIUS[thing.shape] * scale
        dx = grid[None, None, :] - x[:, None, None]
        dy = grid[None, :, None] - y[:, None, None]
        alpha = _coverage(thing.shape, dx, dy, radius[:, None, None])
        alpha = alpha * (1.0 - p * (verb == "fade"))[:, None, None]
        white = (p * (verb == "whiten"))[:, None]
        colour = np.array(_RGB[thing.colour]) * (1.0 - white) + _WHITE * white
        clip += alpha[..., None] * (colour[:, None, None, :] - clip)
    return np.rint(clip).astype(np.uint8)


def _index(scene: Scene, event: Event) -> int:
    for i, thing in enumerate(scene.things):
        if (thing.colour, thing.shape) == (event.colour, event.shape):
            return i
    names = ", ".join(f"{t.colour} {t.shape}" for t in scene.things)
    raise ValueError(f"the scene has no {event.colour} {event.shape}; it shows: {names}")


def render(scene: Scene, event: Event | None) -> np.ndarray:
    """The target clip (9, 32, 32, 3) uint8: from the rest scene, the event unfolds and is held. ``None``: nothing happens.

    Raises ValueError when the scene has no such object.
    """
    if event is None:
        return _paint(scene, {}, FRAMES)
    return event_frames(scene, event, np.minimum(1.0, np.arange(FRAMES) * _SPEED))


def event_frames(scene: Scene, event: Event, progress: np.ndarray) -> np.ndarray:
    """Frames (N, 32, 32, 3) uint8 of the scene in which the event has come to pass by ``progress`` (N,), 0..1.

    Raises ValueError when the scene has no such object.
    """
    return _paint(scene, {_index(scene, event): (event.verb, progress)}, len(progress))


def render_there_and_back(scene: Scene, events: tuple[Event, ...]) -> np.ndarray:
    """The input clip (9, 32, 32, 3) uint8: one or two events, each played there and back; first and last frame are the rest scene."""
    if len(events) not in (1, 2):
        raise ValueError(f"an input clip shows 1 or 2 events, got {len(events)}")
    span = (FRAMES - 1) // len(events)
    clip = []
    for event in events:
        ramp = 1.0 - np.abs(np.arange(span) - span / 2) / (span / 2)
        clip.append(_paint(scene, {_index(scene, event): (event.verb, np.minimum(1.0, ramp * 1.34))}, span))
    clip.append(_paint(scene, {}, 1))
    return np.concatenate(clip)


def all_events(scene: Scene) -> list[Event]:
    """Every event that can happen in the scene, in a fixed order."""
    return [Event(t.colour, t.shape, verb) for t in scene.things for verb in VERBS]
