"""Whether an adapter fits a model: names, shapes and rank of its tensors against the model's linear layers.

Responsible for refusing an adapter that would be served or trained as if some or all of its tensors were not there, and for
the names that other versions and libraries gave to the same layers. Every way in calls :func:`fit`: the driver before
anything starts, the policies, the engine. Not responsible for files (``actors.weights``) or for injecting (``lora``).
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from actors.policy.settings import LoraSection
from cluster.errors import CheckpointError

T = TypeVar("T")
Role = Literal["vlm", "vdm"]
Layers = Mapping[str, tuple[int, int]]
"""A model's linear layers: (out features, in features) by the module's full name."""


LANGUAGE_MODEL = "model.language_model."
"""Where transformers keeps the language model of a vision-language model: its modules' names begin so."""


@dataclass(frozen=True)
class _Place:
    """Where an adapter sits in a model: ``trunk`` begins the names of the layers that LoRA may reach."""

    title: str
    trunk: str
    aliases: tuple[str, ...]
    """What the trunk is or was called: by the libraries' versions, and by adapters of a part of the model. Longest first."""


_PLACES: dict[Role, _Place] = {
    # transformers before 4.52 had no language_model in Qwen-VL's names, and put language_model.model in those of others.
    "vlm": _Place(
        "the VLM's language model",
        LANGUAGE_MODEL,
        (
            f"{LANGUAGE_MODEL}model.",
            LANGUAGE_MODEL,
            "language_model.model.",
            "language_model.",
            "model.",
            "",
        ),
    ),
    # diffusers' pytorch_lora_weights says transformer; ComfyUI says diffusion_model.
    "vdm": _Place("the VDM's transformer", "", ("diffusion_model.", "transformer.", "")),
}
_PREFIX = "base_model.model."
_FORM = f"{_PREFIX}<module>.lora_A.weight (r, in) and .lora_B.weight (out, r)"
_PLAIN: dict[str, Any] = {
    "use_dora": False,
    "use_rslora": False,
    "lora_bias": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
}
"""What a plain LoRA's configuration says: learner, engine and sampler know no other kind."""


def linear_layers(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the linear layers of a model without an adapter; a module on the meta device will do."""
    return {n: (m.out_features, m.in_features) for n, m in module.named_modules() if isinstance(m, nn.Linear)}


@functools.lru_cache(maxsize=8)
def model_layers(path: str, role: Role) -> Layers:
    """Return the linear layers of the model folder (or hub name) ``path``, from its configuration: no weights are read.

    Changes torch's default dtype while it works, so nothing else may compute in this process. Raises CheckpointError for a
    folder that is no such model.
    """
    import torch

    try:
        with torch.device("meta"):
            if role == "vdm":
                from actors.vdm.files import open_pipeline

                return linear_layers(open_pipeline(path).build("transformer"))
            from transformers import AutoConfig, AutoModelForImageTextToText

            return linear_layers(AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path)))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the configuration of the {role} in {path} cannot be read: {error}") from error


def plain_lora(config: Mapping[str, Any], where: str) -> LoraConfig:
    """Return a PEFT configuration; CheckpointError where it is not that of a plain LoRA. ``where`` begins the message."""
    if str(config.get("peft_type", "LORA")) != "LORA":
        raise CheckpointError(
            f"{where}: peft_type={config['peft_type']!r}; the only kind of adapter known here is LORA"
        )
    odd = {k: config[k] for k, plain in _PLAIN.items() if config.get(k, plain) != plain and config[k]}
    if odd:
        told = ", ".join(f"{name}={value!r}" for name, value in odd.items())
        raise CheckpointError(
            f"{where}: {told} in adapter_config.json; the only kind of adapter known here is plain LoRA"
        )
    missing = [name for name in ("r", "lora_alpha", "target_modules") if not config.get(name)]
    if missing:
        raise CheckpointError(f"{where}: adapter_config.json has no {' and no '.join(missing)}")
    known = {f.name for f in dataclasses.fields(LoraConfig)}
    try:
        return LoraConfig(**{name: value for name, value in config.items() if name in known})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: adapter_config.json is not PEFT's: {error}") from error


def adapted(names: Collection[str]) -> set[str]:
    """Return the modules that an adapter's tensors, under PEFT's names, belong to."""
    return {name.removeprefix(_PREFIX).rpartition(".lora_")[0] for name in names}


@dataclass(frozen=True)
class Fit:
    """How an adapter fits a model."""

    names: dict[str, str]  # the tensors' names as given → as PEFT writes them for this model
    spec: LoraSection  # its targets are the modules' full names

    @property
    def renamed(self) -> bool:
        """Whether a tensor had an old name."""
        return any(given != own for given, own in self.names.items())

    def configured(self, adapter_config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the PEFT configuration that goes with the tensors' own names."""
        return (
            {**adapter_config, "target_modules": list(self.spec.targets or ())}
            if self.renamed
            else dict(adapter_config)
        )

    def apply(self, tensors: Mapping[str, T]) -> dict[str, T]:
        """Return ``tensors`` under PEFT's names."""
        return {self.names[given]: tensor for given, tensor in tensors.items()}


def fit(tensors: Mapping[str, Any], adapter_config: Mapping[str, Any], layers: Layers, role: Role, where: str) -> Fit:
    """Return how an adapter's ``tensors`` (anything with a shape) fit the model whose ``layers`` are given.

    ``adapter_config`` is PEFT's. ``where`` (a folder, say) begins the message of an error.

    Raises:
        CheckpointError: it is no plain LoRA; or tensors are missing, left over, or of another shape or rank than the
            model and ``adapter_config.json`` say. The message says which, how many, and what would be right.
    """
    config, place = plain_lora(adapter_config, where), _PLACES[role]
    reached = {name: shape for name, shape in layers.items() if name.startswith(place.trunk)}
    found: dict[tuple[str, str], str] = {}  # (module, A or B) → the name given
    problems = _Problems(len(tensors))
    for name in tensors:
        key = _place_of(name, layers, place)
        if key is None:
            problems.note(f"tensors name no layer of {place.title}", name)
        elif key[0] not in reached:
            problems.note(f"tensors are outside of {place.title}, where no adapter is trained or served", name)
        elif key in found:
            problems.note(f"tensors name what another one names too ({found[key]})", name)
        else:
            found[key] = name
    targets = {name for name in reached if _targeted(config, name, place)}
    present = {module for module, _ in found}
    for module in sorted(targets | present):
        for letter in "AB":
            wanted = (config.r, layers[module][1]) if letter == "A" else (layers[module][0], config.r)
            given = found.get((module, letter))
            if given is None:
                problems.note("tensors are missing", f"{_PREFIX}{module}.lora_{letter}.weight {wanted}")
            elif module not in targets:
                problems.note("tensors belong to modules that target_modules in adapter_config.json leaves out", given)
            elif (shape := tuple(tensors[given].shape)) != wanted:
                told = f"{given} {shape}, which should be {wanted}"
                rank = shape[0 if letter == "A" else 1] if len(shape) == 2 else config.r
                problems.note(
                    f"tensors have rank {rank} instead of r={config.r}"
                    if rank != config.r
                    else "tensors have another shape",
                    told,
                )
    for target in _idle(config, reached, present, place):
        problems.note("of its target_modules name no layer of the model", target)
    if not tensors:
        problems.note("kinds of tensors are missing, since the file is empty", _FORM)
    if problems:
        base = adapter_config.get("base_model_name_or_path")
        of = f" It says that it is of {base!r}." if base else ""
        raise CheckpointError(
            f"{where}: the adapter does not fit the model. {problems.told()}.{of} {_right(reached, place)}"
        )
    names = {given: f"{_PREFIX}{module}.lora_{letter}.weight" for (module, letter), given in found.items()}
    return Fit(names, LoraSection(rank=int(config.r), alpha=float(config.lora_alpha), targets=sorted(present)))


class _Problems:
    """What is wrong with tensors, by kind."""

    def __init__(self, tensors: int) -> None:
        self._tensors = tensors
        self._kinds: dict[str, list[str]] = {}

    def __bool__(self) -> bool:
        return bool(self._kinds)

    def note(self, kind: str, name: str) -> None:
        """Add ``name`` to those that ``kind`` is true of."""
        self._kinds.setdefault(kind, []).append(name)

    def told(self) -> str:
        """Return how many there are of each kind, with the first two of each."""
        parts = []
        for kind, names in self._kinds.items():
            more = ", …" if len(names) > 2 else ""
            parts.append(f"{len(names)} {kind}: {', '.join(names[:2])}{more}")
        return f"Its file has {self._tensors} tensors; " + "; ".join(parts)


def _right(reached: Layers, place: _Place) -> str:
    example = next(iter(reached), "")
    return (
        f"For each module that target_modules name there must be {_FORM}; this model has {len(reached)} linear layers in "
        f"{place.title}, such as {example} {reached.get(example, '')}."
    )


def _place_of(name: str, layers: Layers, place: _Place) -> tuple[str, str] | None:
    """Return the module of the model, and A or B, that the tensor ``name`` belongs to; None for no module of it."""
    stem = name
    while stem.startswith(_PREFIX):
        stem = stem.removeprefix(_PREFIX)
    module, _, rest = stem.rpartition(".lora_")
    letter, _, ending = rest.partition(".")
    if letter not in ("A", "B") or ending not in ("weight", "default.weight"):
        return None
    for candidate in (module, *(place.trunk + module.removeprefix(a) for a in place.aliases if module.startswith(a))):
        if candidate in layers:
            return candidate, letter
    # The vision tower's old name, so that it is told from a name that nobody has.
    return (f"model.{module}", letter) if f"model.{module}" in layers else None


def _targeted(config: LoraConfig, module: str, place: _Place) -> bool:
    """Return whether ``target_modules`` name ``module``, by its own name or an old one, as PEFT reads them."""
    if config.target_modules == "all-linear":
        return True
    rest = module.removeprefix(place.trunk)
    names = (module, *(alias + rest for alias in place.aliases))
    return any(
        answer is True or isinstance(answer, re.Match)
        for answer in (check_target_module_exists(config, name) for name in names)
    )


def _idle(config: LoraConfig, reached: Layers, present: set[str], place: _Place) -> list[str]:
    """Return the entries of ``target_modules`` that no layer of the model goes by."""
    if isinstance(config.target_modules, str) or config.target_modules is None:
        return []
    known = {alias + name.removeprefix(place.trunk) for name in reached for alias in (place.trunk, *place.aliases)}
    return sorted(t for t in config.target_modules if not any(k == t or k.endswith(f".{t}") for k in known))
