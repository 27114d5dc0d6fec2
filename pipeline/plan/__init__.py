"""``vans plan``: a run on given GPUs before anything starts (docs/placement.md).

For: memory, seconds and the balanced split.
Not for: starting anything.
Begin with ``plan``.
"""

from pipeline.plan.models import load_models
from pipeline.plan.plan import Plan, make_plan

__all__ = ["Plan", "load_models", "make_plan"]
