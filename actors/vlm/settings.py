"""Settings of the thinker's prompt and of the vLLM engines, as a run's YAML and the actors read them. No torch: the command line
reads them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from actors.pool.settings import PoolSection
from actors.settings import Positive, Section, cite
from rewards.format import AnswerFormat

Tag = Annotated[str, Field(pattern=r"^(<[^<>/\s]+>|\[[^\[\]/\s]+\])$")]

SYSTEM_TEXT = "You answer a question about a video with the next event. Write {} your reasoning {} {} one sentence {}"
"""Short on purpose: the tiny models have a context of 512 tokens."""


class PromptSection(Section):
    """What the thinker is told, and the form of its answers. Prompt, rewards, SFT, engine, rollouts and evaluation follow it."""

    system: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="System text; null is one sentence that asks for the two tags.",
        json_schema_extra=cite("VANS as released"),
    )
    think_tag: Tag = Field(
        "<think>",
        description="Tag that opens the reasoning, between <> or []; the closing one has a slash more. The release's is "
        '"[Think]", in YAML with its quotes.',
        json_schema_extra=cite("VANS", "VANS as released"),
    )
    answer_tag: Tag = Field(
        "<ans>",
        description='Tag that opens the caption, of the same kind. The release\'s is "[Ans]".',
        json_schema_extra=cite("VANS", "VANS as released"),
    )
    caption: Literal["well_formed", "first"] = Field(
        "well_formed",
        description="Whose caption is drawn. well_formed: an answer that is exactly one thought and one caption, which is what the "
        "reward format pays; another has none. first: whatever stands in the first answer tags, and the whole text where there are "
        "none, as the release reads it; the reward format stays as strict.",
        json_schema_extra=cite("VANS as released"),
    )
    spaced: bool = Field(
        True,
        description="Whether SFT's answers have a space beside each tag; the release's have none.",
        json_schema_extra=cite("VANS as released"),
    )

    @property
    def answers(self) -> AnswerFormat:
        """The form of an answer: what reads captions, pays the format and writes SFT's answers."""
        return AnswerFormat(self.think_tag, self.answer_tag, self.caption == "well_formed", self.spaced)

    @property
    def system_text(self) -> str:
        """The system message."""
        return SYSTEM_TEXT.format(*self.answers.tags) if self.system is None else self.system

    @model_validator(mode="after")
    def _two_tags(self) -> PromptSection:
        if self.think_tag == self.answer_tag:
            raise ValueError(
                f"think_tag and answer_tag are both {self.think_tag!r}: a caption could not be told from the reasoning"
            )
        return self


PROMPT = PromptSection()
"""The prompt of the bundled thinker."""


class VlmPoolSection(PoolSection):
    """vLLM engines."""

    max_batch: Positive = Field(1, description="Most requests in one call of a worker; vLLM batches by itself.")
    max_inflight: Positive = Field(64, description="Requests inside one engine at once.")
    max_model_len: Positive = Field(512, description="vLLM's context length in tokens.")
    kv_cache_mib: Positive | None = Field(256, description="KV cache per engine in MiB; null lets vLLM decide (GPU).")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Engine dtype.")
    gpu_memory_utilization: float = Field(0.85, gt=0, le=1, description="vLLM's share of the GPU's memory.")
    tensor_parallel: Positive = Field(1, description="GPUs per engine.")
    enforce_eager: bool = Field(True, description="Skip graph capture; false is faster on GPUs after a slower start.")
    grouped_lora: bool = Field(
        True,
        description="On a CPU, add an adapter to all its tokens by one matrix product, where vLLM gathers it for each token. "
        "Log-probabilities differ by float noise. GPUs have vLLM's own kernels.",
    )
    text_at_end: bool = Field(
        True,
        description="Make a completion's text once it has ended, where vLLM makes it token by token: the same text, less work for each "
        "token.",
    )

    @property
    def receivers(self) -> int:
        """One for each GPU of an engine."""
        return self.tensor_parallel

    @model_validator(mode="after")
    def _whole_gpus(self) -> VlmPoolSection:
        if self.gpus > 0 and self.tensor_parallel > 1 and self.gpus != self.tensor_parallel:
            raise ValueError(
                f"tensor_parallel={self.tensor_parallel} with gpus={self.gpus:g}: an engine over {self.tensor_parallel} GPUs needs "
                f"gpus: {self.tensor_parallel} (one bundle, so all of them are on one node)"
            )
        return self
