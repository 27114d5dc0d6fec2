"""What all sections of a configuration share: the strict model, the papers that keys come from, common types."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Pair = Annotated[tuple[float, float], Field(strict=False)]  # YAML has lists only


PAPERS = {
    "VANS": "arXiv:2511.16669",
    "VANS as released": "KlingAIResearch/VANS, February 2026",
    "GRPO": "arXiv:2402.03300",
    "DAPO": "arXiv:2503.14476",
    "Dr.GRPO": "arXiv:2503.20783",
    "GDPO": "arXiv:2601.05242",
    "GSPO": "arXiv:2507.18071",
    "CISPO": "arXiv:2506.13585",
    "PPO": "arXiv:1707.06347",
    "IMPALA": "arXiv:1802.01561",
    "AReaL": "arXiv:2505.24298",
    "Flow-GRPO": "arXiv:2505.05470",
    "DanceGRPO": "arXiv:2505.07818",
    "MixGRPO": "arXiv:2507.21802",
    "Flash-GRPO": "arXiv:2605.15980",
    "GRPO-Guard": "arXiv:2510.22319",
    "CPS": "arXiv:2509.05952",
    "DiffusionNFT": "arXiv:2509.16117",
    "PromptRL": "arXiv:2602.01382",
    "AWM": "arXiv:2509.25050",
    "classifier-free guidance": "arXiv:2207.12598",
    "rectified flow": "arXiv:2403.03206",
    "DeepSpeed-Ulysses": "arXiv:2309.14509",
    "LoRA": "arXiv:2106.09685",
    "nucleus sampling": "arXiv:1904.09751",
    "AdamW": "arXiv:1711.05101",
    "cosine": "arXiv:1608.03983",
    "warm-up": "arXiv:1706.02677",
    "KL estimators": "Schulman 2020, Approximating KL divergence",
    "KL as a loss": "arXiv:2510.01555",
}


def cite(*papers: str) -> dict[str, Any]:
    """Return the ``json_schema_extra`` of a key that does what ``papers`` (names in PAPERS) introduced."""
    return {"source": "; ".join(f"{name} ({PAPERS[name]})" for name in papers)}


FREE: dict[str, Any] = {"free": True}
"""The ``json_schema_extra`` of a key or section that may differ between a run and its continuation (``pipeline.config.resume``)."""


class Section(BaseModel):
    """A part of the configuration; a key it does not know is an error, and so is a value of another type.

    A whole number does where any number is meant. Nothing else is converted: ``true`` is not 1, and ``"5"`` is not 5. Infinity
    and NaN are no settings, and JSON, in which a checkpoint holds its configuration, has neither.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True, allow_inf_nan=False)
