"""The released thinker: adapters of Qwen2.5-VL under PEFT's names, written as an adapter or merged into the whole model.

The release puts adapters on every layer with a certain suffix, so the vision tower's MLPs carry some as well. vLLM serves, and the
learner trains, adapters of the language model alone. So what reaches into the tower is merged.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError
from pipeline.release.clone import Lora
from pipeline.release.folders import base_folder, rewrite, weights_of
from pipeline.release.tensors import Account, Header, refuse, wider

MODEL_TYPE = "qwen2_5_vl"
PREFIXES = ("mllmagent.mllm_backbone.", "pipe.mllm.mllm_backbone.", "mllm.mllm_backbone.")
_PEFT = "base_model.model."
_LANGUAGE = "model.language_model."
_TOWER = "model.visual."
_LETTERS = ("A", "B")


def belongs(name: str) -> bool:
    """Return whether a tensor of the released files is the thinker's, by its name."""
    return name.startswith((*PREFIXES, _PEFT))


def current_name(name: str) -> str:
    """Return what transformers 5 calls the part of a Qwen2.5-VL that an earlier version called ``name``.

    Earlier ones had ``visual`` and ``lm_head`` beside the language model's ``model``; files on disk still do.
    """
    if name.startswith((_LANGUAGE, _TOWER, "lm_head.")):
        return name
    return f"model.{name}" if name.startswith("visual.") else _LANGUAGE + name.removeprefix("model.")


@dataclass
class Thinker:
    """What the released files hold of the thinker, compared with its base."""

    folder: Path  # the base's
    lora: Lora
    pairs: dict[str, dict[str, Header]] = field(default_factory=dict)  # the weight's current name → A, B
    whole: dict[str, Header] = field(default_factory=dict)  # the weight's current name → what takes its place
    accounts: list[Account] = field(default_factory=list)

    @property
    def merged(self) -> bool:
        """Whether the tensors need a whole model: an adapter here is of the language model alone."""
        return bool(self.whole) or any(name.startswith(_TOWER) for name in self.pairs)

    def write(self, out: Path, base: str) -> Path:
        """Write ``out/vlm`` or ``out/vlm_adapter``, and return which. ``base`` is what an adapter's configuration names."""
        return self._merge(out / "vlm") if self.merged else self._adapter(out / "vlm_adapter", base)

    def _merge(self, target: Path) -> Path:
        scale = self.lora.alpha / self.lora.rank

        def change(header: Header, weight: Any) -> Any:
            name = current_name(header.name)
            if name in self.whole:
                weight = wider(self.whole[name].read(), weight)
            if name in self.pairs:
                one, other = (self.pairs[name][letter].read().float() for letter in _LETTERS)
                weight = (weight.float() + scale * (other @ one)).to(weight.dtype)
            return weight

        rewrite(self.folder, target, "--base-vlm", change)
        return target

    def _adapter(self, target: Path, base: str) -> Path:
        from peft import LoraConfig

        from actors.learner.adapters import fit, model_layers
        from actors.weights.files import write_folder

        modules = {name: name.removesuffix(".weight") for name in self.pairs}
        config = LoraConfig(
            r=self.lora.rank,
            lora_alpha=self.lora.alpha,
            target_modules=sorted(modules.values()),
            base_model_name_or_path=base,
            inference_mode=True,
        )
        values = {key: sorted(v) if isinstance(v, set) else v for key, v in config.to_dict().items()}
        values["peft_type"] = "LORA"
        tensors = {
            f"{_PEFT}{module}.lora_{letter}.weight": self.pairs[name][letter].read()
            for name, module in modules.items()
            for letter in _LETTERS
        }
        fit(tensors, values, model_layers(str(self.folder), "vlm"), "vlm", str(target))
        return write_folder(target, values, tensors)


def plan_thinker(given: Mapping[str, Header], base: str, lora: Lora) -> Thinker:
    """Return where each tensor of the thinker goes; ``given`` are those of the released files by their :func:`thinker_name`.

    Raises CheckpointError for tensors that fit nowhere: each with its file, name and shape.
    """
    folder = base_folder(base, "--base-vlm")
    kind = config_of(folder).get("model_type")
    if kind != MODEL_TYPE:
        raise CheckpointError(
            f"--base-vlm: {folder}/config.json has model_type={kind!r}; the release is of Qwen2.5-VL ({MODEL_TYPE})"
        )
    known = {current_name(name): header for name, header in weights_of(folder, "--base-vlm").items()}
    thinker, problems = Thinker(folder, lora), []
    for stem, header in given.items():
        module, letter = _pair(stem)
        target = current_name(f"{module}.weight" if letter else stem.replace(".base_layer.", "."))
        if letter and module.rpartition(".")[2] not in lora.targets:
            problems.append(
                f"{header} is an adapter of a layer that mllm_lora_config leaves out: it has {', '.join(lora.targets)}"
            )
        elif target == "lm_head.weight" and target not in known:
            thinker.accounts.append(Account(header, "thinker", False, "the base ties it to its embeddings"))
        elif target not in known:
            problems.append(f"{header} fits nowhere: the thinker's base in {folder} has no {target}")
        elif (wanted := _wanted(known[target], letter, lora.rank)) != header.shape:
            problems.append(f"{header} should be {wanted}: {known[target].name} of the base is {known[target].shape}")
        elif (taken := thinker.pairs.get(target, {}).get(letter) if letter else thinker.whole.get(target)) is not None:
            problems.append(f"{header} is what {taken.name} is too, under another age's name")
        elif letter:
            thinker.pairs.setdefault(target, {})[letter] = header
        else:
            thinker.whole[target] = header
    for target, pair in thinker.pairs.items():
        if missing := [letter for letter in _LETTERS if letter not in pair]:
            there = next(iter(pair.values()))
            problems.append(f"{there} stands alone: lora_{missing[0]} of {target.removesuffix('.weight')} is missing")
    refuse(problems, f"The file is of another model than {base}, or of another version of mllm_lora_config.")
    how = "merged into the whole model, since adapters stand in the vision tower or whole weights beside them"
    told = how if thinker.merged else "kept as an adapter of the language model"
    thinker.accounts += [
        Account(header, "thinker", True, told, target)
        for target, pair in thinker.pairs.items()
        for header in pair.values()
    ]
    thinker.accounts += [
        Account(header, "thinker", True, "takes the place of the base's weight", target)
        for target, header in thinker.whole.items()
    ]
    return thinker


def config_of(folder: Path) -> dict[str, Any]:
    """Return config.json of the thinker's base; CheckpointError where there is none."""
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"--base-vlm: {folder} is no model folder: config.json: {error}") from error


def thinker_name(name: str) -> str:
    """Return a tensor's name in the model that PEFT adapts, without what PEFT and the release put before it."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name.removeprefix(_PEFT)


def _pair(stem: str) -> tuple[str, str]:
    """Return the layer and A or B of an adapter's tensor; an empty letter for any other tensor."""
    module, _, rest = stem.rpartition(".lora_")
    letter, _, ending = rest.partition(".")
    return (module, letter) if module and letter in _LETTERS and ending in ("weight", "default.weight") else (stem, "")


def _wanted(weight: Header, letter: str, rank: int) -> tuple[int, ...]:
    if not letter:
        return weight.shape
    return (rank, *weight.shape[1:]) if letter == "A" else (weight.shape[0], rank)
