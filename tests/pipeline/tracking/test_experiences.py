"""What a learner read comes back from its file bit for bit, shared arrays once; a damaged file is told. Pure."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.records import Conditioning, SdeSpec, Trajectory, VdmExperience, VideoQuestion, VlmExperience
from cluster.errors import DataError
from pipeline.tracking.experiences import read_experiences, write_experiences

RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 255, (9, 64, 64, 3), dtype=np.uint8)


def thinker(index: int) -> VlmExperience:
    tokens = RNG.integers(0, 500, 7, dtype=np.int32)
    return VlmExperience(
        "s", index, VideoQuestion("what next ?", FRAMES, 8.0), tokens, RNG.normal(size=7).astype(np.float32), 0.1 + 0.2
    )


def artist(condition: bool) -> VdmExperience:
    path = Trajectory(
        RNG.normal(size=(3, 4, 2, 3, 3)).astype(np.float32),
        np.linspace(1, 0, 5, dtype=np.float32),
        np.array([], np.float32),
        SdeSpec("flow", 0.7, 1, 2, (0, 4)),
        1.0,
    )
    made = Conditioning(np.full((3, 5), -0.0, np.float32), None, RNG.normal(size=(4, 2)).astype(np.float32), 16)
    return VdmExperience("s", 3, "字 <b>", FRAMES[:2], path, -1 / 3, made if condition else None)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return type(a) is type(b) and a == b


def test_both_policies_records_come_back_to_the_last_bit(tmp_path: Path) -> None:
    given = {"vlm": [thinker(i) for i in range(3)], "vdm": [artist(True), artist(False)]}
    path = tmp_path / "step.safetensors"
    write_experiences(path, given)
    found = read_experiences(path)
    assert list(found) == list(given)
    for policy, items in given.items():
        assert all(same(a, b) for a, b in zip(items, found[policy], strict=True))
    frames = {id(item.asked.frames) for item in found["vlm"]}  # type: ignore[union-attr]
    assert len(frames) == 1 and path.stat().st_size < 1.5 * FRAMES.nbytes  # a group's video once
    assert [file.name for file in tmp_path.iterdir()] == ["step.safetensors"]


@pytest.mark.parametrize("content", [b"", b"\x08\0\0\0\0\0\0\0{}      ", b"no tensors at all"])
def test_a_file_that_is_none_of_these_is_told(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "step.safetensors"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"step\.safetensors: damaged, or no file of experiences"):
        read_experiences(path)


def test_a_record_that_the_file_has_no_form_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="holds a set"):
        write_experiences(tmp_path / "x.safetensors", {"vlm": [{1}]})  # type: ignore[list-item]
