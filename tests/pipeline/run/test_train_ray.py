"""The main job, whole and real, with the bundled tiny pair: both stages on Ray, vLLM, diffusers, FSDP2, Ray Data and MLflow.

One run serves all tests of this file. A rendering worker is killed in the middle of it.
"""

from __future__ import annotations

import io
import json
import os
import signal
from pathlib import Path

import mlflow
import numpy as np
import psutil
import pytest
import torch
from rich.console import Console

from actors.records import RenderRequest
from pipeline.commands.answer import AnswerError, run_answer
from pipeline.commands.demo import summarise, tell, write_answers
from pipeline.config import RunConfig, load_config
from pipeline.data.video import decode_video, probe
from pipeline.evaluate.evaluation import write_report
from pipeline.fleet.models import resolve_model
from pipeline.run.train import SYSTEMS, RunReport, run_training
from pipeline.stages.loop import StepReport
from pipeline.tracking.profile import read_profiles
from pipeline.tracking.rollouts import read_step, stored_steps

pytestmark = [pytest.mark.ray, pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(600)]
STEPS, GROUP, PROMPTS = 2, 4, 4


def settings(out: Path, data: Path, *more: str) -> RunConfig:
    return load_config(
        "toy",
        [
            f"name={out.name}",
            f"out={out}",
            f"data.train={data}/train",
            f"data.eval={data}/test",
            f"stage1.steps={STEPS}",
            f"stage2.steps={STEPS}",
            f"stage1.rollout={{prompts_per_step: {PROMPTS}, group_size: {GROUP}, max_refills: 2}}",
            "stage1.optim.ema=0.5",
            f"stage2.rollout={{prompts_per_step: 2, group_size: {GROUP}}}",
            "stage2.anchor_min_rouge=0.3",
            "pools.vlm.workers=2",
            "evaluate.samples=8",
            "checkpoint.every=1",
            "tracking.clips_every=1",
            *more,
        ],
    )


def kill_a_renderer() -> int:
    """Kill -9 one VDM worker of this process's Ray; returns its pid."""
    victims = [p for p in psutil.Process().children(recursive=True) if "VdmWorker" in " ".join(p.cmdline())]
    assert victims, "no VDM worker is running"
    os.kill(victims[0].pid, signal.SIGKILL)
    return victims[0].pid


@pytest.fixture(scope="module")
def run(ray_alone: None, toy_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, RunReport]:
    config = settings(tmp_path_factory.mktemp("e2e") / "run", toy_shards)
    seen: list[tuple[str, int]] = []

    def kill_once(stage: str, step: StepReport) -> None:
        if not seen:
            kill_a_renderer()
        seen.append((stage, step.step))

    report = run_training(config, evaluate=True, on_step=kill_once)
    assert seen == [(stage, step) for stage in ("stage1", "stage2") for step in range(STEPS)]
    return config, report


def test_both_stages_learnt_from_their_own_rollouts(run: tuple[RunConfig, RunReport]) -> None:
    _, report = run
    assert list(report.stages) == ["stage1", "stage2"]
    for stage in report.stages.values():
        assert stage.frozen_ok
        assert stage.ratio_max_dev == 0.0  # nothing updated yet: bitwise
        assert [m["learner/applied"] for m in stage.history] == [1.0] * STEPS
    first, second = report.stages["stage1"].history[0], report.stages["stage2"].history[0]
    assert first["rollout/groups"] == PROMPTS
    assert second["rollout/groups"] == 2
    assert first["learner/logp_diff_max"] < 1e-3  # vLLM against the learner, fp32
    assert {"learner/logp_diff_p0000", "learner/logp_diff_p0004"} <= set(first)  # and by token position,
    assert any(name.startswith("learner/logp_diff_t") for name in second)  # or by denoising step
    assert {"reward/format_mean", "reward/rouge_l_mean", "reward/clip_v_mean"} <= set(first)
    assert {"reward/clip_v_mean", "reward/clip_score_mean", "anchor/kept_ratio", "sde/window_start"} <= set(second)


def test_the_killed_worker_was_replaced_and_nothing_was_lost(run: tuple[RunConfig, RunReport]) -> None:
    _, report = run
    last = report.stages["stage2"].history[-1]
    assert last["pool/vdm/restarts"] >= 1
    assert all(m["rollout/dropped_groups"] == 0 for m in report.stages["stage1"].history)
    assert all(m["rollout/failed_members"] == 0 for stage in report.stages.values() for m in stage.history)


def test_samplers_and_learners_tell_how_fast_they_work(run: tuple[RunConfig, RunReport]) -> None:
    config, report = run
    working = {
        "stage1": {"vlm": "tokens", "vdm": "latents", "learner": "tokens"},
        "stage2": {"vdm": "latents", "learner": "latents"},
    }
    for name, units in working.items():
        for step in report.stages[name].history:
            for party, unit in units.items():
                assert step[f"speed/{party}/{unit}_per_s"] > 0 and step[f"speed/{party}/flops_per_s"] > 1e6
            assert not [metric for metric in step if metric.endswith("/mfu")]  # no GPU, no peak
    profile, _ = read_profiles(config.out)
    assert {party: speed.unit for party, speed in profile.speeds.items()} == working["stage1"]
    assert all(speed.mfu is None and speed.flops_per_s for speed in profile.speeds.values())


def test_stage_two_is_asked_of_the_average_that_stage_one_exported(run: tuple[RunConfig, RunReport]) -> None:
    from actors.weights.files import read_adapter
    from pipeline.checkpoint import CheckpointStore

    config, report = run
    thinker = {m["pool/vlm/version"] for m in report.stages["stage2"].history}
    assert thinker == {STEPS + 1.0}  # one version per update, and one for their average
    checkpoint = CheckpointStore(config.out / "checkpoints").latest("stage1")
    assert checkpoint is not None
    exported, saved = (read_adapter(f).tensors for f in (config.out / "vlm_adapter", checkpoint.path / "vlm_adapter"))
    assert all(np.array_equal(exported[name], saved[name]) for name in saved)
    assert (checkpoint.path / "vlm_learner" / "learner.json").read_text().count('"ema": 0.5') == 1


def test_groups_without_a_gradient_were_replaced_or_counted(run: tuple[RunConfig, RunReport]) -> None:
    _, report = run
    for metrics in report.stages["stage1"].history:
        drawn, replaced = metrics["rollout/refill_draws"], metrics["rollout/refilled_groups"]
        assert 0 <= replaced <= drawn <= 2
        assert drawn == 2 or metrics["advantage/zero_std_ratio"] == 0
    assert all("rollout/refill_draws" not in m for m in report.stages["stage2"].history)


def test_mlflow_holds_the_job_its_stages_and_their_steps(run: tuple[RunConfig, RunReport]) -> None:
    config, report = run
    client = mlflow.MlflowClient(report.tracking_uri)
    parent = client.get_run(report.run_id)
    assert parent.info.status == "FINISHED"
    assert parent.data.params["stage1.rollout.group_size"] == str(GROUP)
    children = client.search_runs([parent.info.experiment_id], f"tags.mlflow.parentRunId = '{report.run_id}'")
    assert {c.info.run_name for c in children} == {"stage1", "stage2"}
    for child in children:
        steps = [m.step for m in client.get_metric_history(child.info.run_id, "reward/total_mean")]
        assert sorted(steps) == list(range(STEPS))
        assert any(a.path.startswith("samples") for a in client.list_artifacts(child.info.run_id))
    assert any(key.startswith("eval/") for key in parent.data.metrics)
    assert (config.out / "config.yaml").is_file()


def test_every_rollout_is_in_the_folder_and_on_the_page(run: tuple[RunConfig, RunReport], tmp_path: Path) -> None:
    config, report = run
    stored = stored_steps(config.out)
    assert [(each.stage, each.step) for each in stored] == [(n, s) for n in ("stage1", "stage2") for s in range(STEPS)]
    for each, groups in zip(stored, (PROMPTS, PROMPTS, 2, 2), strict=True):
        stored_rows, note = read_step(each.path)
        figures = report.stages[each.stage].history[each.step]
        rows = [row for row in stored_rows if row["lost"] is None]
        refused = figures.get("anchor/kept", 0.0) / figures.get("anchor/kept_ratio", 1.0) - figures.get(
            "anchor/kept", 0.0
        )
        assert len(rows) == groups * GROUP and len(stored_rows) - len(rows) == round(refused)
        assert np.mean([row["reward"] for row in rows]) == pytest.approx(figures["reward/total_mean"])
        assert note["figures"] == figures and note["run"] == report.run_id
        assert {len({row[name] for row in rows if row["group"] == 0}) for name in ("question", "input_video")} == {1}
        for row in rows:
            if row["caption"]:
                assert decode_video(row["clip"], 9, 32, 32).shape == (9, 32, 32, 3)
                assert row["seeds"]["noise"] and row["seconds"]["render"] > 0
    page = mlflow.MlflowClient(report.tracking_uri).download_artifacts(
        report.run_id, "report/index.html", str(tmp_path)
    )
    html = Path(page).read_text(encoding="utf-8")
    assert (
        all(f'id="step-{each.stage}-{each.step}"' in html for each in stored) and "reward/total_mean at step 1" in html
    )


def test_checkpoints_of_both_stages_are_whole(run: tuple[RunConfig, RunReport]) -> None:
    from pipeline.checkpoint import CheckpointStore

    config, report = run
    store = CheckpointStore(config.out / "checkpoints")
    for name, policy in (("stage1", "vlm"), ("stage2", "vdm")):
        checkpoint = store.latest(name)
        assert checkpoint is not None and checkpoint.step == STEPS
        assert (checkpoint.path / f"{policy}_adapter" / "adapter_model.safetensors").is_file()
        assert checkpoint.state.mlflow_run_ids["parent"] == report.run_id


def test_the_exported_adapters_load_in_peft_and_diffusers(run: tuple[RunConfig, RunReport]) -> None:
    from diffusers import WanPipeline
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    config, _ = run
    model = AutoModelForImageTextToText.from_pretrained(resolve_model("tiny", "vlm"))
    tuned = PeftModel.from_pretrained(model, str(config.out / "vlm_adapter"))
    trained = [p for name, p in tuned.named_parameters() if "lora_B" in name]
    assert trained and any(p.abs().max() > 0 for p in trained)
    pipe = WanPipeline.from_pretrained(resolve_model("tiny", "vdm"))
    pipe.load_lora_weights(str(config.out / "vdm_adapter"))
    moved = [p for name, p in pipe.transformer.named_parameters() if "lora_B" in name]
    assert moved and any(p.abs().max() > 0 for p in moved)


def test_the_tuned_artist_draws_otherwise_than_the_base(run: tuple[RunConfig, RunReport]) -> None:
    from actors.vdm.policy import VdmPolicy
    from actors.vdm.sampling import sample

    config, report = run
    torch.set_num_threads(1)
    request = RenderRequest("s", 0, "the red circle rises", report.samples[0].context[[0, -1]], 9, 4, 1.0, 7)
    base, tuned = (
        sample(VdmPolicy.load(resolve_model("tiny", "vdm"), adapter=adapter), [request])[0].frames
        for adapter in (None, str(config.out / "vdm_adapter"))
    )
    assert base.shape == tuned.shape == (9, 32, 32, 3)
    assert np.abs(base.astype(int) - tuned.astype(int)).max() > 0


def test_evaluation_compares_both_pairs_on_the_same_samples(run: tuple[RunConfig, RunReport], tmp_path: Path) -> None:
    _, report = run
    assert report.table is not None
    for system in SYSTEMS:
        figures = report.table.figures(system)
        assert figures["n"] == 8
        assert {"rouge_l", "bleu_4", "clip_v", "clip_t", "frechet", "follow", "drawable", "format"} <= set(figures)
    write_report(tmp_path, report.table, report.predictions, report.samples)
    assert "Joint-GRPO" in (tmp_path / "table.md").read_text()
    assert json.loads((tmp_path / "figures.json").read_text())["SFT"]["n"] == 8
    assert (tmp_path / "contact_sheet.png").read_bytes().startswith(b"\x89PNG")


def test_the_demo_tells_what_happened(run: tuple[RunConfig, RunReport], tmp_path: Path) -> None:
    config, report = run
    summary = summarise(config, report, 12.0)
    assert summary["stage1"]["steps"] == summary["stage2"]["steps"] == STEPS
    assert summary["evaluation"]["joint_grpo"]["n"] == 8
    assert summary["ratio_gate"] == {"vlm": 0.0, "vdm": 0.0}
    assert summary["frozen_ok"] is True
    assert {"install", "pretrain", "stage1", "stage2", "evaluate"} <= set(summary["wall_s"])
    assert json.loads(json.dumps(summary)) == summary
    write_answers(tmp_path, report, 8.0)
    assert probe(tmp_path / "input.mp4").frames == 9
    assert {probe(path).width for path in (tmp_path / "answers").glob("*.mp4")} == {256}
    paper = Console(width=100, record=True, file=io.StringIO())
    tell(paper, tmp_path, summary)
    text = paper.export_text()
    assert "8 held-out questions" in text and "vans answer --vlm" in text


def test_the_tuned_pair_answers_two_questions_about_one_video_although_a_third_cannot_be_asked(
    run: tuple[RunConfig, RunReport], tmp_path: Path
) -> None:
    from pipeline.data.video import encode_mp4

    config, report = run
    video = tmp_path / "in.mp4"
    video.write_bytes(encode_mp4(report.samples[0].context, 8.0))
    questions = ["what if it were reversed ?", "next " * 1000, "what happens if it is done again ?"]
    out, adapters = tmp_path / "answer.mp4", {name: str(config.out / f"{name}_adapter") for name in ("vlm", "vdm")}
    with pytest.raises(
        AnswerError, match=r"^1 of 3 questions got no answer\n.* cannot be completed: .*512 tokens"
    ) as caught:
        run_answer(config, video, questions, out, **adapters)
    answers = caught.value.answers
    assert [a.path.name for a in answers] == ["answer-1.mp4", "answer-3.mp4"] and not (
        tmp_path / "answer-2.mp4"
    ).exists()
    for item in answers:
        assert item.caption
        assert probe(item.path).frames == 9
        drawn = decode_video(item.path, 9, 32, 32)
        assert np.abs(drawn.astype(int) - item.frames.astype(int)).mean() < 8  # what was drawn is what was written
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
