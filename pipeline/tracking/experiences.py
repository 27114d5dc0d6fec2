"""What a learner read in a step, as one safetensors file: records go in, equal ones come out, to the last bit (``vans replay``).

Arrays are tensors of the file, each once, however many records share it. All else is JSON in the file's metadata, which
names the tensors. Only records of ``actors.records`` are written and made: nothing in a file is code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from actors.records import Conditioning, Experience, SdeSpec, Trajectory, VdmExperience, VideoQuestion, VlmExperience
from cluster.errors import DataError

NOTE = "vans.experiences"
FORMAT = 1
Experiences = Mapping[str, Sequence[Experience]]
"""What each policy's learner read, in its order."""

_RECORDS: dict[str, type] = {
    record.__name__: record
    for record in (VlmExperience, VdmExperience, VideoQuestion, Trajectory, SdeSpec, Conditioning)
}


def experiences_path(rollouts: Path) -> Path:
    """Return where the experiences of a step lie, beside the file of its ``rollouts``."""
    return rollouts.with_suffix(".safetensors")


def write_experiences(path: Path, experiences: Experiences) -> None:
    """Write ``experiences`` to ``path``, which gets its name when it is whole. Raises OSError where the disk does not take it."""
    tensors: dict[str, np.ndarray] = {}
    names: dict[int, str] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            if id(value) not in names:
                names[id(value)] = f"t{len(names)}"
                tensors[names[id(value)]] = np.ascontiguousarray(value)
            return {"tensor": names[id(value)]}
        if is_dataclass(value) and type(value).__name__ in _RECORDS:
            return {"record": type(value).__name__} | {f.name: plain(getattr(value, f.name)) for f in fields(value)}
        if isinstance(value, tuple):
            return {"tuple": [plain(each) for each in value]}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"an experience holds a {type(value).__name__}, which this file has no form for")

    said = {policy: [plain(item) for item in items] for policy, items in experiences.items()}
    beside = path.with_name(f".{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with beside.open("wb") as file:
            file.write(save(tensors, {NOTE: json.dumps({"format": FORMAT, "experiences": said})}))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_experiences(path: Path) -> dict[str, list[Experience]]:
    """Return what :func:`write_experiences` wrote; raises DataError for a file that is damaged or none of these."""
    try:
        with safe_open(path, framework="numpy") as file:
            note = json.loads((file.metadata() or {})[NOTE])
            if note["format"] != FORMAT:
                raise DataError(f"{path}: experiences of format {note['format']}, this version reads {FORMAT}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        return {policy: [_made(item, tensors) for item in items] for policy, items in note["experiences"].items()}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: damaged, or no file of experiences: {type(error).__name__}: {error}") from error


def _made(value: Any, tensors: Mapping[str, np.ndarray]) -> Any:
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    if "tuple" in value:
        return tuple(_made(each, tensors) for each in value["tuple"])
    record = _RECORDS[value["record"]]
    return record(**{name: _made(each, tensors) for name, each in value.items() if name != "record"})
