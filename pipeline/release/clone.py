"""What a clone of the authors' repository says of the released pair: prompt, tags, frames, decoding, schedule, guidance, rate.

Source: github.com/KlingAIResearch/VANS as of February 2026. Nothing of it is executed, and none of its sentences stand here: the system
text and the negative prompt come from the clone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError
from pipeline.release.literals import NotLiteralError, NotThereError, Place, Source

REPOSITORY = "github.com/KlingAIResearch/VANS"
AGENT = "vans/models_mllm/agent_mllm.py"
FRAMES = "vans/models_mllm/qwen-vl-utils/src/qwen_vl_utils/vision_process.py"
PIPELINE = "vans/pipelines/wan_video_new.py"
INFERENCE = "inference.py"

_ASKED = "MLLMAgent.generate_with_query"
_ROW = "process_video_row"
_DRAWN = "WanVideoPipeline.__call__"


_LORA = {
    "r": 8,
    "lora_alpha": 32,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}


@dataclass(frozen=True)
class Row:
    """Where a value stands in a clone, what kind of value it is, and what it was in February 2026.

    ``was`` is taken where the name is there and its value is computed. Texts have none: other people's sentences are not kept here.
    """

    file: str
    place: Place
    kind: type[Any]
    was: Any = None


ROWS: Mapping[str, Row] = {
    "system": Row(AGENT, Place("MLLMAgentConfig.__init__", parameter="system_prompt"), str),
    "lora": Row(AGENT, Place("MLLMAgentConfig.__init__", parameter="mllm_lora_config"), dict, _LORA),
    "vision_queries": Row(AGENT, Place("MLLMAgentConfig.__init__", parameter="num_visionqueries"), int, 0),
    "temperature": Row(AGENT, Place(_ASKED, call="generate", argument="temperature"), float, 0.7),
    "top_p": Row(AGENT, Place(_ASKED, call="generate", argument="top_p"), float, 0.9),
    "answer_tokens": Row(AGENT, Place(_ASKED, call="generate", argument="max_new_tokens"), int, 1024),
    "rollout_tokens": Row(AGENT, Place("MLLMAgent.generate_grpo_samples", variable="max_generate_length"), int, 256),
    "caption_pattern": Row(PIPELINE, Place("extract_caption", variable="pattern"), str),
    "frames_seen": Row(FRAMES, Place(variable="FPS_MAX_FRAMES"), int, 6),
    "multiple": Row(FRAMES, Place(variable="IMAGE_FACTOR"), int, 28),
    "least_pixels": Row(FRAMES, Place(variable="VIDEO_MIN_PIXELS"), int, 128 * 28 * 28),
    "most_pixels": Row(FRAMES, Place(variable="VIDEO_MAX_PIXELS"), int, 768 * 28 * 28),
    "negative_prompt": Row(INFERENCE, Place(_ROW, call="pipe", argument="negative_prompt"), str),
    "height": Row(INFERENCE, Place(_ROW, call="pipe", argument="height"), int, 352),
    "width": Row(INFERENCE, Place(_ROW, call="pipe", argument="width"), int, 640),
    "num_frames": Row(INFERENCE, Place(_ROW, call="pipe", argument="num_frames"), int, 33),
    "tiled": Row(INFERENCE, Place(_ROW, call="pipe", argument="tiled"), bool, True),
    "tile": Row(PIPELINE, Place(_DRAWN, parameter="tile_size"), tuple, (30, 52)),
    "stride": Row(PIPELINE, Place(_DRAWN, parameter="tile_stride"), tuple, (15, 26)),
    "fps": Row(INFERENCE, Place(_ROW, call="save_video", argument="fps"), float, 11),
    "steps": Row(PIPELINE, Place(_DRAWN, parameter="num_inference_steps"), int, 50),
    "guidance": Row(PIPELINE, Place(_DRAWN, parameter="cfg_scale"), float, 5.0),
    "shift": Row(PIPELINE, Place(_DRAWN, parameter="sigma_shift"), float, 5.0),
    "take": Row(PIPELINE, Place(_DRAWN, call="linspace", argument=2), int, 6),
    "sigma_min": Row(
        PIPELINE, Place("WanVideoPipeline.__init__", call="FlowMatchScheduler", argument="sigma_min"), float, 0.0
    ),
    "extra_step": Row(
        PIPELINE, Place("WanVideoPipeline.__init__", call="FlowMatchScheduler", argument="extra_one_step"), bool, True
    ),
}

BY_CODE: Mapping[str, tuple[Any, str]] = {
    "models.prompt.caption": ("first", f"{PIPELINE}: extract_caption takes the first match, else the whole text"),
    "models.prompt.spaced": (False, f"{AGENT}: tokenize joins tags and texts without a space"),
    "video.vlm_fps": (2.0, f"{AGENT}: tokenize tells the processor no rate, and transformers then takes 2"),
    "video.conditioning.references": ("clip", f"{PIPELINE}: the whole input clip is encoded"),
    "video.conditioning.time": ("shared", f"{PIPELINE}: one timestep goes to all tokens"),
    "sft.vdm.timesteps": ("uniform", f"{PIPELINE}: training_loss draws the timestep's number uniformly"),
    "sft.vdm.weighting": ("bell", "vans/schedulers/flow_match.py: training_weight"),
}
"""What the release does by its code and not by a literal: key of a run → value and where it is done."""


@dataclass(frozen=True)
class Lora:
    """The thinker's adapter: its file holds neither alpha nor targets."""

    rank: int
    alpha: float
    targets: tuple[str, ...]


@dataclass(frozen=True)
class Release:
    """What a clone says."""

    values: Mapping[str, Any]  # by the names of ROWS
    lora: Lora
    think_tag: str
    answer_tag: str
    computed: tuple[str, ...]  # names of ROWS whose value is no literal in this clone

    def where(self, name: str) -> str:
        """Return where the value ``name`` is from, for the report."""
        row = ROWS[name]
        told = f"{row.file}: {row.place}"
        return f"{told} is computed there; {row.was!r} as in February 2026" if name in self.computed else told


def read_clone(clone: Path) -> Release:
    """Return what the clone in the folder ``clone`` says.

    Raises CheckpointError where it is no such clone, or its code is another: the message names the file, and the name in it.
    """
    if not clone.is_dir():
        raise CheckpointError(f"{clone}: no such folder; give a clone of {REPOSITORY}")
    sources = {row.file: Source(clone, row.file) for row in ROWS.values()}
    values: dict[str, Any] = {}
    computed = []
    for name, row in ROWS.items():
        where = f"{clone / row.file}: {row.place}"
        try:
            values[name] = _of_kind(sources[row.file].read(row.place), row.kind, where)
        except NotThereError as error:
            raise CheckpointError(f"{_no_clone(clone)}: {row.file} has no {row.place}") from error
        except NotLiteralError as error:
            if row.was is None:
                raise CheckpointError(
                    f"{where} is computed ({error}), and only a literal can be read; use the commit of February 2026"
                ) from error
            values[name] = row.was
            computed.append(name)
        except CheckpointError as error:
            raise CheckpointError(f"{_no_clone(clone)}: {error}") from error
    if values["vision_queries"]:
        raise CheckpointError(
            f"{clone / AGENT}: num_visionqueries={values['vision_queries']}: such a thinker hands query embeddings to its artist, "
            "which Wan as published does not read; only 0, as released, can be imported"
        )
    think, answer = _tags(values, clone)
    return Release(values, _lora(values["lora"], clone), think, answer, tuple(computed))


def _no_clone(clone: Path) -> str:
    return f"{clone} is not a clone of {REPOSITORY} as of February 2026"


def _of_kind(value: Any, kind: type[Any], where: str) -> Any:
    """Return ``value`` as ``kind``; a number may be written as the other kind of number where that changes nothing."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind in (int, float) and number and kind(value) == value:
        return kind(value)
    if isinstance(value, kind) and kind not in (int, float):
        return value
    raise CheckpointError(f"{where} is {str(value)[:80]!r}, which is no {kind.__name__}")


def _tags(values: Mapping[str, Any], clone: Path) -> tuple[str, str]:
    """Return the opening tags of thought and answer: the pairs in the system text, the second being what is searched for."""
    pairs = re.findall(r"(\[(\w+)\])\s*\[/\2\]|(<(\w+)>)\s*</\4>", values["system"])
    tags = [square or angle for square, _, angle, _ in pairs]
    if len(tags) != 2:
        raise CheckpointError(
            f"{clone / AGENT}: the system text names {len(tags)} pairs of tags ({', '.join(tags) or 'none'}); it should name one for "
            "the reasoning and one for the answer"
        )
    searched = values["caption_pattern"].replace("\\", "")
    if not searched.startswith(tags[1]):
        raise CheckpointError(
            f"{clone / PIPELINE}: extract_caption searches for {searched!r}, but the system text in {AGENT} asks for {tags[1]}: two "
            "versions are mixed"
        )
    return tags[0], tags[1]


def _lora(config: Mapping[str, Any], clone: Path) -> Lora:
    where = f"{clone / AGENT}: mllm_lora_config"
    missing = [key for key in ("r", "lora_alpha", "target_modules") if not config.get(key)]
    if missing:
        raise CheckpointError(f"{where} has no {' and no '.join(missing)}")
    targets = config["target_modules"]
    if not isinstance(targets, list | tuple) or not all(isinstance(t, str) for t in targets):
        raise CheckpointError(f"{where}: target_modules={targets!r} is no list of names")
    return Lora(
        _of_kind(config["r"], int, f"{where}['r']"),
        _of_kind(config["lora_alpha"], float, f"{where}['lora_alpha']"),
        tuple(targets),
    )
