"""From a model's name or folder to the configurations of its parts, and to modules that have shapes but no memory.

Responsible for the published configurations of the models this project is made for (``known/``, facts of the
``config.json`` files that each names) and for reading a local folder's own. Not responsible for weights
(``actors.vlm.policy``, ``actors.vdm.files``), for what a shape costs (``cost``), or for what is an artist's family's
(``actors.vdm.families``). torch, transformers and diffusers are imported where a module is built, not before: a plan needs
numbers only.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from actors.loading import read_config
from actors.vdm.families import Blueprint, read_blueprint
from cluster.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from actors.vdm.shapes import Shapes

Role = Literal["vlm", "vdm", "clip"]
_KNOWN = Path(__file__).parent / "known"


@dataclass(frozen=True)
class Architecture:
    """A model's configurations by component, as its own library reads them from ``config.json``."""

    role: Role
    name: str  # hub name, or folder
    components: Mapping[str, Mapping[str, Any]]  # "model"; of a vdm its family's parts
    index: Mapping[str, Any] = field(default_factory=dict)  # model_index.json of a vdm

    @functools.cached_property
    def blueprint(self) -> Blueprint:
        """An artist's configurations as its family reads them."""
        return Blueprint(self.name, self.index, self.components)

    @property
    def shapes(self) -> Shapes:
        """An artist's numbers, its family's. CheckpointError for one that cannot be used here, with the reason."""
        return self.blueprint.shapes

    def meta(self, component: str, dtype: torch.dtype | None = None) -> nn.Module:
        """Return ``component`` as its library's own class on the meta device: names and shapes, no storage.

        ``dtype`` is that of the parameters, None float32; what diffusers keeps in float32 whatever it is asked for stays
        in it. Raises CheckpointError for a component that this role does not have.
        """
        import torch
        from torch import nn

        module = self._build(component)
        if dtype is not None:
            kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
            nn.Module.to(module, dtype)  # diffusers' own to() warns of what is put right here
            for name, parameter in module.named_parameters():
                if kept & set(name.split(".")):
                    parameter.data = parameter.data.to(torch.float32)
        return module.eval()

    def random(
        self, component: str, dtype: torch.dtype | None = None, device: str = "cpu", scale: float = 0.5, seed: int = 0
    ) -> nn.Module:
        """Return ``component`` with weights that are cheap to make, finite in use and good for nothing but measuring.

        Matrices hold uniform values within ``scale`` / sqrt(fan-in), repeated from one block of a million; norms are 1,
        biases 0. Buffers, such as rotary frequencies, are the real ones. ``dtype`` as in :meth:`meta`.
        """
        import torch

        module = self._build(component, real_buffers=True)
        kept = (
            set(getattr(module, "_keep_in_fp32_modules", None) or ()) if dtype not in (None, torch.float32) else set()
        )
        names = {id(p): name for name, p in module.named_parameters()}
        block = torch.rand((1 << 20) + 7, generator=torch.Generator().manual_seed(seed)).to(device) * 2 - 1

        def fill(tensor: torch.Tensor) -> torch.Tensor:
            if not tensor.is_meta:
                return tensor.to(device)
            name = names[id(tensor)]
            kind = torch.float32 if kept & set(name.split(".")) else dtype
            values = torch.empty(tensor.shape, dtype=kind, device=device)
            flat = values.view(-1)
            if tensor.dim() < 2:
                return values.fill_(1.0 if name.endswith(("weight", "gamma")) else 0.0)
            bound = scale / math.sqrt(tensor[0].numel())
            for start in range(0, len(flat), len(block)):
                piece = flat[start : start + len(block)]
                piece.copy_(block[: len(piece)] * bound)
            return values

        module._apply(fill)
        if hasattr(module, "tie_weights"):
            module.tie_weights()
        return module.eval()

    def parameters(self, component: str) -> int:
        """Return the number of parameters of ``component``; tied ones count once."""
        key = self.role, str(self.index.get("_class_name")), component
        return _count(*key, json.dumps(self._config(component), sort_keys=True))

    def _config(self, component: str) -> dict[str, Any]:
        if component not in self.components:
            raise CheckpointError(
                f"{self.name} is a {self.role} and has no component {component!r}; it has {', '.join(self.components)}"
            )
        return dict(self.components[component])

    def _build(self, component: str, real_buffers: bool = False) -> nn.Module:
        """Return the module with float32 parameters, and unless ``real_buffers`` all else, on the meta device."""
        import torch
        from accelerate import init_empty_weights

        config = self._config(component)
        with init_empty_weights(include_buffers=False) if real_buffers else torch.device("meta"):
            if self.role == "vdm":
                module: nn.Module = self.blueprint.build(component)
                return module
            if self.role == "vlm":
                from transformers import AutoConfig, AutoModelForImageTextToText

                vlm = AutoConfig.for_model(config.pop("model_type"), **config)
                return AutoModelForImageTextToText.from_config(vlm, dtype=torch.float32, attn_implementation="sdpa")
            from transformers import CLIPConfig, CLIPModel

            return CLIPModel(CLIPConfig(**config))


def known(role: Role | None = None) -> tuple[str, ...]:
    """Return the hub names (of ``role``) whose configurations are part of this package."""
    return tuple(name for name, entry in _table().items() if role in (None, entry.role))


def architecture(name_or_folder: str | Path, role: Role) -> Architecture:
    """Return the architecture of a known hub name, or of a local folder in the format that ``role`` is loaded from.

    vlm and clip: a transformers folder (``config.json``); vdm: a diffusers pipeline folder of a family that is known
    (``model_index.json`` and a ``config.json`` in ``transformer``, ``text_encoder`` and ``vae``). Nothing is
    downloaded. Raises CheckpointError for anything else; the message lists what is known.
    """
    if role not in get_args(Role):
        raise CheckpointError(f"role={role!r} is unknown; use one of {', '.join(get_args(Role))}")
    folder = Path(name_or_folder).expanduser()
    entry = _table().get(str(name_or_folder))
    if entry is not None:
        if entry.role != role:
            raise CheckpointError(f"{entry.name} is a {entry.role}, not a {role}; known as {role}: {_names(role)}")
        return entry
    if folder.is_dir():
        return _read_folder(folder, role)
    raise CheckpointError(
        f"{str(name_or_folder)!r} is neither a folder nor a {role} whose architecture is known here: {_names(role)}; download "
        "it and give its folder"
    )


def _names(role: Role) -> str:
    return ", ".join(known(role))


@functools.cache
def _table() -> dict[str, Architecture]:
    shared = {path.stem: read_config(path)["config"] for path in sorted((_KNOWN / "shared").glob("*.json"))}
    entries = [read_config(path) for path in sorted(_KNOWN.glob("*.json"))]
    return {
        entry["name"]: Architecture(
            entry["role"],
            entry["name"],
            {part: shared[c] if isinstance(c, str) else c for part, c in entry["components"].items()},
            entry.get("index", {}),
        )
        for entry in entries
    }


def _read_folder(folder: Path, role: Role) -> Architecture:
    """Return a local folder's architecture; CheckpointError says which file is missing or another's."""
    if role == "vdm":
        blueprint = read_blueprint(folder)
        return Architecture(role, str(folder), blueprint.parts, blueprint.index)
    config = read_config(folder / "config.json")
    if role == "vlm":
        config = _whole_vlm(folder)
    elif config.get("model_type") != "clip":
        raise CheckpointError(f"{folder}/config.json has model_type={config.get('model_type')!r}; a {role} is clip")
    return Architecture(role, str(folder), {"model": config})


def _whole_vlm(folder: Path) -> dict[str, Any]:
    """Return a thinker's configuration with the values that its ``config.json`` leaves to transformers."""
    from actors.vlm.loading import load_config

    values: dict[str, Any] = load_config(folder).to_dict()
    return values


@functools.lru_cache(maxsize=64)
def _count(role: Role, pipeline: str, component: str, config: str) -> int:
    model = Architecture(role, "counted", {component: json.loads(config)}, {"_class_name": pipeline})
    return sum(parameter.numel() for parameter in model.meta(component).parameters())
