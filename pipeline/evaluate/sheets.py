"""The contact sheet of an evaluation: what was asked, what really happened, and what each system said and drew.

Responsible for which clips and words stand on the sheet; ``pipeline.data.sheet`` draws it, and nothing here scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from actors.records import Sample
from pipeline.data.sheet import Strip, contact_sheet
from pipeline.evaluate.figures import Answered
from pipeline.evaluate.predictions import Prediction
from pipeline.evaluate.table import EvaluationTable


def evaluation_sheet(
    samples: Sequence[Sample],
    systems: Mapping[str, Sequence[Prediction]],
    path: Path,
    *,
    table: EvaluationTable | None = None,
    count: int = 8,
    title: str = "",
) -> Path:
    """Write the sheet of ``count`` samples, both kinds in turn: input, ground truth, and each system's first answer.

    With ``table`` each answer's note says its ROUGE-L, CLIP-V and (toy) whether it shows the right event.
    """
    answers = {} if table is None else {(n, a.id, a.index): a for n, r in table.systems.items() for a in r.answers}
    first = {(name, p.id): p for name, found in systems.items() for p in sorted(found, key=lambda p: -p.index)}
    rows: list[tuple[str, list[Strip]]] = []
    for sample in _mixed(samples, count):
        strips = [Strip("input", sample.context), Strip(f"ground truth\n{sample.caption}", sample.target_frames)]
        for name in systems:
            prediction = first.get((name, sample.id))
            if prediction is None:
                continue
            said = prediction.caption or "(no caption)"
            watched, problem = prediction.watched(sample.target_frames)
            note = problem or _note(answers.get((name, sample.id, prediction.index)))
            strips.append(Strip(f"{name}\n{said}", watched.frames, note))
        rows.append((f"{sample.question}   · {sample.kind}", strips))
    return contact_sheet(rows, path, title=title)


def _mixed(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Return ``count`` samples in which the kinds take turns, each kind in the given order."""
    kinds = {kind: [s for s in samples if s.kind == kind] for kind in dict.fromkeys(s.kind for s in samples)}
    turns = [
        group[i] for i in range(max(map(len, kinds.values()), default=0)) for group in kinds.values() if i < len(group)
    ]
    return turns[:count]


def _note(answer: Answered | None) -> str:
    if answer is None:
        return ""
    values = answer.values
    parts = [f"{text} {values[n]:.2f}" for n, text in (("rouge_l", "ROUGE-L"), ("clip_v", "CLIP-V")) if n in values]
    if "follow" in values:
        parts.append("right event" if values["follow"] == 1 else "wrong event")
    return " · ".join(parts)
