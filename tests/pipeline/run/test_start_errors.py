"""What is wrong from the start is said at the start, in words, with exit code 2 and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from typer.testing import CliRunner

from cluster.errors import CheckpointError, DataError, VansError
from pipeline.cli import app
from pipeline.config import load_config
from pipeline.data.video import encode_mp4
from pipeline.fleet.models import resolve_adapter, resolve_model


def vans(*arguments: str) -> Result:
    """Run the command line in this process; what no command catches is raised here, as a traceback would be printed there."""
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def refused(*arguments: str) -> str:
    result = vans(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output, result.output
    return " ".join(result.stderr.split())


HEAVY = "{'torch', 'transformers', 'diffusers', 'peft', 'vllm', 'mlflow', 'sklearn'} & set(sys.modules)"


def test_a_mistake_in_the_configuration_is_told_by_the_program_before_it_loads_torch() -> None:
    code = f"""import atexit, sys
atexit.register(lambda: print(sorted({HEAVY})))
from pipeline.cli import main
main()"""
    command = [sys.executable, "-c", code, "train", "toy", "stage1.rollout.group_siz=3", "--dry-run"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=dict(os.environ))
    assert result.returncode == 2, result.stdout + result.stderr
    assert "did you mean 'group_size'" in result.stderr and "Traceback" not in result.stderr
    assert result.stdout.strip() == "[]"


def test_a_plan_and_a_run_s_first_checks_load_no_model_library() -> None:
    """A driver only sends requests to the processes that hold models."""
    code = f"import sys, pipeline.run.train; print(sorted({HEAVY} - {{'torch', 'mlflow'}}))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert result.stdout.strip() == "[]"


def test_unknown_key() -> None:
    assert "did you mean 'group_size'" in refused("train", "toy", "stage1.rollout.group_siz=3", "--dry-run")


def test_dry_run_prints_the_run_and_its_placement() -> None:
    result = vans("train", "toy", "stage1.rollout.group_size=5", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "group_size: 5" in result.stdout
    assert "learner" in result.stdout and "needed" in result.stdout


def test_dry_run_of_the_papers_run_resolves_it() -> None:
    result = vans("train", "vans_2node", "--dry-run")  # the longest chain of bases: vans_8gpu, vans_paper
    assert result.exit_code == 0, result.output
    assert "Qwen/Qwen2.5-VL-3B-Instruct" in result.stdout and "base:" not in result.stdout
    assert "width: 640" in result.stdout and "workers: 10" in result.stdout


def test_missing_model_and_dataset(toy_shards: Path, tmp_path: Path) -> None:
    assert "no such folder" in refused("train", "toy", f"data.train={toy_shards}/train", f"models.vlm={tmp_path}/none")
    assert "does not exist" in refused("train", "toy", f"data.train={tmp_path}/none", f"out={tmp_path}/run")


def test_folder_of_another_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no model_index\.json"):
        resolve_model(str(tmp_path), "vdm")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json and adapter_model\.safetensors not found"):
        resolve_adapter(str(tmp_path), "vlm", resolve_model("tiny", "vlm"))


def test_an_adapter_in_the_place_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"without a base model, and adapter_config\.json is not there"):
        resolve_model(str(tmp_path), "vlm")
    (tmp_path / "adapter_config.json").touch()
    with pytest.raises(CheckpointError, match=r"It is an adapter: give it as models\.vdm_adapter"):
        resolve_model(str(tmp_path), "vdm")


def test_resume_without_a_checkpoint(toy_shards: Path, tmp_path: Path) -> None:
    message = refused("train", "toy", "--resume", f"out={tmp_path}", f"data.train={toy_shards}/train")
    assert "there is no checkpoint" in message and "without --resume" in message


def test_a_folder_that_holds_a_run_is_not_overwritten(toy_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "stage1-step000002").mkdir(parents=True)
    message = refused("train", "toy", f"out={tmp_path}", f"data.train={toy_shards}/train")
    assert "already holds a run" in message and "--resume" in message


@pytest.mark.ray
def test_more_ranks_than_the_cluster_has_room_for(ray_local: None, toy_shards: Path, tmp_path: Path) -> None:
    data = (f"data.train={toy_shards}/train", f"data.eval={toy_shards}/test")
    message = refused("train", "toy", *data, f"out={tmp_path}/run", "learner.ranks=64")
    assert "No room in the cluster" in message and "learner: 64" in message


def test_answer_about_a_file_that_is_no_video(tmp_path: Path) -> None:
    from pipeline.commands.answer import answer_paths, load_video

    config = load_config("toy")
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video")
    with pytest.raises(DataError, match="broken video"):
        load_video(config, broken)
    with pytest.raises(DataError, match="no such file"):
        load_video(config, tmp_path / "none.mp4")
    with pytest.raises(VansError, match=r"must end in \.mp4"):
        answer_paths(tmp_path / "answer.avi", 1)


def test_answer_sees_the_video_as_training_does(tmp_path: Path) -> None:
    from pipeline.commands.answer import load_video

    frames = np.zeros((9, 32, 32, 3), np.uint8)
    frames[:, 8:16, 8:16] = 200
    video = tmp_path / "in.mp4"
    video.write_bytes(encode_mp4(frames, 8.0))
    sample = load_video(load_config("toy"), video)
    assert sample.input_frames.shape == sample.context.shape == (9, 32, 32, 3)
    assert sample.fps == 8.0
    assert np.abs(sample.context.astype(int) - frames.astype(int)).max() <= 4
