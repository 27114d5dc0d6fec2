"""``vans reproduce``: the paper's ablation table on the toy world, over several seeds, with the paper's figures beside it."""

from pipeline.reproduce.run import reproduce
from pipeline.reproduce.spec import Experiment, Row, load_experiment, quickened

__all__ = ["Experiment", "Row", "load_experiment", "quickened", "reproduce"]
