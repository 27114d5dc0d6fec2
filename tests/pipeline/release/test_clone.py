"""A clone's values are read where they stand, without running anything; another repository is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import CheckpointError
from pipeline.release.clone import AGENT, FRAMES, INFERENCE, PIPELINE, ROWS, read_clone
from pipeline.release.literals import NotLiteralError, NotThereError, Place, Source
from tests.pipeline.release.released import NEGATIVE, SYSTEM, build_clone


def test_every_value_of_the_clone_is_read(tmp_path: Path) -> None:
    release = read_clone(build_clone(tmp_path))
    read = release.values
    assert (read["system"], read["negative_prompt"]) == (SYSTEM, NEGATIVE)
    assert (release.think_tag, release.answer_tag) == ("[Think]", "[Ans]")
    assert (read["answer_tokens"], read["temperature"], read["top_p"]) == (
        24,
        0.7,
        0.9,
    )  # of the first call, not the second
    assert (read["least_pixels"], read["most_pixels"], read["multiple"]) == (1024, 4096, 16)
    assert (read["height"], read["width"], read["num_frames"], read["fps"]) == (32, 32, 9, 11.0)
    assert (read["shift"], read["guidance"], read["steps"], read["take"], read["tiled"]) == (5.0, 5.0, 2, 6, True)
    assert (release.lora.rank, release.lora.alpha, len(release.lora.targets)) == (4, 16.0, 7)
    assert release.computed == ()
    assert release.where("fps") == f"{INFERENCE}: save_video(fps) in process_video_row"


def test_nothing_in_a_clone_is_run(tmp_path: Path) -> None:
    folder = build_clone(tmp_path / "clone")
    mark = tmp_path / "ran"
    for file in (AGENT, FRAMES, PIPELINE, INFERENCE):
        path = folder / file
        path.write_text(f"open({str(mark)!r}, 'w').close()\n" + path.read_text(), encoding="utf-8")
    assert read_clone(folder).values["fps"] == 11.0
    assert not mark.exists()


def test_a_value_that_is_computed_is_what_it_was(tmp_path: Path) -> None:
    folder = build_clone(tmp_path, fps="rate_of(video)", frames_seen="int(os.environ['N'])")
    release = read_clone(folder)
    assert (release.values["fps"], release.values["frames_seen"]) == (11.0, 6)
    assert set(release.computed) == {"fps", "frames_seen"}
    assert "is computed there; 6 as in February 2026" in release.where("frames_seen")


def test_texts_have_no_copy_here(tmp_path: Path) -> None:
    assert [name for name, row in ROWS.items() if row.kind is str and row.was is not None] == []
    folder = build_clone(tmp_path)
    path = folder / INFERENCE
    path.write_text(path.read_text().replace(repr(NEGATIVE), "read_text()"), encoding="utf-8")
    with pytest.raises(
        CheckpointError, match=r"pipe\(negative_prompt\) in process_video_row is computed \(read_text\(\)\)"
    ):
        read_clone(folder)


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        (PIPELINE, None, None, "is not a clone of .*has no file vans/pipelines/wan_video_new.py"),
        (AGENT, "system_prompt", "prompt", r"has no MLLMAgentConfig\.__init__\(system_prompt\)"),
        (AGENT, "class MLLMAgentConfig", "class Agent", r"agent_mllm\.py has no MLLMAgentConfig"),
        (INFERENCE, "save_video", "write", r"inference\.py has no save_video\(fps\) in process_video_row"),
        (INFERENCE, "def ", "def def ", r"cannot be read as Python"),
        (FRAMES, "IMAGE_FACTOR = 16", "IMAGE_FACTOR = '16'", r"IMAGE_FACTOR is '16', which is no int"),
        (FRAMES, "FPS_MAX_FRAMES = 6", "FPS_MAX_FRAMES = 6.5", r"FPS_MAX_FRAMES is '6.5', which is no int"),
        (AGENT, "num_visionqueries: int = 0", "num_visionqueries: int = 64", r"num_visionqueries=64"),
        (AGENT, "[Think][/Think], then", "then", r"names 1 pairs of tags \(\[Ans\]\)"),
        (PIPELINE, "Ans", "Answer", r"searches for '\[Answer\].*asks for \[Ans\]"),
        (AGENT, '"lora_alpha": 16, ', "", r"mllm_lora_config has no lora_alpha"),
    ],
)
def test_another_repository_is_refused_by_file_and_name(
    tmp_path: Path, file: str, old: str | None, new: str, said: str
) -> None:
    path = build_clone(tmp_path) / file
    if old is None:
        path.unlink()
    else:
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new), encoding="utf-8")
    with pytest.raises(CheckpointError, match=said) as error:
        read_clone(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder; give a clone of"):
        read_clone(tmp_path / "nowhere")


def test_literals_are_found_where_they_stand_and_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(
        "N: int = 2 * 3 + 1\nM = N * 2\n\n"
        "def f(a, /, b=1, *, c=[1, 2], d):\n    x, y = 1, 2\n    z = go(g(5), h.g(6, k='x'))\n    return 1 / 0\n"
    )
    source = Source(tmp_path, "a.py")
    assert source.read(Place(variable="N")) == 7
    assert source.read(Place("f", parameter="b")) == 1
    assert source.read(Place("f", parameter="c")) == [1, 2]
    assert source.read(Place("f", call="g", argument=0)) == 5
    assert source.read(Place("f", call="g", argument="k")) == "x"
    with pytest.raises(NotLiteralError, match=r"N \* 2"):
        source.read(Place(variable="M"))
    for place in (Place("f", parameter="a"), Place("f", parameter="d"), Place("g", parameter="a"), Place(variable="Z")):
        with pytest.raises(NotThereError):
            source.read(place)
    with pytest.raises(NotThereError):
        source.read(Place("f", call="go", argument="missing"))
