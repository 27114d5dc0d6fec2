"""Parity ladder of the thinker with VANS as it was released: prompt text, token ids, positions, pixel values, loss mask, GRPO loss.

``released`` has the inputs, ``tests/golden`` what the release's code made of them.
"""

from __future__ import annotations

from types import SimpleNamespace

import av
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

from actors.learner.objectives.grpo import Grpo, kl_estimate
from actors.learner.objectives.settings import TokenGrpoSection
from actors.records import VideoQuestion
from actors.vlm.inputs import EncodedPrompt, PromptEncoder, video_prompt
from actors.vlm.makes import MAKES
from pipeline.data.geometry import PixelBudget, stretched
from pipeline.data.video import decode_budget, encode_mp4
from tests.actors.vlm import released as r

BAR = 1e-5
FPS = 2.0  # what transformers assumes of a video without a rate, and the release gives none


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(r.GOLDEN / "release_vlm.safetensors")


@pytest.fixture(scope="module")
def processor() -> Qwen2_5_VLProcessor:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=r.backend(), eos_token="<|im_end|>", pad_token="<|endoftext|>", extra_special_tokens=r.SPECIAL
    )
    size = {"shortest_edge": 3136, "longest_edge": 12845056}
    return Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=size, **r.SHAPE),
        tokenizer,
        Qwen2VLVideoProcessor(size=size, **r.SHAPE, **MAKES["qwen2_5_vl"].options),
        chat_template=r.CHAT_TEMPLATE,
    )


def shown(name: str) -> np.ndarray:
    """The frames of a clip as the decoder of a run hands them to the thinker."""
    height, width = PixelBudget(*r.PIXELS, r.MULTIPLE).size(*r.SIZES[name])
    return np.stack([stretched(av.VideoFrame.from_ndarray(f, format="rgb24"), height, width) for f in r.clip(name)])


def encoded(processor: Qwen2_5_VLProcessor, name: str) -> EncodedPrompt:
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=2)
    encoder = PromptEncoder(processor, SimpleNamespace(model_type="qwen2_5_vl", vision_config=vision), prompt=r.PROMPT)
    (prompt,) = encoder.encode([VideoQuestion(r.QUESTION, shown(name), FPS)])
    return prompt


def test_prompt_text_is_the_releases(processor: Qwen2_5_VLProcessor) -> None:
    with safe_open(r.GOLDEN / "release_vlm.safetensors", "pt") as file:
        theirs = file.metadata()["text"]
    assert video_prompt(processor, VideoQuestion(r.QUESTION, r.clip("kept"), FPS), r.PROMPT).text == theirs


@pytest.mark.parametrize("count", [7, 16, 33, 48])
def test_frames_are_on_screen_at_even_times_where_the_release_takes_the_nearest(
    golden: dict[str, Tensor], count: int
) -> None:
    """So both ends are the same ones, and of those between some are the frame before the release's."""
    numbered = np.broadcast_to(np.arange(count)[:, None, None, None] * 5, (count, 28, 28, 3)).astype(np.uint8)
    frames, _ = decode_budget(encode_mp4(numbered, 8.0), 6, PixelBudget(28 * 28, 28 * 28, 28))
    ours = np.rint(frames.mean(axis=(1, 2, 3)) / 5).astype(int)
    theirs = golden[f"picked.{count}"].numpy()
    exact = np.linspace(0, count - 1, 6)
    assert ours.tolist() == np.floor(exact + 1e-9).tolist() and theirs.tolist() == np.rint(exact).tolist()


def test_token_ids_and_positions_are_the_releases(processor: Qwen2_5_VLProcessor, golden: dict[str, Tensor]) -> None:
    assert golden["seconds_per_step"].tolist() == [2 / FPS]
    prompt = encoded(processor, "grown")
    assert prompt.input_ids.tolist() == golden["ids"].tolist()
    assert prompt.positions.tolist() == golden["positions"].tolist()
    assert prompt.next_position == int(golden["positions"].max()) + 1


@pytest.mark.parametrize("name", r.SIZES)
def test_pixel_values_of_six_frames(processor: Qwen2_5_VLProcessor, golden: dict[str, Tensor], name: str) -> None:
    """Frames that keep their size are the same; of resized ones a few values are another level: torchvision rounds its weights."""
    prompt, theirs = encoded(processor, name), golden[f"pixels.{name}"]
    assert prompt.visual["video_grid_thw"][0].tolist() == golden[f"grid.{name}"].tolist()
    ours = r.thinned(prompt.visual["pixel_values_videos"])
    levels = (ours - theirs).abs() * min(r.CLIP_STD) * 255
    print(f"{name}: {float(levels.max()):.2g} levels, {float((levels > 0.1).float().mean()):.1%} of the values differ")
    assert ours.shape == theirs.shape and levels.max() < (1e-4 if name == "kept" else 1.1)
    assert (levels > 0.1).float().mean() < 0.05


def test_supervised_tokens_are_the_releases_and_one_line_break_less(
    processor: Qwen2_5_VLProcessor, golden: dict[str, Tensor]
) -> None:
    """The release also learns the line break behind "assistant", which is the prompt's: no engine writes it."""
    prompt = encoded(processor, "grown").input_ids.tolist()
    tokenizer = processor.tokenizer
    answer = r.PROMPT.answers.write(r.THOUGHT, r.CAPTION)
    answered = [*tokenizer(answer, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert prompt + answered == golden["sft_ids"].tolist()
    (learnt,) = (golden["sft_labels"] != -100).nonzero(as_tuple=True)
    assert learnt.tolist() == list(range(len(prompt) - 1, len(prompt) + len(answered)))
    assert golden["sft_labels"][learnt].tolist() == [*tokenizer("\n")["input_ids"], *answered]


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_grpo_loss_and_its_gradient(golden: dict[str, Tensor], beta: float) -> None:
    case = r.losses_case()
    settings = TokenGrpoSection(clip_low=0.2, clip_high=0.2, kl_beta=beta, loss_norm="sequence")
    objective = Grpo(settings)
    logits = case["logits"].clone().requires_grad_(True)
    logprobs = r.answer_logprobs(logits, case["ids"])
    kl = kl_estimate(logprobs, case["reference"], "k3") if beta else None
    total, _ = objective.loss(
        logprobs, logprobs.detach(), case["advantages"], case["mask"], rollout_logprobs=logprobs.detach(), kl=kl
    )
    loss = total / objective.normaliser(case["mask"])
    loss.backward()
    assert logits.grad is not None
    theirs, gradient = golden[f"grpo.{beta}.loss"], golden[f"grpo.{beta}.gradient"]
    error = float((logits.grad[:, 2:7] - gradient).abs().max() / gradient.abs().max())
    print(f"beta {beta}: loss {float((loss.detach() - theirs).abs() / theirs.abs()):.1e}, gradient {error:.1e}")
    assert float(loss.detach()) == pytest.approx(float(theirs), rel=BAR) and error <= BAR
    assert not logits.grad[:, :2].any() and not logits.grad[:, 7].any()
