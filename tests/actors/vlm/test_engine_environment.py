"""What the engine sets before vLLM starts, in a process of its own: the tests' own environment has it already."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

SCRIPT = """
import os
import torch._dynamo
from actors.vlm.engine_args import EngineSpec, prepare_environment
from actors.vlm.settings import VlmPoolSection
for given, eager in ((None, False), (None, True), ("0", True)):
    os.environ.pop("TORCH_COMPILE_DISABLE", None) if given is None else os.environ.update(TORCH_COMPILE_DISABLE=given)
    prepare_environment(EngineSpec("model", VlmPoolSection(enforce_eager=eager)))
    print(given, eager, torch._dynamo.config.disable)
"""


def test_nothing_is_compiled_for_an_eager_engine_although_torch_was_imported_before() -> None:
    """Compiling needs a C++ compiler and minutes where the user's cache is empty."""
    env = {name: value for name, value in os.environ.items() if name != "TORCH_COMPILE_DISABLE"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120, env=env, check=True
    )
    assert done.stdout.splitlines() == ["None False False", "None True True", "0 True False"]
