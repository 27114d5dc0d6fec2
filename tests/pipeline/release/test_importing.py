"""The released pair becomes folders that compute what the release's names and PEFT say, and every tensor is accounted for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForImageTextToText

from actors.learner.adapters import fit, model_layers
from actors.weights.files import read_folder
from cluster.errors import CheckpointError, ConfigError
from pipeline.config import load_config
from pipeline.release import import_release
from pipeline.release.tensors import DIFFUSERS
from pipeline.release.thinker import current_name
from tests.pipeline.release.released import (
    NEGATIVE,
    PREFIX,
    SYSTEM,
    artist_tensors,
    build_clone,
    save,
    thinker_tensors,
    tuned_thinker,
    wan_name,
)

pytestmark = pytest.mark.slow

Tensors = dict[str, Tensor]


@dataclass
class World:
    """The tiny release: the tuned models, and their weights under the release's names."""

    base_vlm: Path
    base_vdm: Path
    tuned: Any
    drawn: Any
    thinker: Tensors
    artist: Tensors

    def run(self, folder: Path, **changes: Any) -> Any:
        """Import it into ``folder``/out with ``changes``: of the clone, the tensors or the arguments."""
        clone = build_clone(folder / "clone", **changes.pop("clone", {}))
        vlm = changes.pop("vlm", None) or save(changes.pop("thinker", self.thinker), folder / "vlm.safetensors")
        vdm = changes.pop("vdm", None) or save(changes.pop("artist", self.artist), folder / "vdm.safetensors")
        given = {"base_vlm": str(self.base_vlm), "base_vdm": str(self.base_vdm), "run": "toy", **changes}
        return import_release(clone, vlm, vdm, out=folder / "out", **given)


@pytest.fixture(scope="module")
def world(tiny_qwen25_dir: Path, tiny_vdm_dir: Path) -> World:
    tuned = tuned_thinker(tiny_qwen25_dir)
    drawn, artist = artist_tensors()
    return World(tiny_qwen25_dir, tiny_vdm_dir, tuned, drawn, thinker_tensors(tuned), artist)


def logits(model: Any) -> Tensor:
    """Of a text and of an image, so that the tower takes part."""
    config = model.config
    image = torch.linspace(-1, 1, 16 * 3 * 2 * 8 * 8).reshape(16, -1)
    ids = torch.tensor(
        [[5, config.vision_start_token_id, *[config.image_token_id] * 4, config.vision_end_token_id, 9, 11]]
    )
    with torch.no_grad():
        return model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == config.image_token_id).int(),
            pixel_values=image,
            image_grid_thw=torch.tensor([[1, 4, 4]]),
        ).logits


def test_adapters_in_the_tower_are_merged_into_a_whole_model(world: World, tmp_path: Path) -> None:
    done = world.run(tmp_path)
    assert done.models == {"vlm": str(tmp_path / "out" / "vlm"), "vdm": str(tmp_path / "out" / "vdm")}
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "vlm").eval()
    wanted, before = logits(world.tuned), logits(AutoModelForImageTextToText.from_pretrained(world.base_vlm).eval())
    assert (wanted - before).abs().max() > 1e-2
    assert (logits(merged) - wanted).abs().max() < 1e-4 * wanted.abs().max()
    with world.tuned.disable_adapter():
        assert torch.equal(logits(world.tuned), before)  # the merge left the base alone
    for file in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        if (world.base_vlm / file).exists():
            assert (tmp_path / "out" / "vlm" / file).read_bytes() == (world.base_vlm / file).read_bytes()


@pytest.mark.parametrize("prefix", [PREFIX, "mllmagent.mllm_backbone."])
def test_adapters_of_the_language_model_stay_an_adapter(world: World, tmp_path: Path, prefix: str) -> None:
    given = thinker_tensors(world.tuned, tower=False, prefix=prefix)
    done = world.run(tmp_path, thinker=given)
    folder = tmp_path / "out" / "vlm_adapter"
    assert done.models == {"vlm": str(world.base_vlm), "vlm_adapter": str(folder), "vdm": str(tmp_path / "out" / "vdm")}
    config, tensors = read_folder(folder)
    assert not fit(tensors, config, model_layers(str(world.base_vlm), "vlm"), "vlm", "here").renamed
    base = AutoModelForImageTextToText.from_pretrained(world.base_vlm)
    served = PeftModel.from_pretrained(base, str(folder))
    own = {
        n.replace(".default.", "."): t
        for n, t in world.tuned.state_dict().items()
        if "lora_" in n and ".visual." not in n
    }
    loaded = {n.replace(".default.", "."): t for n, t in served.state_dict().items() if "lora_" in n}
    assert own.keys() == loaded.keys() and all(torch.equal(own[n], loaded[n]) for n in own)
    run = load_config(tmp_path / "out" / "run.yaml")
    assert run.models.vlm_adapter == str(folder) and run.stage1.grpo.kl_beta == 0


def test_the_artist_takes_the_weights_it_is_given_and_keeps_the_bases(world: World, tmp_path: Path) -> None:
    part = {name: tensor for name, tensor in world.artist.items() if "cross_attn" not in name}
    done = world.run(tmp_path, artist=part)
    old = WanTransformer3DModel.from_pretrained(world.base_vdm / "transformer").state_dict()
    new = WanTransformer3DModel.from_pretrained(tmp_path / "out" / "vdm" / "transformer").state_dict()
    assert new.keys() == old.keys()
    for name, tensor in new.items():
        assert torch.equal(tensor, (old if "attn2" in name else world.drawn.state_dict())[name]), name
    assert done.kept == len(old) - len(part)
    base, out = world.base_vdm, tmp_path / "out" / "vdm"
    rest = [p.relative_to(base) for p in base.rglob("*") if p.is_file() and "transformer" not in p.parts]
    assert rest and all((out / p).read_bytes() == (base / p).read_bytes() for p in rest)
    weights, words = out / "vae" / "diffusion_pytorch_model.safetensors", out / "vae" / "config.json"
    assert weights.samefile(base / "vae" / weights.name)  # gigabytes stand once
    assert not words.samefile(base / "vae" / words.name)  # what may be edited does not


def test_a_narrower_base_loses_no_digit(world: World, tmp_path: Path) -> None:
    half = shutil.copytree(world.base_vdm, tmp_path / "half")
    transformer = WanTransformer3DModel.from_pretrained(half / "transformer", torch_dtype=torch.bfloat16)
    transformer.to(torch.bfloat16).save_pretrained(half / "transformer", max_shard_size="500KB")
    assert (half / "transformer" / "diffusion_pytorch_model.safetensors.index.json").is_file()  # in several shards
    (half / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    world.run(tmp_path, base_vdm=str(half))
    folder = tmp_path / "out" / "vdm" / "transformer"
    new = WanTransformer3DModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(tensor, world.drawn.state_dict()[name]) for name, tensor in new.items())
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(4 * t.numel() for t in new.values())


def older(name: str) -> str:
    """A thinker's name as its own training wrote it."""
    return name.replace("pipe.mllm.", "mllmagent.")


def test_every_tensor_is_in_the_report(world: World, tmp_path: Path) -> None:
    extra = {
        "mllm_query_embedding.0.weight": torch.zeros(4, 4),
        "blocks.0.cross_attn.k_mllm_query.weight": torch.zeros(4, 4),
        **{older(name): tensor + 1 for name, tensor in list(world.thinker.items())[:3]},
    }
    done = world.run(tmp_path, artist={**world.artist, **extra})
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    named = {(Path(t["file"]).name, t["name"]) for t in report["tensors"]}
    assert named == {("vdm.safetensors", n) for n in (world.artist | extra)} | {
        ("vlm.safetensors", n) for n in world.thinker
    }
    assert len(named) == len(report["tensors"]) == len(done.accounts)
    unused = {t["name"]: t["why"] for t in report["tensors"] if not t["used"]}
    assert unused.keys() == extra.keys()
    assert "query embeddings" in unused["mllm_query_embedding.0.weight"]
    first = next(iter(world.thinker))
    same = f"{first} of vlm.safetensors is the same one, and the release loads it after this one"
    assert unused[older(first)] == same
    assert all(t["place"] for t in report["tensors"] if t["used"])
    assert report["settings"]["video.fps"] == "inference.py: save_video(fps) in process_video_row"
    assert sum(row["tensors"] for row in report["summary"]) == len(named)


def test_the_run_says_what_the_clone_says(world: World, tmp_path: Path) -> None:
    world.run(tmp_path)
    run = load_config(tmp_path / "out" / "run.yaml")
    prompt, video, models = run.models.prompt, run.video, run.models
    assert (prompt.system, prompt.think_tag, prompt.answer_tag) == (SYSTEM, "[Think]", "[Ans]")
    assert (prompt.caption, prompt.spaced) == ("first", False)
    assert (models.negative_prompt, models.flow_shift, models.flow_grid) == (NEGATIVE, 5.0, "even")
    assert (video.num_frames, video.height, video.width, video.fps, video.input_frames) == (9, 32, 32, 11.0, 6)
    assert (video.vlm_pixels, video.vlm_multiple, video.vae_tiling) == ((1024, 4096), 16, True)
    assert (video.vae_tile, video.vae_stride) == ((240, 416), (120, 208))
    assert (video.conditioning.references, video.conditioning.time, video.conditioning.take) == ("clip", "shared", 6)
    assert (run.evaluate.render.steps, run.evaluate.render.guidance) == (2, 5.0)
    assert (run.evaluate.text.temperature, run.evaluate.text.top_p, run.evaluate.text.max_tokens) == (0.7, 0.9, 24)
    assert (run.stage1.text.top_p, run.stage1.lora.rank, run.stage1.lora.alpha) == (1.0, 4, 16.0)
    assert (run.sft.vdm.timesteps, run.sft.vdm.weighting) == ("uniform", "bell")
    assert (run.name, str(run.out), run.pools.vlm.gpus) == ("out", "runs/out", load_config("toy").pools.vlm.gpus)


def test_whole_weights_beside_adapters_take_the_bases_place(world: World, tmp_path: Path) -> None:
    name = f"{PREFIX}base_model.model.model.embed_tokens.weight"
    layer = f"{PREFIX}base_model.model.model.layers.1.self_attn.q_proj.base_layer.weight"
    state = world.tuned.state_dict()
    embeddings = state["base_model.model.model.language_model.embed_tokens.weight"] * 2
    query = state["base_model.model.model.language_model.layers.1.self_attn.q_proj.base_layer.weight"] * 3
    head = {f"{PREFIX}base_model.model.lm_head.weight": embeddings.clone()}
    given = thinker_tensors(world.tuned, tower=False) | {name: embeddings, layer: query} | head
    done = world.run(tmp_path, thinker=given)
    assert "vlm_adapter" not in done.models
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "vlm").state_dict()
    assert torch.equal(merged["model.language_model.embed_tokens.weight"], embeddings)
    pair = [
        state[f"base_model.model.model.language_model.layers.1.self_attn.q_proj.lora_{x}.default.weight"] for x in "AB"
    ]
    assert torch.allclose(
        merged["model.language_model.layers.1.self_attn.q_proj.weight"], query + 4.0 * (pair[1] @ pair[0])
    )
    (unused,) = [account for account in done.accounts if not account.used]
    assert unused.header.name in head and "ties" in unused.why


def test_names_of_either_age_are_one() -> None:
    for old, new in {
        "model.layers.0.mlp.up_proj.weight": "model.language_model.layers.0.mlp.up_proj.weight",
        "model.embed_tokens.weight": "model.language_model.embed_tokens.weight",
        "visual.blocks.1.mlp.up_proj.weight": "model.visual.blocks.1.mlp.up_proj.weight",
        "lm_head.weight": "lm_head.weight",
    }.items():
        assert current_name(old) == current_name(new) == new
    assert wan_name("blocks.0.norm2.weight") == "blocks.0.norm3.weight"


# --- bad input --------------------------------------------------------------------------------------------------------


def replaced(tensors: Tensors, name: str, value: Tensor | None, new: str | None = None) -> Tensors:
    """``tensors`` with another value or name of ``name``, or without it."""
    rest = {n: t for n, t in tensors.items() if n != name}
    return rest if value is None else {**rest, new or name: value}


def q_proj(letter: str) -> str:
    return f"{PREFIX}base_model.model.model.layers.0.self_attn.q_proj.lora_{letter}.default.weight"


QKV = f"{PREFIX}base_model.model.visual.blocks.0.attn.qkv.lora_A.default.weight"
BAD: dict[str, tuple[Callable[[World], dict[str, Any]], str]] = {
    "a thinker of another size": (
        lambda w: {"thinker": replaced(w.thinker, q_proj("A"), torch.zeros(4, 2048))},
        r"vlm\.safetensors: .*layers\.0\.self_attn\.q_proj\.lora_A.* \(4, 2048\) should be \(4, 64\)",
    ),
    "another rank": (
        lambda w: {"clone": {"rank": 8}},
        r"\(4, 64\) should be \(8, 64\).*another version of mllm_lora_config",
    ),
    "a layer twice": (
        lambda w: {
            "thinker": {
                **w.thinker,
                q_proj("A").replace("model.layers", "model.language_model.layers"): torch.zeros(4, 64),
            }
        },
        r"q_proj\.lora_A.* is what .* is too, under another age's name",
    ),
    "half a pair": (
        lambda w: {"thinker": replaced(w.thinker, q_proj("B"), None)},
        r"stands alone: lora_B of model\.language_model",
    ),
    "a layer too many": (
        lambda w: {"thinker": {**w.thinker, q_proj("A").replace("layers.0", "layers.40"): torch.zeros(4, 64)}},
        r"fits nowhere: the thinker's base in .* has no model\.language_model\.layers\.40",
    ),
    "a layer that the release does not adapt": (
        lambda w: {
            "thinker": {
                **w.thinker,
                QKV: torch.zeros(4, 64),
            }
        },
        r"an adapter of a layer that mllm_lora_config leaves out: it has q_proj",
    ),
    "an artist of another size": (
        lambda w: {"artist": replaced(w.artist, "head.head.weight", torch.zeros(64, 1536))},
        r"vdm\.safetensors: head\.head\.weight \(64, 1536\) should be \(64, 128\), as proj_out\.weight",
    ),
    "a tensor from elsewhere": (
        lambda w: {"artist": {**w.artist, "img_emb.proj.0.weight": torch.zeros(3)}},
        r"img_emb\.proj\.0\.weight \(3,\) fits nowhere",
    ),
    "no tensor of the thinker": (
        lambda w: {"thinker": {"blocks.9.x": torch.zeros(1)}},
        r"--vlm=.* holds no tensor of the thinker",
    ),
    "no tensor of the artist": (
        lambda w: {"artist": {PREFIX + "x": torch.zeros(1)}},
        r"--vdm=.* holds no tensor of the artist",
    ),
    "frames in other squares": (
        lambda w: {"clone": {"unit": 28}},
        r"squares of 16 pixels, the clone's frames are multiples of 28",
    ),
    "a run that cannot be": (lambda w: {"clone": {"frames": 7}}, r"makes no run: .*num_frames=7 must be 4k\+1"),
    "a text that is read as something else": (
        lambda w: {"clone": {"system": "say <|im_end|> [Think][/Think] [Ans][/Ans]"}},
        r"models\.prompt\.system: the system text contains the special token '<\|im_end\|>'",
    ),
    "an unknown base": (
        lambda w: {"base_vlm": "nobody/nothing"},
        r"--base-vlm='nobody/nothing' is no folder, and no model",
    ),
    "no folder of a model": (
        lambda w: {"base_vlm": str(w.base_vdm)},
        r"--base-vlm: .* is no model folder: config\.json: ",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_does_not_fit_is_refused_before_anything_is_written(world: World, tmp_path: Path, what: str) -> None:
    change, said = BAD[what]
    with pytest.raises((CheckpointError, ConfigError), match=f"(?s){said}"):
        world.run(tmp_path, **change(world))
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial"))


def test_a_base_of_another_make_or_without_video_is_refused(world: World, tmp_path: Path, tiny_vlm_dir: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model_type='qwen3_vl'; the release is of Qwen2\.5-VL"):
        world.run(tmp_path, base_vlm=str(tiny_vlm_dir))
    text = shutil.copytree(world.base_vlm, tmp_path / "text")
    for file in [*text.glob("*processor*.json")]:
        file.unlink()
    with pytest.raises(CheckpointError, match=r"--base-vlm: .*(without a video_processor|cannot load a VLM)"):
        world.run(tmp_path, base_vlm=str(text))


def test_pickles_are_refused_with_what_holds_the_same_weights(world: World, tmp_path: Path) -> None:
    original = tmp_path / "Wan2.1-T2V-1.3B"
    original.mkdir()
    for name, part in {"Wan2.1_VAE.pth": "vae", "models_t5_umt5-xxl-enc-bf16.pth": "text_encoder"}.items():
        (original / name).write_bytes(b"not opened")
        with pytest.raises(CheckpointError, match=f"{name} is a pickle.*{part}/ of {DIFFUSERS}"):
            world.run(tmp_path / part, vdm=original / name)
        with pytest.raises(
            CheckpointError, match=f"no transformer/ in it. It is Wan2.1 as first published: .*{DIFFUSERS}"
        ):
            world.run(tmp_path / f"{part}-base", base_vdm=str(original))
    (tmp_path / "vlm.pt").write_bytes(b"not opened")
    with pytest.raises(CheckpointError, match="only safetensors files are read"):
        world.run(tmp_path / "pt", vlm=tmp_path / "vlm.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        world.run(tmp_path / "cut", vdm=tmp_path / "cut.safetensors")


def test_nothing_is_overwritten(world: World, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="there is something already"):
        world.run(tmp_path)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]
