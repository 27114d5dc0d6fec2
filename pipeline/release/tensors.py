"""Safetensors files by their headers: what is in them, and the account of every tensor.

Which tensor belongs where is ``thinker``'s and ``artist``'s. Folders are ``folders``'.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError

DIFFUSERS = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
PICKLES = {"Wan2.1_VAE.pth": "vae", "models_t5_umt5-xxl-enc-bf16.pth": "text_encoder"}
"""Files of Wan2.1 as first published, and the part of :data:`DIFFUSERS` that holds the same weights as safetensors."""
_TOLD = 5


@dataclass(frozen=True)
class Header:
    """A tensor in a file, without its values."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str  # as safetensors writes it: BF16, F32

    def __str__(self) -> str:
        return f"{self.file}: {self.name} {self.shape}"

    def read(self) -> Any:
        """Return the values, a torch tensor in host memory."""
        from safetensors import safe_open

        with safe_open(str(self.file), framework="pt") as opened:
            return opened.get_tensor(self.name)


@dataclass(frozen=True)
class Account:
    """What became of one tensor of the released files."""

    header: Header
    part: str  # thinker or artist
    used: bool
    why: str  # in which form it is used, or why it is not
    place: str = ""  # the weight that it became or changed; empty where it is not used


def headers(file: Path, option: str) -> dict[str, Header]:
    """Return the headers of a safetensors file by their names. ``option`` is what the file was given as.

    Raises CheckpointError for a missing or damaged file, and for a pickle, which is not opened.
    """
    if file.name in PICKLES:
        raise CheckpointError(f"{option}={file}: {pickled(file.name)}")
    if not file.is_file():
        raise CheckpointError(f"{option}={file}: no such file")
    if file.suffix != ".safetensors":
        raise CheckpointError(
            f"{option}={file}: only safetensors files are read, because loading a pickle may run code that is in it"
        )
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            found = {}
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                part = opened.get_slice(name)
                found[name] = Header(file, name, tuple(part.get_shape()), part.get_dtype())
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{option}={file} is not a whole safetensors file: {error}") from error
    if not found:
        raise CheckpointError(f"{option}={file} holds no tensor")
    return found


def pickled(name: str) -> str:
    """Return why the file ``name`` of Wan2.1 as first published is refused, and what holds the same weights."""
    return (
        f"{name} is a pickle, which may run code when it is loaded, so it is not read. The same weights are in {PICKLES[name]}/ of "
        f"{DIFFUSERS}: give that folder as --base-vdm"
    )


def wider(one: Any, other: Any) -> Any:
    """Return ``one`` in the wider of the two tensors' dtypes, so that no digit is lost."""
    import torch

    return one.to(torch.promote_types(one.dtype, other.dtype))


def refuse(problems: Sequence[str], cure: str) -> None:
    """Raise CheckpointError that tells ``problems``, if there are any: the first few, how many there are, and ``cure``."""
    if not problems:
        return
    more = f"\n  … and {len(problems) - _TOLD} more" if len(problems) > _TOLD else ""
    raise CheckpointError("\n  ".join([f"{len(problems)} tensors do not fit", *problems[:_TOLD]]) + more + f"\n{cure}")


def summary(accounts: Iterable[Account]) -> list[Mapping[str, Any]]:
    """Return how many tensors of which file went the same way, in the order of their first one."""
    rows: dict[tuple[str, str, bool, str], int] = {}
    for account in accounts:
        key = (str(account.header.file), account.part, account.used, account.why)
        rows[key] = rows.get(key, 0) + 1
    return [
        {"file": file, "part": part, "used": used, "why": why, "tensors": count}
        for (file, part, used, why), count in rows.items()
    ]
