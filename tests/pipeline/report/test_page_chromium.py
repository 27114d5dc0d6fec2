"""A run's page as a person uses it, in Chromium: slider, sort, filter, search, links, playing videos, nothing from outside.

The page is opened from the disk, as it will be.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.report.page import write_page
from tests.browser import Seen
from tests.pipeline.report.made_run import GROUPS, HOSTILE, SIZE, make_run

pytestmark = pytest.mark.slow


class Report(Seen):
    """A run's page, and what a person reads off it."""

    def groups(self) -> list[int]:
        """The numbers of the groups that are shown, in their order."""
        found: list[int] = self.page.eval_on_selector_all(
            ".group", "all => all.map(each => Number(each.dataset.group))"
        )
        return found

    def step(self) -> str:
        text: str = self.page.inner_text("#shown")
        return text

    def wait_until(self, holds: str) -> None:
        """Wait until the expression ``holds``; the page's policy lets nobody, Playwright's own polling included, make code of text."""
        for _ in range(300):
            if self.page.evaluate(holds):
                return
            self.page.wait_for_timeout(100)
        raise AssertionError(f"not within 30 s: {holds}")

    def set_slider(self, position: int) -> None:
        self.page.eval_on_selector(
            "#slider", "(slider, to) => { slider.value = to; slider.dispatchEvent(new Event('input')); }", position
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("browser") / "run"
    make_run(out, store=False)
    return out


@pytest.fixture(scope="module")
def seen(run: Path, browser: Any) -> Iterator[Report]:
    found = Report(browser.new_page(viewport={"width": 1400, "height": 900}))
    path = write_page(run, run / "report")
    found.page.goto(path.as_uri())
    found.page.wait_for_selector(".group")
    yield found
    # What all tests of this file have asked for and heard.
    assert found.complaints == []
    assert found.asked and {url.partition(":")[0] for url in found.asked} == {"file"}
    assert found.page.title() == "made · VANS on Ray"


def test_the_last_step_is_shown_first_and_the_slider_moves(seen: Report) -> None:
    assert seen.step() == "8" and seen.groups() == list(range(GROUPS))
    assert seen.page.locator(".member").count() == GROUPS * SIZE
    seen.set_slider(2)
    assert seen.step() == "2" and seen.page.url.endswith("#stage1-2")
    seen.page.click("#after")
    assert seen.step() == "3"
    seen.page.select_option("#stage", "stage2")
    assert seen.step() == "3" and "stage2" in seen.page.input_value("#stage")
    seen.page.select_option("#stage", "stage1")


def test_a_point_of_a_curve_leads_to_its_step(seen: Report) -> None:
    seen.page.locator('#part-stage1 a[href="#stage1-6"] .point').first.click()
    seen.wait_until("document.getElementById('shown').textContent === '6'")
    assert seen.page.input_value("#stage") == "stage1"


def test_sorting_puts_the_asked_for_group_first(seen: Report) -> None:
    seen.set_slider(4)
    data = seen.page.evaluate("JSON.parse(document.getElementById('step-stage1-4').textContent).groups")
    for order, key, falling in (("best", "best", True), ("worst", "worst", False), ("apart", "apart", True)):
        seen.page.select_option("#order", order)
        wanted = sorted(data, key=lambda group: group[key], reverse=falling)
        assert seen.groups() == [group["number"] for group in wanted], order
    seen.page.select_option("#order", "number")
    seen.page.select_option("#members", "best")
    rewards = seen.page.locator(".group").first.locator(".sum b").all_inner_texts()
    values = [float(text.split()[-1]) for text in rewards]
    assert values == sorted(values, reverse=True) and len(set(values)) > 2
    seen.page.select_option("#members", "index")


def test_lost_ones_are_found_with_their_reason(seen: Report) -> None:
    seen.set_slider(6)
    seen.page.select_option("#filter", "lost")
    assert len(seen.groups()) == 2
    assert "lost: the artist refused it: <b>too long</b>" in seen.page.inner_text("#groups")
    assert seen.page.locator("#groups b b, #groups .bad b").count() == 0
    seen.page.fill("#words", "the scorer died")
    assert len(seen.groups()) == 1
    seen.page.fill("#words", "")
    seen.page.select_option("#filter", "all")
    assert len(seen.groups()) == GROUPS


def test_a_question_with_html_is_shown_as_it_was_written(seen: Report) -> None:
    seen.set_slider(1)
    assert HOSTILE in seen.page.locator(".words b").all_inner_texts()
    assert seen.page.locator("#groups img, #groups script").count() == 0


def test_the_slowest_groups_way_is_first_and_leads_to_it(seen: Report) -> None:
    seen.set_slider(4)
    seen.page.click("#timeline summary")
    ends = [float(text.split()[0]) for text in seen.page.locator(".path > .soft").all_inner_texts()]
    assert len(ends) == GROUPS and ends == sorted(ends, reverse=True)
    titles = seen.page.locator(".path").first.locator(".span").evaluate_all("all => all.map(each => each.title)")
    assert [title.partition(",")[0] for title in titles][:2] == ["the thinker writes", "the artist draws"]
    assert len([title for title in titles if title.startswith("the artist draws")]) == SIZE
    seen.page.locator(".path button").first.click()
    assert seen.page.locator("#pools svg").count() == 3 and "vdm" in seen.page.inner_text("#pools")


def test_a_clip_plays(seen: Report) -> None:
    seen.set_slider(5)
    seen.page.locator("#rollouts").scroll_into_view_if_needed()
    plays = (
        "(() => { const v = document.querySelector('.member video'); return v && !v.error && v.currentTime > 0.2; })()"
    )
    seen.wait_until(plays)
    assert seen.page.eval_on_selector(".member video", "video => [video.videoWidth, video.videoHeight]") == [32, 32]


def test_the_search_finds_curves_by_name_and_meaning(seen: Report) -> None:
    seen.page.locator("#part-stage1 .rest summary").click()
    box = seen.page.locator("#part-stage1 .rest input")
    box.fill("captions embedded")
    shown = seen.page.locator("#part-stage1 .card:visible .name").all_inner_texts()
    assert shown == ["cache/captions"]
    box.fill("")


def test_one_file_plays_too_and_a_phone_is_wide_enough(run: Path, browser: Any, tmp_path: Path) -> None:
    path = write_page(run, tmp_path, single=True)
    found = Report(browser.new_page(viewport={"width": 390, "height": 844}))
    found.page.goto(f"{path.as_uri()}#stage2-1")
    found.wait_until("document.getElementById('shown').textContent === '1'")
    playing = "[...document.querySelectorAll('video')].some(video => video.currentTime > 0.2)"
    found.wait_until(playing)
    assert found.page.evaluate("document.documentElement.scrollWidth") <= 390
    assert found.complaints == []
    assert {url for url in found.asked if not url.startswith("data:")} == {path.as_uri()}
    found.page.close()
