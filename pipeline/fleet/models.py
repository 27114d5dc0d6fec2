"""Where a configured model name points, the bundled tiny pair, a local folder or a hub name, and how a run loads its artist."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from actors.failures import BadSampleError
from actors.learner.settings import LEARNER_SHARES, require_divisor
from actors.vdm.settings import SAMPLERS_SHARE
from cluster.errors import CheckpointError, ConfigError

if TYPE_CHECKING:  # the sections of the pools, whose rows resolve models, are part of it
    from pipeline.config import RunConfig

ASSETS = Path(__file__).parents[1] / "assets" / "tiny"
Role = Literal["vlm", "vdm", "clip"]
Encoder = Literal["video", "pictures"]
"""Of a reward with a model: what it encodes."""
_VDM_MARKER, _MARKER = "model_index.json", "config.json"


def resolve_model(name: str, role: Role | Encoder, key: str | None = None) -> str:
    """Return the folder or hub name for ``name`` in the place of ``role``, which the configuration has under ``key``.

    ``tiny`` is what ``vans pretrain`` has trained and is shipped here. Anything that looks like a path must be a folder
    of the right format. Raises CheckpointError otherwise.
    """
    key, marker = key or f"models.{role}", _VDM_MARKER if role == "vdm" else _MARKER
    if name == "tiny" and role == "pictures":
        raise CheckpointError(
            f"{key}=tiny: no tiny encoder of pictures comes with this project; give a folder or a hub name"
        )
    if name == "tiny":
        folder = ASSETS / role
        if not (folder / marker).is_file():
            raise CheckpointError(
                f"the bundled tiny {role} is missing at {folder}; make it with: vans pretrain --out {ASSETS}"
            )
        return str(folder)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / marker).is_file():
            raise CheckpointError(
                f"{key}={name!r}: this folder has no {marker}, so it is not a {_expected(role)} folder"
                + (_adapter_hint(folder, role) or _released_hint(folder))
            )
        return str(folder.resolve())
    if folder.is_file():
        raise CheckpointError(
            f"{key}={name!r}: this is a file; give a {_expected(role)} folder" + _released_hint(folder)
        )
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise CheckpointError(
            f"{key}={name!r}: no such folder; give a {_expected(role)} folder, a hub name (owner/name) or 'tiny'"
        )
    return name


def resolve_adapter(name: str | None, role: Literal["vlm", "vdm"], model: str) -> str | None:
    """Return the adapter folder ``name``, which is of ``model`` (as :func:`resolve_model` returned it).

    Its tensors are compared with the model's layers. Raises CheckpointError where it is not a PEFT adapter, or not of this
    model: the message says what does not fit.
    """
    if name is None:
        return None
    folder = Path(name).expanduser().resolve()
    from actors.learner.adapters import fit, model_layers  # torch and peft take seconds to import
    from actors.weights.files import read_folder

    where = f"models.{role}_adapter={name!r}"
    try:
        config, tensors = read_folder(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}{_released_hint(folder)}") from error
    fit(tensors, config, model_layers(model, role), role, where)
    return str(folder)


def require_drawable(config: RunConfig) -> None:
    """Raise where the artist of ``config`` cannot draw its clips: ConfigError for size or condition, CheckpointError for the model.

    Read from the model's configuration alone: of a folder, or of a name whose configuration is known here. Of another name
    the workers say it when they have loaded it.
    """
    from actors.architectures import architecture, known  # two seconds of imports saved for those who never ask

    name, video = resolve_model(config.models.vdm, "vdm"), config.video
    if not Path(name).is_dir() and name not in known("vdm"):
        return
    shapes = architecture(name, "vdm").shapes
    try:
        latents = shapes.reference_latents(video.conditioning, video.reference_frames)
        shapes.geometry.latent_shape(video.num_frames, video.height, video.width, latents)
    except BadSampleError as error:
        raise ConfigError(f"video does not fit models.vdm={config.models.vdm!r}: {error}") from error


def vdm_options(config: RunConfig) -> dict[str, Any]:
    """Return what every load of the artist has in common: how it reads its times and its input, and how its VAE cuts frames."""
    return {
        "shift": config.models.flow_shift,
        "grid": config.models.flow_grid,
        "negative_prompt": config.models.negative_prompt or "",
        "shared_times": config.models.shared_times,
        "tiling": config.video.tiling,
        "fps": config.video.fps,
        "conditioning": config.video.conditioning,
    }


SHARERS: Mapping[str, Callable[[RunConfig], int]] = {
    LEARNER_SHARES: lambda config: config.learner.sharers("vdm"),
    SAMPLERS_SHARE: lambda config: config.pools.vdm.context_parallel,
}
"""How many processes share each of the artist's clips, by the key that says so."""


def require_shareable(config: RunConfig, key: str) -> None:
    """Raise ConfigError where the artist's clips cannot be shared as ``key`` (of SHARERS) says.

    Read from the model's configuration alone: of a folder, or of a name whose configuration is known here. Of another name the
    learner, or the sampler, says it when it has loaded it.
    """
    sharers, video = SHARERS[key](config), config.video
    if sharers == 1:
        return
    from actors.architectures import architecture, known  # two seconds of imports saved for those who share nothing

    name = resolve_model(config.models.vdm, "vdm")
    if not Path(name).is_dir() and name not in known("vdm"):
        return
    vdm = architecture(name, "vdm")
    latents = vdm.shapes.reference_latents(video.conditioning, video.reference_frames)
    tokens = vdm.shapes.tokens(video.num_frames, video.height, video.width, latents).total
    heads = int(vdm.components["transformer"]["num_attention_heads"])
    require_divisor(sharers, {"the artist's attention heads": heads, "a clip's tokens": tokens}, key)


def _adapter_hint(folder: Path, role: Role | Encoder) -> str:
    """Return what to do with a folder that holds an adapter alone; empty for others."""
    missing = [f for f in ("adapter_config.json", "adapter_model.safetensors") if not (folder / f).is_file()]
    if not missing:
        return f". It is an adapter: give it as models.{role}_adapter, and the model that it was trained on as models.{role}"
    if len(missing) == 1 or (folder / "pytorch_lora_weights.safetensors").is_file():
        return (
            f". It holds LoRA weights without a base model, and {' and '.join(missing)} is not there: an adapter needs "
            f"adapter_config.json and adapter_model.safetensors, and goes into models.{role}_adapter"
        )
    return ""


def _released_hint(path: Path) -> str:
    """Return what to do with weights as VANS and Wan2.1 were released, a file or a folder of them; empty for anything else."""
    if path.is_file() or any((path / f"{role}.safetensors").is_file() for role in ("vlm", "vdm")):
        return ". Files of VANS as its authors released it are made into folders by vans import-release (docs/vans.md)"
    if (path / "Wan2.1_VAE.pth").is_file():
        return (
            ". It is Wan2.1 as first published; the same weights are in Wan-AI/Wan2.1-T2V-1.3B-Diffusers (docs/vans.md)"
        )
    return ""


def _expected(role: Role | Encoder) -> str:
    return "diffusers pipeline" if role == "vdm" else "transformers model"
