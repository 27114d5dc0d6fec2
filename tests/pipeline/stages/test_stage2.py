"""Stage 2's switches, each seen in the trajectories that the real artist samples: what the configuration says happens."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.failures import Ok
from actors.records import Completion, CompletionRequest, Sample, Trajectory
from actors.scoring.worker import RewardWorker
from actors.vdm.worker import VdmWorker
from cluster.errors import ConfigError, TrainingError
from pipeline.config import RunConfig, load_config, parse_config
from pipeline.config.load import BUNDLED
from pipeline.data.toy import make_sample
from pipeline.stages.all_in_one import AllInOne
from pipeline.stages.feed import SampleFeed
from pipeline.stages.groups import FailureBudget, Group, RolloutBatch
from pipeline.stages.loop import complete
from pipeline.stages.stage2 import Anchor, Stage2, sde_spec, sde_window, window_steps, window_warnings
from tests.pipeline.stages.test_feed import Numbers

STEPS, GROUP = 6, 3


@dataclass
class Here:
    """A pool whose only worker runs in this process."""

    worker: Any

    async def submit(self, request: Any) -> Any:
        (outcome,) = self.worker.process([request])
        assert isinstance(outcome, Ok), outcome
        return outcome.value


@dataclass
class Fleet:
    vdm: Here
    reward: Here
    conditions: Any = None
    scoring: Any = None
    vlm: Any = None


@pytest.fixture(scope="module")
def fleet(tiny_vdm_dir: Path, tiny_clip_dir: Path) -> Fleet:
    workers = (VdmWorker("vdm", str(tiny_vdm_dir)), RewardWorker("reward", str(tiny_clip_dir), ("clip_v",)))
    for worker in workers:
        worker.setup()  # type: ignore[attr-defined]
    return Fleet(*(Here(worker) for worker in workers))


def sample(index: int = 0) -> Sample:
    s = make_sample(index, "test")
    return Sample(s.id, "predictive", s.question, s.caption, s.input_frames, s.target_frames)


def settings(render: dict[str, Any] | None = None, rollout: dict[str, Any] | None = None, **sde: Any) -> RunConfig:
    stage = {
        "rollout": {"prompts_per_step": 2, "group_size": GROUP, **(rollout or {})},
        "text": {"temperature": 0.0},
        "render": {"steps": STEPS, **(render or {})},
        "rewards": {"weights": {"clip_v": 1.0}},
        "sde": {"window_schedule": "fixed", **sde},
    }
    return parse_config({"stage2": stage})


def sampled(fleet: Fleet, config: RunConfig, step: int = 0) -> list[Trajectory]:
    """Trajectories of one group of ``step``."""
    stage, item = Stage2(config, fleet), sample()  # type: ignore[arg-type]
    group = asyncio.run(
        stage.group(item, Anchor("", item.caption, 1.0), str(step), sde_spec(stage.config, stage.window, step, item.id))
    )
    assert group is not None and not group.failures
    return [m.clip.trajectory for m in group.members if m.clip is not None and m.clip.trajectory is not None]


def spread(trajectories: list[Trajectory]) -> float:
    """Standard deviation of the first stochastic step, from how far members go apart that stood in one place."""
    before, after = (np.stack([t.latents[i] for t in trajectories]) for i in (0, 1))
    assert (before == before[0]).all()
    return float(after.std(axis=0, ddof=1).mean() / 0.8862)  # E of the sample std of 3 normals: c4(3) = .8862


@pytest.mark.parametrize(
    ("schedule", "level"), [("flow", 0.7), ("flow", 0.35), ("wan", 0.6), ("dance", 0.3), ("cps", 0.5)]
)
def test_schedule_and_level_set_the_noise_of_a_step(fleet: Fleet, schedule: str, level: float) -> None:
    first = 2
    trajectories = sampled(fleet, settings(schedule=schedule, level=level, window_range=[first, STEPS - 1]))
    sigma, following = trajectories[0].sigmas[first : first + 2].astype(float)
    scale = {
        "flow": level * np.sqrt(sigma / (1 - sigma)),
        "wan": level * sigma,
        "dance": level,
        "cps": following * np.sin(level * np.pi / 2) / np.sqrt(sigma - following),
    }[schedule]
    assert spread(trajectories) == pytest.approx(scale * np.sqrt(sigma - following), rel=0.05)
    assert trajectories[0].sigmas.shape == (STEPS + 1,)


@pytest.mark.parametrize(("size", "window"), [(1, [0, 5]), (3, [2, 5])])
def test_window_says_which_steps_are_stochastic(fleet: Fleet, size: int, window: list[int]) -> None:
    trajectories = sampled(fleet, settings(window_size=size, window_range=window))
    starts = [t.latents[0] for t in trajectories]
    assert all(np.array_equal(s, starts[0]) for s in starts)  # the steps before it follow the ODE: no noise yet
    for t in trajectories:
        assert t.sde.window_start == window[0] and t.logprobs.shape == (size,) and len(t.latents) == size + 1
    assert not np.array_equal(trajectories[0].latents[1], trajectories[1].latents[1])


def test_same_latent_says_whether_members_start_together(fleet: Fleet) -> None:
    together = sampled(fleet, settings(same_latent=True))
    apart = sampled(fleet, settings(same_latent=False))
    assert all(np.array_equal(t.latents[0], together[0].latents[0]) for t in together)
    assert len({t.latents[0].tobytes() for t in apart}) == GROUP


def test_guidance_is_part_of_the_sampled_policy(fleet: Fleet) -> None:
    plain, guided = (sampled(fleet, settings(render={"guidance": g})) for g in (1.0, 3.0))
    assert {t.guidance for t in plain} == {1.0} and {t.guidance for t in guided} == {3.0}
    assert np.array_equal(plain[0].latents[0], guided[0].latents[0])
    assert np.abs(plain[0].latents[1] - guided[0].latents[1]).max() > 1e-3


def starts(config: RunConfig, steps: int = 12) -> list[int]:
    stage = Stage2(config, None)  # type: ignore[arg-type]
    return [sde_spec(stage.config, stage.window, step, "s").window_start for step in range(steps)]


def test_window_moves_as_its_schedule_says() -> None:
    options: dict[str, Any] = {"window_size": 2, "window_range": [1, 5]}
    assert starts(settings(**options)) == [1] * 12
    moving = options | {"window_schedule": "progressive"}
    assert starts(settings(**moving)) == [1, 2, 3] * 4
    assert starts(settings(**moving, window_every=2)) == [1, 1, 2, 2, 3, 3] * 2
    chance = settings(**options | {"window_schedule": "random"})
    assert set(starts(chance, 60)) == {1, 2, 3}
    assert starts(chance) == starts(chance) != starts(chance.model_copy(update={"seed": 5}))
    default = settings(window_size=2, window_schedule="random")
    assert set(starts(default, 80)) == set(range(len(window_steps(default)) - 1))


def test_the_window_that_is_told_is_the_steps_own() -> None:
    config = settings(window_schedule="random")
    stage = Stage2(config, None)  # type: ignore[arg-type]
    told = [stage.metrics(RolloutBatch((), (), ()), step)["sde/window_start"] for step in range(12)]
    assert told == starts(config) and len(set(told)) > 1
    both = AllInOne(config, None)  # type: ignore[arg-type]
    assert [both.metrics(RolloutBatch((), (), ()), step)["sde/window_start"] for step in range(12)] == told


def test_with_a_window_per_prompt_a_group_shares_its_own(fleet: Fleet) -> None:
    config = settings(window_schedule="random", window_per="prompt", window_size=1)
    stage, found = Stage2(config, fleet), {}  # type: ignore[arg-type]
    for number in range(6):
        item = sample(number)
        spec = sde_spec(config, stage.window, 3, item.id)
        group = asyncio.run(stage.group(item, Anchor("", item.caption, 1.0), "3", spec))
        assert group is not None and not group.failures
        (window,) = {m.clip.trajectory.sde for m in group.members if m.clip is not None and m.clip.trajectory}
        assert window == spec and window.reach == (stage.window.first, stage.window.last)
        found[item.id] = (group, window.window_start)
    starts = [start for _, start in found.values()]
    assert len(set(starts)) > 1, "other prompts have others"
    batch = RolloutBatch(tuple(group for group, _ in found.values()), (), ())
    assert stage.metrics(batch, 3)["sde/window_start"] == pytest.approx(np.mean(starts))
    both = AllInOne(config, None)  # type: ignore[arg-type]
    assert both._render(item, "x", 0, "3").sde == spec, "all-in-one asks for the same"


def test_a_forward_process_objective_gets_the_ends_of_odes_from_noises_of_their_own(fleet: Fleet) -> None:
    config, item = parse_config({"stage2": {**settings().stage2.model_dump(), "objective": "nft"}}), sample()
    stage = Stage2(config, fleet)  # type: ignore[arg-type]
    group = asyncio.run(stage.group(item, Anchor("", item.caption, 1.0), "0", None))
    assert group is not None and len(group.members) == GROUP
    paths = [e.trajectory for e in stage.experiences(RolloutBatch((group,), (), (np.array([1.0, 0.0, -1.0]),)), "vdm")]
    assert {(path.sde.level, path.latents.shape[0], len(path.logprobs)) for path in paths} == {(0.0, 2, 0)}
    assert len({path.latents[-1].tobytes() for path in paths}) == GROUP


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"window_per": "prompt", "window_schedule": "progressive"}, "window_schedule: random"),
        ({"window_per": "group"}, "'batch' or 'prompt'"),
        ({"schedule": "cps", "level": 0.5}, "one of the schedules flow, wan, dance"),
    ],
)
def test_windows_and_balances_that_cannot_be(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_config({"stage2": {"sde": keys, "grpo": {"step_balance": "ratio_norm"}}})


def test_the_default_range_follows_from_the_grid() -> None:
    """Of 10 steps the last is the ODE's, and the one before leads onto sigma .009, where its noise would stay."""
    config = settings(render={"steps": 10}, window_size=2)
    assert (sde_window(config).first, sde_window(config).last) == (0, 8)
    cps = settings(render={"steps": 10}, window_size=2, schedule="cps", level=0.5)
    assert (sde_window(cps).first, sde_window(cps).last) == (0, 9)
    fine = settings(render={"steps": 25}, schedule="dance", level=0.3)
    shifted = parse_config({**fine.model_dump(), "models": {"flow_shift": 1.0}})
    assert (window_steps(fine), window_steps(shifted)) == (range(23), range(22))
    with pytest.raises(
        ConfigError, match=r"window_size=9 is longer than the 8 steps .*render.steps=10, models.flow_shift=3"
    ):
        sde_window(settings(render={"steps": 10}, window_size=9))
    named = settings(
        render={"steps": 10}, window_size=9, window_range=[0, 9]
    )  # whoever names it gets it, with a warning
    assert sde_window(named).last == 9


def test_a_range_that_reaches_steps_whose_noise_stays_is_told() -> None:
    for window_range, told in (([0, 8], 0), ([0, 9], 1), ([8, 9], 1), (None, 0)):
        config = settings(render={"steps": 10}, window_size=1, window_range=window_range)
        assert len(window_warnings(config)) == told
    (text,) = window_warnings(settings(render={"steps": 10}, window_size=1, window_range=[0, 9]))
    assert "use [0, 8]" in text and "level=0.7" in text
    (text,) = window_warnings(settings(level=9.0, window_size=1, window_range=[0, 4]))
    assert "lower stage2.sde.level" in text
    with pytest.raises(ConfigError, match=r"lower stage2\.sde\.level"):
        window_warnings(settings(level=9.0, window_size=1))
    off = settings(level=9.0, window_size=1).model_dump()
    assert window_warnings(parse_config({**off, "stage2": {**off["stage2"], "steps": 0}})) == []
    joint = {**off, "training": "all_in_one", "stage2": {**off["stage2"], "steps": 0}}
    with pytest.raises(ConfigError, match=r"lower stage2\.sde\.level"):
        window_warnings(parse_config(joint))


@pytest.mark.parametrize("name", sorted(path.stem for path in BUNDLED.glob("*.yaml")))
def test_no_shipped_run_leaves_noise_in_its_clips(name: str) -> None:
    assert window_warnings(load_config(name)) == []


# --- anchors ----------------------------------------------------------------------------------------------------------


def anchors_of(samples: list[Sample], temperature: float) -> tuple[list[Anchor], list[str]]:
    """What stage 2 takes as the anchors of ``samples``, and the questions that reached the thinker."""
    config = parse_config({"stage2": {"text": {"temperature": temperature}}})
    thinker = Thinker({"what next?": TRUTH, "what if?": "the blue square falls"})
    stage = Stage2(config, Fleet(None, None, vlm=thinker))  # type: ignore[arg-type]

    async def body() -> list[Anchor]:
        return [await stage.anchor(s, "0") for s in samples]

    return asyncio.run(body()), thinker.asked


def test_a_greedy_answer_is_remembered_for_what_was_asked_and_not_for_a_name() -> None:
    frames, target = pair()
    first = Sample("line-000001", "predictive", "what next?", TRUTH, frames, target)
    others = [
        replace(first, question="what if?", caption="the blue square falls"),  # of another import, with an equal id
        replace(first, input_frames=frames[::-1].copy()),
        replace(first, fps=2.0),
        replace(first, caption="the blue square falls"),  # the same question, and another truth
    ]
    found, asked = anchors_of([first, first, *others, first], temperature=0.0)
    assert asked == ["what next?", "what if?", "what next?", "what next?"]
    assert [anchor.caption for anchor in found[:3]] == [TRUTH, TRUTH, "the blue square falls"]
    assert [round(anchor.rouge_l, 2) for anchor in found[:3]] == [1.0, 1.0, 1.0]
    assert found[5].caption == TRUTH and found[5].rouge_l < 0.5
    assert len(anchors_of([first, first], temperature=1.0)[1]) == 2, "a sampled answer is asked for anew"


# --- dynamic sampling -----------------------------------------------------------------------------------------------


TRUTH = "the red circle rises"


@dataclass
class Thinker:
    """A pool that answers each question with what ``answers`` says of it, else with something else than the truth."""

    answers: dict[str, str]
    asked: list[str] = field(default_factory=list)

    async def submit(self, request: CompletionRequest) -> list[Completion]:
        self.asked.append(request.asked.question)
        caption = self.answers.get(request.asked.question, "nobody knows")
        text = f"<think>x</think><ans>{caption}</ans>"
        return [Completion(text, np.zeros(1, np.int32), np.zeros(1, np.float32), "stop", 0)]


class Toys(Numbers):
    """Numbers' order over samples of the toy world."""

    def batches(self, size: int, cursor: Any = None) -> Any:
        for samples, bad, after in super().batches(size, cursor):
            yield [Sample(s.id, s.kind, s.id, TRUTH, *pair()) for s in samples], bad, after


def pair() -> tuple[np.ndarray, np.ndarray]:
    toy = make_sample(0, "test")
    return toy.input_frames, toy.target_frames


def anchored(fleet: Fleet, kept: set[str], rollout: dict[str, Any]) -> Stage2:
    """A stage whose thinker answers well for ``kept`` only."""
    config = settings(rollout={"group_size": 2, **rollout}, window_size=1)
    return Stage2(config, replace(fleet, vlm=Thinker(dict.fromkeys(kept, TRUTH))))  # type: ignore[arg-type]


def flat(group: Group) -> Group:
    """The group with equal rewards."""
    members = [replace(m, scores=replace(m.scores, values={"clip_v": 0.5})) for m in group.members]
    return replace(group, members=tuple(members))


def test_a_refill_draws_on_until_anchors_pass(fleet: Fleet) -> None:
    stage = anchored(fleet, kept={"0.0", "0.3", "0.4", "0.8"}, rollout={"max_refills": 2})
    feed = SampleFeed(Toys(), 2)  # type: ignore[arg-type]

    async def body() -> list[str]:
        groups = await asyncio.gather(*await stage.draw(feed, 0, 2))
        assert [g.sample.id for g in groups if g] == ["0.0", "0.3"]
        assert groups[0] and groups[1]
        refill = await complete(stage, feed, 0, [flat(groups[0]), groups[1]], FailureBudget("stage2", 0.1))  # type: ignore[arg-type]
        assert refill.metrics() == {"rollout/refill_draws": 1.0, "rollout/refilled_groups": 1.0}
        return [g.sample.id for g in refill.groups if g]

    assert asyncio.run(body()) == ["0.4", "0.3"]
    assert asyncio.run(feed.draw(1))[0].id == "0.5"  # the next step goes on right behind


def test_a_refill_that_finds_no_anchor_keeps_what_there_is(fleet: Fleet) -> None:
    stage = anchored(fleet, kept={"0.0", "0.1"}, rollout={"max_refills": 3})
    feed = SampleFeed(Toys(), 2)  # type: ignore[arg-type]

    async def body() -> list[str]:
        groups = await asyncio.gather(*await stage.draw(feed, 0, 2))
        assert groups[0] and groups[1]
        refill = await complete(stage, feed, 0, [flat(groups[0]), flat(groups[1])], FailureBudget("stage2", 0.1))  # type: ignore[arg-type]
        assert refill.metrics() == {"rollout/refill_draws": 3.0, "rollout/refilled_groups": 0.0}
        return [g.sample.id for g in refill.groups if g]

    assert asyncio.run(body()) == ["0.0", "0.1"]
    with pytest.raises(TrainingError, match="anchor_min_rouge"):
        asyncio.run(anchored(fleet, kept=set(), rollout={}).draw(SampleFeed(Toys(), 2), 0, 2))  # type: ignore[arg-type]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)
