"""Recipes: what is bundled can be planned, overrides reach every key, and each mistake is told with its cure."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import ConfigError
from pipeline.config.load import parse_section
from pipeline.data.build.recipe import BUNDLED, Recipe, load_recipe, plan_stages, recipe_identity
from pipeline.data.build.video import Pair, Video

ONE = {"models": {"m": {"model": "x", "base_url": "http://127.0.0.1:1/v1"}}, "stages": {"review": {"model": "m"}}}


def planned(**changed: Any) -> str:
    recipe = parse_section(Recipe, {**ONE, **changed}, "mine.yaml")
    return recipe_identity(recipe, plan_stages(recipe))


@pytest.mark.parametrize("name", sorted(path.stem for path in BUNDLED.glob("*.yaml")))
def test_a_bundled_recipe_has_stages_that_there_are(name: str) -> None:
    plans = plan_stages(load_recipe(name))
    assert next(plan.name for plan in plans) == "probe"
    assert plans[-1].name == "review"


def test_the_page_shows_a_recipe_and_a_stage_that_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[4] / "docs" / "build.md").read_text()
    shown = {kind: re.search(rf"```{kind}\n(.*?)```", page, re.DOTALL)[1] for kind in ("yaml", "python")}  # type: ignore[index]
    (tmp_path / "mine.yaml").write_text(shown["yaml"])
    (tmp_path / "shown_stage.py").write_text(shown["python"])
    monkeypatch.syspath_prepend(str(tmp_path))
    plans = plan_stages(
        load_recipe(tmp_path / "mine.yaml", ["stages.short.use='shown_stage:Short'", "stages.short.words=3"])
    )
    stage = plans[-1].stage(settings=plans[-1].settings, build=None)
    film = Video(
        "a", "a.mp4", pairs=[Pair(0, 1, "procedural", caption=text) for text in ("one two", "one two three four")]
    )
    assert [pair.caption for pair in stage(film).pairs] == ["one two"]


def test_overrides_reach_models_stages_and_their_settings() -> None:
    overrides = [
        "models.writer.model=qwen",
        "stages.review.workers=7",
        "stages.review.bounds.overlap=0.4",
        "languages=both",
    ]
    recipe = load_recipe("predictive", overrides)
    review = plan_stages(load_recipe("predictive", [*overrides, "models.reviewer.concurrency=9"]))[-1]
    assert recipe.models["writer"].model == "qwen"
    assert recipe.spoken == ("en", "zh")
    assert review.section.workers == 7
    assert review.settings.bounds.overlap == 0.4  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("stages.shots.wokers=3", "unknown key 'stages.shots.wokers'"),
        ("stages.reviw.model=writer", "stages.reviw: no stage 'reviw'; there are probe, shots"),
        ("stages.review.use=nowhere:Stage", "No module named 'nowhere'"),
        ("stages.review.use=pathlib:Path", "a stage is a class with a Section named Settings"),
        ("stages.review.model=judge", "stages.review.model='judge': no such model under models (writer, reviewer)"),
        ("stages.review.workers=9", "models.reviewer.concurrency=8: 9 workers ask it"),
        ("langages=both", "unknown key 'langages' (value 'both'); did you mean 'languages'?"),
        (
            "models.writer.kay_variable=A",
            "unknown key 'models.writer.kay_variable' (value 'A'); did you mean 'key_variable'?",
        ),
        ("models.writer.base_url=null", "set either base_url (an endpoint) or engine"),
        ("models.writer.base_url=ftp://x", "an endpoint begins with http://"),
        ("name.x=1", "name is a value, not a section"),
        ("stages.review.workers=0", "stages.review.workers=0: Input should be greater than 0"),
    ],
)
def test_a_mistake_is_told_with_its_key_and_its_cure(override: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_stages(load_recipe("predictive", [override]))
    assert told in str(caught.value)


@pytest.mark.parametrize("key", ["sk-proj-4f9a8b7c6d5e", "A" * 100])
def test_a_key_in_the_recipe_is_refused_and_not_repeated(key: str) -> None:
    with pytest.raises(ConfigError, match="must not stand in a recipe") as caught:
        load_recipe("predictive", [f"models.writer.key_variable={key}"])
    assert key not in str(caught.value)


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="holds a password") as caught:
        load_recipe("predictive", ["models.writer.base_url='http://me:hunter2@host/v1'"])
    assert "hunter2" not in str(caught.value)


def test_a_recipe_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not one of the bundled recipes \(predictive, procedural\)"):
        load_recipe("procedual")
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ConfigError, match="a recipe is a mapping"):
        load_recipe(tmp_path / "list.yaml")


def test_what_may_change_while_a_build_goes_on_is_no_part_of_what_it_is() -> None:
    base = planned()
    url = "http://127.0.0.1:1/v1"
    assert planned(budget={"max_cost": 3.0}) == base
    assert planned(stages={"review": {"model": "m", "workers": 4, "batch": 2}}) == base
    assert planned(models={"m": {"model": "x", "base_url": url, "concurrency": 99, "key_variable": "KEY"}}) == base
    assert planned(models={"m": {"model": "y", "base_url": url}}) != base
    assert planned(stages={"review": {"model": "m", "rewrite": False}}) != base
    assert planned(languages="chn") != base
    assert planned(seed=1) != base
