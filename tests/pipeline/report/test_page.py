"""A run's page: whole, escaped, also of a run that goes on, that MLflow knows nothing of, or whose files are damaged."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.errors import ConfigError
from pipeline.cli import app
from pipeline.report.gather import gather, nearest_base
from pipeline.report.page import write_page
from pipeline.tracking.rollouts import FOLDER, stored_steps
from tests.pipeline.report.made_run import FROZEN, GROUPS, HOSTILE, SIZE, STEPS, make_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "run"
    make_run(out)
    (out / "table.json").write_text(
        json.dumps(
            {
                "samples": {"all": 8},
                "systems": {
                    "<i>SFT</i>": {
                        "metrics": {"all": {"clip_v": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 8}}},
                        "alarms": ["clips are <b>still</b>"],
                    }
                },
            }
        )
    )
    return out


@pytest.fixture(scope="module")
def folder(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(run, tmp_path_factory.mktemp("page") / "report").parent


def embedded(html: str, name: str) -> object:
    """The JSON of the block ``name``."""
    (found,) = re.findall(rf'<script type="application/json" id="{name}">(.*?)</script>', html, re.DOTALL)
    return json.loads(found)


def test_the_page_holds_every_stored_step_with_all_its_members(folder: Path) -> None:
    html = (folder / "index.html").read_text()
    assert embedded(html, "index")["numbers"] == {stage: list(range(n)) for stage, n in STEPS.items()}  # type: ignore[index]
    for stage, count in STEPS.items():
        for step in range(count):
            view = embedded(html, f"step-{stage}-{step}")
            assert [len(g["members"]) for g in view["groups"]] == [SIZE] * GROUPS  # type: ignore[index]
            names = {m["clip"] for g in view["groups"] for m in g["members"] if m["clip"]}  # type: ignore[index]
            assert names and all((folder / "clips" / f"{name}.mp4").is_file() for name in names)


def test_what_people_wrote_is_text(folder: Path) -> None:
    html = (folder / "index.html").read_text()
    assert (
        HOSTILE not in html
        and "<script>document" not in html
        and "{{ 7" not in re.sub(r"<script.*?</script>", "", html)
    )
    assert "&lt;i&gt;SFT&lt;/i&gt;" in html and "<i>SFT" not in html and "<b>still" not in html
    shown = [g["question"] for g in embedded(html, "step-stage1-0")["groups"]]  # type: ignore[index]
    assert HOSTILE in shown


def test_nothing_on_the_page_is_asked_of_a_network(folder: Path) -> None:
    html = (folder / "index.html").read_text()
    assert not re.search(r"(?:src|href)=\"?(?:https?:)?//", html) and "@import" not in html and "url(" not in html
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', html)
    assert "default-src &#39;none&#39;" in policy and "unsafe" not in policy and "http" not in policy


def test_alarms_are_those_that_the_run_had(run: Path) -> None:
    found = [(a.stage, a.name, a.first, a.last) for a in gather(run).alarms]
    assert found == [("stage1", "motion", FROZEN.start, FROZEN.stop), ("stage2", "motion", 3, 3)]


def test_curves_come_from_mlflow_and_lead_to_their_steps(folder: Path) -> None:
    html = (folder / "index.html").read_text()
    assert "reward/total_mean at step 8" in html and 'href="#stage1-8"' in html
    assert '<span class="name">cache/captions</span>' in html and "9 of 56 steps" in html
    assert "0.500 [0.400, 0.600]" in html


def test_the_curves_are_of_the_job_that_stored_the_rollouts_and_of_no_other_of_that_name(run: Path) -> None:
    from pipeline.tracking import Tracker

    mine = gather(run).job
    assert mine is not None
    with Tracker.start(gather(run).config) as later:
        assert later.run_id != mine.id
    found = gather(run)
    assert found.job == mine and set(found.stages) == set(STEPS)


def test_the_configuration_is_compared_with_the_nearest_bundled_run(run: Path) -> None:
    name, changes = nearest_base(gather(run).config)
    assert name == "toy" and {change.key for change in changes} == {"name", "out", "alarms.patience"}
    assert [(c.base, c.here) for c in changes if c.key == "alarms.patience"] == [("2", "1")]


def test_one_file_has_all_in_it(run: Path, tmp_path: Path) -> None:
    path = write_page(run, tmp_path / "single", single=True)
    assert [file.name for file in path.parent.iterdir()] == ["index.html"]
    html = path.read_text()
    view = embedded(html, "step-stage2-1")
    for group in view["groups"]:  # type: ignore[index]
        assert f'id="clip-{group["input"]}"' in html


def test_a_page_that_is_bounded_has_the_newest_steps(run: Path, tmp_path: Path) -> None:
    html = write_page(run, tmp_path / "short", single=True, most_bytes=1).read_text()
    assert embedded(html, "index")["numbers"] == {"stage2": [STEPS["stage2"] - 1]}  # type: ignore[index]
    assert f"The newest 1 of {sum(STEPS.values())} stored steps are here" in html


def test_written_again_it_shows_what_has_come_and_drops_what_has_gone(tmp_path: Path) -> None:
    make_run(tmp_path / "run", store=False)
    page = tmp_path / "page"
    write_page(tmp_path / "run", page)
    before = {path.name for path in (page / "clips").iterdir()}
    for each in stored_steps(tmp_path / "run")[:-1]:
        each.path.unlink()
    html = write_page(tmp_path / "run", page).read_text()
    assert embedded(html, "index")["numbers"] == {"stage2": [3]}  # type: ignore[index]
    assert {path.name for path in (page / "clips").iterdir()} < before
    assert "no MLflow store here" in html and "reward/total_mean at step 3" in html  # the curves of what is stored


def test_a_damaged_file_is_told_and_the_others_are_shown(tmp_path: Path) -> None:
    make_run(tmp_path / "run", store=False, clips="none")
    (tmp_path / "run" / FOLDER / "stage1-step000002.parquet").write_bytes(b"PAR1")
    html = write_page(tmp_path / "run", tmp_path / "page").read_text()
    assert embedded(html, "index")["numbers"]["stage1"] == [0, 1, *range(3, STEPS["stage1"])]  # type: ignore[index]
    assert "stage1-step000002.parquet: damaged" in html


def test_a_run_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    from pipeline.config import load_config, to_yaml

    (tmp_path / "config.yaml").write_text(to_yaml(load_config("toy", [f"out={tmp_path}"])))
    html = write_page(tmp_path, tmp_path / "report").read_text()
    assert "No rollouts are stored" in html


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not a run's folder"):
        write_page(tmp_path, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_the_command_says_where_the_page_is(run: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(run), "--out", str(tmp_path / "here"), "--single"])
    assert done.exit_code == 0, done.output
    assert f"wrote {tmp_path}/here/index.html" in done.output.replace("\n", "")
