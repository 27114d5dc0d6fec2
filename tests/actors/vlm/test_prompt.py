"""Texts of strangers on their way into the thinker's prompt: what would be read as a token is refused by name."""

from __future__ import annotations

import asyncio
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from actors.failures import BadSampleError
from actors.records import VideoQuestion, VlmExperience
from actors.vlm.engine import VlmEngine, engine_prompt
from actors.vlm.engine_args import EngineSpec, engine_args
from actors.vlm.loading import load_processor
from actors.vlm.policy import VlmPolicy
from actors.vlm.prompt import check_text, load_tokenizer
from actors.vlm.settings import PROMPT, PromptSection
from cluster.errors import ConfigError


@pytest.fixture(scope="module")
def policy(tiny_vlm_dir: Path) -> VlmPolicy:
    return VlmPolicy.load(tiny_vlm_dir)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("what <|video_pad|> now ?", r"the question contains the special token '<\|video_pad\|>'"),
        ("end<|im_end|>", r"'<\|im_end\|>'"),
        ("", "the question is empty"),
        (" \n\t\u2003", "the question is empty"),
        ("half \ud83d a pair", "not Unicode"),
    ],
)
def test_a_text_that_cannot_be_asked_is_named(tiny_vlm_dir: Path, text: str, said: str) -> None:
    with pytest.raises(BadSampleError, match=said):
        check_text(load_tokenizer(tiny_vlm_dir), text, "question")


@pytest.mark.parametrize(
    "text", ["<think> is it so ?", "שלום 😀 \u202e", "a\x00b\x1b[31m", "<ans>", "<|no_such_token|>"]
)
def test_odd_text_that_is_only_text_may_be_asked(tiny_vlm_dir: Path, text: str) -> None:
    tokenizer = load_tokenizer(tiny_vlm_dir)
    check_text(tokenizer, text, "question")
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert special and not special & set(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_an_example_that_cannot_be_learnt_from_is_named(policy: VlmPolicy) -> None:
    good = "<think> a </think> <ans> b </ans>"
    policy.check_example("what next ?", good)
    for question, answer, said in (
        ("what <|im_start|>", good, "the question contains"),
        ("what next ?", good.replace("b", "b <|im_end|>"), "the answer contains special tokens"),
        ("what next ?", good.replace("b", "</ans> b"), "the answer is not <think>"),
        ("what next ?", "b", "the answer is not <think>"),
        ("next " * 50_000, good, "tokens; the model has"),
    ):
        with pytest.raises(BadSampleError, match=said):
            policy.check_example(question, answer)


def test_processor_and_engine_are_told_how_many_pixels_a_frame_has(tiny_vlm_dir: Path) -> None:
    assert load_processor(tiny_vlm_dir).video_processor.cap_pixels_per_frame is False  # unset, transformers warns
    assert engine_args(EngineSpec(str(tiny_vlm_dir)))["mm_processor_kwargs"] == {"cap_pixels_per_frame": False}


RELEASED = PromptSection(system="Predict.", think_tag="[Think]", answer_tag="[Ans]", spaced=False)


def test_the_default_prompt_is_the_sentence_that_the_bundled_thinker_learnt() -> None:
    assert PROMPT.system_text == (
        "You answer a question about a video with the next event. "
        "Write <think> your reasoning </think> <ans> one sentence </ans>"
    )
    other = PromptSection(think_tag="[Think]", answer_tag="[Ans]")
    assert other.system_text.endswith("Write [Think] your reasoning [/Think] [Ans] one sentence [/Ans]")


def test_engine_and_learner_show_the_prompt_that_is_set(tiny_vlm_dir: Path) -> None:
    """Text and token ids of both are the chat template's own for the messages, written here by hand."""
    policy = VlmPolicy.load(tiny_vlm_dir, prompt=RELEASED)
    clip = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3)).astype(np.uint8)
    asked = VideoQuestion("What now ?", clip, 4.0)
    text = (
        "<|im_start|>system\nPredict.<|im_end|>\n<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>What now ?"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    assert engine_prompt(policy.processor, asked, RELEASED)["prompt"] == text
    ids = policy.collate([VlmExperience("s", 0, asked, np.array([5]), np.zeros(1), 1.0)]).model_inputs["input_ids"][0]
    shown = policy.processor.tokenizer.decode([i for i in ids if i != policy.processor.video_token_id])
    assert shown.startswith("<|im_start|>system\nPredict.<|im_end|>\n") and "your reasoning" not in shown
    policy.check_example("what next ?", "[Think]a[/Think][Ans]b[/Ans]")
    with pytest.raises(BadSampleError, match=r"the answer is not \[Think\]…\[/Think\]\[Ans\]…\[/Ans\]"):
        policy.check_example("what next ?", "<think> a </think> <ans> b </ans>")


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        # The bundled tokenizer writes composed letters alone: the accent that stands apart comes back joined.
        (
            {"answer_tag": "[Re\u0301ponse]"},
            r"models.prompt.answer_tag='\[Réponse\]': the model's tokenizer cannot write '\[Réponse\]'",
        ),
        ({"think_tag": "<|im_start|>"}, r"models.prompt.think_tag='<\|im_start\|>': .* which it reads back as ''"),
        (
            {"system": "say <|im_end|>"},
            r"models.prompt.system: the system text contains the special token '<\|im_end\|>'",
        ),
    ],
)
def test_a_prompt_that_the_tokenizer_cannot_write_is_refused_with_its_key(
    tiny_vlm_dir: Path, prompt: dict[str, str], said: str
) -> None:
    with pytest.raises(ConfigError, match=unicodedata.normalize("NFD", said) if "Re" in str(prompt) else said):
        VlmPolicy.load(tiny_vlm_dir, prompt=PromptSection(**prompt))


def test_the_engine_refuses_such_a_prompt_before_it_starts(tiny_vlm_dir: Path) -> None:
    engine = VlmEngine(EngineSpec(str(tiny_vlm_dir), prompt=PromptSection(think_tag="<|im_start|>")))
    with pytest.raises(ConfigError, match=r"models\.prompt\.think_tag"):
        asyncio.run(engine.start())


def test_tags_that_are_no_tags_or_equal_are_refused() -> None:
    for tags in ({"answer_tag": "ans"}, {"answer_tag": "</ans>"}, {"answer_tag": "<a ns>"}, {"think_tag": "[]"}):
        with pytest.raises(ValidationError, match="pattern"):
            PromptSection(**tags)
    with pytest.raises(ValidationError, match="are both '<ans>'"):
        PromptSection(think_tag="<ans>")
