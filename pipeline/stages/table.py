"""The stages of a run, in their order, by the way of training that a configuration names."""

from __future__ import annotations

from pipeline.stages.all_in_one import AllInOne
from pipeline.stages.stage1 import Stage1
from pipeline.stages.stage2 import Stage2

AnyStage = Stage1 | Stage2 | AllInOne


STAGES: dict[str, tuple[type[AnyStage], ...]] = {"two_stage": (Stage1, Stage2), "all_in_one": (AllInOne,)}
