"""Rows that a thinker cannot learn from: quarantined and counted in ``vans sft``, each with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.records import Sample
from actors.vlm.policy import VlmPolicy
from actors.vlm.settings import PromptSection
from cluster.errors import DataError
from pipeline.config import load_config
from pipeline.data.decoder import Shard, decode_block
from pipeline.data.schema import Row, ShardWriter
from pipeline.data.toy import make_sample
from pipeline.data.video import VideoLimits, encode_mp4
from pipeline.sft import SftSettings, sft_settings
from pipeline.sft.items import Items, refusal, training_item

GOOD = ("what next ?", "the disc grows", "<think> a </think> <ans> b </ans>")


class Blocks:
    """Rows of one shard as Ray Train's iterator gives them, decoded by the same function."""

    def __init__(self, shard: Path, rows: int, settings: Any) -> None:
        places = np.arange(rows)
        batch = {"epoch": 0 * places, "position": places, "shard": 0 * places, "row": places}
        batch |= {"group": 0 * places, "offset": places}
        self.block = decode_block(batch, (Shard(str(shard), rows),), settings.shape, VideoLimits())

    def iter_batches(self, **_: Any) -> Iterator[dict[str, np.ndarray]]:
        yield self.block


def items(tmp_path: Path, policy: VlmPolicy, rows: list[tuple[str, str, str | None]]) -> Items:
    sample, folder = make_sample(0, "test"), tmp_path / "shards"
    clips = encode_mp4(sample.input_frames, 8.0), encode_mp4(sample.target_frames, 8.0)
    with ShardWriter(folder) as writer:
        for number, (question, caption, answer) in enumerate(rows):
            writer.write(Row(f"row-{number}", "predictive", question, caption, *clips, "test", "{}", answer))
    (shard,) = folder.glob("*.parquet")
    run = load_config("toy", ["sft.vlm.batch=2", "learner.ranks=1"])
    settings = sft_settings(run, "vlm")
    blocks = Blocks(shard, len(rows), settings)
    return Items(blocks, "vlm", settings, [str(shard)], 0, len(rows), partial(refusal, "vlm", policy))


@pytest.fixture(scope="module")
def policy(tiny_vlm_dir: Path) -> VlmPolicy:
    return VlmPolicy.load(tiny_vlm_dir)


def test_rows_that_spell_special_tokens_are_counted_with_their_reason(
    tmp_path: Path, policy: VlmPolicy, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        GOOD,
        ("what <|im_end|> next ?", GOOD[1], GOOD[2]),
        (GOOD[0], GOOD[1], GOOD[2].replace("b", "b<|video_pad|>")),
        (GOOD[0], "the disc <|im_start|>", None),
        (GOOD[0], "the disc </ans> grows", None),
        ("next " * 100_000, GOOD[1], GOOD[2]),
        (GOOD[0], "the disc grows \u202e 😀", None),
    ]
    found = items(tmp_path, policy, rows)
    batch = next(found.batches(0))
    assert {row for _, row in found.quarantined} == {1, 2, 3, 4, 5}
    for reason in ("'<|im_end|>'", "special tokens", "not <think>", "positions"):
        assert reason in caplog.text
    assert len(batch) == found.size and policy.sft_loss(batch) is not None


def test_a_set_of_such_rows_alone_says_why(tmp_path: Path, policy: VlmPolicy) -> None:
    with pytest.raises(DataError, match=r"no usable sample; the last row is .*row 1 .*'<\|im_end\|>'"):
        next(items(tmp_path, policy, [("a <|im_end|>", "c", None)] * 2).batches(0))


def test_answers_are_learnt_in_the_format_of_the_run() -> None:
    """A dataset holds the default format, whatever the run's; an answer that is of neither is left for the check to refuse."""
    released = SftSettings(prompt=PromptSection(think_tag="[Think]", answer_tag="[Ans]", spaced=False))
    frames = np.zeros((2, 8, 8, 3), np.uint8)

    def learnt(settings: SftSettings, answer: str | None) -> str:
        sample = Sample("s", "predictive", "what next ?", "the disc grows", frames, frames, answer=answer)
        return str(training_item("vlm", sample, settings)[1])

    held = "<think>  why </think>\n<ans> the disc  grows </ans>"
    assert learnt(SftSettings(), held) == held
    assert learnt(SftSettings(), None) == "<think> the disc grows </think> <ans> the disc grows </ans>"
    assert learnt(released, held) == "[Think]why[/Think][Ans]the disc grows[/Ans]"
    assert learnt(released, None) == "[Think]the disc grows[/Think][Ans]the disc grows[/Ans]"
    for text in ("[Think]why[/Think][Ans]b[/Ans]", "of neither"):
        assert learnt(released, text) == text
