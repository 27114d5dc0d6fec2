"""Which family a pipeline folder belongs to: the one table of families, by the class that ``model_index.json`` names.

Responsible for reading a pipeline's configurations and for finding what knows them. A family's modules are imported when they are
asked for: its ``shapes`` need no torch, its ``family`` does.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.loading import read_config
from cluster.errors import CheckpointError

if TYPE_CHECKING:
    from actors.vdm.family import Family
    from actors.vdm.shapes import Shapes

PARTS = ("transformer", "text_encoder", "vae")
"""The models of a pipeline; each has a folder of its own."""


@dataclass(frozen=True)
class Row:
    """One family: its package, with ``shapes.SHAPES`` and ``family.FAMILY``, and its parts' classes in their libraries."""

    package: str
    classes: Mapping[str, tuple[str, str]]
    """Part → (library, class)."""


_WAN = Row(
    "actors.vdm.wan",
    {
        "transformer": ("diffusers", "WanTransformer3DModel"),
        "text_encoder": ("transformers", "UMT5EncoderModel"),
        "vae": ("diffusers", "AutoencoderKLWan"),
    },
)
_LTX = Row(
    "actors.vdm.ltx",
    {
        "transformer": ("diffusers", "LTXVideoTransformer3DModel"),
        "text_encoder": ("transformers", "T5EncoderModel"),
        "vae": ("diffusers", "AutoencoderKLLTXVideo"),
    },
)
FAMILIES: dict[str, Row] = {"WanPipeline": _WAN, "LTXPipeline": _LTX, "LTXConditionPipeline": _LTX}
"""Pipeline class → its family."""
LEFT_OUT: dict[str, str] = {
    "CogVideoXPipeline": "it predicts v of a variance-preserving path, and steps, KL and losses here are those of the straight path",
    "WanImageToVideoPipeline": "it gives the first frame to its transformer in channels of their own, which nothing here fills",
}
"""Pipeline class → why no family is written for it; for those whose sisters are known."""


@dataclass(frozen=True)
class Blueprint:
    """What a pipeline's JSON files say, as its libraries read them."""

    where: str  # folder or hub name
    index: Mapping[str, Any]  # model_index.json
    parts: Mapping[str, Mapping[str, Any]]  # PARTS → config.json

    @property
    def folder(self) -> Path:
        """The folder that it was read from."""
        return Path(self.where)

    @property
    def pipeline(self) -> str:
        """The class of diffusers' pipeline."""
        return str(self.index.get("_class_name"))

    @functools.cached_property
    def row(self) -> Row:
        """The family's row; CheckpointError where no family is known for the pipeline's class."""
        row = FAMILIES.get(self.pipeline)
        if row is None:
            reason = LEFT_OUT.get(self.pipeline)
            raise CheckpointError(
                f"{self.where}/model_index.json is of a {self.pipeline}; the vdm must be one of {', '.join(FAMILIES)}"
                + (f". Of this one: {reason}" if reason else "")
            )
        return row

    @functools.cached_property
    def shapes(self) -> Shapes:
        """The pipeline's numbers; CheckpointError for a pipeline that cannot be used here, with the reason."""
        shapes: Shapes = importlib.import_module(f"{self.row.package}.shapes").SHAPES(self)
        return shapes

    def family(self, **options: Any) -> Family:
        """Return what knows how the pipeline's models are called; ``options`` are its constructor's. Imports torch."""
        family: Family = importlib.import_module(f"{self.row.package}.family").FAMILY(self, **options)
        return family

    def part_class(self, part: str) -> Any:
        """Return the class of ``part`` (of :data:`PARTS`). Imports its library."""
        library, name = self.row.classes[part]
        return getattr(importlib.import_module(library), name)

    def build(self, part: str) -> Any:
        """Return ``part`` with the weights that its class begins with, on the default device."""
        kind, config = self.part_class(part), dict(self.parts[part])
        return kind(kind.config_class(**config)) if part == "text_encoder" else kind.from_config(config)


def read_blueprint(folder: Path) -> Blueprint:
    """Return what the JSON files of a pipeline folder say.

    CheckpointError: a file is missing, no family is known for it, or the pipeline cannot be used here.
    """
    index = read_config(folder / "model_index.json")
    blueprint = Blueprint(str(folder), index, {})
    _ = blueprint.row  # a folder of another kind is refused by its class, not by a file that it lacks
    blueprint = Blueprint(str(folder), index, {part: read_config(folder / part / "config.json") for part in PARTS})
    _ = blueprint.shapes
    return blueprint
