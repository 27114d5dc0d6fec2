"""The form of an answer where a run sets other tags than the default: read, paid and written by one object."""

import pickle

import pytest

from rewards.format import DEFAULT, Answer, AnswerFormat

RELEASED = AnswerFormat("[Think]", "[Ans]", strict=False, spaced=False)
WHOLE = "[Think]it rains[/Think][Ans]she opens\n an umbrella[/Ans]"


def test_other_tags_are_read_paid_and_written_and_the_default_ones_are_text() -> None:
    for tags in (RELEASED, AnswerFormat("[Think]", "[Ans]")):
        assert tags.parse(WHOLE) == Answer("it rains", "she opens an umbrella") and tags.reward(WHOLE) == 1.0
        assert tags.reward(DEFAULT.write("a", "b")) == 0.0
        assert tags.reward("[Think]<think>[/Think][Ans]<ans>[/Ans]") == 1.0
    assert DEFAULT.parse(WHOLE) is None
    assert str(RELEASED) == "[Think]…[/Think][Ans]…[/Ans]"


@pytest.mark.parametrize("tags", [DEFAULT, RELEASED, AnswerFormat("<a.b>", "<a+b>")])
def test_what_is_written_is_read_back(tags: AnswerFormat) -> None:
    written = tags.write("why", "what next")
    assert tags.parse(written) == Answer("why", "what next") and tags.reward(written) == 1.0
    assert (" why " in written) is tags.spaced
    assert pickle.loads(pickle.dumps(tags)) == tags


@pytest.mark.parametrize(
    ("text", "caption"),
    [
        ("[Ans]a[/Ans] and [Ans]b[/Ans]", "a"),
        ("no, wait [/Ans] [Ans] a [/Ans]", "a"),
        ("[Think]so[/Think] she opens\nan umbrella", "[Think]so[/Think] she opens an umbrella"),
        ("[Ans]she opens", "[Ans]she opens"),
        ("[Ans] [/Ans]", None),
        (" \n", None),
    ],
)
def test_the_first_caption_is_read_as_the_release_reads_it_and_never_paid(text: str, caption: str | None) -> None:
    """The release's rule: what a search for the first pair finds, and the whole text where there is none."""
    found = RELEASED.parse(text)
    assert (found.caption if found else None) == caption
    assert RELEASED.reward(text) == 0.0
    assert AnswerFormat("[Think]", "[Ans]").parse(text) is None
