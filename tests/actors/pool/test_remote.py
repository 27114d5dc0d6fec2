"""What a pool makes of Ray's errors, without a Ray."""

from __future__ import annotations

import pytest
from ray.exceptions import RuntimeEnvSetupError

from actors.failures import Failure, failure_of
from actors.pool.remote import WorkerRaised, translate
from actors.scoring.model import RewardLoadError

PIP = """Could not create the actor because its associated runtime env failed to be created.
[Node 10.0.0.2] Traceback (most recent call last):
  File "ray/_private/runtime_env/pip.py", line 252, in _install_pip_packages
    await check_output_cmd(pip_install_cmd, logger=logger, cwd=cwd, env=pip_env)
ray._private.runtime_env.utils.SubprocessCalledProcessError: Run cmd[13] failed with the following details.
Command '['python', '-m', 'pip', 'install', '-r', 'requirements.txt']' returned non-zero exit status 1.
Last 50 lines of stdout:
    Looking in links: wheels
    ERROR: Could not find a version that satisfies the requirement six==99.15.0 (from versions: 1.16.0, 1.17.0)
    ERROR: No matching distribution found for six==99.15.0

"""


@pytest.mark.parametrize("lines", [3, 40])
def test_an_environment_that_cannot_be_built_shows_what_pip_said_last_and_no_traceback(lines: int) -> None:
    chatter = "\n".join(f"    Collecting package-{i}" for i in range(lines - 3))
    found = translate(
        RuntimeEnvSetupError(PIP.replace("    Looking in links: wheels", chatter or "    Looking in links: wheels"))
    )
    assert isinstance(found, WorkerRaised) and found.for_people
    told = str(found).splitlines()
    assert (
        told[0] == "its environment cannot be built:"
        and told[-1] == "  ERROR: No matching distribution found for six==99.15.0"
    )
    assert len(told) <= 13 and not any("Traceback" in line or "check_output_cmd" in line for line in told)


def test_an_environment_that_fails_otherwise_shows_ray_s_last_lines() -> None:
    found = translate(RuntimeEnvSetupError("first\n\nthe disk is full"))
    assert "the disk is full" in str(found)


def test_a_failure_knows_whether_it_was_raised_for_people() -> None:
    told = failure_of(RewardLoadError("the weights are missing"))
    assert (told.kind, told.for_people) == ("bug", True) and "the weights are missing" in told.message
    assert failure_of(ZeroDivisionError()) == Failure(
        "bug", "ZeroDivisionError: ", failure_of(ZeroDivisionError()).traceback
    )
