"""The released artist: Wan's transformer, or a part of it, under its authors' names, written as a diffusers WanPipeline folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.release.folders import base_folder, place, place_folder, rewrite, weights_of
from pipeline.release.tensors import DIFFUSERS, Account, Header, refuse, wider

PREFIXES = ("pipe.dit.", "dit.")
_QUERIES = (".mllm_query_embedding.", ".k_mllm_query.", ".v_mllm_query.", ".norm_k_mllm_query.")
_PART = "transformer"


@dataclass
class Artist:
    """What the released files hold of the artist, compared with its base."""

    folder: Path  # the base's
    weights: dict[str, Header] = field(default_factory=dict)  # diffusers' name → the released tensor
    kept: int = 0  # weights that are the base's
    accounts: list[Account] = field(default_factory=list)

    def write(self, out: Path) -> Path:
        """Write ``out/vdm``, and return it: the base's pipeline with the released weights in its transformer."""

        def change(header: Header, weight: Any) -> Any:
            given = self.weights.get(header.name)
            return weight if given is None else wider(given.read(), weight)

        target = out / "vdm"
        rewrite(self.folder / _PART, target / _PART, "--base-vdm", change)
        for entry in sorted(self.folder.iterdir()):
            if entry.is_dir() and entry.name != _PART and not entry.name.startswith("."):
                place_folder(entry, target / entry.name)
            elif entry.name == "model_index.json" or entry.name.startswith(("README", "LICENSE")):
                place(entry, target / entry.name)
        return target


def plan_artist(given: Mapping[str, Header], base: str) -> Artist:
    """Return where each tensor of the artist goes; ``given`` are those of the released files by their :func:`artist_name`.

    Names are translated by diffusers' own converter of Wan's checkpoints. Raises CheckpointError for tensors that fit nowhere: each
    with its file, name and shape.
    """
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    folder = base_folder(base, "--base-vdm", part=_PART)
    known = weights_of(folder / _PART, "--base-vdm")
    artist, problems = Artist(folder), []
    for target, name in convert_wan_transformer_to_diffusers({name: name for name in given}).items():
        header = given[name]
        if any(query in f".{name}" for query in _QUERIES):
            why = "of the query embeddings, for which the release builds no layer (mllm_query_dim is None)"
            artist.accounts.append(Account(header, "artist", False, why))
        elif target not in known:
            problems.append(f"{header} fits nowhere: the artist's base in {folder / _PART} has no {target}")
        elif known[target].shape != header.shape:
            problems.append(f"{header} should be {known[target].shape}, as {target} of the base")
        else:
            artist.weights[target] = header
            artist.accounts.append(Account(header, "artist", True, "takes the place of the base's weight", target))
    refuse(
        problems,
        f"The file is of another model than {base}, or not under the names that Wan's authors use; the release is of {DIFFUSERS}.",
    )
    artist.kept = len(known.keys() - artist.weights.keys())
    return artist


def artist_name(name: str) -> str:
    """Return a tensor's name in the transformer, without what the release puts before it."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name
