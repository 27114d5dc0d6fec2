"""From a model's name or folder to the configurations of its parts, and to modules that have shapes but no memory.

Responsible for the published configurations of the models this project is made for (``known/``, facts of the
``config.json`` files that each names) and for reading a local folder's own. Not responsible for weights
(``actors.vlm.policy``, ``actors.vdm.wan.files``) or for what a shape costs (``cost``). torch, transformers and diffusers are
imported where a module is built, not before: a plan needs numbers only.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from cluster.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import nn

Role = Literal["vlm", "vdm", "clip"]
COMPONENTS: dict[Role, tuple[str, ...]] = {
    "vlm": ("model",),
    "vdm": ("transformer", "text_encoder", "vae"),
    "clip": ("model",),
}
_KNOWN = Path(__file__).parent / "known"
_VLM_TYPES = ("qwen2_5_vl", "qwen3_vl")


@dataclass(frozen=True)
class Architecture:
    """A model's configurations by component, as its own library reads them from ``config.json``."""

    role: Role
    name: str  # hub name, or folder
    components: Mapping[str, Mapping[str, Any]]  # COMPONENTS[role], in order

    def meta(self, component: str, dtype: torch.dtype | None = None) -> nn.Module:
        """Return ``component`` as its library's own class on the meta device: names and shapes, no storage.

        ``dtype`` is that of the parameters, None float32; what diffusers keeps in float32 whatever it is asked for stays
        in it. Raises CheckpointError for a component that this role does not have.
        """
        import torch
        from torch import nn

        module = _build(self.role, component, self._config(component))
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

        module = _build(self.role, component, self._config(component), real_buffers=True)
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
        return _count(self.role, component, json.dumps(self._config(component), sort_keys=True))

    def _config(self, component: str) -> dict[str, Any]:
        if component not in self.components:
            raise CheckpointError(
                f"{self.name} is a {self.role} and has no component {component!r}; it has {', '.join(self.components)}"
            )
        return dict(self.components[component])


def known(role: Role | None = None) -> tuple[str, ...]:
    """Return the hub names (of ``role``) whose configurations are part of this package."""
    return tuple(name for name, entry in _table().items() if role in (None, entry.role))


def architecture(name_or_folder: str | Path, role: Role) -> Architecture:
    """Return the architecture of a known hub name, or of a local folder in the format that ``role`` is loaded from.

    vlm and clip: a transformers folder (``config.json``); vdm: a diffusers WanPipeline folder (``model_index.json`` and a
    ``config.json`` in ``transformer``, ``text_encoder`` and ``vae``). Nothing is downloaded. Raises CheckpointError for
    anything else; the message lists what is known.
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
        return Architecture(role, str(folder), _read_folder(folder, role))
    raise CheckpointError(
        f"{str(name_or_folder)!r} is neither a folder nor a {role} whose architecture is known here: {_names(role)}; download "
        "it and give its folder"
    )


def _names(role: Role) -> str:
    return ", ".join(known(role))


@functools.cache
def _table() -> dict[str, Architecture]:
    shared = {path.stem: _read(path)["config"] for path in sorted((_KNOWN / "shared").glob("*.json"))}
    entries = [_read(path) for path in sorted(_KNOWN.glob("*.json"))]
    return {
        entry["name"]: Architecture(
            entry["role"],
            entry["name"],
            {part: shared[c] if isinstance(c, str) else c for part, c in entry["components"].items()},
        )
        for entry in entries
    }


def _read_folder(folder: Path, role: Role) -> dict[str, dict[str, Any]]:
    """Return a local folder's configurations by component; CheckpointError says which file is missing or another's."""
    if role != "vdm":
        config = _read(folder / "config.json")
        found, wanted = config.get("model_type"), _VLM_TYPES if role == "vlm" else ("clip",)
        if found not in wanted:
            raise CheckpointError(f"{folder}/config.json has model_type={found!r}; a {role} is {' or '.join(wanted)}")
        return {"model": config}
    index = _read(folder / "model_index.json")
    if index.get("_class_name") != "WanPipeline":
        raise CheckpointError(
            f"{folder}/model_index.json is of a {index.get('_class_name')}; the vdm must be a diffusers WanPipeline"
        )
    return {part: _read(folder / part / "config.json") for part in COMPONENTS["vdm"]}


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold an object, found {type(values).__name__}")
    return values


@functools.lru_cache(maxsize=64)
def _count(role: Role, component: str, config: str) -> int:
    return sum(parameter.numel() for parameter in _build(role, component, json.loads(config)).parameters())


def _build(role: Role, component: str, config: dict[str, Any], real_buffers: bool = False) -> nn.Module:
    """Return the module of ``config`` with float32 parameters, and unless ``real_buffers`` all else, on the meta device."""
    import torch
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False) if real_buffers else torch.device("meta"):
        if role == "vlm":
            from transformers import AutoConfig, AutoModelForImageTextToText

            values = dict(config)
            vlm = AutoConfig.for_model(values.pop("model_type"), **values)
            return AutoModelForImageTextToText.from_config(vlm, dtype=torch.float32, attn_implementation="sdpa")
        if role == "clip":
            from transformers import CLIPConfig, CLIPModel

            return CLIPModel(CLIPConfig(**config))
        if component == "text_encoder":
            from transformers import UMT5Config, UMT5EncoderModel

            return UMT5EncoderModel(UMT5Config(**config))
        if component == "vae":
            from diffusers import AutoencoderKLWan

            return AutoencoderKLWan.from_config(config)
        from diffusers import WanTransformer3DModel

        return WanTransformer3DModel.from_config(config)
