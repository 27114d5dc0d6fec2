"""Texts of strangers on their way into the thinker's prompt: what would be read as a token is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.failures import BadSampleError
from actors.vlm.engine_args import EngineSpec, engine_args
from actors.vlm.policy import VlmPolicy
from actors.vlm.prompt import check_text, load_processor, load_tokenizer


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
    check_text(load_tokenizer(tiny_vlm_dir), text, "question")


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
