"""What an experiment is: rows that are trained or put together from other rows, and the orderings that are expected of them.

A row is configuration, not code: overrides of one run, adapters of other rows, or supervised training for the time that another
row took. A row that is put together from others may be asked other questions than they. This module holds types and contradictions;
running is ``reproducing``, the table is ``report``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from actors.settings import Positive, Section
from actors.vdm.settings import ConditioningSection
from cluster.errors import ConfigError
from pipeline.config.load import BUNDLED
from pipeline.config.yaml12 import parse_yaml
from pipeline.data.toy.scene import UNSEEN_BACKGROUNDS
from pipeline.evaluate.table import HEADINGS

EXPERIMENTS = BUNDLED.parent / "experiments"
Printed = Annotated[tuple[float | None, float | None], Field(strict=False)]


class PaperFigures(Section):
    """Figures of the paper for a row (arXiv 2511.16669, tables 1 and 2), procedural then predictive; null: not printed."""

    rouge_l: Printed = Field((None, None), description="ROUGE-L.")
    clip_v: Printed = Field((None, None), description="CLIP-V.")
    clip_t: Printed = Field((None, None), description="CLIP-T.")
    frechet: Printed = Field((None, None), description="FVD.")


class Asked(Section):
    """What a row is asked in place of the table's questions: the same held-out samples, changed in what nothing was trained on."""

    wording: Literal["unseen"] | None = Field(
        None,
        description="unseen: the thinker's caption is drawn in those words of the toy world that no artist was pretrained on.",
    )
    background: str | None = Field(None, description="Background of all scenes, one that no training scene has.")
    conditioning: ConditioningSection | None = Field(
        None, description="How the artist sees the input (video.conditioning), another way than it was trained with."
    )
    held: bool = Field(
        False,
        description="Each clip is held at its first frame: what an artist that draws nothing but stills would earn.",
    )

    @model_validator(mode="after")
    def _something(self) -> Asked:
        if not (self.wording or self.background or self.conditioning or self.held):
            raise ValueError(
                "asked says nothing else than the table's questions; give wording, background, conditioning or held"
            )
        if self.background is not None and self.background not in UNSEEN_BACKGROUNDS:
            raise ValueError(f"asked.background={self.background!r}: write {' or '.join(UNSEEN_BACKGROUNDS)}")
        return self


class Row(Section):
    """One row of the table. Without ``set`` and ``sft_like`` nothing is trained: the row is made of other rows' models."""

    title: str = Field(description="Name in the table.")
    vlm: str | None = Field(None, description="Row whose tuned VLM this row starts from.")
    vdm: str | None = Field(None, description="Row whose tuned VDM this row starts from.")
    set: list[str] | None = Field(None, description="Overrides of the base run; given, the row is trained.")
    shown: bool = Field(True, description="Whether it stands in the table; false for what other rows are made of.")
    sft_like: list[str] = Field(
        default_factory=list,
        description="Rows whose stages' wall time plain SFT of both models is given (the control of equal time).",
    )
    asked: Asked | None = Field(None, description="Other questions than the table's; its models are vlm's and vdm's.")
    paper: PaperFigures = Field(PaperFigures(), description="The paper's figures for this row.")

    @model_validator(mode="after")
    def _elsewhere(self) -> Row:
        if self.asked is not None and (self.set is not None or self.sft_like):
            raise ValueError(
                "asked goes with neither set nor sft_like: train a row of its own, and name it as vlm and vdm of the one that is asked"
            )
        if self.asked is not None and self.paper != PaperFigures():
            raise ValueError("asked goes without paper: the paper has no figures for other questions")
        return self

    @model_validator(mode="after")
    def _one_way(self) -> Row:
        if self.sft_like and (self.set is not None or self.vlm or self.vdm):
            raise ValueError("sft_like goes with neither set, vlm nor vdm: it is supervised training of the SFT pair")
        for override in self.set or ():
            if re.match(r"(models|video|evaluate)\.|stage[12]\.lora", override):
                raise ValueError(
                    f"{override!r}: all rows answer with the same models, video shape and adapter sizes; set it for the experiment"
                )
        return self

    @property
    def trained(self) -> bool:
        """Whether anything of this row depends on the seed."""
        return self.set is not None or bool(self.sft_like or self.vlm or self.vdm)


class Ordering(Section):
    """An order of rows by a metric that is expected to hold: best first, or one row before all others."""

    claim: str = Field(description="The claim, as the paper makes it.")
    metric: str = Field(description="Metric that decides: one of evaluation's, or of the experiment's rewards.")
    rows: list[str] = Field(
        default_factory=list, description="Rows, the best first (the lowest first for a Fréchet distance)."
    )
    best: str | None = Field(None, description="Instead of rows: the row that is better than every other one shown.")
    besides: list[str] = Field(default_factory=list, description="With best: shown rows that the claim is not about.")

    @model_validator(mode="after")
    def _one_form(self) -> Ordering:
        if (self.best is None) == (len(self.rows) < 2):
            raise ValueError(f"ordering {self.claim!r}: give two rows or more, or best")
        if self.besides and self.best is None:
            raise ValueError(f"ordering {self.claim!r}: besides goes with best, not with rows")
        return self

    def pairs(self, shown: Sequence[str]) -> list[tuple[str, str]]:
        """Return the pairs (better, worse) that must hold among the rows ``shown``."""
        if self.best is not None:
            return [(self.best, other) for other in shown if other not in (self.best, *self.besides)]
        return list(itertools.pairwise(self.rows))

    def rests_on(self) -> set[str]:
        """Return the rows without which it cannot be checked."""
        return {self.best} if self.best is not None else set(self.rows)


class Experiment(Section):
    """A table: its base run, its rows in the order of the table, and what is expected of them."""

    title: str = Field("The paper's table on the toy world", description="Title of the report.")
    base: str = Field("toy", description="Run that every row starts from: a YAML file or a bundled name.")
    set: list[str] = Field(default_factory=list, description="Overrides for all rows.")
    train_samples: Positive = Field(1024, description="Training samples of the toy world.")
    test_samples: Positive = Field(192, description="Held-out samples, which no choice was made on.")
    sft_samples: Positive = Field(2048, description="Supervised samples for the control of equal time.")
    drawable_captions: bool = Field(
        False,
        description="Whether all true captions are in words that the artist can draw; a third of their words are not.",
    )
    baseline: str = Field("sft", description="Row that gains are relative to.")
    rewards: list[str] = Field(
        default_factory=list,
        description="Rewards that all answers are measured by too (evaluate.rewards), whatever the rows are trained with.",
    )
    rows: dict[str, Row] = Field(min_length=1, description="Rows by key, each after those it is made of.")
    orderings: list[Ordering] = Field(default_factory=list, description="Orders that are checked.")

    @model_validator(mode="after")
    def _known_rows(self) -> Experiment:
        known: set[str] = set()
        for key, row in self.rows.items():
            for other in (row.vlm, row.vdm, *row.sft_like):
                if other is not None and other not in known:
                    raise ValueError(f"rows.{key} is made of {other!r}, which is not a row above it ({sorted(known)})")
            known.add(key)
        metrics = {*HEADINGS, *self.rewards}
        for ordering in self.orderings:
            if unknown := (ordering.rests_on() | set(ordering.besides)) - known:
                raise ValueError(f"ordering {ordering.claim!r} names unknown rows {sorted(unknown)}")
            if ordering.metric not in metrics:
                raise ValueError(
                    f"ordering {ordering.claim!r}: metric={ordering.metric!r} is not measured; there are {', '.join(sorted(metrics))}"
                )
            if ordering.best is not None and self.rows[ordering.best].asked is not None:
                raise ValueError(
                    f"ordering {ordering.claim!r}: {ordering.best!r} is asked other questions than the rows it is compared with"
                )
        if self.baseline not in known:
            raise ValueError(f"baseline={self.baseline!r} is not a row ({sorted(known)})")
        if self.rows[self.baseline].asked is not None:
            raise ValueError(f"baseline={self.baseline!r} is asked other questions than the table's")
        return self

    @property
    def backgrounds(self) -> list[str]:
        """The other backgrounds that rows are asked about."""
        return list(dict.fromkeys(b for row in self.rows.values() if row.asked and (b := row.asked.background)))

    def needed(self, wanted: list[str]) -> list[str]:
        """Return ``wanted`` rows (all where empty), those that they are made of, and the baseline, in the table's order."""
        if unknown := [key for key in wanted if key not in self.rows]:
            raise ConfigError(f"no row {', '.join(unknown)}; the rows are {', '.join(self.rows)}")
        todo, found = [*(wanted or self.rows), self.baseline], set()
        while todo:
            key = todo.pop()
            found.add(key)
            row = self.rows[key]
            todo += [other for other in (row.vlm, row.vdm, *row.sft_like) if other and other not in found]
        return [key for key in self.rows if key in found]


def load_experiment(source: str | Path = "table") -> Experiment:
    """Return the experiment in a YAML file, or a bundled one by its name. Raises ConfigError."""
    path = Path(source)
    try:
        if not path.is_file():
            path = EXPERIMENTS / f"{source}.yaml"
        there = path.is_file()
    except OSError as error:  # a name that is too long
        raise ConfigError(f"no experiment {str(source)[:100]!r}: {error.strerror}") from error
    if not there:
        names = ", ".join(sorted(p.stem for p in EXPERIMENTS.glob("*.yaml")))
        raise ConfigError(f"no experiment {str(source)!r}: not a file, and not one of the bundled ones ({names})")
    try:
        values: Any = parse_yaml(path.read_text(encoding="utf-8-sig"), str(path))
        return Experiment.model_validate(values)
    except ValidationError as error:
        lines = [f"{'.'.join(str(part) for part in d['loc'])}: {d['msg']}" for d in error.errors()]
        raise ConfigError(f"{path}: " + "; ".join(lines)) from error
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def quickened(experiment: Experiment) -> Experiment:
    """Return ``experiment`` with two small steps a stage and few samples: it shows that rows run, not what they are worth."""
    tiny = "{prompts_per_step: 2, group_size: 4}"
    rows = {
        key: row if row.set is None else row.model_copy(update={"set": [*row.set, *_quick_steps(row.set)]})
        for key, row in experiment.rows.items()
    }
    return experiment.model_copy(
        update={
            "set": [
                *experiment.set,
                *(f"{stage}.rollout={tiny}" for stage in ("stage1", "stage2")),
                *(f"sft.{role}.batch=16" for role in ("vlm", "vdm")),
                "stage2.anchor_min_rouge=0.3",
            ],
            "rows": rows,
            "train_samples": 32,
            "test_samples": 8,
            "sft_samples": 16,
        }
    )


def _quick_steps(overrides: list[str]) -> list[str]:
    return [f"{stage}.steps=2" for stage in ("stage1", "stage2") if f"{stage}.steps=0" not in overrides]
