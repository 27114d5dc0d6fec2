"""The adapter of HPSv3: refusals here; its calls against the published package's own source, where that can be had."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from actors.scoring.hpsv3 import ENVIRONMENT, HPSv3
from actors.scoring.model import RewardLoadError, load_model, start_model

PATH = "actors.scoring.hpsv3:HPSv3"


def test_what_cannot_be_loaded_is_said_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(RewardLoadError, match="would be unpickled"):
        load_model(PATH, {"checkpoint": "HPSv3.pth"})
    with pytest.raises(RewardLoadError, match="at least 1"):
        load_model(PATH, {"checkpoint": "a.safetensors", "frames": 0})
    with pytest.raises(RewardLoadError, match="there is no file"):
        start_model(PATH, load_model(PATH, {"checkpoint": str(tmp_path / "a.safetensors")}), "cpu", "float32")
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(RewardLoadError) as error:
        start_model(PATH, load_model(PATH, {"checkpoint": str(tmp_path / "a.safetensors")}), "cpu", "float32")
    assert ENVIRONMENT in str(error.value)


class Counting:
    """Takes the calls of the real class by its signature, and scores a picture by its brightness, its spread beside it."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def reward(self, **given: Any) -> torch.Tensor:
        self.calls.append(given)
        return torch.tensor([[float(np.asarray(picture).mean()), 99.0] for picture in given["image_paths"]])


def test_a_clip_has_the_mean_of_its_frames_whatever_the_batches(request_for: Any) -> None:
    clips = [np.full((5, 8, 8, 3), [[[[10 * i]]], [[[0]]], [[[20]]], [[[0]]], [[[40]]]], np.uint8) for i in (1, 4)]
    requests = [request_for(i, ("hpsv3",), clip=clip, caption=f"caption {i}") for i, clip in enumerate(clips)]
    for batch in (1, 4, 99):
        reward = HPSv3("a.safetensors", frames=3, batch=batch)
        reward._inferencer = Counting()
        assert reward.score(requests) == pytest.approx([(10 + 20 + 40) / 3, (40 + 20 + 40) / 3])
        prompts = [prompt for call in reward._inferencer.calls for prompt in call["prompts"]]
        assert prompts == ["caption 0"] * 3 + ["caption 1"] * 3
        pictures = [picture for call in reward._inferencer.calls for picture in call["image_paths"]]
        assert all(isinstance(picture, Image.Image) for picture in pictures)


@pytest.mark.chaos
def test_the_published_package_takes_these_calls(tmp_path: Path) -> None:
    """Without weights, and without its twenty packages: its wheel is read, and the calls are bound to its signatures."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(tmp_path), "hpsv3==1.0.0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        pytest.skip(f"pip has no hpsv3 here: {done.stderr.strip().splitlines()[-1:]}")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        exported = ast.parse(file.read("hpsv3/__init__.py"))
        source = ast.parse(file.read("hpsv3/inference.py"))
        reader = file.read("hpsv3/dataset/utils.py").decode()
    imports = [node for node in ast.walk(exported) if isinstance(node, ast.ImportFrom)]
    assert "HPSv3RewardInferencer" in {name.name for node in imports for name in node.names}
    (made,) = [node for node in source.body if isinstance(node, ast.ClassDef) and node.name == "HPSv3RewardInferencer"]
    methods = {node.name: node.args for node in made.body if isinstance(node, ast.FunctionDef)}

    def signature(name: str) -> inspect.Signature:
        arguments, kind = methods[name], inspect.Parameter.POSITIONAL_OR_KEYWORD
        defaults = [inspect.Parameter.empty] * (len(arguments.args) - len(arguments.defaults)) + [None] * len(
            arguments.defaults
        )
        return inspect.Signature(
            [inspect.Parameter(a.arg, kind, default=d) for a, d in zip(arguments.args, defaults, strict=True)]
        )

    signature("__init__").bind(None, config_path=None, checkpoint_path="x", device="cpu")
    signature("reward").bind(None, image_paths=[], prompts=[])
    assert "self.model = model" in ast.unparse(made)  # what rests, and is hashed
    assert "isinstance(image, Image.Image)" in reader  # pictures are taken as they are
    assert "[0]" in ast.unparse(source) and "logits" in ast.unparse(made)
