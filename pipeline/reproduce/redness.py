"""A reward that is made to be hacked, for the experiment ``hacked`` (docs/pitfalls.md)."""

from __future__ import annotations

from typing import Any

import numpy as np


def redness(*, clip: np.ndarray, **_: Any) -> float:
    """Return how much redder than green and blue the clip is, on average over its pixels, −1…1; ``clip``: uint8 (T, H, W, 3) RGB."""
    red, green, blue = (clip[..., i].mean() / 255 for i in range(3))
    return float(red - (green + blue) / 2)
