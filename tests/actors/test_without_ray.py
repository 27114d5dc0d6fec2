"""The policies, what they learn by and what is known of their size need no Ray: a bare GPU machine can measure them."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

MODULES = (
    "actors.vdm.policy",
    "actors.vlm.policy",
    "actors.scoring.clip",
    "actors.learner.objectives.grpo",
    "actors.policy.lora",
    "actors.learner.sharding",
    "actors.architectures",
    "actors.architectures.cost",
)


def test_policies_and_losses_import_no_ray() -> None:
    code = (
        f"import sys, {', '.join(MODULES)}\n"
        "print(sorted({m.partition('.')[0] for m in sys.modules} & {'ray', 'mlflow', 'vllm', 'pipeline'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250, check=True)
    assert done.stdout.strip() == "[]"


def test_a_plan_needs_no_torch() -> None:
    code = "import sys, actors.architectures, actors.architectures.cost; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=250, check=True)
    assert done.stdout.strip() == "False"
