"""``vans answer``: one video, one or more questions, one future per question: caption, mp4, contact sheet.

Runs both models in this process, without Ray: the same engine and the same sampler that the pools hold.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from actors.failures import BadSampleError, InfrastructureError
from actors.records import Clip, Completion, RenderRequest, Sample
from cluster.errors import DataError, StorageError, TrainingError, VansError
from cluster.harmless import in_markup, short
from cluster.session import require_loopback
from pipeline.config import RunConfig
from pipeline.data.sheet import Strip, contact_sheet
from pipeline.data.video import encode_mp4
from pipeline.fleet.models import vdm_options
from pipeline.stages.question import (
    Drawn,
    Said,
    Unanswered,
    caption_request,
    captioned,
    question_request,
    read_video,
    split_model,
)
from pipeline.support import terminal
from pipeline.support.progress import Bar, bar

PHASES = ("starting the thinker", "asking", "loading the artist", "drawing")


@dataclass(frozen=True)
class VideoAnswer:
    """One future: what was said, and the clip that shows it."""

    question: str
    text: str
    caption: str
    frames: np.ndarray  # uint8 (T, H, W, 3)
    path: Path


class AnswerError(VansError):
    """Questions without an answer. ``answers`` are those of the other questions, which are written."""

    def __init__(self, unanswered: Sequence[Unanswered], answers: Sequence[VideoAnswer]) -> None:
        self.unanswered, self.answers = list(unanswered), list(answers)
        count = len(self.unanswered) + len(self.answers)
        head = f"{len(self.unanswered)} of {count} questions got no answer\n" if count > 1 else ""
        super().__init__(head + "\n".join(f"--question {short(item.question)}: {item.reason}" for item in unanswered))


def run_answer(
    config: RunConfig,
    video: Path,
    questions: Sequence[str],
    out: Path,
    *,
    vlm: str | None = None,
    vdm: str | None = None,
    seed: int = 0,
) -> list[VideoAnswer]:
    """Answer ``questions`` about ``video``; writes mp4 files and a contact sheet beside ``out`` and prints the captions.

    Raises AnswerError for questions that got no answer, after those of the others are written; DataError for the video,
    StorageError where ``out`` cannot be written to.
    """
    paths = answer_paths(out, len(questions))
    sample = load_video(config, video)
    require_writable(out.parent)
    console = terminal.console()
    with bar(console, "answering", len(PHASES)) as progress:
        progress.advance(PHASES[0], by=0)
        said = asyncio.run(ask(config, sample, questions, vlm, seed, progress))
        drawn = draw(config, sample, said, vdm, seed, progress)
    answers = write_answers(config, drawn, paths)
    if answers:
        sheet = out.with_suffix(".png")
        with _storing(sheet):
            contact_sheet([(video.name, [Strip("input", sample.context), *map(_strip, drawn)])], sheet)
    for answer in answers:
        told = f"[bold]{in_markup(answer.question)}[/]\n  {in_markup(answer.caption)}\n  {in_markup(str(answer.path))}"
        console.print(told, highlight=False)
    if answers:
        console.print(f"contact sheet: {sheet}", highlight=False, markup=False)
    if unanswered := [item for item in drawn if isinstance(item, Unanswered)]:
        raise AnswerError(unanswered, answers)
    return answers


def write_answers(config: RunConfig, drawn: Sequence[Drawn | Unanswered], paths: Sequence[Path]) -> list[VideoAnswer]:
    """Write the mp4 of each answer to its place in ``paths``; an unanswered question's place stays empty."""
    answers = []
    for item, path in zip(drawn, paths, strict=True):
        if isinstance(item, Drawn):
            _store(path, encode_mp4(item.frames, config.video.fps, near_lossless=False))
            answers.append(VideoAnswer(item.said.question, item.said.text, item.said.caption, item.frames, path))
    return answers


def _strip(item: Drawn | Unanswered) -> Strip:
    if isinstance(item, Unanswered):
        return Strip(f"{item.question}\n(no answer)", None, item.reason)
    return Strip(f"{item.said.question}\n{item.said.caption}", item.frames)


def answer_paths(out: Path, count: int) -> list[Path]:
    """Return the mp4 of each question: ``out`` for one, ``out-1.mp4`` … for several."""
    if out.suffix != ".mp4":
        raise VansError(f"--out {out}: the answer is an mp4 file, so the name must end in .mp4")
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{i + 1}") for i in range(count)]


def load_video(config: RunConfig, video: Path) -> Sample:
    """Decode the file of ``--video``. Raises DataError for one that is not there, is broken or has no frames."""
    if not video.is_file():
        raise DataError(f"--video {video}: no such file")
    try:
        return read_video(config, video)
    except DataError as error:
        raise DataError(f"--video {video}: {error}") from error


def require_writable(folder: Path) -> None:
    """Make ``folder``; raises StorageError where nothing can be written there, before minutes are spent on what is to be written."""
    with _storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


@contextmanager
def _storing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}; choose another --out") from error


def _store(path: Path, data: bytes) -> None:
    """Write a file whole or not at all."""
    partial = path.with_suffix(".partial")
    with _storing(path):
        try:
            partial.write_bytes(data)
            partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise


async def ask(
    config: RunConfig, sample: Sample, questions: Sequence[str], vlm: str | None, seed: int, progress: Bar
) -> list[Said | Unanswered]:
    """Return what the thinker says to each question. The engine is started only where there is a question for it."""
    from actors.vlm.engine import EngineSpec, VlmEngine
    from actors.vlm.prompt import check_text, load_tokenizer

    model, adapter = split_model(config, "vlm", vlm)
    tokenizer = load_tokenizer(model)

    def refused(question: str) -> Unanswered | None:
        try:
            check_text(tokenizer, question, "question")
        except BadSampleError as error:
            return Unanswered(question, str(error))
        return None

    found = [refused(question) for question in questions]
    if all(found):
        return [item for item in found if item is not None]
    settings = config.pools.vlm.model_copy(update={"rest": False})  # no learner wants its memory here
    spec = EngineSpec(model, settings, config.models.prompt, adapter=adapter)
    engine = VlmEngine(spec)

    async def said_to(question: str) -> Said | Unanswered:
        try:
            completions: list[Completion] = await engine.generate(question_request(config, sample, question, seed))
        except (BadSampleError, InfrastructureError) as error:
            return Unanswered(question, str(error))
        return captioned(question, completions[0].text, config.models.prompt.answers)

    try:
        require_loopback()
        await engine.start()
        progress.advance(PHASES[1])
        said = await asyncio.gather(*(said_to(q) for q, bad in zip(questions, found, strict=True) if bad is None))
    except InfrastructureError as error:
        raise VansError(f"the thinker {model} did not start: {error}") from error
    finally:
        await asyncio.to_thread(engine.close)
    progress.advance(PHASES[2])
    rest = iter(said)
    return [next(rest) if bad is None else bad for bad in found]


def draw(
    config: RunConfig, sample: Sample, said: Sequence[Said | Unanswered], vdm: str | None, seed: int, progress: Bar
) -> list[Drawn | Unanswered]:
    """Draw every caption in ``said``. The artist is loaded only where there is one."""
    from actors.vdm.policy import VdmPolicy
    from actors.vdm.sampling import sample as draw_clips

    captions = {i: item.caption for i, item in enumerate(said) if isinstance(item, Said)}
    clips: dict[int, Clip | str] = {}
    if captions:
        model, adapter = split_model(config, "vdm", vdm)
        artist = VdmPolicy.load(
            model,
            dtype=config.pools.vdm.dtype,
            adapter=adapter,
            settings=config.pools.vdm.model_copy(update={"compile_blocks": False}),  # slower for one answer
            **vdm_options(config),
        )
        render = config.evaluate.render
        artist.embed([*captions.values(), *([artist.negative_prompt] if render.guidance != 1.0 else [])])
        artist.drop_text_encoder()  # the largest of the models, and done
        progress.advance(PHASES[3])
        requests = [caption_request(config, sample, caption, i, render, seed) for i, caption in captions.items()]
        clips = dict(zip(captions, sample_each(partial(draw_clips, artist), requests), strict=True))
        progress.advance()
    found: list[Drawn | Unanswered] = []
    for i, item in enumerate(said):
        if isinstance(item, Unanswered):
            found.append(item)
        else:
            clip = clips[i]
            found.append(Unanswered(item.question, clip) if isinstance(clip, str) else Drawn(item, clip.frames))
    return found


def sample_each(
    sample: Callable[[Sequence[RenderRequest]], list[Clip]], requests: Sequence[RenderRequest]
) -> list[Clip | str]:
    """Return the clip of each request, or why it has none: together, and one by one where one of them fails."""
    try:
        return list(sample(requests))
    except (BadSampleError, TrainingError) as error:
        if len(requests) == 1:
            return [f"the caption {requests[0].caption!r} could not be drawn: {error}"]
        return [clip for request in requests for clip in sample_each(sample, [request])]
