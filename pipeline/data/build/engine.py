"""Asks that vLLM answers within the cluster, through ``ray.data.llm``.

An engine wants many asks at once, and a stage cannot go on without its replies. So the videos go through the stages up to the asks
that have no reply yet; these, from all videos, stream through one processor into the work area; and then again, until nothing waits.
A stage that finds its replies is not called twice, because what it made is kept too.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
from PIL import Image

from actors.endpoint.settings import Reply
from pipeline.data.build.asking import ASKS, messages_of
from pipeline.data.build.models import ModelSection
from pipeline.data.build.recipe import Recipe
from pipeline.data.build.store import WorkArea
from pipeline.data.build.worker import asks_of
from pipeline.data.reading import VideoLimits

MAX_MODEL_LEN = 8192
"""Tokens of a prompt and its answer, unless ``engine.arguments`` say otherwise."""
ERROR = "__inference_error__"  # ray.data.llm's column


def answer_pending(recipe: Recipe, engines: Sequence[str], area: WorkArea, videos: Callable[[], Any]) -> None:
    """Let each of the models ``engines`` answer all that the stages wait for, as often as their next stages wait for more.

    ``videos`` makes the dataset of the videos behind all stages.
    """
    while engines:
        answered = sum(_answer(name, recipe.models[name], area, videos()) for name in engines)
        if not answered:
            return


def _answer(name: str, model: ModelSection, area: WorkArea, videos: Any) -> int:
    """Return how many asks of the model ``name`` were answered."""
    asks = videos.map_batches(_Waiting(name, model, area), batch_size=1, batch_format="pyarrow", num_cpus=0.5)
    first = asks.take(1)
    if not first:
        return 0
    replies = processor_of(model)(asks)
    return sum(
        int(batch["kept"].sum())
        for batch in replies.map_batches(_Keep(area), batch_size=None).iter_batches(batch_format="numpy")
    )


def processor_of(model: ModelSection) -> Any:
    """Return the processor of ``ray.data.llm`` that turns rows of key and body into rows of key and reply."""
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    from actors.vlm.engine_args import EAGER, ENVIRONMENT, common_args

    assert model.engine is not None
    gpu = model.engine.gpus > 0
    chosen = {"max_model_len": MAX_MODEL_LEN, "enforce_eager": not gpu, **model.engine.arguments}
    bundle = {"CPU": model.engine.cpus, **({"GPU": model.engine.gpus} if model.engine.gpus else {})}
    config = vLLMEngineProcessorConfig(
        model_source=model.model,
        engine_kwargs=chosen | common_args(chosen["max_model_len"], gpu=gpu),
        batch_size=model.engine.batch,
        concurrency=model.engine.replicas,
        placement_group_config={"bundles": [bundle]},
        should_continue_on_error=True,
        runtime_env={"env_vars": ENVIRONMENT | ({} if gpu else EAGER)},
        prepare_multimodal_stage={"enabled": False},  # Ray 2.60's imports a module that vLLM 0.32 has elsewhere
    )
    return build_processor(config, preprocess=_Request(model), postprocess=_reply)


class _Waiting:
    """The asks that a block of videos waits for, as rows."""

    def __init__(self, name: str, model: ModelSection, area: WorkArea) -> None:
        self._name, self._model, self._area = name, model, area

    def __call__(self, block: pa.Table) -> pa.Table:
        found = asks_of(block, self._name, lambda ask: ask.key(self._model))
        found = [(key, ask) for key, ask in found if self._area.read(ASKS, key) is None]
        bodies = [
            json.dumps(
                {
                    "messages": messages_of(ask, self._model, self._area, VideoLimits()),
                    "schema": ask.schema,
                    "max_tokens": ask.max_tokens,
                    "seed": ask.seed,
                }
            )
            for _, ask in found
        ]
        text = pa.large_string()
        return pa.table({"key": pa.array([key for key, _ in found], text), "body": pa.array(bodies, text)})


class _Request:
    """Turns a row into what vLLM is asked."""

    def __init__(self, model: ModelSection) -> None:
        self._model = model

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        body = json.loads(row["body"])
        messages, pictures = without_pictures(body["messages"])
        sampling: dict[str, Any] = {
            "temperature": self._model.temperature,
            "max_tokens": body["max_tokens"],
            "seed": body["seed"],
        }
        if self._model.structured == "json_schema":
            sampling["structured_outputs"] = {"json": body["schema"]}
        asked = {"key": row["key"], "most": body["max_tokens"], "messages": messages, "sampling_params": sampling}
        return asked | ({"multimodal_data": {"image": pictures}} if pictures else {})


def without_pictures(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """Return ``messages`` with a place for each picture, as chat templates have it, and the pictures in their order."""
    pictures: list[Image.Image] = []
    placed = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        parts = []
        for part in content:
            if part["type"] == "image_url":
                data = base64.b64decode(part["image_url"]["url"].partition(",")[2])
                pictures.append(Image.open(io.BytesIO(data)).convert("RGB"))
                part = {"type": "image", "text": ""}  # the same keys in all parts: Ray Data makes columns of them
            parts.append(part)
        placed.append({"role": message["role"], "content": parts})
    return placed, pictures


def _reply(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "key": row["key"],
        "text": row.get("generated_text") or "",
        "most": int(row["most"]),
        "tokens_in": int(row.get("num_input_tokens") or 0),
        "tokens_out": int(row.get("num_generated_tokens") or 0),
        "seconds": float(row.get("time_taken_llm") or 0.0),
    }


class _Keep:
    """Writes replies into the work area."""

    def __init__(self, area: WorkArea) -> None:
        self._area = area

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        import numpy as np

        names = list(batch)
        rows = [dict(zip(names, values)) for values in zip(*(batch[name] for name in names))]
        for row in rows:
            if error := str(row.get(ERROR) or ""):
                reply = Reply(error, "empty")
            else:
                text, counted = (
                    str(row["text"]),
                    (int(row["tokens_in"]), int(row["tokens_out"]), round(float(row["seconds"]), 3)),
                )
                # The processor does not say why an answer ended: one as long as was allowed is taken to be cut short.
                fault = "truncated" if counted[1] >= int(row["most"]) else "" if text.strip() else "empty"
                reply = Reply(text, fault, *counted)  # type: ignore[arg-type]
            self._area.write(ASKS, str(row["key"]), asdict(reply))
        return {"kept": np.ones(len(rows), np.int64)}
