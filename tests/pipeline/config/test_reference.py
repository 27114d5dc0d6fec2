"""docs/configuration.md and the schema say the same; every key has a sentence, and the switches name their source."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from actors.settings import PAPERS
from pipeline.config import RunConfig, flatten, parse_config
from pipeline.config.reference import parts, reference
from pipeline.config.yaml12 import parse_yaml

ROOT = Path(__file__).resolve().parents[3]
KEYS = {key.path: key for part in parts() for key in part.keys}
SWITCHES = {
    "stage1.grpo": (
        "std_norm normalise_rewards clip_low clip_high kl_beta kl_estimator loss_norm old_logprobs importance_cap "
        "updates_per_batch epochs_per_batch"
    ),
    "stage1.rollout": "group_size max_staleness max_refills",
    "stage1.optim": "lr warmup_steps schedule ema",
    "stage1.lora": "rank alpha",
    "stage2.render": "guidance",
    "stage2.sde": "schedule level window_size window_range window_schedule window_every window_per same_latent",
    "stage2": "anchor_min_rouge",
}


def test_the_document_is_what_the_schema_says() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == reference(), "run: make docs"


def test_every_key_of_a_run_is_in_it() -> None:
    # Weights of rewards are a user's own names: the key is the mapping.
    resolved = {re.sub(r"(\.rewards\.weights)\..*", r"\1", key) for key in flatten(RunConfig())}
    assert set(KEYS) == resolved


def test_every_key_has_a_sentence_and_every_section_says_what_it_is() -> None:
    for path, key in KEYS.items():
        assert len(key.description) > 8 and key.description.endswith("."), f"{path}: {key.description!r}"
    for part in parts():
        assert len(part.about) > 4 and part.about.endswith("."), part.path


@pytest.mark.parametrize("path", [f"{s}.{name}" for s, names in SWITCHES.items() for name in names.split()])
def test_a_switch_names_its_source(path: str) -> None:
    assert re.search(r"arXiv:\d{4}\.\d{5}|Schulman 2020", KEYS[path].source), path


def test_the_same_switch_of_the_other_stage_has_one_too() -> None:
    for path, key in KEYS.items():
        twin = KEYS.get(path.replace("stage1.", "stage2.", 1))
        if key.source and twin is not None:
            assert twin.source, twin.path


def test_papers_are_spelt_as_identifiers() -> None:
    for name, paper in PAPERS.items():
        assert re.fullmatch(r"arXiv:\d{4}\.\d{5}", paper) or name in ("KL estimators", "VANS as released"), name
        assert any(name in key.source for key in KEYS.values()), f"{name} is cited nowhere"


def test_a_printed_default_is_the_default() -> None:
    """Each key, set to what the document prints, on its own: the run stays as it is, whatever is not written."""
    base = RunConfig()
    for path, key in KEYS.items():
        values: dict = {}
        *parents, leaf = path.split(".")
        node = values
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = parse_yaml(key.default, path)
        assert parse_config(values) == base, path
