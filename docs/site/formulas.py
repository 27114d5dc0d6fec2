"""Formulas of the pages as MathML, made when the site is built: browsers show it themselves, so no script is loaded for it.

mkdocs calls :func:`on_page_content` (``hooks`` in mkdocs.yml). pymdownx.arithmatex has found the formulas and marked them.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(content: str, **_: Any) -> str:
    """Return a page's HTML with each TeX formula in its place as MathML."""
    return _FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    kind, bracket, tex = found.groups()
    display = "block" if bracket == "[" else "inline"
    return f'<{kind} class="formula">{convert(html.unescape(tex).strip(), display=display)}</{kind}>'
