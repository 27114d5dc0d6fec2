"""Which rewards have models and pools of their own, and what is refused before anything starts."""

from __future__ import annotations

import pytest

from cluster.errors import ConfigError
from pipeline.config import load_config
from pipeline.config.resume import differences, is_free
from pipeline.fleet.kinds import key_of, kinds_of, runtime_env, section_of
from pipeline.fleet.open import answering, measuring, placement_plan, pool_sections

JUDGE = [
    "models.rewards={judge: {model: 'my:Judge', options: {k: 3}}}",
    "stage2.rewards.weights={clip_v: 1.0, judge: 0.5}",
]


def test_a_reward_with_a_model_has_a_pool_of_its_own() -> None:
    config = load_config("toy", [*JUDGE, "pools.rewards={judge: {workers: 3, cpus: 0.25}}"])
    assert list(pool_sections(config)) == ["vlm", "vdm", "reward", "judge"]
    assert pool_sections(config)["judge"].workers == 3 and key_of("judge") == "pools.rewards.judge"
    assert next(ask for ask in placement_plan(config).asks if ask.role == "judge").count == 3
    arguments = kinds_of(config)["judge"].arguments(config)
    assert arguments == {
        "component": "judge",
        "path": "my:Judge",
        "options": {"k": 3},
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
    }
    assert "judge" not in kinds_of(config)["reward"].arguments(config)["components"]


def test_a_class_is_weighed_by_its_path_too() -> None:
    config = load_config(
        "toy", ["stage1.rewards.weights={format: 1.0, 'my.rewards:Judge': 0.5, 'my.rewards:redness': 0.1}"]
    )
    assert list(pool_sections(config))[-1] == "judge" and kinds_of(config)["judge"].component == "my.rewards:Judge"
    assert "my.rewards:redness" in kinds_of(config)["reward"].arguments(config)["components"]
    assert section_of(config, "judge").workers == 1
    assert list(pool_sections(load_config("toy"))) == ["vlm", "vdm", "reward"], "a run without one is as it was"


def test_an_evaluation_starts_no_judge() -> None:
    assert answering(load_config("toy", JUDGE)) == ("vlm", "vdm", "reward")
    assert answering(load_config("toy")) == (), "all, as before"


def test_an_evaluation_starts_the_pools_of_the_rewards_that_it_measures_by() -> None:
    config = load_config("toy", [*JUDGE, "evaluate.rewards=[video_similarity]"])
    assert list(pool_sections(config)) == ["vlm", "vdm", "reward", "judge", "video_similarity"]
    assert answering(config) == ("vlm", "vdm", "reward", "video_similarity")
    assert measuring(config) == ("reward", "video_similarity") and measuring(load_config("toy", JUDGE)) == ("reward",)
    functions = load_config("toy", ["evaluate.rewards=['my.rewards:redness', motion]"])
    assert measuring(functions) == ("reward",)
    assert {"my.rewards:redness", "motion"} <= {*kinds_of(functions)["reward"].arguments(functions)["components"]}


def test_a_deterministic_run_asks_for_each_answer_alone() -> None:
    assert pool_sections(load_config("toy", [*JUDGE, "deterministic=true"]))["judge"].max_batch == 1


def test_what_a_reward_is_binds_a_continuation_and_where_it_runs_does_not() -> None:
    assert is_free("pools.rewards") and not is_free("models.rewards")
    old = {
        "models.rewards.judge.model": "my:Other",
        "models.rewards.judge.options.k": 3,
        "models.rewards.judge.dtype": "float32",
    }
    lines = differences(old, load_config("toy", JUDGE), besides=["stage2.rewards.weights.judge"])
    assert [line for line in lines if line.startswith("models.rewards")] == [
        'models.rewards.judge.model: "my:Other" in the checkpoint, "my:Judge" now'
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["models.rewards={vdm: {model: 'my:Judge'}}"],
            "models.rewards.vdm: a pool or a built-in component has that name",
        ),
        (["models.rewards={clip_v: {model: 'my:Judge'}}"], "models.rewards.clip_v: a pool or a built-in component"),
        (
            ["models.rewards={judge: {model: 'my:function'}}"],
            "models.rewards.judge.model='my:function': write module:Class",
        ),
        (["models.rewards={'a b': {model: 'my:Judge'}}"], "models.rewards"),
        (
            ["stage1.rewards.weights={'a:Judge': 1.0}", "stage2.rewards.weights={'b:Judge': 1.0}"],
            "'b:Judge' would have a pool called 'judge', as 'a:Judge' has; give it a name of its own: "
            "models.rewards.my_judge.model=b:Judge",
        ),
        (["stage1.rewards.weights={'a:Vlm': 1.0}"], "would have a pool called 'vlm'"),
        (
            ["pools.rewards={judge: {workers: 2}}"],
            "pools.rewards.judge: the run has no reward with a model of that name",
        ),
        (
            ["evaluate.rewards=[video_likeness]"],
            "evaluate.rewards: unknown reward 'video_likeness'; built in are format",
        ),
        ([*JUDGE, "pools.rewards={judge: {env: {pip: [a], python: /x}}}"], "one environment"),
        ([*JUDGE, "pools.rewards={judge: {env: {python: env/bin/python}}}"], "an absolute path, the same on each node"),
        (
            [*JUDGE, "pools.rewards={judge: {rest: true}}", "stage1.rollout.max_staleness=1"],
            "pools.rewards.judge.rest=true",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("toy", overrides)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ("{pip: ['six==1.16.0']}", {"pip": ["six==1.16.0"], "config": {"setup_timeout_seconds": 900}}),
        ("{python: /opt/judge/bin/python}", {"py_executable": "/opt/judge/bin/python"}),
        ("{}", {}),
        ("null", {}),
    ],
)
def test_an_environment_of_its_own_is_ray_s(env: str, expected: dict[str, object]) -> None:
    config = load_config("toy", [*JUDGE, f"pools.rewards={{judge: {{env: {env}}}}}"])
    assert runtime_env(section_of(config, "judge")) == expected
    assert runtime_env(config.pools.reward) == {}
