"""Where a configured model name points: the bundled tiny pair, a local folder, or a hub name."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from cluster.errors import CheckpointError

ASSETS = Path(__file__).parent / "assets" / "tiny"
Role = Literal["vlm", "vdm", "clip"]
_MARKER = {"vlm": "config.json", "vdm": "model_index.json", "clip": "config.json"}


def resolve_model(name: str, role: Role) -> str:
    """Return the folder or hub name for ``name`` in the place of ``role``.

    ``tiny`` is the pair trained by ``vans pretrain`` and shipped here. Anything that looks like a path must be a folder
    of the right format. Raises CheckpointError otherwise.
    """
    if name == "tiny":
        folder = ASSETS / role
        if not (folder / _MARKER[role]).is_file():
            raise CheckpointError(
                f"the bundled tiny {role} is missing at {folder}; make it with: vans pretrain --out {ASSETS}"
            )
        return str(folder)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / _MARKER[role]).is_file():
            raise CheckpointError(
                f"models.{role}={name!r}: this folder has no {_MARKER[role]}, so it is not a {_expected(role)} folder"
            )
        return str(folder.resolve())
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise CheckpointError(
            f"models.{role}={name!r}: no such folder; give a {_expected(role)} folder, a hub name (owner/name) or 'tiny'"
        )
    return name


def resolve_adapter(name: str | None, role: Role) -> str | None:
    """Return the adapter folder ``name`` if it is a PEFT adapter; raises CheckpointError otherwise."""
    if name is None:
        return None
    folder = Path(name).expanduser()
    missing = [f for f in ("adapter_config.json", "adapter_model.safetensors") if not (folder / f).is_file()]
    if missing:
        raise CheckpointError(
            f"models.{role}_adapter={name!r}: not a PEFT adapter folder, {' and '.join(missing)} not found in it"
        )
    return str(folder.resolve())


def _expected(role: Role) -> str:
    return "diffusers WanPipeline" if role == "vdm" else "transformers model"
