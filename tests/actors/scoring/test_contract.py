"""What `vans reward check` finds of rewards that keep their promises, and of those that do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from actors.scoring.contract import Promise, check_reward
from pipeline.cli import app
from pipeline.commands.toy_answers import odd_answers, ordinary_answers

pytestmark = pytest.mark.slow

HERE = "tests.actors.scoring.my_judges"
PROMISES = [
    "loads",
    "judges",
    "range",
    "determinism",
    "batch independence",
    "order",
    "pickling",
    "odd answers",
    "frozen",
    "speed",
]


def found(name: str, **options: Any) -> dict[str, Promise]:
    path, elsewhere = f"{HERE}:{name}", name == "Brightness"  # a process of its own takes seconds to start
    promises = check_reward(path, ordinary_answers(), odd_answers(), options=options, elsewhere=elsewhere)
    return {p.name: p for p in promises}


@pytest.mark.parametrize("name", ["Length", "Brightness", "Variety"])
def test_sound_rewards_keep_every_promise(name: str) -> None:
    promises = found(name)
    assert {p.verdict for p in promises.values()} <= {"kept", "weak"}, promises
    assert promises["determinism"].found == "the same to the bit a second time"
    left_out = {"Length": {"pickling"}, "Variety": {"pickling", "batch independence"}}.get(name, set())
    assert list(promises) == [p for p in PROMISES if p not in left_out]
    assert name != "Brightness" or promises["pickling"].found == "the same to the bit in another process"


@pytest.mark.parametrize(
    ("how", "broken", "cause"),
    [
        (
            "batch",
            "batch independence",
            "answer 0 is 0.8, and 0.1 alone: a request that is sent again would earn another",
        ),
        ("drifts", "determinism", "and 0.02 a second time"),
        ("no_file", "loads", "FileNotFoundError"),
        ("few", "judges", "returned 7 values for 8 answer(s)"),
    ],
)
def test_a_broken_promise_is_named_with_what_was_seen(how: str, broken: str, cause: str) -> None:
    promises = found("Odd", how=how)
    assert promises[broken].verdict == "broken" and cause in promises[broken].found


@pytest.mark.parametrize(
    ("how", "cause"), [("nan", "is nan"), ("eleven", "is 11, outside the range 0…1"), ("late", "is late")]
)
def test_odd_answers_earn_a_value_or_a_reason_and_never_nan(
    how: str, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.actors.scoring import my_judges

    def score(self: Any, requests: Any) -> list[float]:
        if how == "late" and len(requests[0].clip) == 1:
            raise ImportError("the decoder is late")
        odd = {"nan": float("nan"), "eleven": 11.0}
        return [odd.get(how, 0.5) if len(r.clip) == 1 else r.index / 8 for r in requests]

    monkeypatch.setattr(my_judges.Odd, "score", score)
    monkeypatch.setattr(my_judges.Odd, "needs", ("clip",))
    promise = found("Odd", how=how)["odd answers"]
    assert promise.verdict == "broken" and promise.found.startswith("a clip of one frame") and cause in promise.found


def test_the_command_says_it_and_its_exit_code_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module lies in the working directory, which a console script does not look into by itself."""
    (tmp_path / "checked_rewards.py").write_text(
        "import random\n"
        "def redness(*, clip, **_):\n    return float(clip[..., 0].mean() / 255)\n"
        "def lottery(*, clip, **_):\n    return random.random()\n"
    )
    monkeypatch.chdir(tmp_path)
    good = CliRunner().invoke(app, ["reward", "check", "checked_rewards:redness"])
    assert good.exit_code == 0, good.output
    assert "the same to the bit in another process" in good.output and "broken" not in good.output
    bad = CliRunner().invoke(app, ["reward", "check", "checked_rewards:lottery"])
    assert bad.exit_code == 1 and "determinism" in bad.output and "broken" in bad.output
    absent = CliRunner().invoke(app, ["reward", "check", "no_such_rewards:Judge"])
    assert absent.exit_code == 1 and "cannot import 'no_such_rewards'" in absent.output.replace("\n", " ")
    option = CliRunner().invoke(app, ["reward", "check", f"{HERE}:Length", "--option", "most=1000"])
    assert option.exit_code == 0 and "…" in option.output
