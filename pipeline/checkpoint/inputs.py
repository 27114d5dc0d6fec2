"""What a run learns from besides its configuration, so that a resumed run finds out what changed behind its back.

The rows that it trains on, and the files of its models. A checkpoint holds their digests; a run that resumes with others is
refused. Not responsible for keys of the configuration (``state.require_same_config``).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError, DataError

MODEL_FILES = frozenset({".safetensors", ".json", ".txt", ".model", ".jinja"})  # weights, configurations, tokenizers
MODEL_DEPTH = 2  # a diffusers pipeline's parts are folders; what lies deeper is a run's own (`vans sft` trains in its model's folder)
WHOLE_BYTES = 64 << 20  # files up to this size are read whole
SAMPLES, SAMPLE_BYTES = 64, 64 << 10  # of a larger file: so many pieces of this size, spread evenly


@dataclass(frozen=True)
class DataFacts:
    """The training data: where, how many rows, and a digest of them in reading order."""

    folder: str
    rows: int
    digest: str

    def __str__(self) -> str:
        return f"{self.rows} rows with digest {self.digest[:16]} in {self.folder}"


@dataclass(frozen=True)
class Inputs:
    """What a run learns from. ``data`` is None where a checkpoint does not say (one of an older version)."""

    data: DataFacts | None = None
    models: Mapping[str, str] = field(default_factory=dict)
    """Key of the section ``models`` → digest of the files."""
    restarts: tuple[str, ...] = ()
    """Each time that the data were begun anew, in words."""

    def to_json(self) -> dict[str, Any]:
        """Return the inputs as a checkpoint stores them."""
        return {**asdict(self), "models": dict(self.models), "restarts": list(self.restarts)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Inputs:
        """Return what :meth:`to_json` wrote; raises CheckpointError for anything else."""
        try:
            data = values.get("data")
            facts = None if data is None else DataFacts(**data)
            models, restarts = dict(values.get("models") or {}), tuple(values.get("restarts") or ())
        except (TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint's record of its inputs cannot be read: {error}") from error
        texts = [*models, *models.values(), *restarts, *([facts.folder, facts.digest] if facts else [])]
        if not all(isinstance(text, str) for text in texts) or (facts and type(facts.rows) is not int):
            raise CheckpointError("the checkpoint's record of its inputs holds values of a wrong type")
        return cls(facts, models, restarts)

    def continues(self, earlier: Inputs) -> bool:
        """Return whether a cursor into the data of ``earlier`` holds here."""
        return earlier.data is not None and self.data is not None and earlier.data.digest == self.data.digest


def model_digest(folder: str | Path) -> str:
    """Return a digest of the files of a model or adapter in ``folder``, by name, size and content.

    Of a file beyond ``WHOLE_BYTES`` pieces are read, evenly spread: training changes weights everywhere, and a run should not
    wait for minutes. Other kinds of files, and names that begin with a dot, are passed over.
    """
    root, digest = Path(folder), hashlib.sha256()
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        hidden = any(part.startswith(".") for part in inside.parts)
        if hidden or len(inside.parts) > MODEL_DEPTH or path.suffix not in MODEL_FILES or path.name == "sft.json":
            continue
        if not path.is_file():
            continue
        size = path.stat().st_size
        digest.update(f"{inside.as_posix()}\0{size}\0".encode())
        with path.open("rb") as file:
            if size <= WHOLE_BYTES:
                digest.update(hashlib.file_digest(file, "sha256").digest())
                continue
            for piece in range(SAMPLES):
                file.seek(piece * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def model_digests(folders: Mapping[str, str | None]) -> dict[str, str]:
    """Return the digest of each model of ``folders`` (key → folder, hub name or None); a hub name has no digest."""
    return {key: model_digest(name) for key, name in folders.items() if name is not None and Path(name).is_dir()}


def compare_inputs(
    earlier: Inputs, now: Inputs, cursor: Mapping[str, int], *, where: str, restart_data: bool = False
) -> tuple[Inputs, list[str]]:
    """Return what the resumed run notes as its inputs, and lines for people.

    ``earlier`` is the checkpoint's, ``cursor`` its place in the data, ``where`` its name. With ``restart_data``, data that
    differ are begun anew, and that is noted; data that are the same go on, so that a job which is queued again does not begin
    them again. Raises DataError where the data differ, CheckpointError where a model does.
    """
    assert now.data is not None
    changed = [key for key, digest in earlier.models.items() if now.models.get(key, digest) != digest]
    if changed:
        lines = [
            f"models.{key}: {earlier.models[key][:16]} in the checkpoint, {now.models[key][:16]} now" for key in changed
        ]
        raise CheckpointError(
            f"{where} was written with other files of its models:\n  "
            + "\n  ".join(lines)
            + "\nPut the models back as they were, or start a new run in another folder (out=…)"
        )
    kept = Inputs(now.data, now.models, earlier.restarts)
    if now.continues(earlier):
        return kept, []
    if restart_data:
        told = f"the data begin anew at {where}: {earlier.data or 'data that it does not name'} → {now.data}"
        return Inputs(now.data, now.models, (*earlier.restarts, told)), [told]
    if earlier.data is None:
        if cursor.get("position", 0) >= now.data.rows:
            raise DataError(
                f"{where} goes on at row {cursor['position']} of an epoch, and there are {now.data}. Put the data back as they "
                "were, or add --restart-data to begin them anew"
            )
        return kept, [
            f"{where} is of an older version and names no data, so it cannot be told whether {now.data.folder} is as it was"
        ]
    raise DataError(
        f"data.train is not what {where} was written with:\n  in the checkpoint: {earlier.data}\n  now: {now.data}\n"
        "A run goes on at a place in the order of its rows, which other rows do not have. Put the data back as they were, "
        "or add --restart-data to go on with the models and begin these data anew"
    )
