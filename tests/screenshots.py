"""``make screenshots``: the pictures of the playground and of a run's page that the documentation shows, from a run.

Starts ``vans serve`` on the run, uses both pages in Chromium as the tests do, and writes PNGs.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pipeline.config import load_config
from pipeline.report.page import write_page
from pipeline.serve.examples import held_out
from tests.browser import chromium
from tests.pipeline.serve.serving import free_port, put, serving_process

WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
QUESTIONS = ("what is the next step ?", "what if it were reversed ?")
ANSWERS = {"x": 0, "y": 0, "width": 1280, "height": 690}
"""What is looked at of a page with answers: the examples are on the empty one."""
WAIT_MS = 120_000
PLAYING = """(wanted) => {
    const clips = [...document.querySelectorAll(".vans-pair video")];
    return clips.length == wanted && clips.every((clip) => clip.currentTime > 0.4);
}"""


def playground(browser: Any, address: str, clip: bytes, shots: Shots) -> None:
    """Take the empty page, one with answers side by side, and that of a phone."""
    page = opened(browser, address, viewport=WIDE)
    page.wait_for_timeout(1000)  # pictures of the examples
    shots.keep("playground", page.screenshot())
    put(page, clip, *QUESTIONS)
    settled(page, 2 * len(QUESTIONS))
    page.evaluate("scrollTo(0, 0)")
    shots.keep("playground_answers", page.screenshot(clip=ANSWERS))
    page.close()
    phone = opened(browser, address, viewport=PHONE, device_scale_factor=1.5)
    put(phone, clip, QUESTIONS[0])
    phone.wait_for_selector(".vans-pair", timeout=WAIT_MS)
    phone.eval_on_selector("#questions", "(asked) => asked.scrollIntoView()")  # a clip plays where it is seen
    settled(phone, 2)
    shots.keep("playground_phone", phone.screenshot())
    phone.close()


def opened(browser: Any, address: str, **options: Any) -> Any:
    """Return a new page of the playground."""
    page = browser.new_page(**options)
    page.goto(address)
    page.wait_for_selector("#ask")
    return page


def settled(page: Any, clips: int) -> None:
    """Wait until ``clips`` are playing, and their players have hidden their buttons."""
    page.wait_for_function(PLAYING, arg=clips, timeout=WAIT_MS)
    page.wait_for_timeout(4000)


def report(browser: Any, page_file: Path, shots: Shots) -> None:
    """Take the first screen of a run's page, and its rollout browser."""
    page = browser.new_page(viewport=WIDE)
    page.goto(page_file.as_uri())
    page.wait_for_selector(".group")
    shots.keep("report", page.screenshot())
    page.eval_on_selector("#rollouts", "(section) => section.scrollIntoView()")
    page.wait_for_timeout(1500)  # clips begin to play
    shots.keep("report_rollouts", page.screenshot())
    page.close()


class Shots:
    """Pictures written to a folder."""

    def __init__(self, out: Path) -> None:
        self._out = out
        out.mkdir(parents=True, exist_ok=True)

    def keep(self, name: str, png: bytes) -> None:
        """Write a screenshot and say how large it is."""
        path = self._out / f"{name}.png"
        image = Image.open(io.BytesIO(png)).convert("RGB")
        image.save(path, optimize=True)  # in all colours: with few, a small green circle turns grey
        print(f"{path}: {image.width} × {image.height}, {path.stat().st_size / 1024:.0f} KiB")


def main(run: Path, out: Path) -> None:
    """Write the pictures of ``run`` to ``out``. SystemExit with the reason where there is no browser or no held-out clip."""
    examples = held_out(load_config(run / "config.yaml"), run)
    if not examples:
        raise SystemExit(f"{run}: no held-out clip is in its data; a run of `vans demo` has some")
    try:
        with chromium() as browser, tempfile.TemporaryDirectory() as folder:
            shots = Shots(out)
            report(browser, write_page(run, Path(folder)), shots)
            with serving_process(str(run), f"serve.port={free_port()}") as address:
                playground(browser, address, examples[0].video, shots)
    except (pytest.skip.Exception, pytest.fail.Exception) as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the documentation's pictures of the pages.")
    parser.add_argument("--run", type=Path, default=Path("runs/demo"), help="a run of `vans demo`")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    given = parser.parse_args()
    main(given.run, given.out)
