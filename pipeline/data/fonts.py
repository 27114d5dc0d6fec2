"""A font that has the letters of a text, for pictures: DejaVu, which matplotlib brings along, or one that is installed."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path

import matplotlib
from matplotlib.font_manager import fontManager
from matplotlib.ft2font import FT2Font
from PIL import ImageFont

log = logging.getLogger(__name__)

OWN = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def font_for(text: str, size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return a font of ``size`` pixels that has the letters of ``text``.

    Where no font has them all, the one that has most, which draws a box for each of the others, and one warning.
    """
    own = str(OWN / ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"))
    letters = frozenset(letter for letter in text if letter.isprintable())
    return _font(own if letters <= _letters(own) else _fullest(letters, own), size)


@lru_cache(maxsize=256)
def _fullest(letters: frozenset[str], own: str) -> str:
    """Return the file of the font with most of ``letters``, ``own`` before its equals; warns where it lacks any.

    Matplotlib's other fonts do not count: its Last Resort claims all letters and draws a box for each, others draw symbols.
    """
    installed = sorted({font.fname for font in fontManager.ttflist if not Path(font.fname).is_relative_to(OWN)})
    best = max([own, *installed], key=lambda file: len(letters & _letters(file)))
    if not letters <= _letters(best):
        _warn_once()
    return best


@lru_cache(maxsize=1)
def _warn_once() -> None:
    log.warning(
        "no installed font has all letters of the texts on a picture, which shows boxes in their place: install one that "
        "has them, such as Noto Sans CJK (Debian: fonts-noto-cjk) for Chinese"
    )


@lru_cache(maxsize=512)
def _letters(file: str) -> frozenset[str]:
    try:
        return frozenset(map(chr, FT2Font(file).get_charmap()))
    except (OSError, RuntimeError):  # removed since matplotlib listed it, or no font
        return frozenset()


@lru_cache(maxsize=64)
def _font(file: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)
