"""The application that Ray Serve runs (``app``): the gate, the routes, the playground where Gradio is installed.

Not responsible for what a route does (``routes``).
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from pipeline.serve.desk import Desk
from pipeline.serve.examples import Example
from pipeline.serve.gate import Gate
from pipeline.serve.routes import router_of


def build(desk: Desk, token: str | None, examples: Sequence[Example] = ()) -> FastAPI:
    """Return the application that takes questions for ``desk``, with the playground at ``/`` where Gradio is installed.

    ``token`` None asks nobody for one.
    """

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
    app.add_middleware(Gate, token=token, most_bytes=desk.config.data.max_source_mib << 20, busy=desk.busy)
    app.add_exception_handler(RequestValidationError, _refused)
    app.include_router(router_of(desk))
    if importlib.util.find_spec("gradio") is None:
        return app
    from pipeline.serve.page import mount

    return mount(app, desk, examples)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    """Say in one sentence what of a form is wrong."""
    assert isinstance(error, RequestValidationError)
    told = "; ".join(f"{'.'.join(str(part) for part in e['loc'][1:])}: {e['msg']}" for e in error.errors())
    return JSONResponse({"detail": told}, 422)
