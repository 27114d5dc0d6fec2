"""docs/placement.md shows what ``vans plan`` prints; ``make docs`` writes it."""

from pathlib import Path

from pipeline.plan.document import renewed


def test_the_document_shows_what_is_printed() -> None:
    text = (Path(__file__).parents[3] / "docs" / "placement.md").read_text(encoding="utf-8")
    assert "$ vans plan vans_paper --gpus 8x80\nvans_paper on 8 GPU(s) of 80 GiB\n" in text
    assert renewed(text) == text, "make docs writes it anew"
