"""Each alarm is fed the failure that it is for, from pictures and texts to the alarm, and its healthy twin.

Pictures come out of the bundled artist's real VAE and are looked at by the real CLIP: a frozen video that was decoded
flickers, and still has to be found.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from actors.policy.cache import content_key
from actors.records import Completion, Sample, ScoreRequest, Scores
from actors.scoring.clip import ClipScorer
from actors.scoring.scorer import Scorer
from pipeline.config import RunConfig, load_config
from pipeline.data.toy import ToySample, make_sample
from pipeline.fleet.models import resolve_model
from pipeline.stages.alarms import AlarmWatch, alarm_lines, alarm_tags
from pipeline.stages.groups import Group, Member, assemble
from pipeline.stages.stage1 import Stage1
from pipeline.stages.stage2 import Stage2
from rewards.format import parse_answer

TOYS = [make_sample(i, "test") for i in range(8)]
FRAMES = np.zeros((1, 8, 8, 3), np.uint8)
Decode = Callable[[np.ndarray], np.ndarray]
OPTIONS: dict[str, Any] = {"std_norm": "group", "normalise_rewards": False, "min_group": 2, "trained_version": 0}
HEALTHY_STEPS, FAILING_STEPS = 6, 3


@pytest.fixture(scope="module")
def decoded() -> Decode:
    """What a clip looks like when the bundled artist draws it perfectly: encoded and decoded by its VAE."""
    from diffusers import AutoencoderKLWan

    vae = AutoencoderKLWan.from_pretrained(resolve_model("tiny", "vdm"), subfolder="vae").eval()

    seen: dict[str, np.ndarray] = {}

    @torch.inference_mode()
    def through(frames: np.ndarray) -> np.ndarray:
        key = content_key(frames)
        if key not in seen:
            seen[key] = decode(frames)
        return seen[key]

    def decode(frames: np.ndarray) -> np.ndarray:
        pixels = torch.from_numpy(np.array(frames)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        video = vae.decode(vae.encode(pixels).latent_dist.mode()).sample[0]
        return ((video.permute(1, 2, 3, 0).clamp(-1, 1) + 1) * 127.5).round().byte().numpy()

    return through


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer(ClipScorer(resolve_model("tiny", "clip")))


def begins(healthy: dict[str, float], failing: dict[str, float], *components: str) -> set[str]:
    """Watch a run that is healthy, then fails; returns the alarms of the failing steps. Healthy steps must have none."""
    alarms = AlarmWatch(RunConfig().alarms, components)
    for step in range(HEALTHY_STEPS):
        assert alarms.see(step, healthy).began == {}
    told: set[str] = set()
    for step in range(HEALTHY_STEPS, HEALTHY_STEPS + FAILING_STEPS):
        told |= set(alarms.see(step, failing).began)
    assert set(alarms.state.on) == told
    return told


# --- pictures ---------------------------------------------------------------------------------------------------------


def still(frames: np.ndarray) -> np.ndarray:
    return np.repeat(frames[-1:], 9, axis=0)


def oversharpened(frames: np.ndarray) -> np.ndarray:
    """A fine texture over the whole picture: every second pixel a little brighter, the others darker."""
    rows, columns = np.indices(frames.shape[1:3])
    texture = np.where((rows + columns) % 2 == 0, 12, -12)[None, :, :, None]
    return np.clip(frames.astype(int) + texture, 0, 255).astype(np.uint8)


def blurred(frames: np.ndarray) -> np.ndarray:
    """The mean of 8×8 pixels."""
    t, h, w, c = frames.shape
    small = frames.reshape(t, h // 8, 8, w // 8, 8, c).mean(axis=(2, 4))
    return small.repeat(8, axis=1).repeat(8, axis=2).astype(np.uint8)


def coloured(frames: np.ndarray, strength: float) -> np.ndarray:
    grey = frames.mean(axis=-1, keepdims=True)
    return np.clip(grey + strength * (frames - grey), 0, 255).astype(np.uint8)


def picture_metrics(scorer: Scorer, draw: Callable[[ToySample], np.ndarray]) -> dict[str, float]:
    """Score what ``draw`` draws for each toy sample, as stage 2 would, and return the step's metrics."""
    requests = [
        ScoreRequest(
            t.id,
            i,
            ("clip_v", "clip_score"),
            "",
            t.caption,
            t.caption,
            t.target_frames,
            t.input_frames[-1],
            draw(t),
        )
        for i, t in enumerate(TOYS)
    ]
    members = [Member(i, "c", outcome.value) for i, outcome in enumerate(scorer.score(requests))]  # type: ignore[union-attr]
    group = Group(Sample("s", "predictive", "q", "c", FRAMES, FRAMES), tuple(members))
    return assemble([group], {"clip_v": 1.0, "clip_score": 1.0}, **OPTIONS).metrics


@pytest.fixture(scope="module")
def healthy(scorer: Scorer, decoded: Decode) -> dict[str, float]:
    return picture_metrics(scorer, lambda t: decoded(t.target_frames))


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (lambda t, decode: decode(still(t.target_frames)), {"motion"}),
        (lambda t, decode: decode(still(t.input_frames)), {"motion", "copy"}),
        (lambda t, decode: oversharpened(decode(t.target_frames)), {"sharpness"}),
        (lambda t, decode: blurred(decode(t.target_frames)), {"sharpness"}),
        (lambda t, decode: coloured(decode(t.target_frames), 0.0), {"saturation"}),
        (lambda t, decode: coloured(decode(t.target_frames), 2.0), {"saturation"}),
        (lambda t, decode: decode(t.target_frames[::-1]), set()),
    ],
    ids=["frozen", "copied-input", "oversharpened", "blurred", "drained", "oversaturated", "healthy"],
)
def test_pictures_that_please_the_reward_only(
    decoded: Decode, scorer: Scorer, healthy: dict[str, float], failure: Any, expected: set[str]
) -> None:
    failing = picture_metrics(scorer, lambda t: failure(t, decoded))
    assert begins(healthy, failing) == expected


# --- texts and groups -------------------------------------------------------------------------------------------------


def text_metrics(texts: list[str], tokens: int, rewards: np.ndarray) -> dict[str, float]:
    """The metrics of one step of stage 1: groups of four ``texts`` of about ``tokens`` tokens, ``rewards`` (N, 2)."""
    groups = []
    for start in range(0, len(texts), 4):
        members = []
        for i, text in enumerate(texts[start : start + 4]):
            completion = Completion(
                text, np.arange(tokens + i, dtype=np.int32), np.zeros(tokens + i, np.float32), "stop", 0
            )
            answer = parse_answer(text)
            values = dict(zip(("rouge_l", "clip_v"), rewards[start + i].tolist()))
            scores = Scores("s", i, values)
            members.append(Member(i, answer.caption if answer else "", scores, completion))
        groups.append(Group(Sample(f"s{start}", "predictive", "q", "c", FRAMES, FRAMES), tuple(members)))
    batch = assemble(groups, {"rouge_l": 1.0, "clip_v": 1.0}, **OPTIONS)
    stage = Stage1(RunConfig(), None)  # type: ignore[arg-type]
    return batch.metrics | stage.metrics(batch, 0)


GOOD = [t.answer_text for t in TOYS] * 2
RNG = np.random.default_rng(0)
LEVEL = RNG.uniform(0.2, 0.8, size=(16, 1))
AGREEING = LEVEL + RNG.normal(0, 0.05, size=(16, 2))
OPPOSED = np.concatenate([LEVEL, 1 - LEVEL], axis=1) + RNG.normal(0, 0.05, size=(16, 2))
EQUAL = np.full((16, 2), 0.5)


@pytest.mark.parametrize(
    ("texts", "tokens", "rewards", "expected"),
    [
        ([t.replace("</ans>", "") for t in GOOD[:12]] + GOOD[12:], 20, AGREEING, {"format"}),
        (GOOD, 70, AGREEING, {"length"}),
        (GOOD, 4, AGREEING, {"length"}),
        (GOOD, 20, OPPOSED, {"correlation.rouge_l.clip_v"}),
        (GOOD, 20, EQUAL, {"zero_std"}),
        (GOOD, 24, AGREEING[::-1], set()),
    ],
    ids=["malformed", "exploding-length", "collapsing-length", "anti-correlated", "all-equal", "healthy"],
)
def test_texts_and_rewards(texts: list[str], tokens: int, rewards: np.ndarray, expected: set[str]) -> None:
    healthy = text_metrics(GOOD, 20, AGREEING)
    assert begins(healthy, text_metrics(texts, tokens, rewards), "rouge_l", "clip_v") == expected


@pytest.mark.parametrize(("scale", "expected"), [(40.0, {"entropy"}), (0.0, {"entropy"}), (0.9, set())])
@pytest.mark.parametrize("learner", ["learner", "learner/vlm"], ids=["one-learner", "all-in-one"])
def test_a_policy_that_is_sure_of_every_token_or_of_none(learner: str, scale: float, expected: set[str]) -> None:
    logits = 5.0 * torch.randn(64, 500, generator=torch.Generator().manual_seed(0))

    def entropy(factor: float) -> dict[str, float]:
        return {f"{learner}/entropy": float(torch.distributions.Categorical(logits=factor * logits).entropy().mean())}

    assert begins(entropy(1.0), entropy(scale)) == expected


# --- the anchor filter ------------------------------------------------------------------------------------------------


@dataclass
class Thinker:
    """A VLM pool whose every ``every``-th answer is right and whose others are about something else."""

    every: int
    asked: int = 0

    async def submit(self, request: Any) -> list[Completion]:
        self.asked += 1
        truth = next(t.caption for t in TOYS if t.id == request.sample_id.partition("/")[0])
        caption = truth if self.asked % self.every == 0 else "nothing of that kind ever happens"
        text = f"<think>so</think><ans>{caption}</ans>"
        return [Completion(text, np.arange(4, dtype=np.int32), np.zeros(4, np.float32), "stop", 0)]


@dataclass
class Toys:
    """A feed of toy samples without end, no id twice."""

    drawn: int = 0

    async def draw(self, count: int) -> list[Sample]:
        start, self.drawn = self.drawn, self.drawn + count
        toys = [(i, TOYS[i % len(TOYS)]) for i in range(start, start + count)]
        return [Sample(f"{t.id}/{i}", t.kind, t.question, t.caption, t.input_frames, t.target_frames) for i, t in toys]


class Renderer:
    """A pool that is asked and never answers: the drawn groups are cancelled."""

    async def submit(self, request: Any) -> Any:
        await asyncio.Event().wait()


@dataclass
class Fleet:
    vlm: Thinker
    vdm: Renderer
    reward: Renderer
    conditions: Any = None
    scoring: Any = None


async def anchor_metrics(stage: Stage2, feed: Toys, step: int) -> tuple[dict[str, float], int]:
    """Draw one step for real; returns its metrics and how many groups it got."""
    tasks = await stage.draw(feed, step, 4)  # type: ignore[arg-type]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    empty = assemble([], {"clip_v": 1.0}, **OPTIONS)
    return stage.metrics(empty, step), len(tasks)


@pytest.mark.parametrize(("every", "expected"), [(9, {"anchors"}), (2, set())])
def test_a_starved_anchor_filter(every: int, expected: set[str]) -> None:
    config = load_config("toy", ["stage2.rollout.prompts_per_step=4"])

    async def both() -> tuple[dict[str, float], dict[str, float]]:
        stage, feed = Stage2(config, Fleet(Thinker(1), Renderer(), Renderer())), Toys()  # type: ignore[arg-type]
        healthy, groups = await anchor_metrics(stage, feed, 0)
        assert groups == healthy["anchor/kept"] == 4 and healthy["anchor/kept_ratio"] == 1.0
        stage.fleet.vlm.every = every  # type: ignore[attr-defined]
        failing, groups = await anchor_metrics(stage, feed, 1)
        assert failing["anchor/kept"] == groups
        return healthy, failing

    healthy, failing = asyncio.run(both())
    assert begins(healthy, failing) == expected


def test_anchors_are_counted_for_the_step_that_drew_them() -> None:
    """With stale rollouts a later step draws before an earlier one is learnt from."""
    config = load_config("toy", ["stage2.rollout.prompts_per_step=4"])

    async def interleaved() -> list[float]:
        stage, feed = Stage2(config, Fleet(Thinker(1), Renderer(), Renderer())), Toys()  # type: ignore[arg-type]
        empty, tasks = assemble([], {"clip_v": 1.0}, **OPTIONS), []
        for step, every in enumerate((1, 2, 4)):
            stage.fleet.vlm.every = every  # type: ignore[attr-defined]
            tasks += await stage.draw(feed, step, 4)  # type: ignore[arg-type]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return [stage.metrics(empty, step)["anchor/kept_ratio"] for step in range(3)]

    first, second, third = asyncio.run(interleaved())
    assert first == 1.0 > second > third > 0.0


# --- how it is told ---------------------------------------------------------------------------------------------------


def test_lines_and_tags_say_what_when_and_since() -> None:
    alarms = AlarmWatch(RunConfig().alarms, ())
    told = [(s, alarms.see(s, {"alarm/motion_ratio": m})) for s, m in enumerate((1.0, 0.03, 0.02, 0.01, 1.0, 0.9))]
    lines = [alarm_lines(step, watched) for step, watched in told]
    assert [len(found) for found in lines] == [0, 0, 1, 0, 0, 1]
    assert lines[2][0][0] == ("step 2 · alarm motion: clips move 0.02 times as much as ground truth (alarm below 0.2)")
    assert lines[5][0][0] == "step 5 · alarm motion is over, on since step 2"
    assert alarm_tags(*told[2])["alarm.motion"].startswith("on since step 2: motion: clips move 0.02")
    assert alarm_tags(*told[5]) == {"alarm.motion": "over at step 5, on since 2"}
