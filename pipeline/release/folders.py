"""Base models' folders: found, read by their weights' headers, and written again with other weights, shard by shard."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError
from pipeline.release.tensors import PICKLES, Header, headers, pickled

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf")
"""Endings of files with weights: of a base they are rewritten or left where they are."""


def base_folder(name: str, option: str, *, part: str = "") -> Path:
    """Return the local folder of a base model, a folder or a hub name; ``part`` is a folder that it must have.

    Raises CheckpointError where there is none, or it is Wan2.1 as first published.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            folder = Path(snapshot_download(name))
        except (OSError, HfHubHTTPError, HFValidationError) as error:
            raise CheckpointError(
                f"{option}={name!r} is no folder, and no model of that name is to be had: {str(error).splitlines()[0]}"
            ) from error
    if part and not (folder / part).is_dir():
        original = sorted(name for name in PICKLES if (folder / name).is_file())
        told = f" It is Wan2.1 as first published: {pickled(original[0])}" if original else ""
        raise CheckpointError(f"{option}={name!r} is no diffusers WanPipeline folder: it has no {part}/ in it.{told}")
    return folder.resolve()


def weights_of(folder: Path, option: str) -> dict[str, Header]:
    """Return the headers of a model folder's weights, in one file or in shards. CheckpointError where a file is missing."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{option}: {folder} is no model folder: it has no config.json")
    shards = _shards(folder, option)
    found: dict[str, Header] = {}
    for shard in shards:
        found |= headers(shard, option)
    return found


def _index(folder: Path) -> Path | None:
    return next(iter(sorted(folder.glob("*.safetensors.index.json"))), None)


def _shards(folder: Path, option: str) -> list[Path]:
    index = _index(folder)
    if index is not None:
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{option}: {index} is damaged: {error}") from error
        if outside := [n for n in names if Path(str(n)).name != n]:
            raise CheckpointError(f"{option}: {index} names a file outside of the folder: {outside[0]!r}")
        return sorted(folder / name for name in names)
    single = sorted(folder.glob("*.safetensors"))
    if len(single) != 1:
        raise CheckpointError(
            f"{option}: {folder} has {len(single) or 'no'} safetensors files and no index of them; give the whole folder, with weights "
            "as safetensors"
        )
    return single


def rewrite(source: Path, target: Path, option: str, change: Callable[[Header, Any], Any]) -> None:
    """Write the model folder ``source`` again as ``target``, with ``change(header, tensor)`` in the place of each weight.

    One shard is in memory at a time. A shard that nothing changes (the same tensor object comes back) is linked, not written.
    """
    from safetensors.torch import load_file, save_file

    target.mkdir(parents=True)
    bytes_ = 0
    for shard in _shards(source, option):
        known = headers(shard, option)
        before = load_file(str(shard))
        after = {name: change(known[name], tensor) for name, tensor in before.items()}
        bytes_ += sum(tensor.numel() * tensor.element_size() for tensor in after.values())
        if all(after[name] is before[name] for name in before):
            place(shard, target / shard.name)
        else:
            whole = {name: tensor.contiguous() for name, tensor in after.items()}
            save_file(whole, str(target / shard.name), metadata={"format": "pt"})
    index = _index(source)
    for file in sorted(source.iterdir()):
        if file == index:
            values = json.loads(file.read_text(encoding="utf-8"))
            values["metadata"] = {**values.get("metadata", {}), "total_size": bytes_}
            (target / file.name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        elif file.is_file() and not file.name.startswith(".") and file.suffix not in WEIGHTS:
            place(file, target / file.name)


def place(file: Path, target: Path) -> None:
    """Put ``file`` at ``target``: weights as a second name of the same file where the disk can, anything else as a copy.

    A copy may be edited without the base changing; weights are many gigabytes, and nobody edits them in place.
    """
    real = file.resolve()  # the hub's cache holds links
    if file.suffix in WEIGHTS:
        try:
            os.link(real, target)
            return
        except OSError:
            pass  # another disk, or one without links
    shutil.copyfile(real, target)


def place_folder(folder: Path, target: Path) -> None:
    """Put all files of ``folder`` into ``target`` (:func:`place`), pickles left out."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(folder.iterdir()):
        if file.is_dir():
            place_folder(file, target / file.name)
        elif not file.name.startswith(".") and (file.suffix not in WEIGHTS or file.suffix == ".safetensors"):
            place(file, target / file.name)
