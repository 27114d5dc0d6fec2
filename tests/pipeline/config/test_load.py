"""Every mistake in a configuration is one line that names the key, the value and what would be right."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster.errors import ConfigError
from pipeline.config import RunConfig, config_digest, flatten, load_config, parse_config, to_yaml
from pipeline.config.load import BUNDLED, merge


def test_bundled_run_loads_and_overrides_apply() -> None:
    run = load_config("toy", ["stage1.rollout.group_size=4", "name=other", "stage2.sde.window_range=[1, 5]"])
    assert run.stage1.rollout.group_size == 4
    assert run.name == "other"
    assert run.stage2.sde.window_range == (1, 5)


def test_resolved_yaml_is_the_same_run(tmp_path) -> None:
    run = load_config("toy", ["seed=7"])
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(run))
    assert load_config(path) == run
    assert flatten(run)["stage1.rollout.group_size"] == run.stage1.rollout.group_size


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["stage1.rollout.group_sise=4"], "did you mean 'group_size'"),
        (["stagee1.steps=4"], "did you mean 'stage1'"),
        (["stage1.rollout.group_size=many"], "stage1.rollout.group_size='many'"),
        (["stage1.rollout.group_size=1"], "needs at least 2 trajectories"),
        (["video.vae_tile=[240, 416]"], "go together"),
        (["video.vae_tile=[240, 416]", "video.vae_stride=[120, 420]"], "would be lost"),
        (["stage2.sde.window_size=9"], "longer than the"),
        (["stage2.sde.window_range=[0, 40]"], "the last step is always an ODE step"),
        (["stage2.sde.window_range=[3, 3]"], "holds no step"),
        (["stage2.sde.window_range=[4, 2]"], "holds no step"),
        (["stage2.sde.window_range=[-1, 3]"], "leaves the schedule"),
        (["stage2.render.steps=1", "stage2.sde.window_range=null"], "longer than the 0 steps"),
        (["stage2.sde.level=0"], "or objective: nft or awm"),
        (["stage2.sde={schedule: cps, level: 1.2}"], "at most 1"),
        (["stage2.grpo.kl_estimator=k3"], "the flow's KL has a closed form"),
        (["stage1.grpo.kl_estimator=closed"], "'k1', 'k2' or 'k3'"),
        (["stage1.text.temperature=0"], "nothing could be learnt"),
        (["stage1.grpo.min_group=9"], "drops every group"),
        (["stage1.optim.ema=1.0"], "less than 1"),
        (["stage2.render.guidance=0.5"], "greater than or equal to 1"),
        (["video.num_frames=7"], "begin with the input's last frame, e.g. 4 or 8"),
        (
            ["video.num_frames=2"],
            "num_frames=2 must be 4k+1 (a causal VAE drops other frames silently), e.g. 1 or 5; or 4k",
        ),
        (["learner.ranks=0"], "greater than 0"),
        (["alarms.length_range=[2.0, 3.0]"], "it must hold 1"),
        (["stage1.rollout=3"], "stage1.rollout=3"),
        (["sft.vlm.step=3"], "did you mean 'steps'"),
        (["sft.vlm.epochs=2"], "steps=300 and epochs=2: give one of"),
        (["sft.vdm.steps=null", "sft.vdm.max_wall_s=60"], "max_wall_s=60 needs optim.schedule=constant"),
        (["sft.vlm.train_text_encoder=true"], "unknown key 'sft.vlm.train_text_encoder'"),
        (["sft.vdm.train_text_encoder=true", "sft.vdm.lora.rank=8"], "cannot go with lora.rank=8"),
        (["seed.x=3"], "seed is a value, not a section"),
        (["stage1.steps"], "expected section.key=value"),
        (["name=../evil"], "name='../evil'"),
        (["weights.transport=nccl"], "'object_store' or 'collective'"),
        (["weights.transport=collective"], "this run trains adapters alone"),
        (
            ["weights.transport=collective", "stage2.lora.rank=0", "learner.gpus=0.5", "pools.vdm.gpus=1"],
            "learner.gpus=0.5: NCCL takes no two processes on one GPU",
        ),
        (
            ["weights.transport=collective", "stage2.lora.rank=0", "learner.gpus=1"],
            "the same kind of device, here learner.gpus=1, pools.vdm.gpus=0",
        ),
        (
            ["weights.transport=collective", "stage1.lora.rank=0", "weights.transfer_timeout_s=290"],
            "leave no time to pull the weights instead: a worker has pools.vlm.start_timeout_s=300 s",
        ),
        (
            ["pools.vlm.rest=true", "stage1.rollout.max_staleness=1"],
            "pools.vlm.rest=true with stage1.rollout.max_staleness=1",
        ),
        (["learner.offload=everything"], "learner.offload='everything': Input should be 'none', 'optimizer' or 'all'"),
    ],
)
def test_mistakes_are_named(overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("toy", overrides)
    assert expected in str(caught.value)


def test_all_mistakes_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"nmae": "x", "seed": "y", "stage1": {"steps": -1}})
    assert all(key in str(caught.value) for key in ("'nmae'", "seed='y'", "stage1.steps=-1"))


def test_unknown_file_lists_the_bundled_runs() -> None:
    with pytest.raises(ConfigError, match="toy"):
        load_config("no-such-run")


def test_broken_yaml_is_named(tmp_path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("stage1: [")
    with pytest.raises(ConfigError, match="not YAML"):
        load_config(path)
    path.write_text(yaml.safe_dump(["a", "list"]))
    with pytest.raises(ConfigError, match="mapping of sections"):
        load_config(path)


def test_digest_sees_what_changes_learning_and_nothing_else() -> None:
    base = RunConfig()
    assert config_digest(base) == config_digest(parse_config({"out": "elsewhere", "name": "b"}))
    assert config_digest(base) == config_digest(parse_config({"alarms": {"stop_after": 3, "copy_above": None}}))
    assert config_digest(base) == config_digest(parse_config({"sft": {"vlm": {"steps": 9, "optim": {"lr": 1e-3}}}}))
    moved = {"weights": {"join_timeout_s": 3}, "learner": {"offload": "all"}, "pools": {"vdm": {"rest": True}}}
    assert config_digest(base) == config_digest(parse_config(moved))
    assert config_digest(base) != config_digest(parse_config({"stage1": {"optim": {"lr": 1e-3}}}))


def test_a_section_written_in_part_keeps_the_other_defaults_of_its_stage() -> None:
    run = parse_config({"stage2": {"grpo": {"std_norm": "batch"}}, "evaluate": {"text": {"max_tokens": 9}}})
    assert (run.stage2.grpo.clip_low, run.stage2.grpo.kl_beta, run.stage2.grpo.loss_norm) == (1e-3, 0.004, "sequence")
    assert run.evaluate.text.temperature == 0.0  # greedy, as where nothing is written


def write(folder: Path, **files: dict) -> None:
    for name, values in files.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))


def test_a_run_changes_its_base_key_by_key(tmp_path: Path) -> None:
    write(
        tmp_path,
        one={"base": "toy", "stage1": {"steps": 3, "rewards": {"weights": {"format": 1.0}}}},
        two={"base": "one.yaml", "stage1": {"optim": {"lr": 1e-4}}, "stage2": {"sde": {"window_range": [1, 3]}}},
    )
    toy, run = load_config("toy"), load_config(tmp_path / "two.yaml", ["seed=9"])
    assert (run.stage1.steps, run.stage1.optim.lr, run.stage2.sde.window_range, run.seed) == (3, 1e-4, (1, 3), 9)
    assert run.stage1.rewards.weights == {"format": 1.0}  # not a section, so replaced as a whole
    assert (run.stage1.lora, run.pools, run.stage2.optim) == (toy.stage1.lora, toy.pools, toy.stage2.optim)
    assert "base" not in to_yaml(run)


def test_merging_changes_neither_side() -> None:
    base, changes = {"stage1": {"steps": 1}}, {"stage1": {"optim": {"lr": 1.0}}}
    assert merge(base, changes) == {"stage1": {"steps": 1, "optim": {"lr": 1.0}}}
    assert (base, changes) == ({"stage1": {"steps": 1}}, {"stage1": {"optim": {"lr": 1.0}}})


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"run": {"base": "tooy"}}, r"run\.yaml: base='tooy': .* bundled runs .*toy"),
        ({"run": {"base": ["toy"]}}, "give the name of a bundled run"),
        ({"run": {"base": "run.yaml"}}, "each other's base"),
        ({"run": {"base": "b.yaml"}, "b": {"base": "run.yaml"}}, r"run\.yaml -> .*b\.yaml -> .*run\.yaml"),
        ({"run": {"base": "b.yaml"}, "b": ["a", "list"]}, r"b\.yaml: a run is a mapping"),
        ({"run": {"base": "toy", "stage1": {"stps": 1}}}, "did you mean 'steps'"),
    ],
)
def test_mistakes_in_a_base_are_named(tmp_path: Path, files: dict, expected: str) -> None:
    write(tmp_path, **files)
    with pytest.raises(ConfigError, match=expected):
        load_config(tmp_path / "run.yaml")


def test_a_base_is_the_files_own_matter() -> None:
    with pytest.raises(ConfigError, match="unknown key 'base'"):
        load_config("toy", ["base=toy"])


RUNS = sorted(path.stem for path in BUNDLED.glob("vans_*.yaml"))
ARTISTS = {
    "vans_ltx": "Lightricks/LTX-Video",
    "vans_wan22": "Wan-AI/Wan2.2-TI2V-5B-Diffusers",
    "vans_wan_i2v": "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers",
}
GIVEN = {"vans_wan_i2v": (32, 1)}
"""Frames drawn, and reference frames, where the artist begins with the one that it is given."""


@pytest.mark.parametrize("name", RUNS)
def test_the_real_runs_differ_from_the_toy_in_values_only(name: str) -> None:
    run, toy = load_config(name), load_config("toy")
    keys = {key for key in flatten(run) if ".rewards.weights." not in key}
    assert keys == {key for key in flatten(toy) if ".rewards.weights." not in key}
    assert type(run) is type(toy)
    assert (run.name, str(run.out)) == (name, f"runs/{name}")


@pytest.mark.parametrize("name", RUNS)
def test_the_real_runs_keep_the_papers_settings(name: str) -> None:
    """arXiv 2511.16669, section 4.1 and its appendix, as ALGORITHM.md's table of the two stages quotes them."""
    run = load_config(name)
    one, two, video = run.stage1, run.stage2, run.video
    assert (video.num_frames, video.reference_frames) == GIVEN.get(name, (33, 6))
    assert (video.height, video.width) == (352, 640)
    assert (one.steps, one.optim.lr, one.rollout.group_size) == (800, 5e-5, 8)
    assert (two.steps, two.optim.lr, two.rollout.group_size) == (1000, 5e-5, 8)
    assert (one.lora.rank, one.lora.alpha) == (8, 32)
    assert (two.grpo.clip_low, two.grpo.clip_high, two.grpo.kl_beta) == (1e-3, 1e-3, 0.004)
    assert set(one.rewards.weights) == {"format", "rouge_l", "clip_v"}
    assert set(two.rewards.weights) == {"clip_v", "clip_score"}
    assert (two.anchor, two.anchor_min_rouge) == ("thinker", 0.6)
    assert run.training == "two_stage" and run.models.vdm == ARTISTS.get(name, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    assert run.models.vlm == ("Qwen/Qwen3-VL-4B-Instruct" if "qwen3" in name else "Qwen/Qwen2.5-VL-3B-Instruct")
    assert 10 <= two.render.steps <= 20 and 40 <= run.evaluate.render.steps <= 50
    pools = run.pools
    assert {pools.vlm.dtype, pools.vdm.dtype, run.learner.dtype} == {"bfloat16"}
    assert run.learner.activation_checkpointing


@pytest.mark.parametrize(("name", "gpus"), [("vans_1gpu", 1), ("vans_paper", 4), ("vans_8gpu", 8), ("vans_2node", 16)])
def test_the_real_runs_ask_for_the_gpus_in_their_name(name: str, gpus: float) -> None:
    run = load_config(name)
    pools = (run.pools.vlm, run.pools.vdm, run.pools.reward)
    asked = sum(pool.workers * pool.gpus for pool in pools) + run.learner.ranks * run.learner.gpus
    assert asked == pytest.approx(gpus)


@pytest.mark.parametrize("name", RUNS)
def test_the_real_runs_say_how_to_tune_both_models_first(name: str) -> None:
    from pipeline.sft.settings import sft_settings

    run = load_config(name)
    for kind in ("vlm", "vdm"):
        settings = sft_settings(run, kind)
        assert settings.tuning.epochs == 1 and settings.learner.activation_checkpointing
        assert settings.learner.dtype == "bfloat16"
    adapter = run.sft.vlm.lora
    if adapter.rank:  # Joint-GRPO goes on from it, and has no other reference than the model below it
        assert (adapter.rank, adapter.alpha) == (run.stage1.lora.rank, run.stage1.lora.alpha)
        assert run.stage1.grpo.kl_beta == 0


def test_a_nucleus_is_refused_where_its_answers_are_learnt_from_and_free_elsewhere() -> None:
    free = ["stage2.text.top_p=0.9", "stage2.text.temperature=0.7", "evaluate.text.top_p=0.9"]
    config = load_config("toy", free)
    assert (config.stage1.text.top_p, config.stage2.text.top_p, config.evaluate.text.top_p) == (1.0, 0.9, 0.9)
    with pytest.raises(ConfigError, match=r"stage1.*text\.top_p=0\.9: stage 1 learns from these answers.*set top_p: 1"):
        load_config("toy", ["stage1.text.top_p=0.9"])
    with pytest.raises(ConfigError, match="stage 1 learns"):
        load_config("toy", ["stage1.text.top_p=0.9", "training=all_in_one"])
    assert load_config("toy", ["stage1.text.top_p=0.9", "stage1.steps=0"]).stage1.text.top_p == 0.9  # nothing is learnt
    for value in ("0", "1.5"):
        with pytest.raises(ConfigError, match="top_p"):
            load_config("toy", [f"evaluate.text.top_p={value}"])
