"""What is said before Ray is started: splits, sources, endpoints and keys that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.errors import DataError
from pipeline.cli import app
from pipeline.data.build.recipe import load_recipe
from pipeline.data.build.run import build_dataset, list_sources, parse_splits
from tests.pipeline.data.build.stages import write_videos
from tests.scripted_server import ScriptedServer

ADDRESSES = ["models.writer.base_url=http://127.0.0.1:9/v1", "models.reviewer.base_url=http://127.0.0.1:9/v1"]


def said(*words: str) -> str:
    result = CliRunner().invoke(app, ["data", "build", *words])
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


@pytest.mark.parametrize("text", ["test", "test=", "test=some", "=0.1=2"])
def test_a_split_that_is_none(text: str) -> None:
    with pytest.raises(DataError, match=r"write NAME=SHARE, such as test=0\.02"):
        parse_splits([text])


@pytest.mark.parametrize(
    ("splits", "told"),
    [
        ({"train": 0.1}, "not train, which is the rest"),
        ({"../up": 0.1}, "called by letters and digits"),
        ({"test": 1.5}, "lies between 0 and 1"),
        ({"test": 0.5, "val": 0.5}, "nothing is left for train"),
    ],
)
def test_a_split_that_cannot_be(splits: dict[str, float], told: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=told):
        build_dataset(load_recipe("predictive"), tmp_path, splits)
    assert not list(tmp_path.iterdir())


def test_an_endpoint_that_is_not_there_is_told_and_nothing_is_written(tmp_path: Path) -> None:
    write_videos(tmp_path / "videos", 1)
    told = said("predictive", f"sources.videos={tmp_path / 'videos'}", *ADDRESSES, "--out", str(tmp_path / "out"))
    assert "models.writer.base_url=http://127.0.0.1:9/v1: nothing answers there" in told
    assert not (tmp_path / "out").exists()


def test_a_key_that_is_missing_is_told_by_the_name_of_its_variable(tmp_path: Path) -> None:
    told = said("predictive", *ADDRESSES, "models.writer.key_variable=VANS_NO_SUCH_KEY", "--out", str(tmp_path / "out"))
    assert "the environment has no VANS_NO_SUCH_KEY" in told


def test_videos_that_are_not_there(tmp_path: Path) -> None:
    with ScriptedServer(models=("MODEL",)) as server:
        addresses = [f"models.{name}.base_url={server.base_url}" for name in ("writer", "reviewer")]
        told = said("predictive", f"sources.videos={tmp_path / 'gone'}", *addresses, "--out", str(tmp_path / "out"))
    assert "gone" in told
    assert not (tmp_path / "out").exists()


def test_another_video_under_the_same_name_is_another_build(tmp_path: Path) -> None:
    write_videos(tmp_path / "videos", 2)
    recipe = load_recipe("predictive", [f"sources.videos={tmp_path / 'videos'}"])
    before = list_sources(recipe)
    assert before.count == 2
    assert list_sources(recipe) == before
    path = tmp_path / "videos" / "v000.mp4"
    path.write_bytes(path.read_bytes() + b"more")
    assert list_sources(recipe).digest != before.digest
