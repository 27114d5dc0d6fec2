"""The checks without a model, on wordings whose faults are known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.build.checks import MENTIONS, Bounds, content, faults, mentioned, other_script, overlap, units

QUESTION = "The onions are chopped, so what should I do next?"
REASONING = "Chopped onions are usually fried in a little oil, which brings out their taste."
CAPTION = "A cook drops onions into a hot pan and stirs."


def reasons(
    question: str = QUESTION, reasoning: str = REASONING, caption: str = CAPTION, language: str = "en"
) -> list[str]:
    return [fault.reason for fault in faults(question, reasoning, caption, language, Bounds())]


def test_a_good_wording_has_no_fault() -> None:
    assert reasons() == []
    assert (
        reasons(
            "洋葱已经切好了，接下来我该做什么？",
            "切好的洋葱通常会用一点油来炒，使味道更香。",
            "厨师把洋葱放进热锅里翻炒。",
            "zh",
        )
        == []
    )


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"question": "Does a cook drop the onions into a hot pan and stir?"}, "gives away"),
        ({"question": "What happens in the second clip after this?"}, "mentions target"),
        ({"reasoning": "As the target caption says, the onions are fried in a pan."}, "mentions target"),
        ({"caption": "Stir."}, "length"),
        ({"caption": "word " * 500}, "length"),
        ({"caption": "厨师把洋葱放进热锅里翻炒"}, "language"),
        ({"question": "1 2 3 4 5 6?"}, "language"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_fault_is_found(changed: dict[str, str], reason: str) -> None:
    assert reason in reasons(**changed)


def test_a_question_that_describes_a_clip_is_found() -> None:
    said = "Hands chop onions on a wooden board"
    found = faults("Hands chop onions on a wooden board; what comes then?", REASONING, CAPTION, "en", Bounds(), [said])
    assert [fault.reason for fault in found] == ["describes"]


def test_chinese_is_counted_in_characters_and_compared_in_pairs() -> None:
    assert len(units("把洋葱放进锅里 OK", "zh")) == 8
    assert content("放进锅里", "zh") == {"放进", "进锅", "锅里"}
    assert overlap("请放进锅里", "放进锅里", "zh") == 1.0


def test_word_endings_do_not_hide_an_overlap() -> None:
    assert overlap("they are mixing onions", "mixed onion", "en") == 1.0
    assert overlap("they are frying onions", "mixed onion", "en") == 0.5


@given(st.text(max_size=80), st.text(max_size=80), st.sampled_from(["en", "zh"]))
def test_shares_are_shares_of_any_text(text: str, other: str, language: str) -> None:
    assert 0.0 <= overlap(text, other, language) <= 1.0
    assert 0.0 <= other_script(text, language) <= 1.0
    assert overlap(other, other, language) in (0.0, 1.0)


@given(st.sampled_from([phrase for phrases in MENTIONS.values() for phrase in phrases]), st.sampled_from(["en", "zh"]))
def test_a_mention_is_found_in_either_language_whatever_its_case(phrase: str, language: str) -> None:
    assert mentioned(f"So it is, as the {phrase.upper()} shows", language)
