"""A run that is paid by a judge behind an endpoint, as people start it: its pool grows meanwhile, and what it spent is in MLflow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlflow
import pytest

from pipeline.tracking.store import STAGE_TAG
from tests.scripted_server import ScriptedServer, text_of

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.chaos, pytest.mark.timeout(900)]
ENV = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "COLUMNS": "200"}
STEPS, ANCHORS, GROUP = 6, 2, 4
DEADLINE_S = 300.0


def judged(form: str, body: dict[str, Any], before: int) -> str:
    """Refuse one answer in some; the others' points depend on what the request shows."""
    shown = sum(len(part["image_url"]["url"]) for part in body["messages"][-1]["content"] if "image_url" in part)
    if shown % 7 == 0:
        return "I would rather not say."
    return json.dumps({"why": text_of(body)[:20], "score": shown % 11})


def vans(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", *words], env=ENV, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pools(run: Path) -> dict[str, Any]:
    return {pool["name"]: pool for pool in json.loads(vans("status", str(run), "--json"))["pools"]}


def until(condition: Any, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_a_run_is_paid_by_a_judge_whose_pool_grows_while_it_judges(toy_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with ScriptedServer(judged, delay_s=0.3) as server:
        judge = (
            f"{{model: judge, options: {{base_url: '{server.base_url}', model: scripted, tries: 1, price_in: 2.0}}}}"
        )
        overrides = [
            f"out={out}",
            *(f"data.{key}={toy_shards}/{split}" for key, split in (("train", "train"), ("eval", "test"))),
            "stage1.steps=0",
            f"stage2={{steps: {STEPS}, anchor: truth, rollout: {{prompts_per_step: {ANCHORS}, group_size: {GROUP}}}}}",
            "stage2.rewards.weights={clip_v: 1.0, judge: 1.0}",
            f"models.rewards={{judge: {judge}}}",
            "pools.rewards={judge: {cpus: 0.1}}",
        ]
        command = [sys.executable, "-m", "pipeline", "train", "toy", *overrides]
        with subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
            try:
                until(lambda: sum(server.forms.values()) > GROUP, run)
                assert "judge: 1 → 2 workers" in vans("scale", str(out), "judge=2")
                until(lambda: sum(w["state"] == "ready" for w in pools(out)["judge"]["workers"]) == 2, run)
                said, _ = run.communicate(timeout=DEADLINE_S)
            finally:
                run.kill()
        assert run.returncode == 0, said
        asks = sum(server.forms.values())
    client = mlflow.MlflowClient(f"sqlite:///{out}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("vans").experiment_id])
    (figures,) = (run.data.metrics for run in runs if run.data.tags.get(STAGE_TAG) == "stage2")
    assert 0 <= figures["reward/judge_mean"] <= 1 and figures["reward/judge_std"] > 0
    assert figures["spend/judge/asks"] == asks >= STEPS * ANCHORS * GROUP
    assert figures["spend/judge/failed"] > 0
    assert figures["spend/judge/cost"] == pytest.approx(2e-6 * figures["spend/judge/tokens_in"])
