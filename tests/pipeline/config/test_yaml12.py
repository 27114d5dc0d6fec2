"""YAML's scalars are those of version 1.2, a key stands once, and what is written is read back as it was."""

from __future__ import annotations

import math

import pytest
import yaml

from cluster.errors import ConfigError
from pipeline.commands.demo import demo_config
from pipeline.config import load_config, parse_config, to_yaml
from pipeline.config.load import override_of, run_name
from pipeline.config.yaml12 import as_value, dump_yaml, parse_value, parse_yaml
from pipeline.reproduce.spec import load_experiment

TEXTS = (
    *(
        "yes",
        "no",
        "on",
        "off",
        "true",
        "null",
        "~",
        "",
        "010",
        "0o10",
        "0x1F",
        "0b1",
        "1_000",
        "1e-5",
        "1e5",
        ".5",
        "+1",
    ),
    *(
        "1:30",
        "2026-11-28",
        "2026-11-28T10:00:00Z",
        ".inf",
        ".nan",
        "<<",
        "=",
        "-",
        "a: b",
        "a # b",
        "#a",
        "a#b",
        "%x",
        "@x",
        "!x",
    ),
    *(
        "&x",
        "*x",
        "{a}",
        "[a]",
        "'q'",
        '"q"',
        "`x",
        " lead",
        "trail ",
        "two\nlines",
        "tab\there",
        "ü",
        "你好",
        "😀",
        "\udcff",
        "\x85",
    ),
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(
            (text, text)
            for text in (
                "yes",
                "no",
                "on",
                "off",
                "Yes",
                "y",
                "tRue",
                "1_000",
                "1:30",
                "190:20:30",
                "0b1",
                "2026-11-28",
            )
        ),
        *((text, True) for text in ("true", "True", "TRUE")),
        *((text, None) for text in ("null", "~", "")),
        *(("010", 10), ("-010", -10), ("+1", 1), ("0o10", 8), ("0x1F", 31), ("089", 89)),
        *(
            ("1e-5", 1e-5),
            ("1E5", 1e5),
            (".5", 0.5),
            ("5.", 5.0),
            ("-1.5e+3", -1500.0),
            (".inf", math.inf),
            ("-.INF", -math.inf),
        ),
    ],
)
def test_a_scalar_means_what_version_1_2_says(text, value) -> None:
    found = parse_yaml(text, "here")
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_read_back_as_text(text) -> None:
    assert parse_yaml(dump_yaml({"key": text, "list": [text]}), "here") == {"key": text, "list": [text]}
    assert yaml.safe_load(dump_yaml({"key": text})) == {"key": text}  # tools that read version 1.1 see the same
    assert parse_value(as_value(text), "here") == text
    assert "\n" not in as_value(text)


@pytest.mark.parametrize("value", [1e-5, 1e16, 5e-324, -0.0, 0.1, 3, 10**20, True, None, math.inf])
def test_other_values_are_read_back_too(value) -> None:
    found = parse_yaml(dump_yaml([value]), "here")[0]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\nb: {c: 1}\nb:\n  d: 2\n", "the key 'b' stands twice, in lines 2 and 3"),
        ("a:\n  b:\n    c: 1\n    d: 2\n    c: 1\n", "'c' stands twice, in lines 3 and 5"),
        ("- {a: 1}\n- {b: 1, b: 1}\n", "'b' stands twice, in columns 4 and 10 of line 2"),
        ("a: 1\n'a': 2\n", "'a' stands twice, in lines 1 and 2"),
        ("x: &x {a: 1, a: 2}\ny: *x\n", "'a' stands twice"),
        ("x: &x {a: 1}\ny:\n  <<: *x\n  <<: *x\n", "'<<' stands twice, in lines 3 and 4"),
        ("x: &x {a: 1}\ny:\n  <<: *x\n  b: 2\n  b: 3\n", "'b' stands twice, in lines 4 and 5"),
    ],
)
def test_a_key_that_stands_twice_is_an_error_with_both_places(text, told) -> None:
    with pytest.raises(ConfigError, match=r"^here\.yaml: ") as error:
        parse_yaml(text, "here.yaml")
    assert told in str(error.value)
    assert "not YAML" not in str(error.value)


def test_a_mapping_s_own_keys_win_over_merged_ones_without_being_called_twice() -> None:
    text = "x: &x {a: 1, b: 2}\ny: &y\n  <<: *x\n  a: 3\nz:\n  <<: [*y, *x]\n  b: 4\n"
    values = parse_yaml(text, "here")
    assert values["y"] == {"a": 3, "b": 2}
    assert values["z"] == {"a": 3, "b": 4}


@pytest.mark.parametrize(
    "text", ["!!binary YQ==", "!!timestamp 2026-11-28", "!!set {a}", "!!python/name:os.system x", "!mine x"]
)
def test_tags_of_other_schemas_are_errors(text) -> None:
    with pytest.raises(ConfigError, match="not YAML"):
        parse_yaml(text, "here")


def test_both_sections_of_a_run_are_named_in_a_base_in_a_file_in_an_override_and_in_an_experiment(tmp_path) -> None:
    twice = "stage1: {steps: 3}\nstage2: {steps: 2}\nstage1: {lora: {rank: 4}}\n"
    for name, text in (
        ("base.yaml", twice),
        ("run.yaml", "base: base.yaml\n"),
        ("table.yaml", "base: toy\nbase: toy\n"),
    ):
        (tmp_path / name).write_text(text)
    for source in ("base.yaml", "run.yaml"):
        with pytest.raises(ConfigError, match=r"base\.yaml: the key 'stage1' stands twice, in lines 1 and 3"):
            load_config(tmp_path / source)
    with pytest.raises(ConfigError, match=r"override 'stage1=\{steps: 1, steps: 2\}': the key 'steps' stands twice"):
        load_config("toy", ["stage1={steps: 1, steps: 2}"])
    with pytest.raises(ConfigError, match=r"table\.yaml: the key 'base' stands twice"):
        load_experiment(tmp_path / "table.yaml")
    assert load_config("toy", ["stage1.steps=1", "stage1.steps=2"]).stage1.steps == 2


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("stage1.steps=yes", "stage1.steps='yes': Input should be a valid integer; this is text"),
        ("stage1.steps=true", "stage1.steps=True: Input should be a valid integer; this is true or false"),
        ("stage1.optim.lr=true", "stage1.optim.lr=True: Input should be a valid number; this is true or false"),
        ("stage1.steps='5'", "stage1.steps='5'"),
        ("stage1.steps=1_000", "stage1.steps='1_000'"),
        ("stage1.steps=1e3", "stage1.steps=1000.0: Input should be a valid integer; write 1000"),
        ("sft.vlm.max_wall_s=1:30", "sft.vlm.max_wall_s='1:30'"),
        ("deterministic=yes", "deterministic='yes': Input should be a valid boolean; write true or false"),
        ("deterministic=1", "deterministic=1"),
        ("name=2026", "name=2026: Input should be a valid string; write it between quotes"),
        ("stage1.optim.betas=[0.9, true]", "stage1.optim.betas.1=True"),
        ("stage1.rewards.weights={clip_v: 'a'}", "stage1.rewards.weights.clip_v='a'"),
        ("pools.vlm.labels={zone: 1}", "pools.vlm.labels.zone=1"),
        ("stage1.optim.lr=.inf", "finite"),
        ("out=runs/a #1", """put the whole value between quotes: "runs/a #1\""""),
        ("out=#1", "for a comment"),
    ],
)
def test_nothing_is_converted_to_the_type_that_a_key_has(override, told) -> None:
    with pytest.raises(ConfigError) as error:
        load_config("toy", [override])
    assert told in str(error.value)


def test_what_is_meant_by_a_number_arrives() -> None:
    run = load_config(
        "toy", ["seed=010", "stage1.optim.lr=1e-5", "stage1.lora.alpha=8", "name=yes", "tracking.experiment=2026-11-28"]
    )
    assert (run.seed, run.stage1.optim.lr, run.name) == (10, 1e-5, "yes")
    assert run.stage1.lora.alpha == 8.0
    assert run.tracking.experiment == "2026-11-28"
    assert parse_config(parse_yaml(to_yaml(run), "here")) == run


@pytest.mark.parametrize("text", [text for text in TEXTS if text and text.isprintable()])
def test_a_resolved_run_with_such_names_is_the_same_run(text) -> None:
    run = load_config("toy", [override_of("out", f"runs/{text}"), override_of("tracking.experiment", text)])
    assert str(run.out) == f"runs/{text}"
    assert run.tracking.experiment == text
    assert parse_config(parse_yaml(to_yaml(run), "here")) == run


@pytest.mark.parametrize("name", ["2026", "yes", "a #1", "what? 100%", "ü", "-x", "demo-1.5", "a: b", "'q'", "…"])
def test_a_demo_takes_any_folder(tmp_path, name) -> None:
    run = demo_config(tmp_path / name, seed=0, quick=True)
    assert run.out == tmp_path / name
    assert run.data.train == tmp_path / name / "data" / "train"
    assert run_name("demo-1.5") == "demo-1.5"
