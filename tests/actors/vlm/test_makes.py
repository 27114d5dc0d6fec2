"""Thinkers of other makes than Qwen's, as the learner has them: against plain transformers and PEFT, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from plain import PlainModel
from samples import QUESTIONS, SIZES, experience, frames, perturb_adapter
from thinkers import build_tiny_glm4v, build_tiny_internvl
from torch import nn
from transformers import AutoConfig

from actors.failures import BadSampleError
from actors.learner.adapters import linear_layers
from actors.policy.settings import LoraSection
from actors.records import VideoQuestion, VlmExperience
from actors.vlm.loading import load_model, load_processor, model_units
from actors.vlm.makes import MAKES, make_of
from actors.vlm.policy import VlmPolicy
from actors.vlm.positions import one_axis
from actors.vlm.prompt import banned_token_ids, render_prompt
from actors.vlm.rows import join
from cluster.errors import CheckpointError, ConfigError
from pipeline.pretrain.tokenizers import qwen_tokenizer

LORA = LoraSection(rank=8, alpha=32.0)
BUILDERS = {"internvl": build_tiny_internvl, "glm4v": build_tiny_glm4v}
LINEARS = {  # of each of the two layers of the language model
    "internvl": {*(f"self_attn.{p}_proj" for p in "qkvo"), *(f"mlp.{p}_proj" for p in ("gate", "up", "down"))},
    "glm4v": {*(f"self_attn.{p}_proj" for p in "qkvo"), "mlp.gate_up_proj", "mlp.down_proj"},
}


@pytest.fixture(scope="module", params=BUILDERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return BUILDERS[request.param](tmp_path_factory.mktemp("thinkers") / request.param)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_internvl(tmp_path_factory.mktemp("whole") / "internvl")


def plain_model(folder: Path, adapter: Path | None = None) -> PlainModel:
    """The stock model; of InternVL, shown frames in the size of its images, as vLLM shows them."""
    plain = PlainModel(folder, adapter)
    if folder.name == "internvl":
        plain.processor.video_processor.size = plain.processor.image_processor.size
    return plain


def items_of(policy: VlmPolicy) -> list[VlmExperience]:
    """Two completions about each of several videos."""
    items = []
    for i, (count, height, width, fps) in enumerate(SIZES):
        video = np.random.default_rng(i).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
        asked = VideoQuestion(QUESTIONS[i % 3], video, fps)
        for k, length in enumerate((5 + i, 1 + 3 * i)):
            tokens = experience(10 * i + k, length, policy.eos_token_id).token_ids
            items.append(VlmExperience(f"s{i}", k, asked, tokens, np.zeros(length, np.float32), 1.0))
    return items


@pytest.mark.parametrize("lora", [False, True], ids=["base", "LoRA"])
def test_logprobs_equal_plain_transformers_and_peft(folder: Path, lora: bool, tmp_path: Path) -> None:
    """Shared prompts, separate rows, and one by one; the adapter is read by PEFT from our export."""
    policy = VlmPolicy.load(folder, lora=LORA if lora else None)
    adapter = None
    if lora:
        perturb_adapter(policy.module, seed=1)
        policy.export(adapter := tmp_path / "adapter")
    plain, items = plain_model(folder, adapter), items_of(policy)
    worst = 0.0
    for shared in (True, False):
        policy.shared_prompts = shared
        with torch.no_grad():
            together = policy.forward(policy.collate(items))
            for i, item in enumerate(items):
                expected = plain.logprobs(item.asked.question, item.asked.frames, item.asked.fps, item.token_ids)
                (alone,) = policy.forward(policy.collate([item])).logprobs
                assert together.mask[i].sum() == len(expected) == len(alone)
                for row in (alone, together.logprobs[i, : len(expected)]):
                    worst = max(worst, float((row - expected).abs().max()))
    print(f"{folder.name}, LoRA {lora}: max error {worst:.1e}")
    assert worst <= 1e-5


def test_tokens_and_pixels_are_the_processors(folder: Path) -> None:
    policy, plain = VlmPolicy.load(folder), plain_model(folder)
    for item in items_of(policy)[::2]:
        (encoded,) = policy._prompts.encode([item.asked])
        stock = plain.prompt(item.asked.question, item.asked.frames, item.asked.fps)
        assert torch.equal(encoded.input_ids, stock["input_ids"][0])
        assert encoded.visual and all(torch.equal(value, stock[name]) for name, value in encoded.visual.items())
        assert encoded.next_position == encoded.positions.max() + 1
        if hasattr(plain.core, "get_rope_index"):
            names = ("input_ids", "mm_token_type_ids", "video_grid_thw")
            theirs, _ = plain.core.get_rope_index(**{name: stock[name] for name in names})
            assert torch.equal(encoded.positions, theirs[:, 0])
        else:
            assert encoded.positions.tolist() == [list(range(len(encoded.input_ids)))]


def test_sft_counts_the_answer_and_its_end_alone(folder: Path) -> None:
    policy, plain = VlmPolicy.load(folder), plain_model(folder)
    asked = [VideoQuestion(QUESTIONS[i], frames(i, 4 + i), 8.0) for i in range(2)]
    answers = [
        "<think> it fell </think> <ans> it rises </ans>",
        "<think> so </think> <ans> the red circle fades </ans>",
    ]
    loss = policy.sft_loss(list(zip(asked, answers, strict=True)))
    tokens = [policy.answer_tokens(answer) for answer in answers]
    expected = [
        plain.logprobs(a.question, a.frames, a.fps, t.numpy()).sum() for a, t in zip(asked, tokens, strict=True)
    ]
    assert loss.count == sum(len(t) for t in tokens) and all(t[-1] == policy.eos_token_id for t in tokens)
    torch.testing.assert_close(loss.total, -sum(expected), rtol=1e-5, atol=1e-4)
    loss.mean.backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for n, p in policy.module.named_parameters() if "vis" in n)


def test_lora_reaches_the_linears_of_the_language_model_and_no_other(folder: Path) -> None:
    policy = VlmPolicy.load(folder, lora=LORA)
    adapted = {n.rpartition(".lora_A.")[0] for n, _ in policy.module.named_parameters() if ".lora_A." in n}
    expected = {f"model.language_model.layers.{i}.{name}" for i in range(2) for name in LINEARS[folder.name]}
    assert adapted == expected
    trained = {n for n, p in policy.module.named_parameters() if p.requires_grad}
    assert trained == {f"{n}.lora_{letter}.default.weight" for n in expected for letter in "AB"}
    others = set(linear_layers(load_model(folder, empty=True)[0])) - expected
    assert any("vis" in name for name in others), "there are linear layers elsewhere that it could have reached"
    one = LORA.model_copy(update={"targets": ["o_proj"]})
    some = VlmPolicy.load(folder, lora=one).adapter_state()
    assert {n.split(".lora_")[0] for n in some} == {f"base_model.model.{n}" for n in expected if n.endswith("o_proj")}
    with pytest.raises(ValueError, match=r"'fc9'.* it has .*down_proj"):
        VlmPolicy.load(folder, lora=LORA.model_copy(update={"targets": ["fc9"]}))


def test_units_are_the_blocks_of_both_towers(folder: Path) -> None:
    model, _ = load_model(folder, empty=True)
    names = {id(module): name for name, module in model.named_modules()}
    found = [names[id(unit)] for unit in model_units(model)]
    blocks = {"internvl": "model.vision_tower.encoder.layer", "glm4v": "model.visual.blocks"}[folder.name]
    assert found == [f"{stem}.{i}" for stem in ("model.language_model.layers", blocks) for i in range(2)]


def test_a_whole_export_is_a_folder_that_loads(folder: Path, tmp_path: Path) -> None:
    policy = VlmPolicy.load(folder)
    assert all(p.requires_grad for p in policy.module.parameters())
    policy.export(tmp_path / folder.name)
    items = items_of(policy)[:2]
    again = VlmPolicy.load(tmp_path / folder.name)
    with torch.no_grad():
        before, after = (p.forward(p.collate(items)).logprobs for p in (policy, again))
    assert torch.equal(before, after)


def test_only_three_axes_need_a_row_of_the_table() -> None:
    """A make without a row has positions on one axis; one with more axes is refused, since libraries differ in them."""
    assert make_of(AutoConfig.for_model("llava_onevision")).positions is one_axis
    for kind in ("qwen2_vl", "qwen3_5"):
        with pytest.raises(CheckpointError, match=rf"model_type='{kind}'.*several axes.*qwen2_5_vl"):
            make_of(AutoConfig.for_model(kind))
    for kind, make in MAKES.items():
        assert make_of(AutoConfig.for_model(kind, text_config=dict(make.text))) is make
    with pytest.raises(CheckpointError, match=r"text_config\.attention_bias=None, but glm4v has True"):
        make_of(AutoConfig.for_model("glm4v"))


def test_videos_that_are_no_one_tensor_are_named() -> None:
    """LLaVA-OneVision's frames stand on an axis of their own, so a batch has videos of one length."""
    from actors.vlm.inputs import EncodedPrompt

    def prompt(count: int) -> EncodedPrompt:
        video = torch.zeros(1, count, 3, 8, 8)
        return EncodedPrompt(torch.arange(3), torch.arange(3)[None], 3, {"pixel_values_videos": video})

    one, other = prompt(4), prompt(5)
    tokens = [torch.tensor([1])] * 2
    batch = join([one, one], tokens, share=False, device=torch.device("cpu"))
    assert batch.model_inputs["pixel_values_videos"].shape == (2, 4, 3, 8, 8)
    with pytest.raises(BadSampleError, match=r"pixel_values_videos has the shapes \(1, 4, .*video\.input_frames"):
        join([one, other], tokens, share=False, device=torch.device("cpu"))


def without_video(folder: Path) -> None:
    file = folder / "processor_config.json"
    settings = json.loads(file.read_text())
    settings.pop("video_processor")
    settings["processor_class"] = "LlavaProcessor"  # of images alone
    file.write_text(json.dumps(settings))


def template(text: str | None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "chat_template.jinja"
        file.unlink() if text is None else file.write_text(text)

    return change


def another_model(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(values))

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_video, r"without a video_processor \(processor_config\.json"),
        (template(None), r"chat_template\.jinja cannot be used"),
        (template("{{ messages[1].content[1].text }}"), r"chat_template\.jinja.*<video> once.* wrote it 0 times"),
        (template("{{ raise_exception('no system role') }}"), r"chat_template\.jinja.*no system role"),
        (another_model(model_type="llama"), r"config\.json has model_type='llama'.*no image-text-to-text model"),
        (another_model(model_type="no_such"), "cannot load a VLM from.*no_such"),
        (another_model(model_type="qwen2_vl"), "model_type='qwen2_vl'.*several axes"),
    ],
)
def test_what_cannot_be_trained_is_refused_with_the_file(
    change: Callable[[Path], None], said: str, whole: Path, tmp_path: Path
) -> None:
    change(folder := shutil.copytree(whole, tmp_path / "internvl"))
    with pytest.raises(CheckpointError, match=re.escape(str(folder)) + rf"(.|\n)*{said}|{said}(.|\n)*"):
        load_model(folder, empty=True)


def test_a_tag_that_its_tokenizer_cannot_write_is_refused(folder: Path) -> None:
    from actors.vlm.settings import PromptSection

    tag = {"internvl": "<img>", "glm4v": "<|image|>"}[folder.name]
    with pytest.raises(ConfigError, match=r"models\.prompt\.answer_tag"):
        VlmPolicy.load(folder, prompt=PromptSection(answer_tag=tag))


def test_a_placeholder_that_is_an_ordinary_token_is_neither_asked_nor_sampled(whole: Path) -> None:
    processor = load_processor(whole)
    tokenizer = qwen_tokenizer()
    word = next(
        token for token in sorted(tokenizer.get_vocab()) if len(token) > 3 and token.isalpha() and token.isascii()
    )
    processor.tokenizer, processor.image_token = tokenizer, word
    banned = banned_token_ids(processor, len(tokenizer))
    assert tokenizer.get_vocab()[word] in banned and tokenizer.eos_token_id not in banned
    with pytest.raises(BadSampleError, match=f"the question contains '{word}', which would be read as a picture"):
        render_prompt(processor, f"where is {word} ?")


def test_a_model_without_the_usual_place_for_its_language_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"no module model\.language_model"):
        model_units(nn.Linear(2, 2))
