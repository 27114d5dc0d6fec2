"""A step's rollouts come back from their file as they were, lost ones with reasons; old ones go, a failing disk is counted."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from actors.records import Clip, Completion, Sample, Scores
from cluster.errors import DataError
from pipeline.data.video import decode_video
from pipeline.stages.groups import NO_GRADIENT, TOO_FEW, Group, LeftOut, Member, RolloutBatch, Span, assemble
from pipeline.tracking import behind
from pipeline.tracking.behind import WAITING, RolloutWriter
from pipeline.tracking.rollouts import (
    FOLDER,
    SCHEMA,
    StepRollouts,
    clear,
    prune,
    read_step,
    step_rollouts,
    stored_steps,
    write_step,
)

WEIGHTS = {"format": 1.0, "clip_v": 2.0}
SIZE = 3


def frames(level: int) -> np.ndarray:
    made = np.full((5, 32, 32, 3), 20, np.uint8)
    made[:, 8:24, 8:24] = [level, 120, 40]
    return made


def member(index: int, clip_v: float, clip: np.ndarray | None = None) -> Member:
    ids = np.arange(index + 2, dtype=np.int32)
    completion = Completion(f"<think>{index}</think>", ids, np.zeros(len(ids), np.float32), "stop", 4)
    scores = Scores("s", index, {"format": 1.0, "clip_v": clip_v}, {"motion_ratio": 0.25})
    drawn = None if clip is None else Clip("s", index, "c", clip, 2)
    return Member(
        index,
        f"c{index}",
        scores,
        completion,
        drawn,
        4,
        {"text": 2**62 + 1, "noise": 7},
        {"score": Span(9.0 + index, 0.5)},
    )


def group(name: str, *members: Member, failures: tuple[str, ...] = ()) -> Group:
    return Group(Sample(name, "predictive", f"{name} <b>?", "truth", frames(1), frames(250)), members, failures)


def batch(*groups: Group, beside: Sequence[LeftOut] = ()) -> RolloutBatch:
    options: dict[str, Any] = {"std_norm": "group", "normalise_rewards": False, "min_group": 2, "trained_version": 4}
    return assemble(groups, WEIGHTS, **options, beside=beside)


def rollouts(found: RolloutBatch, step: int = 3, clips: Any = "all", stage: str = "stage1") -> StepRollouts:
    return step_rollouts(
        stage,
        step,
        found,
        clips=clips,
        group_size=SIZE,
        weights=WEIGHTS,
        figures={"learner/loss": 0.1 + 0.2},
        fps=8.0,
        run_id="r",
    )


SHARED = frames(90)
WHOLE = batch(group("a", member(0, 0.5, SHARED), member(1, 0.9, frames(200)), member(2, 0.5, SHARED)))


def test_a_file_holds_what_the_step_learnt_from_exactly(tmp_path: Path) -> None:
    path = write_step(tmp_path, rollouts(WHOLE))
    assert path.name == "stage1-step000003.parquet"
    rows, note = read_step(path)
    assert [row["index"] for row in rows] == [0, 1, 2]
    first = rows[0]
    assert (first["stage"], first["step"], first["group"], first["sample_id"]) == ("stage1", 3, 0, "a")
    assert (first["question"], first["truth"], first["caption"], first["text"]) == (
        "a <b>?",
        "truth",
        "c0",
        "<think>0</think>",
    )
    assert first["scores"] == {"format": 1.0, "clip_v": 0.5} and first["diagnostics"] == {"motion_ratio": 0.25}
    assert [row["reward"] for row in rows] == WHOLE.totals[0].tolist()
    assert [row["advantage"] for row in rows] == WHOLE.advantages[0].tolist()  # float64, to the last bit
    assert first["seeds"] == {"text": 2**62 + 1, "noise": 7} and (first["began"], first["seconds"]) == (
        {"score": 0.0},
        {"score": 0.5},
    )
    assert (first["tokens"], first["finish_reason"], first["weights_version"], first["clip_version"]) == (
        2,
        "stop",
        4,
        2,
    )
    assert {row["lost"] for row in rows} == {None}
    assert note == {"format": 1, "run": "r", "weights": WEIGHTS, "figures": {"learner/loss": 0.1 + 0.2}}
    for column, level in (("input_video", 1), ("target_video", 250), ("clip", 90)):
        shown = decode_video(first[column], 5, 32, 32).astype(int)
        assert np.abs(shown - frames(level)).mean() < 8, column
    assert rows[0]["clip"] == rows[2]["clip"] != rows[1]["clip"]


def test_a_folder_of_them_is_one_table_for_anyone(tmp_path: Path) -> None:
    write_step(tmp_path, rollouts(WHOLE, step=1))
    write_step(tmp_path, rollouts(batch(), step=2, clips="none", stage="stage2"))  # a step without groups
    table = ds.dataset(tmp_path, format="parquet").to_table(columns=["stage", "step", "reward"])
    assert table.num_rows == SIZE and set(table["stage"].to_pylist()) == {"stage1"}
    assert pq.read_schema(tmp_path / "stage2-step000002.parquet").equals(SCHEMA)


def test_the_inputs_of_a_group_stand_once_in_the_file(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (5, 128, 128, 3), dtype=np.uint8)
    one, many = (
        batch(Group(Sample("a", "predictive", "q", "t", noise, noise), tuple(member(i, float(i)) for i in range(n))))
        for n in (2, 16)
    )
    sizes = [write_step(tmp_path / str(i), rollouts(found)).stat().st_size for i, found in enumerate((one, many))]
    assert sizes[0] > 100_000 and sizes[1] < 1.1 * sizes[0]


@pytest.mark.parametrize(("clips", "shown"), [("all", [0, 1, 2]), ("best_worst", [1, 2]), ("none", [])])
def test_clips_are_kept_as_the_setting_says(tmp_path: Path, clips: str, shown: list[int]) -> None:
    found = batch(group("a", member(0, 0.5, frames(9)), member(1, 0.9, frames(99)), member(2, 0.1, frames(199))))
    rows, _ = read_step(write_step(tmp_path, rollouts(found, clips=clips)))
    assert [row["index"] for row in rows if row["clip"]] == shown
    assert {bool(row["input_video"] and row["target_video"]) for row in rows} == {clips != "none"}


def test_lost_trajectories_are_rows_with_their_reason(tmp_path: Path) -> None:
    kept = group("a", member(0, 0.5), member(2, 0.9), failures=("the scorer refused it",))
    small = group("b", member(1, 0.5), failures=("too long", "too dark"))
    none = group("c", failures=("cannot be asked",) * SIZE)
    rows, _ = read_step(write_step(tmp_path, rollouts(batch(small, kept, none))))
    told = [(row["sample_id"], row["index"], row["lost"]) for row in rows]
    assert told == [
        ("a", 0, None),
        ("a", 1, "the scorer refused it"),
        ("a", 2, None),
        ("b", 0, "too long"),
        ("b", 1, TOO_FEW),
        ("b", 2, "too dark"),
        *(("c", i, "cannot be asked") for i in range(SIZE)),
    ]
    assert [row["group"] for row in rows] == [0] * 3 + [1] * 3 + [2] * 3
    assert [row["reward"] is None for row in rows] == [row["lost"] is not None for row in rows]
    assert rows[4]["scores"] == {"format": 1.0, "clip_v": 0.5}  # what it had come to
    assert rows[6]["question"] == "c <b>?"


def test_what_was_drawn_beside_the_groups_is_in_the_file_with_its_reason(tmp_path: Path) -> None:
    replaced = group("b", member(0, 0.5, frames(9)), member(1, 0.5, frames(99)), failures=("too dark",))
    sample = group("c").sample
    anchor = LeftOut(Group(sample, (), text="<ans>it falls</ans>"), "ROUGE-L 0.1 is too low", "it falls")
    found = batch(WHOLE.groups[0], beside=[LeftOut(replaced, NO_GRADIENT), anchor])
    rows, _ = read_step(write_step(tmp_path, rollouts(found, clips="all")))
    told = [(row["group"], row["sample_id"], row["index"], row["lost"]) for row in rows[SIZE:]]
    assert told == [
        (1, "b", 0, NO_GRADIENT),
        (1, "b", 1, NO_GRADIENT),
        (1, "b", 2, "too dark"),
        (2, "c", 0, "ROUGE-L 0.1 is too low"),
    ]
    assert all(row["scores"] and row["clip"] for row in rows[SIZE : SIZE + 2])
    assert rows[-1]["caption"] == "it falls" and rows[-1]["text"] == "<ans>it falls</ans>"
    assert rows[-1]["clip"] is None and rows[-1]["scores"] is None and rows[-1]["reward"] is None


def test_a_step_written_again_replaces_itself_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    for clip_v in (0.1, 0.2):
        write_step(tmp_path / FOLDER, rollouts(batch(group("a", member(0, clip_v), member(1, 0.9)))))
    (only,) = (tmp_path / FOLDER).iterdir()
    assert read_step(only)[0][0]["scores"]["clip_v"] == 0.2


def test_the_newest_steps_of_each_stage_are_kept_and_a_repeated_run_does_not_count_what_it_will_replace(
    tmp_path: Path,
) -> None:
    def steps(stage: str) -> list[int]:
        return [each.step for each in stored_steps(tmp_path) if each.stage == stage]

    for step in range(6):
        write_step(tmp_path / FOLDER, rollouts(batch(), step=step))
        write_step(tmp_path / FOLDER, rollouts(batch(), step=step, stage="stage2"))
        prune(tmp_path, "stage1", step, keep=3)
    assert steps("stage1") == [3, 4, 5] and steps("stage2") == list(range(6))
    write_step(tmp_path / FOLDER, rollouts(batch(), step=2))  # resumed from a checkpoint after step 1
    prune(tmp_path, "stage1", 2, keep=3)
    assert steps("stage1") == [2, 3, 4, 5]
    clear(tmp_path)
    assert stored_steps(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b"PAR1 no more", None])
def test_a_file_that_is_none_is_told(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "stage1-step000000.parquet"
    if content is None:
        import pyarrow as pa

        pq.write_table(pa.table({"a": [1]}), path)
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"stage1-step000000\.parquet: (damaged|no file of rollouts)"):
        read_step(path)


# --- behind the step ----------------------------------------------------------------------------------------------------


def test_the_writer_writes_in_order_and_keeps_the_newest(tmp_path: Path) -> None:
    writer = RolloutWriter(tmp_path, keep=2)
    for step in range(4):
        writer.put(rollouts(WHOLE, step=step))
        assert writer.flush(30.0)
    writer.close()
    assert [each.step for each in stored_steps(tmp_path)] == [2, 3]
    assert (writer.counts.written, writer.counts.lost, writer.news()) == (4, 0, [])


def test_a_disk_that_fails_is_counted_told_once_and_forgiven(tmp_path: Path) -> None:
    (tmp_path / FOLDER).write_text("a file where the folder should be")
    writer = RolloutWriter(tmp_path, keep=2)
    for step in range(3):
        writer.put(rollouts(WHOLE, step=step))
        assert writer.flush(30.0)
    told = writer.news()
    assert len(told) == 1 and "stage1 step 0 are not stored" in told[0] and "exists" in told[0].lower()
    assert (writer.counts.failed, writer.counts.written) == (3, 0)
    (tmp_path / FOLDER).unlink()
    writer.put(rollouts(WHOLE, step=3))
    writer.close()
    assert [each.step for each in stored_steps(tmp_path)] == [3] and writer.counts.lost == 3


def test_a_disk_that_hangs_holds_up_nothing_and_bounds_what_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on, real = threading.Event(), write_step

    def slow(folder: Path, found: StepRollouts) -> Path:
        assert go_on.wait(30.0)
        return real(folder, found)

    monkeypatch.setattr(behind, "write_step", slow)
    writer = RolloutWriter(tmp_path, keep=50)
    writer.put(rollouts(WHOLE, step=0))
    taken_up(writer)
    for step in range(1, WAITING + 3):
        writer.put(rollouts(WHOLE, step=step))
    assert not writer.flush(0.05)
    assert writer.counts.skipped == 2
    go_on.set()
    writer.close()
    assert [each.step for each in stored_steps(tmp_path)] == list(range(WAITING + 1))
    writer.put(rollouts(WHOLE, step=9))  # after the end nothing is taken
    assert writer.counts.skipped == 3


def taken_up(writer: RolloutWriter) -> None:
    """Wait until the thread has taken what was put."""
    with writer._change:
        assert writer._change.wait_for(lambda: not writer._waiting, 10.0)


def test_a_run_that_was_taken_over_writes_no_more(tmp_path: Path) -> None:
    def lost() -> None:
        raise RuntimeError("another process has the folder")

    refuse: Callable[[], None] = lost
    writer = RolloutWriter(tmp_path, keep=2, require_owned=refuse)
    writer.put(rollouts(WHOLE))
    writer.close()
    assert stored_steps(tmp_path) == [] and "another process has the folder" in writer.news()[0]
