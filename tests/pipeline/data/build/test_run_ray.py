"""Builds on a real Ray: order, what a bad video costs, what ends a build, worker death, resume, budget."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from cluster.errors import ConfigError, DataError, PlacementError
from pipeline.config.load import parse_section
from pipeline.data.build.recipe import Recipe
from pipeline.data.build.run import build_dataset
from pipeline.data.build.worker import SetupError
from pipeline.data.folder import open_dataset
from pipeline.data.schema import open_shard, shard_paths
from pipeline.support.location import Uri, upload
from tests.pipeline.data.build.stages import write_videos
from tests.s3_server import S3Server
from tests.scripted_server import ScriptedServer

pytestmark = pytest.mark.usefixtures("ray_local")
HERE = "tests.pipeline.data.build.stages"


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("videos")
    write_videos(root, 8)
    return root


def recipe(videos: Path | Uri, *, workers: int = 1, server: ScriptedServer | None = None, **stages: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "test",
        "sources": {"videos": videos},
        "stages": {
            "pieces": {"use": f"{HERE}:Pieces", "workers": workers, "cpus": 0.1, "words": server is None},
            **stages,
        },
    }
    if server is not None:
        values["models"] = {"writer": {"model": "scripted", "base_url": server.base_url, "frames": 2, "frame_side": 32}}
        values["stages"]["question"] = {"model": "writer", "cpus": 0.1, "workers": workers}
        values["stages"]["review"] = {"model": "writer", "cpus": 0.1, "workers": workers}
    return parse_section(Recipe, values, "test")


def rows(out: Path) -> list[dict[str, Any]]:
    return [row for shard in sorted(out.glob("*.parquet")) for row in pq.read_table(shard).to_pylist()]


def digest(out: Path) -> dict[str, str]:
    return {
        str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in out.rglob("*.parquet")
    }


@pytest.mark.chaos
def test_rows_come_in_the_order_of_the_sources_whatever_the_workers(videos: Path, tmp_path: Path) -> None:
    one = build_dataset(recipe(videos), tmp_path / "one", rows_per_shard=5, quiet=True)
    build_dataset(recipe(videos, workers=3), tmp_path / "three", rows_per_shard=5, quiet=True)
    assert digest(tmp_path / "one") == digest(tmp_path / "three")
    found = rows(tmp_path / "one" / "train")
    assert [row["id"] for row in found] == [f"v{n:03d}/{k}-{k + 1}" for n in range(8) for k in range(2)]
    assert found[0]["answer"] == "<think> One piece follows the other. </think> <ans> Piece 1 of v000. </ans>"
    assert json.loads(found[0]["meta"])["language"] == "en"
    assert one.rows == {"train": 16}
    assert open_dataset(tmp_path / "one" / "train").rows == 16
    assert not (tmp_path / "one" / "_build").exists()


@pytest.mark.chaos
def test_videos_in_a_store_give_the_rows_of_those_in_a_folder(videos: Path, tmp_path: Path, s3: S3Server) -> None:
    bucket = s3.bucket("footage")
    for path in videos.iterdir():
        upload(path, bucket / "raw" / path.name)
    build_dataset(recipe(videos), tmp_path / "here", quiet=True)
    build_dataset(recipe(bucket / "raw"), bucket / "built", quiet=True)
    here = rows(tmp_path / "here" / "train")
    there = [row for shard in shard_paths(bucket / "built" / "train") for row in open_shard(shard).read().to_pylist()]
    assert here == there and len(here) == 16


def test_splits_are_by_video(videos: Path, tmp_path: Path) -> None:
    build_dataset(recipe(videos), tmp_path, {"test": 0.4}, quiet=True)
    names = {split: {row["id"].split("/")[0] for row in rows(tmp_path / split)} for split in ("train", "test")}
    assert names["train"] and names["test"] and not names["train"] & names["test"]
    assert len(names["train"] | names["test"]) == 8


@pytest.mark.chaos
def test_a_bad_video_costs_itself_alone(videos: Path, tmp_path: Path) -> None:
    bad = {"use": f"{HERE}:Faulty", "cpus": 0.1, "how": "data", "name": "v003"}
    worse = {"use": f"{HERE}:Faulty", "cpus": 0.1, "how": "bug", "name": "v005"}
    summary = build_dataset(recipe(videos, bad=bad, worse=worse), tmp_path, quiet=True)
    names = {row["id"].split("/")[0] for row in rows(tmp_path / "train")}
    assert names == {f"v{n:03d}" for n in range(8)} - {"v003", "v005"}
    assert summary.lost == {("bad", "video", "unusable"): 1, ("worse", "video", "failed"): 1}
    assert "upside down" in summary.example["bad", "video", "unusable"]
    assert "ValueError: bad frame" in summary.example["worse", "video", "failed"]


@pytest.mark.parametrize(
    ("how", "error", "told"),
    [
        ("setup", SetupError, "stages.bad cannot be set up: no weights at /nowhere"),
        ("setup bug", SetupError, "ZeroDivisionError: division by zero"),
        ("config", ConfigError, "the endpoint refuses the key"),
    ],
)
def test_what_no_video_survives_ends_the_build(how: str, error: Any, told: str, videos: Path, tmp_path: Path) -> None:
    bad = {"use": f"{HERE}:Faulty", "cpus": 0.1, "how": how}
    with pytest.raises(error, match=f"^.{{0,40}}{told}"):
        build_dataset(recipe(videos, bad=bad), tmp_path, quiet=True)


def test_the_death_of_a_worker_costs_nothing(videos: Path, tmp_path: Path) -> None:
    bad = {"use": f"{HERE}:Faulty", "cpus": 0.1, "how": "kill", "name": "v002", "once": str(tmp_path / "killed")}
    summary = build_dataset(recipe(videos, bad=bad), tmp_path / "out", quiet=True)
    assert (tmp_path / "killed").exists()
    assert summary.rows == {"train": 16}


def test_more_workers_than_the_cluster_holds_are_told_at_once(videos: Path, tmp_path: Path) -> None:
    many = {"use": f"{HERE}:Nap", "cpus": 1.0, "workers": 500}
    with pytest.raises(PlacementError, match=r"ask for .* CPUs"):
        build_dataset(recipe(videos, many=many), tmp_path, quiet=True)


@pytest.mark.chaos
def test_a_budget_ends_gently_and_a_larger_one_goes_on(videos: Path, tmp_path: Path) -> None:
    with ScriptedServer() as server:
        whole = recipe(videos, server=server)
        build_dataset(whole, tmp_path / "whole", quiet=True, rows_per_shard=3)
        asked = {form: server.forms[form] for form in ("wording", "verdict")}
        server.seen.clear(), server.forms.clear()
        small = whole.model_copy(update={"budget": whole.budget.model_copy(update={"max_tokens_total": 3000})})
        early = build_dataset(small, tmp_path / "small", quiet=True, rows_per_shard=3)
        assert not early.whole
        assert 0 < early.rows["train"] < 16  # 16 wordings and 9 verdicts at 120 tokens
        assert open_dataset(tmp_path / "small" / "train").rows == early.rows["train"]
        assert any("the budget is spent" in note for note in early.notes)
        later = build_dataset(whole, tmp_path / "small", quiet=True, rows_per_shard=3)
        assert later.whole
        assert {form: server.forms[form] for form in asked} == asked  # nothing was asked twice
        with pytest.raises(DataError, match="holds this very dataset already"):
            build_dataset(whole, tmp_path / "small", quiet=True)
    assert digest(tmp_path / "small") == digest(tmp_path / "whole")
