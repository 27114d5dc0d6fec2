"""An adapter fits its model or is refused: names, shapes and rank, for thinker and artist, on the tiny models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from actors.learner.adapters import Role, fit, model_layers
from actors.policy.lora import adapter_config
from actors.policy.settings import LoraSection
from actors.vdm.policy import VdmPolicy
from actors.vdm.served import Served
from actors.vlm.loading import load_model
from actors.vlm.policy import VlmPolicy
from actors.weights.files import write_folder
from actors.weights.transport import Delivery
from cluster.errors import CheckpointError
from pipeline.fleet.models import resolve_adapter

PREFIX = "base_model.model."
Tensors = dict[str, Tensor]
Config = dict[str, Any]


@dataclass
class Trained:
    """A model's folder, and an adapter of it whose tensors are all different."""

    role: Role
    model: Path
    config: Config
    tensors: Tensors

    def policy(self, adapter: Path | None = None) -> Any:
        return {"vlm": VlmPolicy, "vdm": VdmPolicy}[self.role].load(self.model, adapter=adapter)  # type: ignore[attr-defined]


def trained(role: Role, model: Path, targets: tuple[str, ...] | None = None) -> Trained:
    policy: Any = {"vlm": VlmPolicy, "vdm": VdmPolicy}[role].load(  # type: ignore[attr-defined]
        model, lora=LoraSection(rank=4, alpha=8.0, targets=targets)
    )
    generator = torch.Generator().manual_seed(0)
    tensors = {n: torch.randn(t.shape, generator=generator) for n, t in policy.adapter_state().items()}
    return Trained(role, model, adapter_config(policy.module), tensors)


@pytest.fixture(scope="module")
def thinker(tiny_vlm_dir: Path) -> Trained:
    return trained("vlm", tiny_vlm_dir)


@pytest.fixture(scope="module")
def artist(tiny_vdm_dir: Path) -> Trained:
    return trained("vdm", tiny_vdm_dir)


def renamed(adapter: Trained, new: Callable[[str], str]) -> tuple[Config, Tensors]:
    """The adapter with other module names, in its configuration too."""
    config = {**adapter.config, "target_modules": [new(n) for n in adapter.config["target_modules"]]}
    return config, {PREFIX + new(n.removeprefix(PREFIX)): t for n, t in adapter.tensors.items()}


def bare(name: str) -> str:
    return name.removeprefix("model.language_model.")


OLD_NAMES: dict[str, Callable[[str], str]] = {
    "transformers before 4.52": lambda n: "model." + bare(n),
    "language_model.model": lambda n: "language_model.model." + bare(n),
    "of the model without its head": lambda n: "language_model." + bare(n),
    "of the language model": bare,
}


@pytest.mark.parametrize("old", OLD_NAMES)
def test_a_thinkers_old_names_are_mapped(old: str, thinker: Trained, tmp_path: Path) -> None:
    config, tensors = renamed(thinker, OLD_NAMES[old])
    write_folder(tmp_path, config, tensors)
    assert resolve_adapter(str(tmp_path), "vlm", str(thinker.model)) == str(tmp_path)
    ours = thinker.policy(tmp_path)
    assert all(torch.equal(t, thinker.tensors[n]) for n, t in ours.adapter_state().items())
    # As vLLM gets it: PEFT puts the rewritten folder into the model as well.
    fitted = fit(tensors, config, model_layers(str(thinker.model), "vlm"), "vlm", "here")
    folder = write_folder(tmp_path / "new", fitted.configured(config), fitted.apply(tensors))
    peft = PeftModel.from_pretrained(load_model(thinker.model)[0], str(folder))
    stored = {n.replace(".default.", "."): t for n, t in peft.state_dict().items() if ".lora_" in n}
    assert stored.keys() == thinker.tensors.keys()
    assert all(torch.equal(t, thinker.tensors[n]) for n, t in stored.items())


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model."])
def test_an_artists_other_names_are_mapped(prefix: str, artist: Trained, tmp_path: Path) -> None:
    tensors = {f"{prefix}{n.removeprefix(PREFIX)}": t for n, t in artist.tensors.items()}
    write_folder(tmp_path, artist.config, tensors)
    ours = artist.policy(tmp_path)
    assert all(torch.equal(t, artist.tensors[n]) for n, t in ours.adapter_state().items())


def test_a_raw_state_dict_of_peft_is_read(thinker: Trained, tmp_path: Path) -> None:
    raw = {n.replace(".weight", ".default.weight"): t for n, t in thinker.tensors.items()}
    write_folder(tmp_path, thinker.config, raw)
    assert thinker.policy(tmp_path).adapter_state().keys() == thinker.tensors.keys()


Change = Callable[[Config, Tensors], tuple[Config, Tensors]]


def half(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    return config, {n: tensors[n] for n in sorted(tensors)[: len(tensors) // 2]}


def every_other(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    return config, {n: t for n, t in tensors.items() if ".lora_A." in n}


def extra(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    kept = [n for n in config["target_modules"] if not n.endswith(("q_proj", "to_q"))]
    return {**config, "target_modules": kept}, tensors


def beyond(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    return config, tensors | {n.replace("s.0.", "s.9."): t.clone() for n, t in tensors.items() if "s.0." in n}


def wider(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    return config, {n: torch.cat([t, t], 1) if ".lora_A." in n else t for n, t in tensors.items()}


def whole(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    return config, {n.replace(".lora_A.", "."): t for n, t in tensors.items()}


CHANGES: dict[str, tuple[Change, str]] = {
    "half of the tensors": (half, r"\d+ tensors are missing: base_model.model.*\(\d+, \d+\)"),
    "A without B": (every_other, r"\d+ tensors are missing: .*lora_B"),
    "none": (lambda c, t: (c, {}), "since the file is empty"),
    "another rank": (lambda c, t: ({**c, "r": 8}, t), "have rank 4 instead of r=8"),
    "another shape": (wider, r"have another shape: .*which should be \(4, "),
    "tensors that target_modules leave out": (extra, "target_modules in adapter_config.json leaves out"),
    "layers that the model does not have": (beyond, "name no layer of"),
    "no LoRA at all": (whole, "name no layer of"),
    "targets without tensors": (lambda c, t: ({**c, "target_modules": [*c["target_modules"], "w_gate"]}, t), "w_gate"),
    "DoRA": (lambda c, t: ({**c, "use_dora": True}, t), "use_dora=True"),
    "a rank of its own for a layer": (lambda c, t: ({**c, "rank_pattern": {"q": 2}}, t), "rank_pattern"),
    "another kind of adapter": (lambda c, t: ({**c, "peft_type": "IA3"}, t), "IA3"),
    "no rank": (lambda c, t: ({k: v for k, v in c.items() if k != "r"}, t), "no r"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("role", ["vlm", "vdm"])
def test_what_does_not_fit_is_refused_with_the_reason(
    role: str, change: str, thinker: Trained, artist: Trained, tmp_path: Path
) -> None:
    adapter = thinker if role == "vlm" else artist
    make, reason = CHANGES[change]
    write_folder(tmp_path, *make(adapter.config, adapter.tensors))
    with pytest.raises(CheckpointError, match=reason) as told:
        resolve_adapter(str(tmp_path), adapter.role, str(adapter.model))
    assert f"models.{role}_adapter='{tmp_path}'" in str(told.value)
    with pytest.raises(CheckpointError, match=reason):
        adapter.policy(tmp_path)


def test_the_other_models_adapter_is_refused(thinker: Trained, artist: Trained, tmp_path: Path) -> None:
    write_folder(tmp_path / "artist", artist.config, artist.tensors)
    count = len(artist.tensors)
    with pytest.raises(CheckpointError, match=f"{count} tensors name no layer of the VLM's language model"):
        resolve_adapter(str(tmp_path / "artist"), "vlm", str(thinker.model))
    write_folder(tmp_path / "thinker", thinker.config, thinker.tensors)
    with pytest.raises(CheckpointError, match="name no layer of the VDM's transformer"):
        resolve_adapter(str(tmp_path / "thinker"), "vdm", str(artist.model))


def test_an_adapter_of_another_model_is_refused(thinker: Trained, tiny_qwen25_dir: Path, tmp_path: Path) -> None:
    config = {**thinker.config, "base_model_name_or_path": "someone/else"}
    write_folder(tmp_path, config, thinker.tensors)
    with pytest.raises(CheckpointError, match=r"have another shape: .*someone/else"):
        resolve_adapter(str(tmp_path), "vlm", str(tiny_qwen25_dir))


def test_a_vision_towers_adapter_is_refused(thinker: Trained, tmp_path: Path) -> None:
    """The engine adapts the language model alone, and would leave these out."""
    layers = model_layers(str(thinker.model), "vlm")
    name = next(n for n in layers if n.startswith("model.visual."))
    out, inputs = layers[name]
    vision = {
        f"{PREFIX}{name}.lora_A.weight": torch.zeros(4, inputs),
        f"{PREFIX}{name}.lora_B.weight": torch.zeros(out, 4),
    }
    write_folder(tmp_path, thinker.config, thinker.tensors | vision)
    with pytest.raises(CheckpointError, match="2 tensors are outside of the VLM's language model"):
        resolve_adapter(str(tmp_path), "vlm", str(thinker.model))


@pytest.mark.parametrize(
    "targets", ["all-linear", r".*\.language_model\..*_proj", r"^model\.layers\.\d+\..*_proj$", ["q_proj", "k_proj"]]
)
def test_target_modules_are_read_as_peft_reads_them(targets: Any, thinker: Trained) -> None:
    layers = model_layers(str(thinker.model), "vlm")
    chosen = {n: t for n, t in thinker.tensors.items() if isinstance(targets, str) or "q_proj" in n or "k_proj" in n}
    config = {**thinker.config, "target_modules": targets}
    assert fit(chosen, config, layers, "vlm", "here").names == {n: n for n in chosen}
    with pytest.raises(CheckpointError, match="2 tensors are missing"):
        fit({n: t for n, t in chosen.items() if "layers.0.self_attn.q_proj" not in n}, config, layers, "vlm", "here")


def test_published_weights_are_compared_with_the_artists_model(artist: Trained) -> None:
    served = Served("vdm", str(artist.model))
    served.load()
    served.put(1, Delivery("lora", artist.tensors, artist.config))
    assert all(torch.equal(t, artist.tensors[n]) for n, t in served.policy.adapter_state().items())
    _, broken = half(artist.config, artist.tensors)
    with pytest.raises(CheckpointError, match=r"vdm: the published weights: .*are missing"):
        served.put(2, Delivery("lora", broken, artist.config))
