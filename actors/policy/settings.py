"""Settings of what is trained of a policy, as a run's YAML and the policies read them. No torch: the command line reads them."""

from __future__ import annotations

from pydantic import Field

from actors.settings import Section, cite


class LoraSection(Section):
    """Low-rank adapter of the trained model; ``rank: 0`` trains all weights. Paper: r=8, alpha=32."""

    rank: int = Field(
        8,
        ge=0,
        description="LoRA rank; 0 trains the full weights, and the run exports a whole model (vlm_model, vdm_model) instead of "
        "an adapter (vlm_adapter, vdm_adapter).",
        json_schema_extra=cite("LoRA", "VANS"),
    )
    alpha: float = Field(
        32.0, gt=0, description="LoRA alpha; the scaling is alpha/rank.", json_schema_extra=cite("LoRA", "VANS")
    )
    targets: list[str] | None = Field(None, description="Module name suffixes; default: attention and MLP projections.")
