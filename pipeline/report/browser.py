"""A stored step as the page's rollout browser wants it: groups with their members, ranked and compared. Pure: rows in, JSON out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Keep = Callable[[bytes], str]
"""Takes an mp4 into the page and returns the name that it has there."""


def clip_name(video: bytes) -> str:
    """Return what a clip is called: a hash of its bytes, so that equal clips are one."""
    return hashlib.sha256(video).hexdigest()[:20]


def step_view(
    rows: Sequence[Mapping[str, Any]], note: Mapping[str, Any], stage: str, step: int, keep: Keep
) -> dict[str, Any]:
    """Return what the browser shows of a step: JSON-ready, seeds as text because they exceed JavaScript's numbers."""
    weights: dict[str, float] = note.get("weights", {})
    apart = disagreements(rows, tuple(weights))
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row["group"], []).append(i)
    return {
        "stage": stage,
        "step": step,
        "weights": weights,
        "groups": [_group([rows[i] for i in found], [apart[i] for i in found], keep) for found in groups.values()],
        "timeline": [timeline([rows[i] for i in found]) for found in groups.values()],
    }


def timeline(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a group's path through the pools: its number, when it ended, and its requests as [kind, began, ended, index].

    Seconds after the step's first request. Members that share a request, such as the group's completions, have it once. No request
    where the file is of a version that kept no times.
    """
    found: dict[tuple[str, float, float], int] = {}
    for row in rows:
        began = dict(row.get("began") or {})
        for kind, seconds in dict(row["seconds"] or {}).items():
            if kind in began:
                found.setdefault((kind, began[kind], began[kind] + seconds), row["index"])
    spans = [[*span, index] for span, index in sorted(found.items(), key=lambda each: each[0][1:])]
    return {"group": rows[0]["group"], "end": max((ended for _, _, ended in found), default=0.0), "spans": spans}


def _group(rows: Sequence[Mapping[str, Any]], apart: Sequence[float], keep: Keep) -> dict[str, Any]:
    first, rewards = rows[0], [row["reward"] for row in rows if row["reward"] is not None]
    texts = {row["text"] for row in rows}
    return {
        "number": first["group"],
        "id": first["sample_id"],
        "kind": first["kind"],
        "question": first["question"],
        "truth": first["truth"],
        "text": texts.pop() if len(texts) == 1 and first["tokens"] is None else None,
        "input": _kept(first["input_video"], keep),
        "target": _kept(first["target_video"], keep),
        "best": max(rewards, default=None),
        "worst": min(rewards, default=None),
        "spread": float(np.std(rewards)) if rewards else 0.0,
        "apart": max(apart, default=0.0),
        "lost": sum(row["lost"] is not None for row in rows),
        "seconds": max((sum(dict(row["seconds"] or {}).values()) for row in rows), default=0.0),
        "members": [_member(row, value, keep) for row, value in zip(rows, apart, strict=True)],
    }


def _member(row: Mapping[str, Any], apart: float, keep: Keep) -> dict[str, Any]:
    plain = (
        *("index", "lost", "caption", "reward", "advantage", "tokens", "finish_reason"),
        *("weights_version", "clip_version"),
    )
    return {name: row[name] for name in plain} | {
        "text": row["text"] if row["tokens"] is not None else None,
        "apart": apart,
        "scores": _finite(row["scores"]),
        "diagnostics": _finite(row["diagnostics"]),
        "seeds": {name: str(seed) for name, seed in dict(row["seeds"] or {}).items()},
        "seconds": _finite(row["seconds"]),
        "clip": _kept(row["clip"], keep),
    }


def _finite(values: Mapping[str, float] | None) -> dict[str, float]:
    """Return ``values`` without those that JSON has no number for."""
    return {name: value for name, value in (values or {}).items() if math.isfinite(value)}


def _kept(video: bytes | None, keep: Keep) -> str | None:
    return None if video is None else keep(video)


def disagreements(rows: Sequence[Mapping[str, Any]], components: Sequence[str]) -> list[float]:
    """Return for each row how far its components disagree: the largest minus the smallest of their z-scores over the step.

    0 where there are fewer than two components that differ within the step, and for a row without scores.
    """
    scored = [i for i, row in enumerate(rows) if all(name in (row["scores"] or {}) for name in components)]
    found = [0.0] * len(rows)
    if not scored:
        return found
    table = np.array([[rows[i]["scores"][name] for name in components] for i in scored], dtype=np.float64)
    spread = table.std(axis=0)
    differing = spread > 1e-12
    if differing.sum() < 2:
        return found
    z = (table - table.mean(axis=0))[:, differing] / spread[differing]
    for i, value in zip(scored, np.ptp(z, axis=1), strict=True):
        found[i] = float(value)
    return found
