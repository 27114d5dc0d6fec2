"""Sizes of a thinker whose make has no formula of its own in ``cost``, read from its module on the meta device.

Responsible for numbers of parameters and for the linear layers that an adapter reaches. Not responsible for what they cost
(``cost``), or for loading.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass

from actors.architectures.architecture import Architecture


@dataclass(frozen=True)
class Sizes:
    """A thinker's parts, in numbers."""

    language: int  # parameters of the language model and its head; a tied head counts once
    vision: int  # parameters of all else: vision tower and projector
    adapted: tuple[tuple[int, int], ...]  # (out, in) of each linear layer of the language model


def sizes(vlm: Architecture) -> Sizes:
    """Return the sizes of ``vlm``; no memory is taken."""
    return _sizes(json.dumps(dict(vlm.components["model"]), sort_keys=True, default=str))


@functools.lru_cache(maxsize=8)
def _sizes(config: str) -> Sizes:
    from actors.learner.adapters import LANGUAGE_MODEL, linear_layers

    module = Architecture("vlm", "sized", {"model": json.loads(config)}).meta("model")
    own = {name: p.numel() for name, p in module.named_parameters()}
    language = sum(n for name, n in own.items() if name.startswith((LANGUAGE_MODEL, "lm_head.")))
    adapted = tuple(shape for name, shape in linear_layers(module).items() if name.startswith(LANGUAGE_MODEL))
    return Sizes(language, sum(own.values()) - language, adapted)
