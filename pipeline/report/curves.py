"""Which curves come first, and a chart as SVG. Pure: series in, text out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from markupsafe import Markup, escape

Points = Sequence[tuple[int, float]]

COLOURS = ("#3267d6", "#d9730d", "#2f9e6e", "#a33fb5", "#c0392b", "#0f8a9d", "#7b8794", "#8a6d1b")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 190, 46, 10, 10, 24
MOST = 240  # points of a curve that are drawn; of more, evenly spaced ones and the last


@dataclass(frozen=True)
class Panel:
    """A chart: its title, what to look for, and the metrics in it, by pattern."""

    title: str
    about: str
    metrics: tuple[str, ...]
    first_too: bool = True
    """Whether a process's first step is drawn; in times it waits for caches, and would flatten all others."""

    def chosen(self, names: Sequence[str]) -> list[str]:
        """Return which of ``names`` stand in it, in the patterns' order."""
        return list(dict.fromkeys(n for pattern in self.metrics for n in names if fnmatchcase(n, pattern)))

    def points(self, points: Points) -> Points:
        """Return which of ``points`` are drawn."""
        return points if self.first_too or len(points) == 1 else points[1:]


FIRST = (
    Panel(
        "Reward by component",
        "It should rise; a component that rises alone is being hacked.",
        ("reward/total_mean", "reward/*_mean"),
    ),
    Panel(
        "Held out",
        "The curves to choose by.",
        ("evaluate/clip_v", "evaluate/rouge_l", "evaluate/follow", "evaluate/best"),
    ),
    Panel(
        "Format and drawable",
        "Shares; all should approach 1.",
        ("rollout/format_rate", "evaluate/drawable", "evaluate/format", "anchor/kept_ratio"),
    ),
    Panel(
        "Signs of reward hacking",
        "Ground truth has motion 1, copy excess 0, sharpness 1, saturation shift 0.",
        ("alarm/motion_ratio", "alarm/copy_excess", "alarm/sharpness_ratio", "alarm/saturation_shift"),
    ),
    Panel(
        "Ratio",
        "Before an update exactly 0 in float32; the clipped share should stay small.",
        ("learner/*ratio_max_dev", "learner/*clip_frac", "learner/velocity_dev"),
    ),
    Panel("KL to the reference", "It grows slowly; a jump is too large a step.", ("learner/*kl",)),
    Panel(
        "Entropy, groups without a gradient",
        "A quick fall of entropy ends exploration.",
        ("learner/*entropy", "advantage/zero_std_ratio", "rollout/unique_caption_ratio"),
    ),
    Panel(
        "Length of completions",
        "Tokens. A steady climb without reward is length hacking.",
        ("rollout/completion_tokens_mean",),
    ),
    Panel(
        "Staleness",
        "Versions between learner and sampler; 0 in synchronous runs.",
        ("rollout/staleness_mean",),
    ),
    Panel("Gradient norm", "Before clipping.", ("learner/*grad_norm",)),
    Panel(
        "Time by pool",
        "Busy seconds of a step, summed over workers; without the first step, which waits for caches.",
        ("profile/*/busy_s",),
        first_too=False,
    ),
    Panel(
        "Speed",
        "Per second at work: tokens or latents, of samplers and learner. Without the first step.",
        ("speed/*/tokens_per_s", "speed/*/latents_per_s"),
        first_too=False,
    ),
    Panel(
        "Share of the GPUs' peak",
        "MFU; vans plan assumes 0.4. None on CPUs.",
        ("speed/*/mfu",),
        first_too=False,
    ),
    Panel(
        "Time of a step",
        "Seconds; without the first step, which waits for caches.",
        ("time/step_s", "time/rollout_s", "time/update_s", "time/publish_s", "time/evaluate_s"),
        first_too=False,
    ),
)
"""The charts that a stage's part of the page begins with; what no run has is left out."""


def chart(
    curves: Mapping[str, Points],
    marks: Sequence[tuple[int, int, str]] = (),
    link: Callable[[int], str | None] | None = None,
) -> Markup:
    """Return ``curves`` as one SVG; ``marks`` are bands from step to step with their words.

    ``link`` gives the address of a step, None for one that has none. Values that are not finite are gaps.
    """
    shown = {name: [(s, v) for s, v in thinned(points) if math.isfinite(v)] for name, points in curves.items()}
    steps = [s for points in shown.values() for s, _ in points]
    values = [v for points in shown.values() for _, v in points]
    if not steps:
        return Markup('<p class="soft">no value</p>')
    x = _scale(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    ticks = nice_ticks(min(values), max(values))
    y = _scale(ticks[0], ticks[-1], HEIGHT - BOTTOM, TOP)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(", ".join(curves))}">']
    for first, last, words in marks:
        left, right = x(first) - 3, x(last) + 3
        parts.append(
            f'<rect class="alarm" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{HEIGHT - TOP - BOTTOM}">'
            f"<title>{escape(words)}</title></rect>"
        )
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 5}" y="{y(tick) + 3.5:.1f}" text-anchor="end">{tick:.4g}</text>')
    for step in step_ticks(min(steps), max(steps)):
        parts.append(f'<text class="tick" x="{x(step):.1f}" y="{HEIGHT - 7}" text-anchor="middle">{step}</text>')
    for i, points in enumerate(shown.values()):
        colour = COLOURS[i % len(COLOURS)]
        path = " ".join(f"{'M' if j == 0 else 'L'}{x(s):.1f} {y(v):.1f}" for j, (s, v) in enumerate(points))
        parts.append(f'<path class="curve" stroke="{colour}" d="{path}"/>')
    if link is not None or any(len(points) == 1 for points in shown.values()):
        for i, (name, points) in enumerate(shown.items()):
            parts += [
                _point(x(s), y(v), COLOURS[i % len(COLOURS)], f"{name} at step {s}: {v:.5g}", link(s) if link else None)
                for s, v in points
            ]
    return Markup("".join([*parts, "</svg>"]))  # noqa: S704 - all text in it is escaped above


def _point(x: float, y: float, colour: str, words: str, address: str | None) -> str:
    drawn = (
        f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"><title>{escape(words)}</title></circle>'
    )
    return drawn if address is None else f'<a href="{escape(address)}">{drawn}</a>'


def spark(points: Points) -> Markup:
    """Return one curve as a small SVG without axes."""
    shown = [(s, v) for s, v in thinned(points) if math.isfinite(v)]
    if not shown:
        return Markup("")
    low, high = min(v for _, v in shown), max(v for _, v in shown)
    x, y = _scale(shown[0][0], shown[-1][0], 2, 138), _scale(low, high, 34, 4)
    path = " ".join(f"{'M' if j == 0 else 'L'}{x(s):.1f} {y(v):.1f}" for j, (s, v) in enumerate(shown))
    dot = f'<circle cx="{x(shown[-1][0]):.1f}" cy="{y(shown[-1][1]):.1f}" r="2" fill="{COLOURS[0]}"/>'
    return Markup(  # noqa: S704 - numbers alone
        f'<svg class="spark" viewBox="0 0 140 38"><path class="curve" stroke="{COLOURS[0]}" d="{path}"/>{dot}</svg>'
    )


def thinned(points: Points) -> Points:
    """Return at most MOST + 1 of ``points``, evenly spaced, the first and the last among them."""
    every = math.ceil(len(points) / MOST)
    return points if every <= 1 else [*points[:-1:every], points[-1]]


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return round values that cover ``low`` to ``high``, about ``count`` intervals; two at least."""
    if high == low:
        pad = abs(high) * 0.1
        low, high = (low - pad, high + pad) if pad else (0.0, 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [i * size for i in range(first, max(last, first + 1) + 1)]


def step_ticks(first: int, last: int, count: int = 6) -> list[int]:
    """Return round steps within ``first`` … ``last``."""
    if first == last:
        return [first]
    size = max(1, int(nice_ticks(0, last - first, count)[1]))
    return list(range(-(-first // size) * size, last + 1, size))


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = high - low
    return lambda value: (start + end) / 2 if span == 0 else start + (value - low) / span * (end - start)
