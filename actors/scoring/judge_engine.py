"""A judge that vLLM serves in the reward's own worker: a folder of weights instead of an endpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from actors.endpoint.settings import AskFailedError, Fault, Reply
from cluster.errors import ConfigError

if TYPE_CHECKING:
    from actors.scoring.judge import JudgeSection


MAX_MODEL_LEN = 8192
"""Tokens of a prompt and its answer, unless ``engine`` says otherwise."""


class JudgeEngine:
    """vLLM with the model of ``settings``. Raises ConfigError where it cannot be started."""

    def __init__(self, settings: JudgeSection, dtype: str) -> None:
        from actors.vlm.engine_args import EngineSpec, common_args, on_gpu, prepare_environment

        prepare_environment(EngineSpec(settings.model))
        from vllm import LLM

        chosen: dict[str, Any] = {
            "dtype": dtype,
            "max_model_len": MAX_MODEL_LEN,
            "limit_mm_per_prompt": {"image": 3 * settings.frames, "video": 0},
            "enforce_eager": not on_gpu(),
            **settings.engine,
        }
        arguments = chosen | common_args(chosen["max_model_len"], gpu=on_gpu())
        try:
            self._engine = LLM(model=settings.model, **arguments)
        except Exception as error:
            raise ConfigError(
                f"judge: vLLM does not start with model={settings.model!r} and engine={settings.engine}: {error}"
            ) from error

    def send(self, bodies: list[dict[str, Any]]) -> list[Reply | AskFailedError]:
        """Return the reply to each of ``bodies``; a prompt that the model cannot take is an AskFailedError."""
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        found: list[Reply | AskFailedError] = []
        if not bodies:
            return found
        schemas = [body.get("response_format", {}).get("json_schema", {}).get("schema") for body in bodies]
        params = [
            SamplingParams(
                temperature=body["temperature"],
                max_tokens=body["max_tokens"],
                seed=body["seed"],
                structured_outputs=None if schema is None else StructuredOutputsParams(json=schema),
            )
            for body, schema in zip(bodies, schemas, strict=True)
        ]
        try:
            outputs = self._engine.chat([body["messages"] for body in bodies], params, use_tqdm=False)
        except ValueError as error:  # too long a prompt
            if len(bodies) == 1:
                return [AskFailedError("too long", str(error))]
            return [reply for body in bodies for reply in self.send([body])]
        for output in outputs:
            (completion,) = output.outputs
            fault: Fault = (
                "truncated" if completion.finish_reason == "length" else "" if completion.text.strip() else "empty"
            )
            found.append(Reply(completion.text, fault, len(output.prompt_token_ids), len(completion.token_ids)))
        return found
