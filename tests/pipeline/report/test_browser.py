"""What the browser is given of a step: groups ranked by what a person sorts by, seeds whole, JSON that JavaScript reads. Pure."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from pipeline.report.browser import clip_name, disagreements, step_view


def row(group: int, index: int, reward: float | None, scores: dict[str, float] | None, **more: Any) -> dict[str, Any]:
    empty = dict.fromkeys(
        ("lost", "text", "caption", "tokens", "finish_reason", "diagnostics", "advantage", "weights_version", "clip_version",
         "seeds", "seconds", "input_video", "target_video", "clip")
    )  # fmt: skip
    about = {"group": group, "sample_id": f"s{group}", "kind": "predictive", "question": "q", "truth": "t"}
    return empty | about | {"index": index, "reward": reward, "scores": scores} | more


def test_components_disagree_where_one_is_high_and_the_other_low() -> None:
    agree, other = {"a": 1.0, "b": 10.0}, {"a": 0.0, "b": 0.0}
    rows = [row(0, i, 0.0, s) for i, s in enumerate([agree, agree, other, other, {"a": 1.0, "b": 0.0}])]
    found = disagreements([*rows, row(0, 5, None, None)], ("a", "b"))
    assert max(found) == found[4] and found[4] > 2 * max(found[:4]) and found[5] == 0.0


def test_components_that_do_not_differ_cannot_disagree() -> None:
    rows = [row(0, i, 0.0, {"a": float(i), "b": 1.0}) for i in range(3)]
    assert disagreements(rows, ("a", "b")) == [0.0] * 3
    assert disagreements([], ("a",)) == [] and disagreements([row(0, 0, None, None)], ("a",)) == [0.0]


def test_a_group_has_what_it_is_sorted_and_filtered_by() -> None:
    rows = [
        row(0, 0, 1.0, {"a": 1.0}, seconds={"render": 2.0, "text": 0.5}),
        row(0, 1, 3.0, {"a": 3.0}),
        row(0, 2, None, None, lost="too long"),
        row(1, 0, None, None, lost="cannot be asked"),
    ]
    view = step_view(rows, {"weights": {"a": 1.0}}, "stage1", 4, clip_name)
    first, second = view["groups"]
    assert (first["best"], first["worst"], first["spread"], first["lost"], first["seconds"]) == (3.0, 1.0, 1.0, 1, 2.5)
    assert (second["best"], second["spread"], second["lost"]) == (None, 0.0, 1)
    assert [m["lost"] for m in first["members"]] == [None, None, "too long"]


def test_a_groups_way_through_the_pools_has_each_request_once() -> None:
    text = {"began": {"text": 0.5}, "seconds": {"text": 1.0}}
    rows = [
        row(
            0,
            0,
            1.0,
            {},
            began=text["began"] | {"render": 1.5, "score": 4.0},
            seconds=text["seconds"] | {"render": 2.0, "score": 0.25},
        ),
        row(0, 1, 1.0, {}, began=text["began"] | {"render": 1.5}, seconds=text["seconds"] | {"render": 2.0}),
        row(1, 0, 1.0, {}, seconds={"text": 3.0}),
    ]
    first, old = step_view(rows, {"weights": {}}, "stage1", 0, clip_name)["timeline"]
    assert first == {
        "group": 0,
        "end": 4.25,
        "spans": [["text", 0.5, 1.5, 0], ["render", 1.5, 3.5, 0], ["score", 4.0, 4.25, 0]],
    }
    assert old == {"group": 1, "end": 0.0, "spans": []}  # a file without begins


def test_seeds_stay_whole_and_what_json_has_no_number_for_is_left_out() -> None:
    seed = 2**62 + 1
    view = step_view(
        [row(0, 0, 1.0, {"a": 1.0}, seeds={"text": seed}, diagnostics={"copy": math.nan, "motion_ratio": 0.5})],
        {"weights": {"a": 1.0}},
        "stage1",
        0,
        clip_name,
    )
    (member,) = json.loads(json.dumps(view, allow_nan=False))["groups"][0]["members"]
    assert member["seeds"] == {"text": str(seed)} and member["diagnostics"] == {"motion_ratio": 0.5}


def test_equal_clips_are_one() -> None:
    kept: dict[str, bytes] = {}

    def keep(video: bytes) -> str:
        return kept.setdefault(clip_name(video), video) and clip_name(video)

    rows = [row(0, i, float(i), {"a": 1.0}, clip=b"same", input_video=b"input", clip_version=3) for i in range(3)]
    view = step_view(rows, {"weights": {"a": 1.0}}, "stage1", 0, keep)
    assert sorted(kept.values()) == [b"input", b"same"]
    assert {m["clip"] for m in view["groups"][0]["members"]} == {clip_name(b"same")}


@pytest.mark.parametrize(("tokens", "shared"), [(None, "anchor"), (5, None)])
def test_what_the_frozen_thinker_wrote_stands_once_for_the_group(tokens: int | None, shared: str | None) -> None:
    rows = [row(0, i, 1.0, {"a": 1.0}, text="anchor", tokens=tokens) for i in range(2)]
    (group,) = step_view(rows, {"weights": {"a": 1.0}}, "stage2", 0, clip_name)["groups"]
    assert group["text"] == shared
    assert {m["text"] for m in group["members"]} == {None if shared else "anchor"}
