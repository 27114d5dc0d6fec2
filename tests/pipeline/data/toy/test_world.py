"""The toy world: deterministic, split without overlap, its language parses back, and its judge of clips is right."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import DataError
from pipeline.data.schema import shard_paths
from pipeline.data.toy import (
    SPLITS,
    Event,
    drawable,
    follow,
    follow_caption,
    make_sample,
    parse_caption,
    possible_outcomes,
    read_meta,
    render,
    write_toy,
)
from pipeline.data.toy.language import (
    COLOURS,
    LANGUAGES,
    OPPOSITE,
    SHAPES,
    VERBS,
    LanguageCode,
    caption_with,
    caption_words,
    language_in,
    reworded,
)
from pipeline.data.toy.scene import BACKGROUNDS, UNSEEN_BACKGROUNDS
from pipeline.data.toy.shards import ensure_toy
from pipeline.data.toy.world import SFT_WRONG_EVENTS
from pipeline.data.video import decode_video
from rewards.format import parse_answer

pytestmark = pytest.mark.slow


def test_sample_is_a_function_of_index_split_and_seed() -> None:
    one, again, other = (make_sample(5, "train", seed) for seed in (3, 3, 4))
    assert (one.question, one.answer_text, one.meta_json) == (again.question, again.answer_text, again.meta_json)
    assert np.array_equal(one.target_frames, again.target_frames)
    assert (one.meta_json, one.caption) != (other.meta_json, other.caption)


def test_splits_share_no_scene_and_no_scene_event_combination() -> None:
    seen: dict[str, set] = {}
    for split in SPLITS:
        samples = [make_sample(i, split, seed) for seed in (0, 1) for i in range(200)]
        seen[split] = {(s.scene.key(), s.event) for s in samples}
    training = seen["train"] | seen["sft"] | seen["artist"]
    assert not training & seen["test"] and not training & seen["val"] and not seen["val"] & seen["test"]
    scenes = {split: {key for key, _ in pairs} for split, pairs in seen.items()}
    assert not scenes["train"] & scenes["test"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_wording_parses_to_its_event_and_only_known_wordings_are_drawable(language: LanguageCode) -> None:
    for colour in COLOURS:
        for shape in SHAPES:
            for verb in VERBS:
                event = Event(colour, shape, verb)
                for wordings in ((0, 0, 0), (1, 0, 1), (2, 1, 0), (0, 2, 0), (1, 1, 2), (2, 2, 2)):
                    caption = caption_with(event, wordings, language)
                    assert parse_caption(caption) == event and language_in(caption) == language
                    assert drawable(caption) == (2 not in wordings)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the red circle",
        "the red circle grows bigger",
        "red red circle grows",
        "a dog barks",
        "红色的圆形",
        "红色的圆形上升了",
        "the 红色的圆形上升",
        "圆形红色上升",
    ],
)
def test_sentences_outside_the_grammar_do_not_parse(text: str) -> None:
    assert parse_caption(text) is None
    assert not drawable(text) and language_in(text) is None


def test_the_languages_tell_the_same_samples_in_their_own_words() -> None:
    for split in SPLITS:
        for i in range(24):
            english, chinese = make_sample(i, split), make_sample(i, split, language="zh")
            assert (english.scene, english.event, english.noisy) == (chinese.scene, chinese.event, chinese.noisy)
            assert np.array_equal(english.input_frames, chinese.input_frames)
            assert np.array_equal(english.target_frames, chinese.target_frames)
            assert parse_caption(english.caption) == parse_caption(chinese.caption) is not None
            assert drawable(english.caption) == drawable(chinese.caption)
            assert (language_in(english.caption), language_in(chinese.caption)) == ("en", "zh")
            assert not re.search("[a-z]", chinese.question + chinese.thought + chinese.caption)
            assert json.loads(chinese.meta_json)["language"] == "zh"
    with pytest.raises(ValueError, match="unknown language 'fr'; the toy world speaks en, zh"):
        make_sample(0, "test", language="fr")  # type: ignore[arg-type]


def test_a_reworded_caption_names_the_same_event_in_the_words_asked_for() -> None:
    assert reworded("the azure box slides left", 2) == "the cobalt block heads west"
    assert reworded("红色的圆形上升", 2) == "朱红的圆球攀升"
    assert reworded("the azure box", 2) == "the azure box", "what is no sentence stays"
    assert not drawable(reworded("the red circle rises", 2)) and drawable(reworded("the crimson ball ascends", 0))


def test_another_background_changes_nothing_else() -> None:
    own, other = make_sample(3, "test"), make_sample(3, "test", background="moss")
    assert (own.id, own.question, own.caption, own.event) == (other.id, other.question, other.caption, other.event)
    assert own.scene.things == other.scene.things and other.scene.background == "moss"
    assert np.abs(own.target_frames.astype(int) - other.target_frames).mean() > 5
    assert follow(other.meta_json, other.target_frames) and not follow(other.meta_json, render(other.scene, None))


def test_no_scene_is_drawn_with_an_unseen_background() -> None:
    drawn = {make_sample(i, split).scene.background for split in SPLITS for i in range(0, 60, 2)}
    assert drawn == {*BACKGROUNDS} and not drawn & {*UNSEEN_BACKGROUNDS}


def test_no_chinese_wording_holds_another_so_that_a_text_is_cut_in_one_way() -> None:
    words = caption_words("zh")
    assert len(words) == len(set(words)) == 3 * (len(COLOURS) + len(SHAPES) + len(VERBS)) + 1 + 8
    assert [(a, b) for a in words for b in words if a != b and a in b] == []


def test_a_mixed_dataset_is_a_quarter_chinese_by_whole_blocks(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    write_toy(tmp_path, train=32, test=0, language="mixed")
    rows = pq.read_table(shard_paths(tmp_path / "train")[0]).to_pylist()
    told = [json.loads(row["meta"])["language"] for row in rows]
    assert told == ["en"] * 12 + ["zh"] * 4 + ["en"] * 12 + ["zh"] * 4
    assert [language_in(row["caption"]) for row in rows] == told
    with pytest.raises(DataError, match="language=fr: the toy world speaks en, zh, mixed"):
        write_toy(tmp_path / "other", train=1, test=0, language="fr")


def test_true_clips_follow_and_still_or_wrong_clips_do_not() -> None:
    rng = np.random.default_rng(0)
    for i in range(40):
        sample = make_sample(i, "test")
        noisy = np.clip(sample.target_frames + rng.normal(0, 20, sample.target_frames.shape), 0, 255).astype(np.uint8)
        assert follow(sample.meta_json, sample.target_frames) and follow(sample.meta_json, noisy)
        assert follow_caption(sample.meta_json, sample.caption, sample.target_frames)
        still = np.repeat(sample.input_frames[-1:], len(sample.target_frames), axis=0)
        assert not follow(sample.meta_json, still)
        other = next(e for e in possible_outcomes(sample.scene) if e != sample.event)
        assert not follow(sample.meta_json, render(sample.scene, other))
        assert not follow_caption(sample.meta_json, "nothing of the sort", sample.target_frames)


def test_input_clip_ends_where_the_target_clip_starts() -> None:
    for i in range(12):
        sample = make_sample(i, "train")
        assert np.array_equal(sample.input_frames[-1], sample.target_frames[0])
        assert not np.array_equal(sample.input_frames[2], sample.input_frames[-1])


def test_one_clip_and_two_questions_have_two_futures() -> None:
    for block in range(10):
        a, b = (make_sample(4 * block + place, "train") for place in (2, 3))
        assert a.kind == b.kind == "predictive"
        assert np.array_equal(a.input_frames, b.input_frames)
        assert a.question != b.question and a.event != b.event


def test_the_recipe_rule_decides_the_next_step() -> None:
    for i in range(0, 40, 4):
        sample = make_sample(i, "train")
        first, rest = sample.thought.split(" then ")
        second, _ = rest.split(" so ")
        shown = [parse_caption("the " + part) for part in (first, second)]
        assert shown[0] is not None and shown[1] is not None
        assert shown[1].verb == OPPOSITE[shown[0].verb] and sample.event.verb == shown[0].verb
        actor = (sample.event.colour, sample.event.shape)
        if len(sample.scene.things) == 3:
            assert actor not in {(e.colour, e.shape) for e in shown if e is not None}
        else:
            assert actor == (shown[0].colour, shown[0].shape)


def test_answers_have_the_format_and_sft_answers_the_announced_noise() -> None:
    samples = [make_sample(i, "sft") for i in range(300)]
    for sample in samples:
        answer = parse_answer(sample.answer_text)
        assert answer is not None and answer.caption == sample.caption
        assert (parse_caption(sample.caption) != sample.event) == sample.noisy
    assert abs(np.mean([s.noisy for s in samples]) - SFT_WRONG_EVENTS) < 0.08
    assert not any(make_sample(i, split).noisy for split in ("train", "val", "test") for i in range(50))


def test_artist_captions_are_drawable_and_most_clips_show_them() -> None:
    samples = [make_sample(i, "artist") for i in range(200)]
    assert all(drawable(s.caption) for s in samples)
    shown = np.mean([follow_caption(s.meta_json, s.caption, s.target_frames) for s in samples])
    assert 0.68 < shown < 0.88


def test_meta_gives_scene_and_event_back() -> None:
    sample = make_sample(9, "test")
    scene, event = read_meta(sample.meta_json)
    assert (scene, event) == (sample.scene, sample.event)
    assert len(possible_outcomes(scene)) == len(VERBS) * len(scene.things)
    with pytest.raises(ValueError, match="not a toy-world record"):
        read_meta('{"camera": 1}')


def test_written_shards_decode_to_the_rendered_frames(tmp_path) -> None:
    import pyarrow.parquet as pq

    counts = write_toy(tmp_path / "toy", train=6, test=3, seed=2, sft=2)
    assert counts == {"train": 6, "val": 3, "test": 3, "sft": 2}
    rows = pq.read_table(shard_paths(tmp_path / "toy" / "test")[0]).to_pylist()
    for i, row in enumerate(rows):
        sample = make_sample(i, "test", 2)
        frames = decode_video(row["target_video"], 9, 32, 32)
        assert (row["id"], row["question"], row["caption"]) == (sample.id, sample.question, sample.caption)
        assert np.abs(frames.astype(int) - sample.target_frames).mean() < 2.0
        assert follow(row["meta"], frames)
    with pytest.raises(DataError, match="already holds a dataset"):
        write_toy(tmp_path / "toy", train=1, test=0)
    with pytest.raises(DataError, match="at least 1 training row"):
        write_toy(tmp_path / "other", train=0, test=1)


def test_ensure_toy_leaves_a_whole_dataset_alone_and_replaces_half_of_one(tmp_path: Path) -> None:
    out, half = tmp_path / "toy", tmp_path / "toy.partial"
    write_toy(half, train=1, test=1)  # an earlier attempt that was killed before it was complete
    ensure_toy(out, train=3, test=2, sft=1)
    assert sorted(p.name for p in out.iterdir()) == ["sft", "test", "train", "val"] and not half.exists()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.parquet")}
    ensure_toy(out, train=9, test=9)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.parquet")} == before
