"""An import that is killed at any point: no reader takes the part for the whole, and the same call finishes it."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import DataError
from pipeline.data.folder import open_dataset
from pipeline.data.importers.jsonl import import_jsonl
from pipeline.data.importers.vans import import_vans
from pipeline.data.importers.vans_csv import COLUMNS
from pipeline.data.real import make_real
from pipeline.data.schema import ShardWriter, shard_paths
from pipeline.data.toy.shards import write_toy
from pipeline.data.video import encode_mp4

pytestmark = pytest.mark.slow

# Forks a process for each point at which an import changes its folder, and has SIGKILL end it right before that.
SCRIPT = """
import json, os, shutil, signal, sys
from pathlib import Path

import av.video, pyarrow.fs, pyarrow.dataset
import pipeline.data.marker as marker
from pipeline.data.folder import survey
from pipeline.data.importers.vans import import_vans
from pipeline.data.schema import ShardWriter
from cluster.errors import DataError

root, tables, calls = Path(sys.argv[1]), [Path(p) for p in sys.argv[2:]], 0
ShardWriter.__init__.__kwdefaults__ |= {"rows_per_shard": 3, "group_bytes": 1}


def imported(out, kill_at=0):
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.waitstatus_to_exitcode(status)

    def counted(call):
        def deadly(*args, **more):
            global calls
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **more)
        return deadly

    os.replace, marker.remove, ShardWriter.write = map(counted, (os.replace, marker.remove, ShardWriter.write))
    import_vans(tables, root / "clips", out, workers=2, quiet=True)
    (root / "calls").write_text(str(calls))
    os._exit(0)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def taken_for(folder):
    try:
        return survey(folder).completeness.split(":")[0].split(" ")[0]
    except DataError as error:
        return "no" if "part of a dataset" in str(error) else str(error)


assert imported(root / "whole") == 0
points = int((root / "calls").read_text())
told = []
for point in range(1, points + 1):
    out = root / f"cut{point}"
    assert imported(out, point) == signal.SIGKILL
    names, taken = sorted(content(out)), taken_for(out)
    if taken == "no":
        assert imported(out) == 0
        again = content(out) == content(root / "whole")
    else:  # killed after the marker: nothing is missing, and what is left over is the writer's own notes
        again = all(content(out)[name] == value for name, value in content(root / "whole").items())
    told.append([point, taken, again, names])
    shutil.rmtree(out)
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips and two CSVs of 11 rows: 8 that can be imported, names that come twice, and rejections everywhere."""
    root = tmp_path_factory.mktemp("import")
    (root / "clips").mkdir()
    for name in ("a", "b"):
        frames = np.random.default_rng(ord(name)).integers(0, 255, (4, 16, 16, 3), np.uint8)
        (root / "clips" / f"{name}.mp4").write_bytes(encode_mp4(frames, 8.0))
    rows = [
        ["gone", "none.mp4", "a.mp4", "Q", "c"],
        *([name, "a.mp4", "b.mp4", "What if?", f"caption {i}"] for i, name in enumerate("xyx")),
        ["gone", "a.mp4", "none.mp4", "Q", "c"],
        *([name, "b.mp4", "a.mp4", "Next?", f"caption {i}"] for i, name in enumerate("zxxyw")),
        ["empty", "a.mp4", "b.mp4", "Q", " "],
    ]
    for name, part in (("one", rows[:6]), ("two", rows[6:])):
        with (root / f"{name}.csv").open("w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file).writerows([COLUMNS, *part])
    return root


def test_killed_at_any_point_an_import_is_a_part_and_the_same_call_finishes_it(world: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(world), str(world / "one.csv"), str(world / "two.csv")],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert len(told) >= 8 + 7 + 3, "8 rows, a note and a name for each of 3 shards, the marker, and the notes that go"
    marked = [point for point, taken, _, _ in told if taken == "yes"]
    assert marked == list(range(told[-1][0] - len(marked) + 1, told[-1][0] + 1)) and len(marked) < 6, (
        "the marker comes last"
    )
    for point, taken, again, names in told:
        assert taken in ("yes", "no") and again, (point, taken, names)
    kept = [sum(name.endswith(".parquet") for name in names if not name.startswith(".")) for *_, names in told]
    assert kept == sorted(kept) and {0, 1, 2, 3} == set(kept)
    whole = open_dataset(world / "whole")
    assert (whole.rows, whole.vouched) == (8, True)


def test_an_interrupted_import_goes_on_only_with_the_same_arguments(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ShardWriter.__init__.__kwdefaults__, "rows_per_shard", 2)
    write, out = ShardWriter.write, tmp_path / "out"

    def full(self: ShardWriter, row: object) -> None:
        if self.count == 5:
            raise OSError(28, "No space left on device")
        write(self, row)  # type: ignore[arg-type]

    tables = [world / "one.csv", world / "two.csv"]
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(ShardWriter, "write", full)
        import_vans(tables, world / "clips", out, quiet=True)
    assert len(shard_paths(out)) == 2
    for other, differs in (
        ({"sources": tables[:1]}, "manifests"),
        ({"kind": "procedural"}, "kind"),
    ):
        with pytest.raises(DataError, match=rf"another write that was interrupted \(it differs in: {differs}\)"):
            import_vans(**{"sources": tables, "clips": world / "clips", "out": out, "quiet": True, **other})  # type: ignore[arg-type]
    manifest = tmp_path / "m.jsonl"
    manifest.write_text(json.dumps({"question": "q", "caption": "c", "input": "a.mp4", "target": "b.mp4"}))
    with pytest.raises(DataError, match="another write that was interrupted"):
        import_jsonl(manifest, world / "clips", out, quiet=True)
    report = import_vans(tables, world / "clips", out)
    whole = import_vans(tables, world / "clips", tmp_path / "whole", quiet=True)
    assert (report.accepted, report.kinds, report.embedded) == (8, whole.kinds, whole.embedded)
    assert report.rejected == whole.rejected and len(report.rejected) == 3
    assert "4 rows of an interrupted import are kept" in " ".join(capsys.readouterr().out.split())


def test_the_toy_world_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ShardWriter.__init__.__kwdefaults__, "rows_per_shard", 4)

    def stop(split: str, done: int, total: int) -> None:
        if (split, done) == ("test", 6):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_toy(tmp_path / "cut", train=5, test=7, val=0, progress=stop)
    with pytest.raises(DataError, match="part of a dataset"):
        open_dataset(tmp_path / "cut" / "test")
    made: list[tuple[str, int]] = []
    write_toy(tmp_path / "cut", train=5, test=7, val=0, progress=lambda split, done, total: made.append((split, done)))
    assert made == [("test", 5), ("test", 6), ("test", 7)]
    write_toy(tmp_path / "whole", train=5, test=7, val=0)
    for split in ("train", "test"):
        assert open_dataset(tmp_path / "cut" / split).digest == open_dataset(tmp_path / "whole" / split).digest
    with pytest.raises(DataError, match="already holds a dataset"):
        write_toy(tmp_path / "cut", train=5, test=7, val=0)


def test_the_real_demo_goes_on_where_it_stopped(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut = {"file": "a.mp4", "input": [0.0, 0.25], "target": [0.25, 0.5], "kind": "predictive", "question": "q?"}
    pairs = [{**cut, "name": split, "caption": split, "split": split} for split in ("test", "train")]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    arguments = (tmp_path / "out", [world / "clips" / "a.mp4"], tmp_path / "pairs.json")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        close = ShardWriter.close

        def stop(self: ShardWriter) -> None:
            if "train" in str(self.folder):
                raise KeyboardInterrupt
            close(self)

        patch.setattr(ShardWriter, "close", stop)
        make_real(*arguments, quiet=True)
    reports = make_real(*arguments, quiet=True)
    assert [reports[split].accepted for split in ("test", "train")] == [1, 1]
    assert open_dataset(tmp_path / "out" / "train").vouched
    with pytest.raises(DataError, match="already holds a dataset"):
        make_real(*arguments, quiet=True)
