"""The HTTP API: what is asked, checked against the limits, and what is shown of an answer.

Makes the FastAPI application of one :class:`Desk`. Ray Serve runs it (``app``).
"""

# Annotations are evaluated here, not put off: FastAPI could not see the limits that those of a route name.
import asyncio
import importlib.util
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, File, Form, HTTPException, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from pydantic import BaseModel, Field
from sse_starlette.sse import EventSourceResponse

from cluster.errors import DataError
from pipeline.config import RunConfig
from pipeline.data.sheet import Strip, contact_sheet
from pipeline.data.video import decode_video
from pipeline.serve.answers import ENDED, Answer
from pipeline.serve.desk import Desk, Refused
from pipeline.serve.examples import Example
from pipeline.serve.gate import Gate, full

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


def write_sheet(config: RunConfig, answer: Answer) -> Path:
    """Write the contact sheet of an answer beside its clips, and return where it is."""
    size = config.video.num_frames, config.video.height, config.video.width
    strips = [Strip("input", decode_video(answer.input, *size))]
    for question in answer.questions:
        clip = decode_video(question.video, *size) if question.video else None
        strips.append(Strip(f"{question.text}\n{question.caption or ''}", clip, question.error or ""))
    return contact_sheet([("", strips)], answer.folder / "sheet.png")


def build(desk: Desk, token: str | None, examples: Sequence[Example] = ()) -> FastAPI:
    """Return the application that takes questions for ``desk``, with the playground at ``/`` where Gradio is installed.

    ``token`` None asks nobody for one.
    """
    config, limits = desk.config, desk.config.serve.limits

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        pruning = asyncio.create_task(desk.prune())
        try:
            yield
        finally:
            pruning.cancel()
            await desk.close()

    # FastAPI's own pages of the API fetch scripts from elsewhere: /openapi.json has all that they show.
    app = FastAPI(
        title="VANS on Ray",
        description="Answers about a video, as videos.",
        docs_url=None,
        redoc_url=None,
        lifespan=life,
    )
    app.add_middleware(Gate, token=token, most_bytes=config.data.max_source_mib << 20, busy=desk.busy)

    def found(name: str) -> Answer:
        answer = desk.kept.get(name)
        if answer is None:
            kept = f"{limits.keep_s:g} s (serve.limits.keep_s)"
            raise HTTPException(
                404, f"there is no answer {name[:64]!r}; one that has ended is kept for {kept}, while there is room"
            )
        return answer

    @app.exception_handler(RequestValidationError)
    async def refused(request: Request, error: RequestValidationError) -> JSONResponse:
        told = "; ".join(f"{'.'.join(str(part) for part in e['loc'][1:])}: {e['msg']}" for e in error.errors())
        return JSONResponse({"detail": told}, 422)

    @app.post("/v1/answers", status_code=202, response_model=Accepted)
    async def ask(
        video: Annotated[UploadFile, File(description="The video, of any ordinary format.")],
        question: Annotated[list[str], Form(description="A question; several are several futures of the one video.")],
        seed: Annotated[int, Form(ge=0, lt=SEEDS, description="Seed of the noise.")] = 0,
        steps: Annotated[int | None, Form(ge=1, le=limits.steps, description="Denoising steps.")] = None,
        guidance: Annotated[float | None, Form(ge=1, le=limits.guidance, description="Guidance; 1 is off.")] = None,
        pair: Annotated[str | None, Form(description="served, or before: the pair that the run began with.")] = None,
    ) -> Any:
        """Ask about a video. Answers at once with an id, when the video has been read."""
        try:
            asked = desk.questions(question)
        except Refused as error:
            raise HTTPException(422, str(error)) from error
        with tempfile.NamedTemporaryFile(dir=desk.kept.root, prefix="upload-") as file:
            await asyncio.to_thread(shutil.copyfileobj, video.file, file, 1 << 20)
            file.flush()
            try:
                sample = await desk.read(Path(file.name))
            except DataError as error:
                raise HTTPException(422, f"video: {error}".replace(file.name, "the upload")) from error
        if (seconds := desk.busy()) is not None:  # others came while this one was read
            return full(seconds)
        try:
            return Accepted(id=desk.open(sample, asked, seed, desk.render(steps, guidance), pair).id)
        except Refused as error:
            raise HTTPException(422, str(error)) from error

    @app.get("/v1/answers/{name}", response_model=AnswerView)
    async def show(name: str) -> Any:
        """Return how far an answer is."""
        return found(name).as_json()

    @app.get("/v1/answers/{name}/events", response_class=EventSourceResponse)
    async def events(name: str) -> EventSourceResponse:
        """Send an answer as server-sent events, once now and again whenever it changes, until it has ended."""
        answer = found(name)

        async def stream() -> AsyncIterator[dict[str, str]]:
            async for state in answer.changes():
                yield {"event": state.state, "data": json.dumps(state.as_json(), ensure_ascii=False)}

        return EventSourceResponse(stream())

    @app.get("/v1/answers/{name}/video.mp4", response_class=FileResponse)
    async def clip(name: str, question: int = 0) -> FileResponse:
        """Return the clip of a question, counted from 0."""
        answer = found(name)
        if not 0 <= question < len(answer.questions):
            raise HTTPException(404, f"question={question}: this answer has questions 0 to {len(answer.questions) - 1}")
        asked = answer.questions[question]
        if asked.video is None or not asked.video.is_file():
            raise HTTPException(404 if asked.ended else 409, asked.error or f"the clip is not drawn yet: {asked.state}")
        return FileResponse(
            asked.video,
            media_type="video/mp4",
            filename=f"answer-{question + 1}.mp4",
            content_disposition_type="inline",
        )

    @app.get("/v1/answers/{name}/input.mp4", response_class=FileResponse)
    async def shown(name: str) -> FileResponse:
        """Return the input as the artist sees it."""
        answer = found(name)
        if not answer.input.is_file():
            raise HTTPException(409, "it is not written yet")
        return FileResponse(answer.input, media_type="video/mp4", content_disposition_type="inline")

    @app.get("/v1/answers/{name}/sheet.png", response_class=FileResponse)
    async def sheet(name: str) -> FileResponse:
        """Return the answer as a contact sheet, once it has ended."""
        answer = found(name)
        if answer.state not in ENDED or not answer.input.is_file():
            raise HTTPException(409, "there is a sheet when the answer has ended")
        return FileResponse(await asyncio.to_thread(write_sheet, config, answer), media_type="image/png")

    @app.delete("/v1/answers/{name}", status_code=204)
    async def end(name: str) -> Response:
        """Cancel an answer that is being made; remove one that has ended."""
        answer = found(name)
        if answer.ended is None:
            desk.cancel(answer)
            with suppress(asyncio.CancelledError):
                if answer.task is not None:
                    await asyncio.wait([answer.task])
        else:
            desk.kept.forget(answer)
        return Response(status_code=204)

    if importlib.util.find_spec("gradio") is None:
        return app
    from pipeline.serve.page import mount

    return mount(app, desk, examples)
