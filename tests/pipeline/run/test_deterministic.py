"""``deterministic=true``: what it asks of the pools, and what it refuses. That it keeps its word: tests/chaos."""

from __future__ import annotations

import pytest

from actors.vlm.engine_args import EngineSpec, engine_args
from cluster.errors import ConfigError
from pipeline.config import load_config
from pipeline.fleet.models import ASSETS
from pipeline.fleet.open import pool_sections


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("pools.vlm.dtype=bfloat16", "pools.vlm.dtype=bfloat16"),
        ("pools.vdm.gpus=0.5", "pools.vdm.gpus=0.5"),
        ("pools.reward.gpus=1", "pools.reward.gpus=1"),
        ("learner.dtype=bfloat16", "learner.dtype=bfloat16"),
        ("stage2.rollout.max_staleness=1", "stage2.rollout.max_staleness=1"),
    ],
)
def test_what_cannot_be_kept_is_refused_by_key(override: str, named: str) -> None:
    load_config("toy", [override])
    with pytest.raises(ConfigError, match=named.replace(".", r"\.")):
        load_config("toy", [override, "deterministic=true"])


def test_no_request_shares_a_call_or_a_batch() -> None:
    for deterministic in (False, True):
        config = load_config("toy", [f"deterministic={str(deterministic).lower()}"])
        shared = [pool_sections(config)[name].max_batch > 1 for name in ("vdm", "reward")]
        assert shared == [not deterministic] * 2
    together, alone = (engine_args(EngineSpec(str(ASSETS / "vlm"), alone=alone)) for alone in (False, True))
    assert alone["max_num_seqs"] == 1 < together["max_num_seqs"]
    assert alone["enable_prefix_caching"] is False and "enable_prefix_caching" not in together
