"""Answers as HTML, the way the playground shows them. What people wrote is text in it, never markup. No Gradio."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from pipeline.serve.answers import ENDED, Answer
from pipeline.serve.words import Words


def card(answer: Answer, words: Words) -> str:
    """Return the HTML of an answer: each question beside the input, what is known of it, and links to its files."""
    seen = answer.as_json()
    pair = f"{getattr(words, seen['pair'], seen['pair'])} · "
    facts = f"{escape(pair)}{words.seed} {seen['seed']} · {words.steps} {seen['steps']} · {words.guidance} {seen['guidance']:g}"
    links = _link(f"/v1/answers/{answer.id}", "JSON", f"{answer.id}.json")
    if answer.state in ENDED and answer.input.is_file():
        links += _link(seen["sheet"], words.sheet, "contact-sheet.png")
    columns = "".join(_column(seen["input"], number, asked, words) for number, asked in enumerate(seen["questions"]))
    return f'<section class="vans-answer"><div class="vans-columns">{columns}</div><p class="vans-facts">{facts} {links}</p></section>'


def cards(answers: Iterable[Answer], words: Words) -> str:
    """Return the HTML of several answers, one below the other."""
    return "".join(card(answer, words) for answer in answers)


def side_by_side(answers: Iterable[Answer], words: Words) -> str:
    """Return the HTML of answers to one thing, beside each other where there is room."""
    return f'<div class="vans-compare">{cards(answers, words)}</div>'


def bar(answers: Sequence[Answer]) -> str:
    """Return the HTML of how much there is of ``answers`` together; nothing where all have ended."""
    if all(answer.state in ENDED for answer in answers):
        return ""
    share = sum(answer.progress for answer in answers) / len(answers)
    return f'<div class="vans-progress"><progress max="1" value="{share:.3f}"></progress> {share:.0%}</div>'


def notice(text: str) -> str:
    """Return the HTML of what could not be asked, and why."""
    return f'<p class="vans-error" role="alert">{escape(text)}</p>'


def _column(shown: str, number: int, asked: dict[str, Any], words: Words) -> str:
    """Return what is known of one question, as the API shows it; ``shown`` is where the input is."""
    state = f'<span class="vans-state vans-{asked["state"]}">{escape(getattr(words, asked["state"]))}</span>'
    parts = [f"<h3>{escape(asked['question'])}</h3>{state}"]
    if asked["reasoning"]:
        parts.append(f'<p class="vans-reasoning">{escape(asked["reasoning"])}</p>')
    if asked["caption"]:
        parts.append(f'<p class="vans-caption">{escape(asked["caption"])}</p>')
    if asked["error"] and asked["state"] == "failed":
        parts.append(f'<p class="vans-error">{escape(asked["error"])}</p>')
    if asked["video"] is not None:
        parts.append(
            f'<div class="vans-pair">{_video(shown, words.input)}{_video(asked["video"], words.next)}</div>'
            + _link(asked["video"], "mp4", f"answer-{number + 1}.mp4")
        )
    return f'<article class="vans-question">{"".join(parts)}</article>'


def _video(address: str, label: str) -> str:
    played = "controls loop muted autoplay playsinline"
    return f'<figure><video src="{escape(address)}" {played}></video><figcaption>{escape(label)}</figcaption></figure>'


def _link(address: str, label: str, name: str) -> str:
    return f'<a class="vans-link" href="{escape(address)}" download="{escape(name)}">{escape(label)}</a> '
