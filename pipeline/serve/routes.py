"""The API's handlers: what is asked, checked against the limits, what is shown of an answer, and its files.

Handlers of one :class:`Desk`. Not responsible for who may ask (``gate``) or for the application around them (``api``).
"""

# Annotations are evaluated here, not put off: FastAPI could not see the limits that those of a route name.
import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, HTTPException, UploadFile
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel, Field
from sse_starlette.sse import EventSourceResponse

from actors.records import Sample
from cluster.errors import DataError
from pipeline.data.sheet import Strip, contact_sheet
from pipeline.data.video import decode_video
from pipeline.serve.answers import ENDED, Answer
from pipeline.serve.desk import Desk, Refused
from pipeline.serve.gate import full

SEEDS = 2**63
"""Seeds are below it: any others would be others' too."""


class Accepted(BaseModel):
    """The id of an answer that is being made."""

    id: str


class QuestionView(BaseModel):
    """One question, and how far its answer is."""

    question: str
    state: str = Field(description="queued, thinking, drawing, done, failed or cancelled.")
    progress: float = Field(ge=0, le=1)
    caption: str | None
    reasoning: str | None
    error: str | None
    video: str | None = Field(description="Where the mp4 is, once it is drawn.")


class AnswerView(BaseModel):
    """All questions about one video."""

    id: str
    state: str
    progress: float = Field(ge=0, le=1)
    pair: str = Field(description="Which pair answers.")
    seed: int
    steps: int
    guidance: float
    input: str = Field(description="Where the input is, as the artist sees it.")
    sheet: str = Field(description="Where the contact sheet is, once the answer has ended.")
    questions: list[QuestionView]


def router_of(desk: Desk) -> APIRouter:
    """Return the routes of ``/v1/answers`` for ``desk``."""
    asking, files = Asking(desk), Files(desk)
    one = "/v1/answers/{name}"
    router = APIRouter()
    router.add_api_route("/v1/answers", asking.route(), methods=["POST"], status_code=202, response_model=Accepted)
    router.add_api_route(one, asking.show, response_model=AnswerView)
    router.add_api_route(one, asking.end, methods=["DELETE"], status_code=204)
    router.add_api_route(f"{one}/events", asking.events, response_class=EventSourceResponse)
    for path, handler in (("video.mp4", files.clip), ("input.mp4", files.shown), ("sheet.png", files.sheet)):
        router.add_api_route(f"{one}/{path}", handler, response_class=FileResponse)
    return router


def found(desk: Desk, name: str) -> Answer:
    """Return an answer by its id; status 404 where it is not kept."""
    answer = desk.kept.get(name)
    if answer is None:
        kept = f"{desk.config.serve.limits.keep_s:g} s (serve.limits.keep_s)"
        raise HTTPException(
            404, f"there is no answer {name[:64]!r}; one that has ended is kept for {kept}, while there is room"
        )
    return answer


class Asking:
    """What begins an answer, shows how far it is, and ends it."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    def route(self) -> Callable[..., Any]:
        """Return the handler that takes a form. FastAPI reads the desk's limits from its annotations."""
        limits = self._desk.config.serve.limits

        async def ask(
            video: Annotated[UploadFile, File(description="The video, of any ordinary format.")],
            question: Annotated[
                list[str], Form(description="A question; several are several futures of the one video.")
            ],
            seed: Annotated[int, Form(ge=0, lt=SEEDS, description="Seed of the noise.")] = 0,
            steps: Annotated[int | None, Form(ge=1, le=limits.steps, description="Denoising steps.")] = None,
            guidance: Annotated[float | None, Form(ge=1, le=limits.guidance, description="Guidance; 1 is off.")] = None,
            pair: Annotated[
                str | None, Form(description="served, or before: the pair that the run began with.")
            ] = None,
        ) -> Any:
            """Ask about a video. Answers at once with an id, when the video has been read."""
            return await self.begin(video, question, seed, steps, guidance, pair)

        return ask

    async def begin(
        self,
        video: UploadFile,
        questions: list[str],
        seed: int,
        steps: int | None,
        guidance: float | None,
        pair: str | None,
    ) -> Accepted | Response:
        """Begin an answer and return its id; status 422 for what cannot be asked, 429 where there is no room."""
        desk = self._desk
        try:
            asked = desk.questions(questions)
            sample = await self._read(video)
            if (seconds := desk.busy()) is not None:  # others came while this one was read
                return full(seconds)
            return Accepted(id=desk.open(sample, asked, seed, desk.render(steps, guidance), pair).id)
        except Refused as error:
            raise HTTPException(422, str(error)) from error

    async def _read(self, video: UploadFile) -> Sample:
        with tempfile.NamedTemporaryFile(dir=self._desk.kept.root, prefix="upload-") as file:
            await asyncio.to_thread(shutil.copyfileobj, video.file, file, 1 << 20)
            file.flush()
            try:
                return await self._desk.read(Path(file.name))
            except DataError as error:
                raise HTTPException(422, f"video: {error}".replace(file.name, "the upload")) from error

    async def show(self, name: str) -> Any:
        """Return how far an answer is."""
        return found(self._desk, name).as_json()

    async def events(self, name: str) -> EventSourceResponse:
        """Send an answer as server-sent events, once now and again whenever it changes, until it has ended."""
        answer = found(self._desk, name)

        async def stream() -> AsyncIterator[dict[str, str]]:
            async for state in answer.changes():
                yield {"event": state.state, "data": json.dumps(state.as_json(), ensure_ascii=False)}

        return EventSourceResponse(stream())

    async def end(self, name: str) -> Response:
        """Cancel an answer that is being made; remove one that has ended."""
        answer = found(self._desk, name)
        if answer.ended is None:
            self._desk.cancel(answer)
            with suppress(asyncio.CancelledError):
                if answer.task is not None:
                    await asyncio.wait([answer.task])
        else:
            self._desk.kept.forget(answer)
        return Response(status_code=204)


class Files:
    """What an answer can be looked at by: its clips, its input, its contact sheet."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def clip(self, name: str, question: int = 0) -> FileResponse:
        """Return the clip of a question, counted from 0."""
        answer = found(self._desk, name)
        if not 0 <= question < len(answer.questions):
            raise HTTPException(404, f"question={question}: this answer has questions 0 to {len(answer.questions) - 1}")
        asked = answer.questions[question]
        if asked.video is None or not asked.video.is_file():
            raise HTTPException(404 if asked.ended else 409, asked.error or f"the clip is not drawn yet: {asked.state}")
        return _video(asked.video, filename=f"answer-{question + 1}.mp4")

    async def shown(self, name: str) -> FileResponse:
        """Return the input as the artist sees it."""
        answer = found(self._desk, name)
        if not answer.input.is_file():
            raise HTTPException(409, "it is not written yet")
        return _video(answer.input)

    async def sheet(self, name: str) -> FileResponse:
        """Return the answer as a contact sheet, once it has ended."""
        answer = found(self._desk, name)
        if answer.state not in ENDED or not answer.input.is_file():
            raise HTTPException(409, "there is a sheet when the answer has ended")
        return FileResponse(await asyncio.to_thread(self._write_sheet, answer), media_type="image/png")

    def _write_sheet(self, answer: Answer) -> Path:
        shape = self._desk.config.video
        size = shape.num_frames, shape.height, shape.width
        strips = [Strip("input", decode_video(answer.input, *size))]
        for question in answer.questions:
            clip = decode_video(question.video, *size) if question.video else None
            strips.append(Strip(f"{question.text}\n{question.caption or ''}", clip, question.error or ""))
        return contact_sheet([("", strips)], answer.folder / "sheet.png")


def _video(path: Path, filename: str | None = None) -> FileResponse:
    """Return a clip that a browser plays in its place."""
    return FileResponse(path, media_type="video/mp4", filename=filename, content_disposition_type="inline")
