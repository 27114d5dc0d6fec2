"""SFT, rollouts, learner, evaluation and `vans answer` give the thinker one and the same input of a sample.

The clip has another frame rate than the answers (``video.fps``). What vLLM gets is processed by vLLM's own code, in this
process and without an engine."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors.records import Completion, CompletionRequest, Sample, Scores, VideoQuestion
from actors.vlm.inputs import PromptEncoder
from actors.vlm.policy import VlmPolicy
from pipeline.commands.answer import load_video
from pipeline.config import RunConfig, load_config, parse_config
from pipeline.data.decoder import Shard, VideoShape, block_items, decode_block
from pipeline.data.schema import Row, ShardWriter
from pipeline.data.video import VideoLimits, encode_mp4
from pipeline.evaluate.predict import answer_one
from pipeline.sft import SftSettings
from pipeline.sft.items import training_item
from pipeline.stages.groups import Group, Member, RolloutBatch
from pipeline.stages.question import question_request
from pipeline.stages.stage1 import Stage1, completion_experiences
from pipeline.stages.stage2 import Stage2
from tests.actors.vlm.vllm_inputs import VllmInputs

QUESTION = "what comes next?"
SIDE = 32


@dataclass
class Recorder:
    """A VLM pool that notes its requests and answers in no form, so that nothing is drawn."""

    requests: list[CompletionRequest] = field(default_factory=list)

    async def submit(self, request: CompletionRequest) -> list[Completion]:
        self.requests.append(request)
        return [Completion("?", np.array([5, 6], np.int32), np.zeros(2, np.float32), "stop", 0)] * request.n


def run_config(frames: int) -> RunConfig:
    return parse_config(
        {
            "video": {"input_frames": frames, "fps": 8.0},
            "stage1": {"rewards": {"weights": {"format": 1.0}}},
            "stage2": {"text": {"temperature": 0.0}},
        }
    )


def write_clip(folder: Path, frames: int, seconds: float) -> tuple[Path, Sample]:
    """Write a clip whose frames span ``seconds``; return the file, and the sample that training reads of it."""
    pictures = np.random.default_rng(0).integers(0, 256, (frames, SIDE, SIDE, 3), dtype=np.uint8)
    video = folder / "clip.mp4"
    video.write_bytes(encode_mp4(pictures, (frames - 1) / seconds))
    target = encode_mp4(pictures[:9], 8.0)
    with ShardWriter(folder / "data") as writer:
        writer.write(Row("s", "predictive", QUESTION, "the ball falls", video.read_bytes(), target, source="test"))
    (shard,) = (folder / "data").glob("*.parquet")
    shape = VideoShape(input_frames=frames)
    place = {name: np.zeros(1, np.int64) for name in ("epoch", "position", "shard", "row", "group", "offset")}
    (sample,) = block_items(decode_block(place, (Shard.of(shard),), shape, VideoLimits()), shape, [shard])
    assert isinstance(sample, Sample), sample
    return video, sample


WAYS: dict[str, Any] = {
    "stage 1": lambda config, fleet, sample: Stage1(config, fleet).group(sample, "0"),
    "stage 2": lambda config, fleet, sample: Stage2(config, fleet).anchor(sample, "0"),
    "evaluation": answer_one,
}


def asked_in_rollouts(config: RunConfig, sample: Sample) -> dict[str, CompletionRequest]:
    """Return what the engine is asked about ``sample`` by stage 1, stage 2 and the evaluation."""
    found = {}
    for name, way in WAYS.items():
        pool = Recorder()
        nothing = SimpleNamespace(submit=scored)
        asyncio.run(
            way(config, SimpleNamespace(vlm=pool, reward=nothing, vdm=nothing, conditions=None, scoring=None), sample)
        )
        (found[name],) = pool.requests
    return found


async def scored(request: Any) -> Any:
    return SimpleNamespace(values={"format": 0.0}, diagnostics={})


def learnt(policy: VlmPolicy, way: Any) -> Any:
    """Return the prompt that ``way`` makes ``policy`` encode."""
    seen: list[Any] = []
    encode = policy._prompts.encode
    policy._prompts.encode = lambda prompts: seen.append(encode(prompts)) or seen[-1]  # type: ignore[method-assign,func-returns-value]
    try:
        way()
    finally:
        del policy._prompts.encode
    ((encoded,),) = seen
    return encoded


@pytest.mark.parametrize(
    ("name", "frames", "seconds"), [("qwen2.5-vl", 16, 30.0), ("qwen3-vl", 16, 30.0), ("qwen3-vl", 9, 2.5)]
)
def test_five_ways_make_one_input(
    name: str, frames: int, seconds: float, tiny_vlm_dir: Path, tiny_qwen25_dir: Path, tmp_path: Path
) -> None:
    folder = tiny_vlm_dir if name == "qwen3-vl" else tiny_qwen25_dir
    config = run_config(frames)
    video, sample = write_clip(tmp_path, frames, seconds)
    assert sample.fps == pytest.approx((frames - 1) / seconds, rel=1e-4) and sample.fps != config.video.fps
    asked = {way: request.asked for way, request in asked_in_rollouts(config, sample).items()}
    asked["answer"] = question_request(config, load_video(config, video), QUESTION, 0).asked
    policy, engine = VlmPolicy.load(folder), VllmInputs(folder, "float32")
    completion = Completion("?", np.array([5, 6], np.int32), np.zeros(2, np.float32), "stop", 0)
    member = Member(0, "", Scores("s", 0, {}), completion)
    batch = RolloutBatch((Group(sample, (member,)),), (np.ones(1),), (np.ones(1),))
    item = training_item("vlm", sample, SftSettings())
    prompts = {
        "SFT": learnt(policy, lambda: policy.sft_loss([item])),
        "learner": learnt(policy, lambda: policy.collate(completion_experiences(batch))),
    }
    seen = {
        way: (e.input_ids.tolist(), e.positions.tolist(), e.visual["pixel_values_videos"].numpy())
        for way, e in prompts.items()
    }
    for way, question in asked.items():
        tokens, positions, pixels = engine(question)
        seen[way] = (tokens, positions.tolist(), pixels)
    assert len(seen) == 6
    ids, positions, pixels = seen.pop("SFT")
    for way, other in seen.items():
        assert other[:2] == (ids, positions), way
        assert np.allclose(other[2], pixels, atol=1e-6), way
    # And the time is the clip's, not that of the answers.
    encoder = PromptEncoder(policy.processor, policy.module.config)
    (wrong,) = encoder.encode([VideoQuestion(QUESTION, sample.input_frames, config.video.fps)])
    assert (ids, positions) != (wrong.input_ids.tolist(), wrong.positions.tolist())
    if name == "qwen2.5-vl":
        types = prompts["learner"].input_ids == policy.processor.video_token_id
        time = prompts["learner"].positions[0][types]
        assert int(time.max() - time.min()) == 112, "seven steps of 4 s, 4 positions a second"


def test_the_nucleus_reaches_the_engine_from_each_section_and_never_a_rollout_that_learns(tmp_path: Path) -> None:
    overrides = ("stage2.text.top_p=0.8", "stage2.text.temperature=0.7", "evaluate.text.top_p=0.9")
    config = load_config("toy", [*overrides, "stage1.rewards.weights={format: 1.0}"])
    video, sample = write_clip(tmp_path, 9, 1.0)
    found = {name: request.top_p for name, request in asked_in_rollouts(config, sample).items()}
    found["answer"] = question_request(config, load_video(config, video), QUESTION, 0).top_p
    assert found == {"stage 1": 1.0, "stage 2": 0.8, "evaluation": 0.9, "answer": 0.9}
