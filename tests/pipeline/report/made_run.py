"""A run's folder as a run leaves it, made without training: configuration, MLflow store, rollouts of both stages of the toy world."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from actors.records import Clip, Completion, Sample, Scores
from pipeline.config import RunConfig, load_config, to_yaml
from pipeline.control.trace import TRACE_FILE
from pipeline.data.toy import make_sample
from pipeline.stages.groups import Group, Member, RolloutBatch, Span, assemble
from pipeline.tracking import Tracker
from pipeline.tracking.rollouts import FOLDER, step_rollouts, write_step

WEIGHTS = {"format": 1.0, "rouge_l": 1.0, "clip_v": 2.0}
STEPS, GROUPS, SIZE = {"stage1": 9, "stage2": 4}, 4, 6
FROZEN = range(3, 6)  # steps of stage 1 whose clips do not move
HOSTILE = "</script><script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> {{ 7 * 7 }}"


@cache
def toy(index: int) -> Sample:
    made = make_sample(index, "test")
    question = HOSTILE if index == 1 else made.question
    return Sample(made.id, made.kind, question, made.caption, made.input_frames, made.target_frames)  # type: ignore[arg-type]


def member(sample: Sample, step: int, index: int, rng: np.random.Generator) -> Member:
    """A member whose reward rises with the steps; that of index 5 has no caption."""
    good = index != 5
    text = f"<think>step {step}</think><ans>{sample.caption}</ans>" if good else "no form"
    completion = Completion(text, np.zeros(12, np.int32), np.zeros(12, np.float32), "stop" if good else "length", step)
    values = {
        "format": float(good),
        "rouge_l": rng.uniform(0.3, 0.6) * good,
        "clip_v": good * (0.4 + 0.05 * step + rng.normal(0, 0.05)),
    }
    clip = Clip(sample.id, index, sample.caption, np.roll(sample.target_frames, index * 3, axis=2), 0) if good else None
    spans = {"text": Span(50.0, 0.4), "render": Span(50.4, rng.uniform(0.5, 3.0)), "score": Span(54.0, 0.1)}
    scores = Scores(sample.id, index, values, {"motion_ratio": 0.05 if step in FROZEN else 0.9})
    return Member(index, sample.caption if good else "", scores, completion, clip, step, {"text": 2**62 + index}, spans)


def batch(stage: str, step: int) -> RolloutBatch:
    """The groups of a step; in every third one a group loses a member and another one all but one."""
    rng = np.random.default_rng([step, len(stage), ord(stage[-1])])
    groups = []
    for place in range(GROUPS):
        sample = toy((step + place) % 6)
        members = tuple(member(sample, step, i, rng) for i in range(SIZE))
        lost: tuple[str, ...] = ()
        if step % 3 == 0 and place == 1:
            members, lost = members[:-1], ("the artist refused it: <b>too long</b>",)
        if step % 3 == 0 and place == 2:
            members, lost = members[:1], ("the scorer died",) * (SIZE - 1)
        groups.append(Group(sample, members, lost))
    return assemble(groups, WEIGHTS, std_norm="group", normalise_rewards=False, min_group=2, trained_version=step)


def trace() -> list[dict[str, Any]]:
    """Lines of pools.jsonl: the artist's pool works all the time, the thinker's waits; a second artist comes after a minute."""
    point = {"ready": 1, "queue_len": 0}
    return [
        {
            "time": 1e9 + t,
            "pools": {"vlm": point | {"busy": 0}, "vdm": point | {"busy": 1, "ready": 1 + (t > 60), "queue_len": t}},
        }
        for t in range(0, 120, 10)
    ]


def make_run(out: Path, *more: str, store: bool = True, clips: str = "all") -> RunConfig:
    """Write the folder of a run into ``out`` and return its configuration; without ``store`` nothing is in MLflow."""
    config = load_config("toy", ["name=made", f"out={out}", "alarms.patience=1", *more])
    out.mkdir(parents=True)
    (out / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    (out / TRACE_FILE).write_text("".join(json.dumps(line) + "\n" for line in trace()), encoding="utf-8")
    batches = {(stage, step): batch(stage, step) for stage, count in STEPS.items() for step in range(count)}
    figures = {
        (stage, step): made.metrics | {"learner/kl": 0.01 * step, "time/step_s": 2.0, "cache/captions": float(step)}
        for (stage, step), made in batches.items()
    }
    run_id = ""
    if store:
        with Tracker.start(config) as tracker:
            run_id = tracker.run_id
            for stage, count in STEPS.items():
                with tracker.stage(stage):
                    for step in range(count):
                        tracker.log_metrics(figures[stage, step], step)
    for (stage, step), made in batches.items():
        rollouts = step_rollouts(
            stage,
            step,
            made,
            clips=clips,
            group_size=SIZE,
            weights=WEIGHTS,
            figures=figures[stage, step],
            fps=8.0,
            run_id=run_id,
        )
        write_step(out / FOLDER, rollouts)
    return config
