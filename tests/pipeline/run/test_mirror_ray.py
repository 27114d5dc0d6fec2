"""Ray Data reads from an S3 bucket what it reads from a folder; a whole run lives on one: data in, checkpoints out and back."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from cluster.session import connect
from pipeline.config import load_config
from pipeline.data.source import SampleSource
from pipeline.data.toy.shards import write_toy
from pipeline.run.start import mirror_of
from pipeline.run.train import run_training
from pipeline.support.location import remove
from tests.conftest import stop_ray
from tests.s3_server import S3Server

pytestmark = [pytest.mark.ray]


def test_samples_from_a_bucket_are_those_from_a_folder(ray_local: None, s3: S3Server, toy_shards: Path) -> None:
    bucket = s3.bucket("samples")
    write_toy(bucket, train=24, test=8, seed=0)
    here, there = (SampleSource(folder, seed=3) for folder in (toy_shards / "train", bucket / "train"))
    assert there.digest == here.digest and there.count == 24
    for source, taken in ((here, []), (there, [])):  # type: ignore[var-annotated]
        stream = source.batches(5)
        taken += itertools.islice(stream, 2)
        stream.close()
        if source is here:
            expected = taken
    for a, b in zip(expected, taken, strict=True):
        assert b.cursor == a.cursor and not b.quarantined
        assert [s.id for s in b.samples] == [s.id for s in a.samples]
        for x, y in zip(a.samples, b.samples, strict=True):
            assert np.array_equal(x.input_frames, y.input_frames) and np.array_equal(x.target_frames, y.target_frames)


@pytest.mark.chaos
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_reads_from_a_bucket_and_goes_on_from_it_where_its_folder_is_gone(s3: S3Server, tmp_path: Path) -> None:
    stop_ray()
    bucket = s3.bucket("whole")
    write_toy(bucket / "toy", train=8, test=2, seed=0)
    overrides = [
        f"out={tmp_path}/run",
        f"data.train={bucket / 'toy' / 'train'}",
        f"data.eval={bucket / 'toy' / 'test'}",
    ]
    overrides += [f"checkpoint.mirror={bucket / 'run'}", "checkpoint.every=1", "deterministic=true"]
    overrides += ["stage1.steps=1", "stage2.steps=2", "stage2.anchor=truth", "learner.ranks=1", "pools.vdm.workers=1"]
    overrides += ["tracking.clips_every=0"]
    overrides += [f"{stage}.rollout={{prompts_per_step: 1, group_size: 2}}" for stage in ("stage1", "stage2")]
    config = load_config("toy", overrides)
    with connect(local_cpus=8):  # one cluster for both
        whole = run_training(config)
        mirror = mirror_of(config)
        assert mirror is not None
        names = ["stage2-step000002", "stage2-step000001", "stage1-step000001"]
        assert {found.name for found in mirror.checkpoints()} <= set(names) and mirror.checkpoints()[0].name == names[0]
        exports = {
            name: (config.out / name / "adapter_model.safetensors").read_bytes()
            for name in ("vlm_adapter", "vdm_adapter")
        }
        remove(bucket / "run" / "checkpoints" / names[0] / "manifest.json")
        # Another folder, as on another machine: MLflow keeps the store of the first open in this process.
        config = config.model_copy(update={"out": tmp_path / "other"})
        resumed = run_training(config, resume=True)
    assert {"stage2"} <= resumed.stages.keys()
    first, again = whole.stages["stage2"].history, resumed.stages["stage2"].history
    compared = [
        name for name in first[-1] if not name.startswith(("time/", "profile/", "speed/", "pool/", "cache/"))
    ]  # of the process
    assert len(compared) > 10 and {n: again[-1][n] for n in compared} == {n: first[-1][n] for n in compared}
    for name, content in exports.items():
        assert (config.out / name / "adapter_model.safetensors").read_bytes() == content
    assert mirror.checkpoints()[0].name == names[0]
