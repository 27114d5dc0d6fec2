"""Pictures are drawn in a font that has their letters."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager

from pipeline.data import fonts
from pipeline.data.fonts import font_for


@pytest.fixture(autouse=True)
def only_matplotlibs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a machine with no fonts but matplotlib's own, whatever is installed here."""
    own = [font for font in fontManager.ttflist if Path(font.fname).is_relative_to(fonts.OWN)]
    assert any("Last Resort" in font.name for font in own)  # which has a glyph for every letter: a box
    monkeypatch.setattr(fontManager, "ttflist", own)
    for cache in (fonts._fullest, fonts._warn_once):
        cache.cache_clear()
    yield
    for cache in (fonts._fullest, fonts._warn_once):
        cache.cache_clear()


def a_font_with(letters: str, path: Path) -> None:
    pen = TTGlyphPen(None)
    pen.moveTo((100, 0))
    for point in ((500, 800), (900, 0)):
        pen.lineTo(point)
    pen.closePath()
    names = [".notdef", *(f"letter{i}" for i in range(len(letters)))]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(letter): name for letter, name in zip(letters, names[1:], strict=True)})
    builder.setupGlyf({name: pen.glyph() for name in names})
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Letters", "styleName": "Regular"})
    builder.setupOS2(sTypoAscender=800)
    builder.setupPost()
    builder.save(path)


def test_latin_texts_stand_in_dejavu() -> None:
    assert font_for("the red circle rises ?", 14).getname() == ("DejaVu Sans", "Book")
    assert font_for("Ünïcode – ж", 14, bold=True).getname() == ("DejaVu Sans", "Bold")


def test_letters_that_dejavu_lacks_are_drawn_in_an_installed_font_that_has_them(tmp_path: Path) -> None:
    a_font_with("红色的圆形上升", tmp_path / "some.ttf")
    a_font_with("红色的圆形上升 abc", tmp_path / "all.ttf")
    for name in ("some.ttf", "all.ttf"):
        fontManager.addfont(tmp_path / name)
    assert font_for("红色的圆形上升 abc", 20).path == str(tmp_path / "all.ttf")
    assert font_for("abc", 20).getname()[0] == "DejaVu Sans"


def test_one_warning_says_what_to_install_where_no_font_has_the_letters(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert {font_for(text, 14).getname()[0] for text in ("红色", "蓝色", "\n")} == {"DejaVu Sans"}
    assert [r.getMessage().count("fonts-noto-cjk") for r in caplog.records] == [1]
