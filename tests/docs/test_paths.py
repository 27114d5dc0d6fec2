"""Files that the pages name are there."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import PAGES, ROOT, text_of

_PATH = re.compile(r"`((?:pipeline|actors|rewards|cluster|tests|docs|\.ci)/[\w./-]+)`")


@pytest.mark.parametrize("page", PAGES)
def test_a_file_that_a_page_names_is_there(page: str) -> None:
    named = [path for path in _PATH.findall(text_of(page)) if "/x/" not in path]  # x stands for any
    assert not [path for path in named if not (ROOT / path).exists()]
