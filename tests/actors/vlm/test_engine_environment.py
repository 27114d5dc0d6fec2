"""What the engine sets before vLLM starts, in a process of its own: the tests' own environment has it already."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

SCRIPT = (
    "import torch._dynamo; from actors.vlm.engine_args import EngineSpec, prepare_environment\n"
    "from actors.vlm.settings import VlmPoolSection\n"
    "prepare_environment(EngineSpec('model', VlmPoolSection(enforce_eager={eager}))); print(torch._dynamo.config.disable)"
)


@pytest.mark.parametrize(
    ("given", "eager", "disabled"), [(None, True, "True"), (None, False, "False"), ("0", True, "False")]
)
def test_nothing_is_compiled_for_an_eager_engine_although_torch_was_imported_before(
    given: str | None, eager: bool, disabled: str
) -> None:
    """Compiling needs a C++ compiler and minutes where the user's cache is empty."""
    env = {name: value for name, value in os.environ.items() if name != "TORCH_COMPILE_DISABLE"}
    env |= {"TORCH_COMPILE_DISABLE": given} if given is not None else {}
    words = [sys.executable, "-c", SCRIPT.format(eager=eager)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=env, check=True)
    assert done.stdout.split() == [disabled]
