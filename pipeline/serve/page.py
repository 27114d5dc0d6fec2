"""The playground: a page at ``/`` on which a person asks about a clip and sees the answers beside it.

Made with Gradio, without its analytics, fonts or scripts from elsewhere. It asks the same :class:`Desk` as the API and shows the
API's files. What the page says is in ``words``.
"""

# Annotations are evaluated here, not put off: Gradio looks for its request among those of a function.
import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import Any

from fastapi import FastAPI

os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")  # read when Gradio is imported
import gradio as gr

from cluster.errors import VansError
from pipeline.serve.answers import ENDED, Answer, Question
from pipeline.serve.desk import Desk
from pipeline.serve.examples import Example
from pipeline.serve.words import LANGUAGES, Words, words_for

HISTORY = 20  # answers of a session that stay on the page
CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
SCRIPT = f"<script>{(Path(__file__).parent / 'page.js').read_text(encoding='utf-8')}</script>"


def mount(app: FastAPI, desk: Desk, examples: Sequence[Example]) -> FastAPI:
    """Return ``app`` with the page at ``/``; files of examples are written below the desk's folder."""
    uploads = desk.kept.root / "page"
    uploads.mkdir()
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)  # read when a file comes
    clips = [uploads / f"example-{number + 1}.mp4" for number in range(len(examples))]
    for path, example in zip(clips, examples, strict=True):
        path.write_bytes(example.video)
    limits, defaults = desk.config.serve.limits, desk.config.evaluate.render
    i18n = gr.I18n(**{tag: _named(words) for tag, words in LANGUAGES.items()})
    keep = int(limits.keep_s)
    with gr.Blocks(title="VANS on Ray", analytics_enabled=False, delete_cache=(60, keep)) as page:
        gr.Markdown(i18n("vans_title"))
        history = gr.State([])
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                video = gr.Video(label=i18n("vans_video"), sources=["upload", "webcam"], elem_id="video")
                questions = gr.Textbox(
                    label=i18n("vans_questions"), lines=3, elem_id="questions", info=i18n("vans_one_a_line")
                )
                compare = gr.Checkbox(False, label=i18n("vans_compare"), visible=len(desk.pairs) > 1, elem_id="compare")
                with gr.Accordion(i18n("vans_settings"), open=False):
                    seed = gr.Number(0, label=i18n("vans_seed"), precision=0, minimum=0)
                    steps = gr.Slider(
                        1, limits.steps, min(defaults.steps, limits.steps), step=1, label=i18n("vans_steps")
                    )
                    guidance = gr.Slider(1, limits.guidance, defaults.guidance, step=0.5, label=i18n("vans_guidance"))
                with gr.Row():
                    ask = gr.Button(i18n("vans_ask"), variant="primary", elem_id="ask")
                    cancel = gr.Button(i18n("vans_cancel"), elem_id="cancel")
                if clips:
                    gr.Examples(
                        [[str(path)] for path in clips], [video], label=i18n("vans_examples"), cache_examples=False
                    )
            with gr.Column(scale=2, min_width=300):
                shown = gr.HTML(elem_id="answers")

        async def answer(
            clip: str | None,
            text: str,
            seed: float | None,
            steps: float,
            guidance: float,
            both: bool,
            past: list[str],
            request: gr.Request,
        ) -> AsyncIterator[tuple[str, list[str]]]:
            words = words_for(request.headers.get("accept-language", ""))
            older = _past(desk, past, words)
            try:
                asked = desk.questions([line for line in (text or "").splitlines() if line.strip()])
                if clip is None:
                    raise VansError(words.no_video)
                if (seconds := desk.busy()) is not None:
                    raise VansError(words.busy.format(seconds=seconds))
                sample = await desk.read(Path(clip))
            except VansError as error:
                yield _notice(str(error).replace(clip or " ", "video")) + older, past
                return
            render = desk.render(int(steps), float(guidance))
            pairs = list(desk.pairs) if both else [None]
            made = [desk.open(sample, asked, int(seed or 0), render, pair) for pair in pairs]
            kept = [*(each.id for each in made), *past][:HISTORY]
            async for _ in _changes(made):
                cards = "".join(card(each, words) for each in made)
                yield f'<div class="vans-compare">{cards}</div>{older}', kept

        async def stop(past: list[str]) -> None:
            for name in past:
                made = desk.kept.get(name)
                if made is not None and made.ended is None:
                    desk.cancel(made)

        ask.click(
            answer,
            [video, questions, seed, steps, guidance, compare, history],
            [shown, history],
            concurrency_limit=None,
            show_progress="hidden",
            api_visibility="private",
        )
        cancel.click(stop, [history], None, concurrency_limit=None, api_visibility="private")
    plain = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    app = gr.mount_gradio_app(
        app,
        page,
        "/",
        footer_links=[],
        i18n=i18n,
        theme=plain,
        css=CSS,
        head=SCRIPT,
        max_file_size=desk.config.data.max_source_mib << 20,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        run_history=False,
        show_error=True,
    )
    return app


def _named(words: Words) -> dict[str, str]:
    """Return the texts under names that Gradio has no text of its own for."""
    return {f"vans_{name}": text for name, text in asdict(words).items()}


def card(answer: Answer, words: Words) -> str:
    """Return the HTML of an answer: each question beside the input, what is known of it, and links to its files."""
    seen = answer.as_json()
    pair = f"{getattr(words, seen['pair'], seen['pair'])} · "
    facts = f"{escape(pair)}{words.seed} {seen['seed']} · {words.steps} {seen['steps']} · {words.guidance} {seen['guidance']:g}"
    links = _link(f"/v1/answers/{answer.id}", "JSON", f"{answer.id}.json")
    if answer.state in ENDED and answer.input.is_file():
        links += _link(seen["sheet"], words.sheet, "contact-sheet.png")
    columns = "".join(_column(answer, number, question, words) for number, question in enumerate(answer.questions))
    return f'<section class="vans-answer"><div class="vans-columns">{columns}</div><p class="vans-facts">{facts} {links}</p></section>'


async def _changes(answers: Sequence[Answer]) -> AsyncIterator[Answer]:
    """Yield whichever of ``answers`` has changed, until all have ended."""
    changed: asyncio.Queue[Answer | None] = asyncio.Queue()

    async def watch(answer: Answer) -> None:
        async for _ in answer.changes():
            changed.put_nowait(answer)
        changed.put_nowait(None)

    watching = [asyncio.create_task(watch(answer)) for answer in answers]
    try:
        ended = 0
        while ended < len(answers):
            answer = await changed.get()
            if answer is None:
                ended += 1
            else:
                yield answer
    finally:
        for task in watching:
            task.cancel()


def _column(answer: Answer, number: int, question: Question, words: Words) -> str:
    state = f'<span class="vans-state vans-{question.state}">{escape(getattr(words, question.state))}</span>'
    parts = [f"<h3>{escape(question.text)}</h3>{state}"]
    if question.reasoning:
        parts.append(f'<p class="vans-reasoning">{escape(question.reasoning)}</p>')
    if question.caption:
        parts.append(f'<p class="vans-caption">{escape(question.caption)}</p>')
    if question.error and question.state == "failed":
        parts.append(f'<p class="vans-error">{escape(question.error)}</p>')
    if question.video is not None:
        seen = answer.as_json()
        clip = seen["questions"][number]["video"]
        parts.append(
            f'<div class="vans-pair">{_video(seen["input"], words.input)}{_video(clip, words.next)}</div>'
            + _link(clip, "mp4", f"answer-{number + 1}.mp4")
        )
    return f'<article class="vans-question">{"".join(parts)}</article>'


def _video(address: str, label: str) -> str:
    played = "controls loop muted autoplay playsinline"
    return f'<figure><video src="{escape(address)}" {played}></video><figcaption>{escape(label)}</figcaption></figure>'


def _link(address: str, label: str, name: str) -> str:
    return f'<a class="vans-link" href="{escape(address)}" download="{escape(name)}">{escape(label)}</a> '


def _notice(text: str) -> str:
    return f'<p class="vans-error" role="alert">{escape(text)}</p>'


def _past(desk: Desk, names: Sequence[str], words: Words) -> str:
    kept: list[Any] = [desk.kept.get(name) for name in names]
    return "".join(card(answer, words) for answer in kept if answer is not None)
