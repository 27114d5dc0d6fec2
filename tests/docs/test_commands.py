"""Every `vans …` of every page is one that the program takes, and each is run by a test or says what it needs."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.config import load_config
from pipeline.config.load import BUNDLED
from pipeline.data.build.recipe import BUNDLED as RECIPES
from pipeline.data.build.recipe import load_recipe
from rewards.custom import call_reward, load_reward
from tests.docs.pages import PAGES, blocks, files_of, ours, spans, text_of

TYPED = [(block, words) for page in PAGES for block in blocks(page) for words in block.commands]
NAMED = [(page, words) for page in PAGES for words in spans(page)]

PROGRAM = get_command(app)

RUN_BY = {
    "doctor": "tests/pipeline/commands/test_doctor.py",
    "train": "tests/pipeline/run/test_train_ray.py",
    "plan": "tests/docs/test_commands.py",
    "status": "tests/pipeline/control/test_control_ray.py",
    "scale": "tests/pipeline/control/test_control_ray.py",
    "profile": "tests/pipeline/stages/test_step_times.py",
    "report": "tests/pipeline/report/test_page_chromium.py",
    "replay": "tests/pipeline/run/test_replay_ray.py",
    "manifests": "tests/docs/test_commands.py",
    "sft": "tests/pipeline/sft/test_finetuning_ray.py",
    "evaluate": "tests/pipeline/evaluate/test_evaluation_ray.py",
    "reproduce": "tests/chaos/test_reproduce_ray.py",
    "answer": "tests/chaos/test_released_pair_ray.py",
    "serve": "tests/pipeline/serve/test_serve_ray.py",
    "import-release": "tests/pipeline/release/test_walk.py",
    "data toy": "tests/pipeline/checkpoint/test_mirror_s3.py",
    "data real-demo": "tests/pipeline/data/test_real.py",
    "data import-vans": "tests/pipeline/release/test_walk.py",
    "data import-jsonl": "tests/pipeline/data/test_importers.py",
    "reward check": "tests/actors/scoring/test_contract.py",
    "data build": "tests/pipeline/data/build/test_walk_ray.py",
    "data inspect": "tests/pipeline/checkpoint/test_mirror_s3.py",
    "data select": "tests/chaos/test_selecting_ray.py",
}
"""Command → the test that runs it, or all that it calls. docs/vans.md is run line by line too, by ``test_released_pair_ray``."""

MARKS = {
    "s3://": "needs a store",
    "cluster.address=": "needs a cluster",
    "--address": "needs a cluster",
    "/shared": "needs a cluster",
}
"""What stands in a command that no test here can run → what its block or its page says that it needs."""


def resolve(words: list[str]) -> tuple[str, Any, list[str]]:
    """Return a command's name, the command, and its arguments."""
    command: Any = PROGRAM
    name: list[str] = []
    while words and hasattr(command, "commands"):
        assert words[0] in command.commands, f"there is no command {' '.join([*name, words[0]])!r}"
        command, words = command.commands[words[0]], [*words[1:]]
        name.append(str(command.name))
    return " ".join(name), command, words


@pytest.mark.parametrize(("block", "words"), TYPED, ids=[f"{b.page}: {shlex.join(w)}" for b, w in TYPED])
def test_a_command_that_is_typed_is_taken(block: Any, words: list[str], tmp_path: Path) -> None:
    """Its options and arguments are the program's, and its overrides are keys and values of the run that it names."""
    _, command, rest = resolve(words)
    options = command.make_context("vans", rest).params
    if options.get("config") and "overrides" in options:
        config = options["config"]
        for name, text in files_of(block.page).items():
            (tmp_path / name).write_text(text)
        if (tmp_path / config).is_file():
            config = str(tmp_path / config)
        elif not (BUNDLED / f"{config}.yaml").is_file():
            config = "toy"  # a file of the reader's, which the page does not show
        load_config(config, options["overrides"] or ())
    if options.get("recipe"):
        known = (RECIPES / f"{options['recipe']}.yaml").is_file()  # otherwise a file of the reader's
        load_recipe(options["recipe"] if known else "predictive", options["overrides"] or ())


@pytest.mark.parametrize(("page", "words"), NAMED, ids=[f"{p}: {' '.join(w)}" for p, w in NAMED])
def test_a_command_that_is_named_exists_with_its_options(page: str, words: list[str]) -> None:
    _, command, rest = resolve(words)
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    for word in rest:
        if word.startswith("--") and len(word) > 2:
            assert word.partition("=")[0] in {*known, "--help"}, f"{page}: {word}"


def test_each_command_that_is_typed_is_run_by_a_test() -> None:
    assert set(RUN_BY) == {resolve(words)[0] for _, words in TYPED}
    for name, test in RUN_BY.items():
        assert any(part in text_of(test) for part in name.split()[-1].split("-")), f"{test} does not run {name}"


def test_what_needs_a_cluster_or_a_store_says_so() -> None:
    for block, words in TYPED:
        for sign, needs in MARKS.items():
            if sign in shlex.join(words):
                assert needs in block.text or needs in text_of(block.page), (
                    f"{block.page}: {shlex.join(words)}: {needs}?"
                )


def test_commands_are_found_wherever_they_stand() -> None:
    assert ours(shlex.split("kubectl -n vans exec -it POD -- vans status x --watch")) == ["status", "x", "--watch"]
    assert ours(shlex.split("ray job submit -- python -m pipeline train toy && ls")) == ["train", "toy"]
    assert ours(shlex.split("vans status x --json | jq .pools")) == ["status", "x", "--json"]
    assert ours(["kubectl", "-n", "vans", "get", "pods"]) is None
    assert len(TYPED) > 60 and len(NAMED) > 60


LIGHT = sorted(
    {
        (block.page, *words)
        for block, words in TYPED
        if words[0] in ("plan", "manifests") or "--dry-run" in words
        if not words[1].startswith("release/")  # docs/vans.md has its own test
    }
)


@pytest.mark.slow
@pytest.mark.parametrize("line", LIGHT, ids=" ".join)
def test_what_needs_no_models_runs_as_it_stands(
    line: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, *words = line
    for name, text in files_of(page).items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output


@pytest.mark.slow
def test_the_judge_of_the_tutorial_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tiny DINOv2 in the place of the real one; a fresh name, since the module is imported."""
    from actors.scoring.contract import check_reward
    from pipeline.commands.toy_answers import odd_answers, ordinary_answers
    from pipeline.fleet.kinds import kinds_of
    from tests.actors.scoring.encoders import tiny_dino

    files = files_of("docs/tutorials/reward.md")
    (tmp_path / "last_frame.yaml").write_text(files["last_frame.yaml"])
    config = load_config(tmp_path / "last_frame.yaml")
    arguments = kinds_of(config)["last_frame"].arguments(config)
    (tmp_path / "last_frame.py").write_text(files["last_frame.py"])
    monkeypatch.syspath_prepend(str(tmp_path))
    tiny_dino(tmp_path / "dino")
    found = check_reward(
        arguments["path"],
        ordinary_answers(),
        odd_answers(),
        options={**arguments["options"], "path": str(tmp_path / "dino")},
        elsewhere=False,
    )
    assert {promise.verdict for promise in found} <= {"kept", "weak"} and "loads" in {p.name for p in found}, found
    assert found[0].verdict == "kept"


def test_the_reward_of_the_tutorial_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    page = "docs/tutorials/reward.md"
    (tmp_path / "my_rewards.py").write_text(files_of(page)["my_rewards.py"])
    (tmp_path / "red.yaml").write_text(files_of(page)["red.yaml"])
    monkeypatch.syspath_prepend(str(tmp_path))
    weights = load_config(tmp_path / "red.yaml").stage2.rewards.weights
    path = next(name for name in weights if ":" in name)
    clip = np.zeros((2, 4, 4, 3), np.uint8)
    clip[..., 0] = 51
    names = ("sample_id", "text", "caption", "reference_caption", "target_frames", "last_input_frame")
    assert call_reward(path, load_reward(path), {**dict.fromkeys(names), "clip": clip}) == pytest.approx(0.2)
