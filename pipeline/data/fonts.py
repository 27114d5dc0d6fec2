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

_OWN = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def font_for(text: str, size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Return a font of ``size`` pixels that has all letters of ``text``.

    Where no installed font has them, DejaVu, which draws a box for each, and one warning that says which are missing.
    """
    own = str(_OWN / ("DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"))
    missing = {letter for letter in text if letter.isprintable()} - _letters(own)
    return _font(own if not missing else _other("".join(sorted(missing))) or own, size)


@lru_cache(maxsize=256)
def _other(missing: str) -> str | None:
    """Return the file of the installed font with most of the letters ``missing``; None, and a warning, where none has any."""
    found = {font.fname: len(set(missing) & _letters(font.fname)) for font in sorted(fontManager.ttflist, key=str)}
    best = max(found, key=lambda name: found[name], default=None)
    if best is None or found[best] < len(missing):
        _warn_once()
        log.debug("no installed font has all of %s", missing)
    return best if best is not None and found[best] else None


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
