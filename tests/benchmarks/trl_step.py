"""Row 11: a step of stage 1 with text rewards alone beside TRL's `GRPOTrainer` on the same thinker, batch and group size."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from actors.records import VlmExperience
from actors.vlm.policy import VlmPolicy
from actors.vlm.settings import PROMPT
from pipeline.config import load_config
from pipeline.data.toy.shards import write_toy
from pipeline.data.toy.world import make_sample
from pipeline.fleet.models import resolve_model
from rewards.format import format_reward, parse_answer
from rewards.text import rouge_l
from tests.benchmarks.bench import Check, Result, Size, interleave, medians, ratios, seconds
from tests.benchmarks.text_run import text_run

GROUP, MAX_TOKENS = 8, 40


def ours(folder: Path, turn: int, prompts: int, steps: int) -> list[float]:
    """Return the seconds of each step of a run with its pools, its learner of two ranks, and tracking."""
    overrides = [f"stage1.steps={steps}", f"seed={turn}"]
    overrides += [f"stage1.rollout.prompts_per_step={prompts}", f"stage1.rollout.group_size={GROUP}"]
    return [m["time/step_s"] for m in text_run(folder, f"run{turn}", *overrides)]


def theirs(folder: Path, turn: int, prompts: int, steps: int) -> list[float]:
    """Return the seconds of each step of TRL's trainer, with a thread on every core."""
    from trl import import_utils

    import_utils.is_vllm_available = lambda *_, **__: (
        False
    )  # its client for vLLM needs a GPU build, and is not used here
    from datasets import Dataset, Features, Sequence, Value
    from datasets import Image as ImageFeature
    from peft import LoraConfig
    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration, TrainerCallback
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    config = load_config("toy")
    section = config.stage1
    samples = [make_sample(turn * 1000 + i, "train") for i in range(prompts * steps)]
    rows = {
        "prompt": [
            [{"role": "system", "content": PROMPT.system_text}, {"role": "user", "content": s.question}]
            for s in samples
        ],
        # Two frames of a video make one patch in time: an image for each of them is as many tokens as the video has.
        "images": [[Image.fromarray(f) for f in s.input_frames[::2]] for s in samples],
        "truth": [s.caption for s in samples],
    }
    message = [{"role": Value("string"), "content": Value("string")}]
    features = Features({"prompt": message, "images": Sequence(ImageFeature()), "truth": Value("string")})

    def text(completion: Any) -> str:
        return str(completion[0]["content"])

    def formatted(completions: list[Any], **_: Any) -> list[float]:
        return [format_reward(text(c)) for c in completions]

    def rouge(completions: list[Any], truth: list[str], **_: Any) -> list[float]:
        answers = [parse_answer(text(c)) for c in completions]
        return [rouge_l(a.caption, t) if a is not None else 0.0 for a, t in zip(answers, truth, strict=True)]

    class Clock(TrainerCallback):
        """Notes when each step ends."""

        ends: list[float]

        def __init__(self) -> None:
            self.ends = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

    path = str(resolve_model("tiny", "vlm"))
    model = Qwen3VLForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(path)
    clock = Clock()
    settings = GRPOConfig(
        str(folder / f"trl{turn}"),
        per_device_train_batch_size=prompts * GROUP,
        num_generations=GROUP,
        max_completion_length=MAX_TOKENS,
        temperature=section.text.temperature,
        learning_rate=section.optim.lr,
        beta=0.0,
        max_steps=steps,
        gradient_checkpointing=False,  # ours has none on this model
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        seed=turn,
    )
    lora = LoraConfig(
        r=section.lora.rank, lora_alpha=int(section.lora.alpha), target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    trainer = GRPOTrainer(
        model,
        reward_funcs=[formatted, rouge],
        args=settings,
        train_dataset=Dataset.from_dict(rows, features=features),
        processing_class=processor,
        peft_config=lora,
        callbacks=[clock],
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        trainer.train()
    finally:
        torch.set_num_threads(threads)
    return np.diff(clock.ends).tolist()


def one_pass(groups: int) -> tuple[Callable[[], float], Callable[[], float]]:
    """Return what takes the seconds of a learner's forward and backward over ``groups`` groups: prompts shared, and separate."""
    section, path = load_config("toy").stage1, resolve_model("tiny", "vlm")
    lora = section.lora

    def side(shared: bool) -> Callable[[], float]:
        policy = VlmPolicy.load(path, lora=lora, shared_prompts=shared)
        items = []
        for i in range(groups):
            s = make_sample(i, "train")
            answer = policy.answer_tokens(f"<think> </think><ans>{s.caption}</ans>").numpy().astype(np.int32)
            none = np.zeros(len(answer), np.float32)
            items += [VlmExperience(s.id, k, s.asked, answer, none, 1.0) for k in range(GROUP)]
        batch = policy.collate(items)
        return lambda: seconds(lambda: policy.forward(batch).logprobs.sum().backward())

    return side(True), side(False)


def measure(size: Size) -> Result:
    """Measure both in turn, in other orders."""
    prompts, steps, repeats = (8, 12, 3) if size == "full" else (2, 2, 1)
    warm = 2 if size == "full" else 1
    rounds = []
    with tempfile.TemporaryDirectory(prefix="bench-trl-") as name:
        folder = Path(name)
        write_toy(folder / "toy", train=128, test=8, seed=0)
        for turn in range(repeats):
            sides = (ours, theirs) if turn % 2 == 0 else (theirs, ours)
            found = {
                side.__name__: 1 / statistics.median(side(folder, turn, prompts, steps)[warm - 1 :]) for side in sides
            }
            rounds.append((found["ours"], found["theirs"]))
    check = Check("steps/s, stage 1 with text rewards ÷ TRL", ratios(rounds), "≥", 2.0)
    notes = (
        "Both take steps of 8 prompts with 8 completions of at most 40 tokens at temperature 1, with format and ROUGE-L as rewards,",
        "LoRA of the same rank, no KL term and one AdamW step. Ours is a whole run: vLLM pool, reward pool, learner of two ranks,",
        "weights published after each step, tracking. TRL generates with transformers, its default, with a thread on every core; it",
        "takes no videos, so it is given an image for every two frames, which is as many visual tokens. A side's figure is the",
        "median of the steps of one run after the first; runs take turns. Last, on one thread, what a rank's forward and backward",
        "gain by `learner.shared_prompts`: each prompt read once for its eight completions, which are the true answers here.",
    )
    passes = interleave(one_pass(prompts // 2), 7 if size == "full" else 1)
    figures = medians(rounds, "steps/s, ours", "steps/s, TRL")
    figures |= medians(passes, "forward and backward, prompts shared, s", "forward and backward, prompts separate, s")
    figures["separate ÷ shared"] = statistics.median(ratios(passes, 1, 0))
    return Result((check,), figures, notes)
