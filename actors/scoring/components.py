"""The built-in components and what each of them looks at. No torch: the configuration reads the names."""

from __future__ import annotations

from collections.abc import Mapping

VIDEO_FEATURES = "video_features"
"""Not a number: asks for the features of the Fréchet distance under ``Scores.features`` (``clip`` and ``target``)."""

FEATURES: Mapping[str, tuple[str, ...]] = {
    "format": (),
    "rouge_l": (),
    "clip_v": ("clip", "target"),
    "clip_t": ("clip", "caption"),
    "clip_t_truth": ("clip", "truth"),
    "clip_score": ("clip", "caption"),
    "motion": ("clip", "target"),
    "first_frame": ("clip",),
    VIDEO_FEATURES: ("clip", "target"),
}
"""Component → the CLIP features, or the frames of the same name, that its formula takes."""

BUILT_IN = tuple(name for name in FEATURES if name != VIDEO_FEATURES)
"""Names of the built-in components (docs/rewards.md)."""

TEXT_ONLY = frozenset(name for name, features in FEATURES.items() if not features)
"""Components that judge the text alone: nothing has to be rendered for them."""
