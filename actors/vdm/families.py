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
"""The models of every pipeline; each has a folder of its own. A family's row may have more: ``image_encoder``."""


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
_WAN_I2V = Row("actors.vdm.wan_i2v", {**_WAN.classes, "image_encoder": ("transformers", "CLIPVisionModel")})
_LTX = Row(
    "actors.vdm.ltx",
    {
        "transformer": ("diffusers", "LTXVideoTransformer3DModel"),
        "text_encoder": ("transformers", "T5EncoderModel"),
        "vae": ("diffusers", "AutoencoderKLLTXVideo"),
    },
)
FAMILIES: dict[str, Row] = {
    "WanPipeline": _WAN,
    "WanImageToVideoPipeline": _WAN_I2V,
    "LTXPipeline": _LTX,
    "LTXConditionPipeline": _LTX,
}
"""Pipeline class → its family."""
LEFT_OUT: dict[str, str] = {
    "CogVideoXPipeline": "it predicts v of a variance-preserving path, and steps, KL and losses here are those of the straight path",
}
"""Pipeline class → why no family is written for it; for those whose sisters are known."""


@dataclass(frozen=True)
class Blueprint:
    """What a pipeline's JSON files say, as its libraries read them."""

    where: str  # folder or hub name
    index: Mapping[str, Any]  # model_index.json
    parts: Mapping[str, Mapping[str, Any]]  # the row's parts, those that the pipeline has → config.json

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
        """Return the class of ``part`` (of the row's). Imports its library."""
        library, name = self.row.classes[part]
        return getattr(importlib.import_module(library), name)

    def build(self, part: str) -> Any:
        """Return ``part`` with the weights that its class begins with, on the default device."""
        kind, config = self.part_class(part), dict(self.parts[part])
        if self.row.classes[part][0] == "diffusers":
            return kind.from_config(config)
        return kind(kind.config_class(**config))


def read_blueprint(folder: Path) -> Blueprint:
    """Return what the JSON files of a pipeline folder say.

    CheckpointError: a file is missing, no family is known for it, or the pipeline cannot be used here.
    """
    index = read_config(folder / "model_index.json")
    blueprint = Blueprint(str(folder), index, {})
    row = blueprint.row  # a folder of another kind is refused by its class, not by a file that it lacks
    # An index names what its pipeline does without: [null, null]. Whether it can be used without is the family's to say.
    parts = [part for part in row.classes if part in PARTS or (index.get(part) or [None])[0] is not None]
    blueprint = Blueprint(str(folder), index, {part: read_config(folder / part / "config.json") for part in parts})
    _ = blueprint.shapes
    return blueprint
