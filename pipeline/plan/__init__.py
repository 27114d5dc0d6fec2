"""``vans plan``: a run on given GPUs before anything starts (docs/placement.md)."""

from pipeline.plan.models import load_models
from pipeline.plan.plan import Plan, make_plan

__all__ = ["Plan", "load_models", "make_plan"]
