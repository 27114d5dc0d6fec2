"""Each measure is a number in its range for any frames, and the one that arithmetic says for made-up ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.build import measures

FPS = 10.0


@st.composite
def clips(draw: st.DrawFn) -> np.ndarray:
    """Any few frames of any small size: noise, one colour, or noise with even rows."""
    shape = tuple(draw(st.integers(1, most)) for most in (7, 40, 40))
    generator = np.random.default_rng(draw(st.integers(0, 99)))
    low, high = sorted((draw(st.integers(0, 255)), draw(st.integers(0, 255))))
    frames = generator.integers(low, high + 1, (*shape, 3)).astype(np.uint8)
    frames[:, : draw(st.integers(0, shape[1]))] = draw(st.integers(0, 255))
    return frames


@settings(max_examples=60, deadline=None)
@given(clips())
def test_every_measure_is_finite_and_in_its_range(frames: np.ndarray) -> None:
    found = measures.take(frames, FPS)
    for name, value in found.items():
        assert 0.0 <= value <= (FPS if name == "flashes" else 1.0), name
    assert measures.take(frames, FPS) == found


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 12), st.integers(0, 12), st.integers(0, 20))
def test_black_bars_are_measured_to_the_pixel(top: int, bottom: int, left: int, right: int, level: int) -> None:
    frames = np.random.default_rng(0).integers(60, 256, (3, 40, 60, 3)).astype(np.uint8)
    out = np.full_like(frames, level)
    out[:, top : 40 - bottom, left : 60 - right] = frames[:, top : 40 - bottom, left : 60 - right]
    inside = (40 - top - bottom) * (60 - left - right) / (40 * 60)
    assert measures.border(out) == pytest.approx(1 - inside)


def test_coloured_bars_count_where_they_are_at_two_opposite_edges() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3)).astype(np.uint8)
    frames[:, :, :9] = frames[:, :, -9:] = (200, 30, 90)
    assert measures.border(frames) == pytest.approx(18 / 60)
    frames[:, :, -9:] = (10, 200, 90)
    assert measures.border(frames) == 0.0
    sky = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3)).astype(np.uint8)
    sky[:, :15] = 240  # at one edge alone
    assert measures.border(sky) == 0.0


def test_a_bar_is_one_in_every_frame() -> None:
    frames = np.random.default_rng(0).integers(60, 256, (4, 40, 60, 3)).astype(np.uint8)
    frames[:3, :10] = 0
    assert measures.border(frames) == 0.0


@pytest.mark.parametrize("count", [0, 1, 3])
def test_flashes_are_counted_by_the_second(count: int) -> None:
    frames = np.full((40, 8, 8, 3), 100, np.uint8)
    frames[[5 + 10 * i for i in range(count)]] = 220
    assert measures.flashes(frames, FPS) == pytest.approx(count / 4.0)
    assert (
        measures.flashes(np.concatenate([frames[:1], np.full((10, 8, 8, 3), 220, np.uint8)]), FPS) == 0.0
    )  # a light goes on


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 15), st.integers(0, 5))
def test_motion_is_the_share_of_what_moves(columns: int, seed: int) -> None:
    frames = np.full((10, 36, 64, 3), 90, np.uint8)
    frames[5:, :, : 4 * columns] = 200  # between the fifth and the sixth frame
    # With 10 frames a second, half a second is five frames: all five pairs see the change.
    assert measures.motion(frames, FPS) == pytest.approx(4 * columns / 64, abs=1e-6)
    assert measures.motion(frames[:5], FPS) == 0.0
    assert measures.motion(frames[:1], FPS) == 0.0


def test_brightness_is_the_mean() -> None:
    assert measures.brightness(np.full((2, 4, 4, 3), 51, np.uint8)) == pytest.approx(0.2)


def test_likeness_is_the_share_of_frames_with_a_like_one_before() -> None:
    assert measures.likeness([0b0, 0b111, 0xFF00], [0b11, 0b1]) == pytest.approx(2 / 3)
    assert measures.likeness([], [1]) == measures.likeness([1], []) == 0.0
