"""``vans reproduce``: the paper's table on the toy world, over several seeds.

For: the experiment, its rows, spread, the report beside the paper's figures.
Not for: how one run trains (``pipeline.run``).
Begin with ``reproducing``.
"""

from pipeline.reproduce.reproducing import reproduce
from pipeline.reproduce.spec import Experiment, Row, load_experiment, quickened

__all__ = ["Experiment", "Row", "load_experiment", "quickened", "reproduce"]
