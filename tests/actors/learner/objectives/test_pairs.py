"""Each way to learn with each property of the learner: it holds, or the configuration refuses the pair (``ways``).

The rows of both stages go through the learner itself: a toy policy stands for the thinker, the tiny artist for itself. The artist's
rollouts are those of the stage's own window, and every batch is learnt from twice, so that ratios and velocities have moved.
"""

from __future__ import annotations

import multiprocessing
import os
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from actors.learner.batches import RankPlan, plan_batch
from actors.learner.settings import LearnerSection, OptimSection
from actors.learner.spec import LearnerSpec
from actors.learner.trainer import Trainer
from actors.policy.settings import LoraSection
from actors.records import Experience, RenderRequest, VdmExperience
from actors.vdm.policy import VdmPolicy
from actors.vdm.sampling import sample
from cluster.errors import ConfigError
from pipeline.run.learners import learner_spec
from pipeline.stages.all_in_one import AllInOne
from pipeline.stages.stage2 import sde_spec, sde_window
from tests.actors.learner.objectives.ways import PROPERTIES, REFUSED, WAYS, asked, holding
from tests.actors.learner.toy_policy import ToyPolicy, changed, experiences

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[4]
KINDS = {"LoRA": LoraSection(rank=4, alpha=8.0), "full weights": None}
Arrays = dict[str, np.ndarray]
LEARNER = ("transformer",)


def spec_of(name: str, kind: str, folder: Path, **settings: Any) -> LearnerSpec:
    """The learner of a way, with its settings as a run has them."""
    way = WAYS[name]
    config = way.config(*asked(name, kind))
    section = getattr(config, way.stage)
    artist = way.stage == "stage2"
    return LearnerSpec(
        kind="vdm" if artist else "tests.actors.learner.toy_policy:ToyPolicy",
        model_path=str(folder) if artist else "3",
        settings=LearnerSection(ranks=1, micro_batch=2, step_timeout_s=60.0).model_copy(update=settings),
        lora=KINDS[kind],
        objective=section.objective,
        learning=way.learning(config),
        optim=OptimSection(lr=1e-3, max_grad_norm=1.0),
        policy_kwargs={"components": LEARNER, "shift": config.models.flow_shift} if artist else {},
        seed=5,
    )


@pytest.fixture(scope="module")
def artist(tiny_vdm_dir: Path) -> VdmPolicy:
    return VdmPolicy.load(tiny_vdm_dir)


@pytest.fixture(scope="module")
def rollout_of(artist: VdmPolicy) -> Callable[[str, int], list[Experience]]:
    """Two groups of two, sampled by the weights that a learner starts from, as the stage asks for them in a step."""

    def make(name: str, step: int) -> list[Experience]:
        if WAYS[name].stage == "stage1":
            return list(experiences(2, 2, seed=step))
        config = WAYS[name].config()
        window, ends = sde_window(config), config.stage2.learning.samples == "ends"
        frames = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
        requests = [
            RenderRequest(
                group,
                i,
                f"the {colour} circle rises",
                frames,
                9,
                config.stage2.render.steps,
                1.0,
                noise_seed=step + (i if ends else 0),
                sde_seed=100 * step + i,
                sde=None if ends else sde_spec(config, window, step, group),
                ends=ends,
            )
            for group, colour in ((f"a{step}", "red"), (f"b{step}", "blue"))
            for i in range(2)
        ]
        return [
            VdmExperience(c.sample_id, c.index, c.caption, frames, c.trajectory, (-1.0) ** c.index, c.condition)
            for c in sample(artist, requests)
            if c.trajectory is not None
        ]

    return make


@pytest.fixture
def trainer_of(mesh: DeviceMesh) -> Callable[[LearnerSpec], Trainer]:
    return lambda spec: trainer_on(mesh, spec)


def trainer_on(mesh: DeviceMesh, spec: LearnerSpec) -> Trainer:
    load: Any = VdmPolicy.load if spec.kind == "vdm" else ToyPolicy.load
    policy = load(spec.model_path, lora=spec.lora, seed=spec.seed, **spec.policy_kwargs)
    return Trainer(policy, spec, mesh, torch.device("cpu"))


def plans(items: list[Experience], spec: LearnerSpec) -> list[RankPlan]:
    return plan_batch(items, ranks=spec.settings.ranks, micro_batch=spec.settings.micro_batch, updates=1)


def learn(trainer: Trainer, items: list[Experience]) -> Any:
    with trainer.resident():
        return trainer.update(plans(items, trainer.spec)[0], epochs=2)


def weights(trainer: Trainer) -> Arrays:
    """What is learnt, whatever samples; a copy."""
    with trainer.resident():
        learnt = [(name, p.detach()) for name, p in trainer.policy.module.named_parameters() if p.requires_grad]
        return {name: getattr(p, "full_tensor", lambda p=p: p)().numpy().copy() for name, p in learnt}


def published(trainer: Trainer) -> Arrays:
    """What is served; a copy."""
    with trainer.resident():
        found = trainer.weights()
        assert found is not None
        return {name: value.copy() for name, value in found.tensors.items()}


def assert_equal(one: Arrays, other: Arrays) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert np.array_equal(value, other[name]), name


# --- in this process -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", holding("resume"))
def test_a_restart_repeats_an_undisturbed_learner_bit_for_bit(
    trainer_of: Any, rollout_of: Any, tiny_vdm_dir: Path, tmp_path: Path, name: str, kind: str
) -> None:
    """With an adapter and with whole weights, whose reference is a frozen copy."""
    spec = spec_of(name, kind, tiny_vdm_dir)
    straight = trainer_of(spec)
    start = weights(straight)
    learn(straight, rollout_of(name, 0))
    straight.save(str(tmp_path / "here"))
    again = trainer_of(spec)
    again.restore(str(tmp_path / "here"))
    assert_equal(weights(again), weights(straight))
    assert_equal(published(again), published(straight))
    items = rollout_of(name, 1)
    first, second = (dict(learn(trainer, items).sums) for trainer in (straight, again))
    assert first == second and first["applied"] == 2.0
    assert_equal(weights(again), weights(straight))
    assert_equal(published(again), published(straight))
    moved = [key for key, value in weights(again).items() if not np.array_equal(value, start[key])]
    assert moved and all("lora" in key for key in moved) == (kind == "LoRA")
    assert (first.get("kl", 0.0) > 0) == (spec.learning.kl_beta > 0)


@pytest.mark.parametrize("name", holding("staleness"))
def test_a_rollout_of_older_weights_is_learnt_from(
    trainer_of: Any, rollout_of: Any, tiny_vdm_dir: Path, name: str
) -> None:
    """The gate is due and holds: ratios are relative to the learner's own weights before the update, whatever sampled."""
    spec = spec_of(name, "LoRA", tiny_vdm_dir)
    spec = replace(spec, learning=spec.learning.model_copy(update={"gate_every": 1}))
    trainer, stale = trainer_of(spec), rollout_of(name, 1)
    learn(trainer, rollout_of(name, 0))
    before = weights(trainer)
    report = learn(trainer, stale)
    assert report.common["ratio_max_dev"] == 0.0 and report.sums["applied"] == 2.0
    assert report.maxima["logp_diff_max"] > 1e-5, "the weights that sampled it are others"
    assert any(not np.array_equal(value, before[key]) for key, value in weights(trainer).items())


@pytest.mark.parametrize("name", holding("colocated rest"))
def test_a_learner_that_rests_outside_its_devices_memory_learns_the_same_bits(
    trainer_of: Any, rollout_of: Any, tiny_vdm_dir: Path, name: str
) -> None:
    """As it does beside pools that rest on the same device, turn by turn."""
    spec = spec_of(name, "full weights", tiny_vdm_dir)
    plain, resting = trainer_of(spec), trainer_of(changed(spec, offload="all"))
    for step in (0, 1):
        items = rollout_of(name, step)
        assert dict(learn(plain, items).sums) == dict(learn(resting, items).sums)
    assert_equal(weights(resting), weights(plain))
    assert_equal(published(resting), published(plain))


@pytest.mark.parametrize("name", holding("embed pool"))
def test_a_learner_without_frozen_models_learns_the_same_bits(
    trainer_of: Any, rollout_of: Any, tiny_vdm_dir: Path, name: str
) -> None:
    """One reads what the embed pool made of captions and frames, the other makes it itself."""
    spec, items = spec_of(name, "LoRA", tiny_vdm_dir), rollout_of(name, 0)
    whole = replace(spec, policy_kwargs={"shift": spec.policy_kwargs["shift"]})
    bare, full = trainer_of(spec), trainer_of(whole)
    assert set(bare.policy.held()) == {"transformer"} < set(full.policy.held())
    learn(bare, items)
    learn(full, [replace(item, condition=None) for item in items])
    assert_equal(weights(bare), weights(full))


@pytest.mark.parametrize("name", holding("`micro_steps`"))
def test_window_steps_learnt_one_at_a_time_learn_the_same(
    trainer_of: Any, rollout_of: Any, tiny_vdm_dir: Path, name: str
) -> None:
    spec, items = spec_of(name, "LoRA", tiny_vdm_dir), rollout_of(name, 0)
    whole, cut = trainer_of(spec), trainer_of(changed(spec, micro_steps=1))
    start = weights(whole)
    reports = [learn(trainer, items) for trainer in (whole, cut)]
    assert reports[0].sums["loss"] == pytest.approx(reports[1].sums["loss"], rel=1e-3, abs=1e-5)
    assert distance(weights(cut), weights(whole), start) < 1e-2


def distance(one: Arrays, other: Arrays, start: Arrays) -> float:
    """How far two learners are apart, as a share of how far the second has come from ``start``."""
    apart = sum(float(((one[key] - other[key]) ** 2).sum()) for key in start)
    come = sum(float(((other[key] - start[key]) ** 2).sum()) for key in start)
    assert come > 0
    return (apart / come) ** 0.5


@pytest.mark.parametrize("name", holding("all-in-one"))
def test_all_in_one_learns_each_model_as_its_own_stage_says(name: str) -> None:
    way = WAYS[name]
    config = way.config(*asked(name, "all-in-one"))
    stage = AllInOne(config, None)  # type: ignore[arg-type]
    policy = "vlm" if way.stage == "stage1" else "vdm"
    found = learner_spec(config, stage, policy)
    assert found.learning is way.learning(config) and found.objective == getattr(config, way.stage).objective
    assert policy in stage.policies


# --- two ranks -------------------------------------------------------------------------------------------------------


def journeys(specs: list[LearnerSpec], rank: int, folder: Path, cut: list[RankPlan]) -> list[Arrays]:
    """Be one rank of each learner in turn, and return what each has learnt; runs in a process of its own."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    found = []
    for number, (spec, plan) in enumerate(zip(specs, cut, strict=True)):
        meeting, longest = f"file://{folder}/{number}", timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2, timeout=longest)
        trainer = trainer_on(init_device_mesh("cpu", (2,)), spec)
        trainer.update(plan, epochs=2)
        found.append(weights(trainer))
        dist.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def two_ranks(
    rollout_of: Any, tiny_vdm_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Arrays]:
    """What each way learns on two ranks, the second of which has fewer items and pads: all in one pair of processes."""
    cases = [(name, kind) for name in holding("2 ranks") for kind in KINDS]
    specs = [spec_of(name, kind, tiny_vdm_dir, ranks=2, micro_batch=1) for name, kind in cases]
    cut = [plans(rollout_of(name, 0)[:3], spec) for (name, _), spec in zip(cases, specs, strict=True)]
    folder = tmp_path_factory.mktemp("meetings")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with context.Pool(2) as pool:  # whose end ends its processes, whatever they wait for
        calls = [pool.apply_async(journeys, (specs, rank, folder, [plan[rank] for plan in cut])) for rank in range(2)]
        first, second = (call.get(timeout=240) for call in calls)
    for one, other in zip(first, second, strict=True):
        assert_equal(one, other)  # all ranks have the whole
    return dict(zip(cases, first, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", holding("2 ranks"))
def test_two_ranks_learn_what_one_learns(
    two_ranks: dict, trainer_of: Any, rollout_of: Any, tiny_vdm_dir: Path, name: str, kind: str
) -> None:
    alone = trainer_of(spec_of(name, kind, tiny_vdm_dir, micro_batch=4))
    start = weights(alone)
    learn(alone, rollout_of(name, 0)[:3])
    assert distance(two_ranks[name, kind], weights(alone), start) < 1e-2


# --- what the configuration says -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WAYS)
def test_the_configuration_refuses_these_pairs_and_no_others(name: str) -> None:
    for what in PROPERTIES:
        if (name, what) not in REFUSED:
            WAYS[name].config(*asked(name, what))
            continue
        with pytest.raises(
            ConfigError, match=r"stage2.*objective=(nft|awm).*(set max_staleness: 0|use stage2.objective: grpo)"
        ):
            WAYS[name].config(*asked(name, what))


PROOFS = {
    "resume": test_a_restart_repeats_an_undisturbed_learner_bit_for_bit,
    "staleness": test_a_rollout_of_older_weights_is_learnt_from,
    "2 ranks": test_two_ranks_learn_what_one_learns,
    "LoRA": test_two_ranks_learn_what_one_learns,
    "full weights": test_two_ranks_learn_what_one_learns,
    "colocated rest": test_a_learner_that_rests_outside_its_devices_memory_learns_the_same_bits,
    "embed pool": test_a_learner_without_frozen_models_learns_the_same_bits,
    "`micro_steps`": test_window_steps_learnt_one_at_a_time_learn_the_same,
    "all-in-one": test_all_in_one_learns_each_model_as_its_own_stage_says,
}
"""By which test each property holds."""


def test_the_document_shows_every_pair_and_the_tests_that_hold_it() -> None:
    """The table under "What goes with what", cell by cell, and the list of tests below it."""
    text = (ROOT / "docs" / "objectives.md").read_text(encoding="utf-8")
    section = text.split("## What goes with what\n")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")
    ]
    (head, _, *body), columns = rows, list(PROPERTIES)
    assert head == ["", *columns]
    shown = {(row[0], what): cell for row in body for what, cell in zip(columns, row[1:], strict=True)}
    expected = {}
    for name in WAYS:
        for what in columns:
            cell = "refused" if (name, what) in REFUSED else "holds" if name in holding(what) else "–"
            expected[name, what] = cell
    assert shown == expected
    listed = dict(re.findall(r"^- (.+): `(test_\w+)`", section, flags=re.M))
    assert listed == {what: proof.__name__ for what, proof in PROOFS.items()}
