"""The playground: a page at ``/`` on which a person asks about a clip and sees the answers beside it.

Made with Gradio, without its analytics, fonts or scripts from elsewhere. It asks the same :class:`Desk` as the API and shows the
API's files. What the page says is in ``words``, how an answer looks in ``cards``.
"""

# Annotations are evaluated here, not put off: Gradio looks for its request among those of a function.
import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import FastAPI

os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")  # read when Gradio is imported
import gradio as gr

from actors.records import Sample
from cluster.errors import DataError, VansError
from pipeline.serve.answers import Answer
from pipeline.serve.cards import bar, cards, notice, side_by_side
from pipeline.serve.desk import Desk
from pipeline.serve.examples import Example
from pipeline.serve.words import LANGUAGES, Words, words_for

HISTORY = 20  # answers of a session that stay on the page
CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
SCRIPT = f"<script>{(Path(__file__).parent / 'page.js').read_text(encoding='utf-8')}</script>"
TEXTS = gr.I18n(
    **{tag: {f"vans_{name}": text for name, text in asdict(words).items()} for tag, words in LANGUAGES.items()}
)
"""What the page says, under names that Gradio has no text of its own for."""


def mount(app: FastAPI, desk: Desk, examples: Sequence[Example]) -> FastAPI:
    """Return ``app`` with the page at ``/``; files of examples are written below the desk's folder."""
    uploads = desk.kept.root / "page"
    uploads.mkdir()
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)  # read when a file comes
    clips = [uploads / f"example-{number + 1}.mp4" for number in range(len(examples))]
    for path, example in zip(clips, examples, strict=True):
        path.write_bytes(example.video)
    plain = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    app = gr.mount_gradio_app(
        app,
        Playground(desk).layout(clips),
        "/",
        footer_links=[],
        i18n=TEXTS,
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


class Playground:
    """The page of one desk: what is on it, and what its buttons do."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def layout(self, clips: Sequence[Path]) -> gr.Blocks:
        """Return the page; ``clips`` are offered as examples."""
        keep = int(self._desk.config.serve.limits.keep_s)
        with gr.Blocks(title="VANS on Ray", analytics_enabled=False, delete_cache=(60, keep)) as page:
            gr.Markdown(TEXTS("vans_title"))
            history = gr.State([])
            with gr.Row():
                with gr.Column(scale=1, min_width=300):
                    inputs = self._inputs()
                    with gr.Row():
                        ask = gr.Button(TEXTS("vans_ask"), variant="primary", elem_id="ask")
                        cancel = gr.Button(TEXTS("vans_cancel"), elem_id="cancel")
                    if clips:
                        rows = [[str(path)] for path in clips]
                        gr.Examples(rows, inputs[:1], label=TEXTS("vans_examples"), cache_examples=False)
                with gr.Column(scale=2, min_width=300):
                    progress = gr.HTML(elem_id="progress")
                    shown = gr.HTML(elem_id="answers")
            ask.click(
                self.answer,
                [*inputs, history],
                [shown, progress, history],
                concurrency_limit=None,
                show_progress="hidden",
                api_visibility="private",
            )
            cancel.click(self.stop, [history], None, concurrency_limit=None, api_visibility="private")
        return page

    def _inputs(self) -> list[gr.components.Component]:
        """Return what a person fills in, in the order of :meth:`answer`."""
        limits, defaults = self._desk.config.serve.limits, self._desk.config.evaluate.render
        several = len(self._desk.pairs) > 1
        video = gr.Video(label=TEXTS("vans_video"), sources=["upload", "webcam"], elem_id="video")
        questions = gr.Textbox(
            label=TEXTS("vans_questions"), lines=3, elem_id="questions", info=TEXTS("vans_one_a_line")
        )
        compare = gr.Checkbox(False, label=TEXTS("vans_compare"), visible=several, elem_id="compare")
        with gr.Accordion(TEXTS("vans_settings"), open=False, elem_id="settings"):
            seed = gr.Number(0, label=TEXTS("vans_seed"), precision=0, minimum=0)
            steps = gr.Slider(
                1, limits.steps, min(defaults.steps, limits.steps), step=1, label=TEXTS("vans_steps"), elem_id="steps"
            )
            guidance = gr.Slider(1, limits.guidance, defaults.guidance, step=0.5, label=TEXTS("vans_guidance"))
        return [video, questions, seed, steps, guidance, compare]

    async def answer(
        self,
        clip: str | None,
        text: str,
        seed: float | None,
        steps: float,
        guidance: float,
        both: bool,
        past: list[str],
        request: gr.Request,
    ) -> AsyncIterator[tuple[Any, str, list[str]]]:
        """Ask, and yield after each change: the page's answers, the newest first; how much there is of it; the answers' ids.

        Answers that look as before are not shown anew, so that clips play on while others are drawn.
        """
        desk, words = self._desk, words_for(request.headers.get("accept-language", ""))
        older = cards(self._kept(past), words)
        try:
            sample, asked = await self._read(clip, text, words)
        except VansError as error:
            yield notice(str(error)) + older, "", past
            return
        render = desk.render(int(steps), float(guidance))
        pairs = list(desk.pairs) if both else [None]
        made = [desk.open(sample, asked, int(seed or 0), render, pair) for pair in pairs]
        kept = [*(each.id for each in made), *past][:HISTORY]
        before = ""
        async for _ in _changes(made):
            shown = side_by_side(made, words)
            yield gr.skip() if shown == before else shown + older, bar(made), kept
            before = shown

    async def stop(self, past: list[str]) -> None:
        """Cancel what of the session is still being made."""
        for made in self._kept(past):
            if made.ended is None:
                self._desk.cancel(made)

    async def _read(self, clip: str | None, text: str, words: Words) -> tuple[Sample, list[str]]:
        """Return what is asked about; raises VansError for what cannot be, and where there is no room."""
        asked = self._desk.questions([line for line in (text or "").splitlines() if line.strip()])
        if clip is None:
            raise VansError(words.no_video)
        if (seconds := self._desk.busy()) is not None:
            raise VansError(words.busy.format(seconds=seconds))
        try:
            return await self._desk.read(Path(clip)), asked
        except DataError as error:
            raise DataError(str(error).replace(clip, "video")) from error

    def _kept(self, names: Sequence[str]) -> list[Answer]:
        answers = [self._desk.kept.get(name) for name in names]
        return [answer for answer in answers if answer is not None]


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
