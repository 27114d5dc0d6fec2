"""The driver's view of tracking: what a run logs, as methods that never wait and never fail a step.

One parent run per job and a nested run per stage. Every call makes a record and puts it into the outbox; MLflow itself is
spoken to in the outbox's thread (``store``). Only opening the parent run happens at once, so that a wrong address is an
error at the start. Only the driver uses this.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import quote, unquote

import numpy as np

from cluster.harmless import redacted
from pipeline.config import RunConfig, config_digest, flatten, to_yaml
from pipeline.config.machinery import TrackingSection
from pipeline.evaluate.table import EvaluationTable
from pipeline.support.location import Uri, parse_location
from pipeline.tracking import lineage, media, metrics
from pipeline.tracking.also import PARENT, Copies, Job, TrackingError
from pipeline.tracking.outbox import Outbox, OutboxCounts
from pipeline.tracking.store import MlflowStore, merge_metrics

STRICT_VARIABLE = "VANS_STRICT_METRICS"
DESCRIPTION = """\
The artifact `report/index.html`, written at the end of each stage, is the run's page: curves, alarms and every stored rollout.
`vans report FOLDER` writes it at any time.

Of the metrics of `stage1` and `stage2` start with `reward/total_mean`, `reward/<component>_mean`, `rollout/format_rate`,
`alarm/on`, `learner/kl`, `learner/ratio_max_dev` (0 before an update), `evaluate/<metric>` and `time/step_s`; docs/metrics.md
explains each.
"""
"""What MLflow shows above a job's figures."""
FOLDER = "tracking"  # under the run's folder: spool, and files on their way to the store

_UNQUOTED = "".join(chr(c) for c in range(33, 127) if chr(c) not in "%?#") + " "
"""What stands in a URI of SQLite as it is; SQLAlchemy decodes the rest."""

log = logging.getLogger(__name__)


class Tracker:
    """Logs one job; a context manager. What is logged goes to the innermost open stage, or to the parent run."""

    def __init__(self, store: MlflowStore, parent_id: str, folder: Path, strict: bool) -> None:
        self.store, self.run_id, self.folder, self.strict = store, parent_id, folder, strict
        self._run = PARENT
        self._warned: set[str] = set()
        self._clips: dict[tuple[str, int, str], int] = {}
        self._outbox = Outbox(store.deliver, folder / "spool.jsonl", merge=merge_metrics)

    @classmethod
    def start(cls, config: RunConfig, *, resume_run_id: str | None = None, strict: bool | None = None) -> Tracker:
        """Open the parent run of ``config``, or go on with ``resume_run_id``, and log what describes it.

        ``strict`` makes an undeclared metric an error; by default it is where VANS_STRICT_METRICS is set to 1.
        Raises TrackingError where the store does not answer or does not know the run to resume.
        """
        tracker = cls.open(
            config.name,
            config.out,
            config.tracking,
            flatten(config),
            tags={"vans.config.digest": config_digest(config), "mlflow.note.content": DESCRIPTION},
            resume_run_id=resume_run_id,
            strict=strict,
        )
        tracker.log_text(to_yaml(config), "config.yaml")
        return tracker

    @classmethod
    def open(
        cls,
        name: str,
        out: Path,
        section: TrackingSection,
        params: Mapping[str, Any],
        *,
        tags: Mapping[str, str] | None = None,
        resume_run_id: str | None = None,
        strict: bool | None = None,
    ) -> Tracker:
        """Open a parent run of any kind of job that writes to the folder ``out``; see :meth:`start`."""
        uri, artifacts = location(out, section)
        database = database_file(uri)
        if database is not None:
            _require_usable(database)
        with _no_stray_folder(uri, database):
            store = MlflowStore(uri, section.experiment, artifacts)
        known: dict[str, str] = {}
        if resume_run_id is None:
            run_id = store.start(name, {**(tags or {}), **lineage.git_tags()})
        else:
            run_id, known = resume_run_id, store.resume(resume_run_id)
        store.copies = Copies.open(section.also, Job(name, section.experiment, run_id, out / FOLDER))
        tracker = cls(store, run_id, out / FOLDER, _strict() if strict is None else strict)
        tracker.log_params(params, known)
        tracker.log_tags({f"version.{name}": value for name, value in lineage.library_versions().items()})
        return tracker

    @property
    def uri(self) -> str:
        """Where the runs are: what ``mlflow ui --backend-store-uri`` takes."""
        return self.store.uri

    @property
    def run_ids(self) -> dict[str, str]:
        """Ids of the runs that the store has made so far: ``parent`` and one per stage."""
        return {name: run_id for (_, name), run_id in self.store.run_ids.items()}

    @property
    def counts(self) -> OutboxCounts:
        """Records delivered, waiting in the spool, and refused."""
        return self._outbox.counts

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._end(error)
        self.close()

    @contextmanager
    def stage(self, name: str, resume_run_id: str | None = None) -> Iterator[str]:
        """Log to the nested run ``name`` within the block; yields its id, "" while the store cannot be reached.

        A resumed job goes on with ``resume_run_id``, or with its run of that name.
        """
        outer, self._run = self._run, name
        if resume_run_id:
            self.store.adopt(self.run_id, name, resume_run_id)
        self._put("begin")
        self.flush(10.0)
        try:
            yield self.run_ids.get(name, "")
        except BaseException as error:
            self._end(error)
            raise
        else:
            self._end(None)
        finally:
            self._run = outer

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log ``values`` of ``step``. Raises TrackingError for an undeclared name in strict mode; else warns once."""
        for name in values:
            if metrics.find(name) is None and name not in self._warned:
                message = f"metric {name!r} is not declared in pipeline/tracking/metrics.py, so nobody can look it up"
                if self.strict:
                    raise TrackingError(message)
                self._warned.add(name)
                log.warning(message)
        if self.counts.spooled:
            values = {**values, "tracking/spooled": float(self.counts.spooled)}
        now = _milliseconds()
        self._put("metrics", values=[[name, float(value), now, int(step)] for name, value in values.items()])

    def replay(self) -> None:
        """Say that steps which were logged already come again: each stays as it was logged first."""
        self._put("replay")

    def log_params(self, values: Mapping[str, Any], known: Mapping[str, str] | None = None) -> None:
        """Log parameters; those in ``known`` stay, and one that differs from there becomes a tag ``changed.<name>``."""
        known = known or {}
        text = {name: str(value)[:6000] for name, value in values.items()}
        if new := {name: value for name, value in text.items() if name not in known}:
            self._put("params", values=new)
        if changed := {f"changed.{n}": v for n, v in text.items() if n in known and known[n] != v}:
            self.log_tags(changed)

    def log_tags(self, values: Mapping[str, str]) -> None:
        """Set tags."""
        self._put("tags", values={name: str(value)[:5000] for name, value in values.items()})

    def log_artifact(self, path: str | Path, to: str = "") -> None:
        """Log the file at ``path`` into the artifact folder ``to``; it has to stay until it is delivered."""
        self._put("artifact", path=str(Path(path).resolve()), to=to)

    def log_text(self, text: str, name: str) -> None:
        """Log ``text`` as the artifact ``name``, which may have folders in front."""
        self.log_file(lambda path: media.write_text(text, path), name)

    def log_file(self, write: Callable[[Path], object], name: str) -> None:
        """Log the artifact ``name``, which may have folders in front; the tracking thread calls ``write`` with the path to write."""
        folder, _, file = name.rpartition("/")
        path = self._outgoing(folder) / file
        self._put("artifact", lambda: write(path), path=str(path), to=folder, remove=True)

    def log_image(self, image: np.ndarray | str | Path, step: int, key: str = "contact_sheet") -> None:
        """Log a picture, uint8 (H, W, 3) or the path of a file, under ``key`` with a slider over steps."""
        if isinstance(image, np.ndarray):
            pixels, path = image, self._outgoing("images") / f"{_slug(key)}-{step:06d}.png"
            self._put("image", lambda: media.write_png(pixels, path), path=str(path), key=key, step=step, remove=True)
        else:
            self._put("image", path=str(Path(image).resolve()), key=key, step=step)

    def log_clip(self, frames: np.ndarray, caption: str, step: int, name: str = "sample", fps: float = 8.0) -> None:
        """Log a clip, uint8 (T, H, W, 3), as ``samples/step…/<name>.mp4``, its caption beside it, and as a film strip.

        Further clips of the same name and step are numbered.
        """
        count = self._clips[self._run, step, name] = self._clips.get((self._run, step, name), 0) + 1
        name = name if count == 1 else f"{name}_{count}"
        to = f"samples/step{step:06d}"
        path = self._outgoing(to) / f"{_slug(name)}.mp4"
        self._put("artifact", lambda: media.write_mp4(frames, path, fps), path=str(path), to=to, remove=True)
        self.log_text(caption + "\n", f"{to}/{_slug(name)}.txt")
        strip = self._outgoing("strips") / f"{_slug(name)}-{step:06d}.png"
        self._put(
            "image",
            lambda: media.write_strip(frames, caption, strip),
            path=str(strip),
            key=name,
            step=step,
            remove=True,
        )

    def log_dataset(
        self, folder: str | Path | Uri, digest: str | None = None, rows: int | None = None, context: str = "training"
    ) -> None:
        """Note that the run reads the shards in ``folder`` for ``context`` (training, evaluation).

        ``digest`` and ``rows`` are read from the shards where not given; raises DataError where there are none.
        """
        folder = parse_location(folder)
        if digest is None or rows is None:
            identity = lineage.dataset_identity(folder)
            digest, rows = identity.digest, identity.rows
        dataset = {
            "name": f"{folder.parent.name}/{folder.name}",
            "digest": digest[:36],
            "source_type": "local" if isinstance(folder, Path) else folder.scheme,
            "source": json.dumps({"uri": folder.resolve().as_uri() if isinstance(folder, Path) else str(folder)}),
            "profile": f'{{"num_rows": {rows}}}',
        }
        self._put("dataset", dataset=dataset, context=context)

    def log_checkpoint(self, path: str | Path) -> None:
        """Note where a checkpoint lies; its files stay there."""
        uri = Path(path).resolve().as_uri()
        self.log_tags({f"checkpoint.{Path(path).name}": uri, "checkpoint.latest": uri})

    def log_table(self, columns: Mapping[str, Sequence[Any]], name: str = "evaluation") -> None:
        """Log a table, column name → values of one length, as MLflow shows tables; raises ValueError if ragged."""
        lengths = {column: len(values) for column, values in columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"the columns of table {name!r} have different lengths: {lengths}")
        self._put("table", columns={n: list(values) for n, values in columns.items()}, to=f"{name}.json")

    def log_evaluation(self, table: EvaluationTable, step: int = 0, name: str = "evaluation") -> None:
        """Log an evaluation: every system's figures as ``eval/<system>/<metric>``, its answers, and the table itself."""
        answers: list[dict[str, Any]] = []
        for system, result in table.systems.items():
            figures = {f"eval/{_slug(system)}/{_slug(metric)}": v for metric, v in table.figures(system).items()}
            figures |= {
                f"eval/{_slug(system)}/{_slug(d.name)}": d.value for k, d in result.frechet.items() if k == "all"
            }
            self.log_metrics(figures, step)
            answers += [
                {"system": system, "id": a.id, "kind": a.kind, "caption": a.caption, "truth": a.reference, **a.values}
                for a in result.answers
            ]
        columns = dict.fromkeys(key for answer in answers for key in answer)
        if answers:
            self.log_table({column: [a.get(column) for a in answers] for column in columns}, f"{name}/answers")
        self.log_text(table.markdown(), f"{name}/table.md")
        self.log_text(json.dumps(table.to_json(), indent=1, ensure_ascii=False) + "\n", f"{name}/table.json")

    def flush(self, timeout_s: float = 30.0) -> bool:
        """Wait until all that was logged is in the store or in the spool; False where ``timeout_s`` passed first."""
        return self._outbox.flush(timeout_s)

    def close(self, timeout_s: float = 30.0) -> int:
        """Deliver the rest; returns how many records are left in the spool (see ``outbox``)."""
        return self._outbox.close(timeout_s)

    def _end(self, error: BaseException | None) -> None:
        status = "FINISHED" if error is None else "KILLED" if _stopped(error) else "FAILED"
        if status == "FAILED":
            self.log_tags({"vans.error": redacted(f"{type(error).__name__}: {error}")})
        self._put("end", status=status, time=_milliseconds())

    def _outgoing(self, folder: str) -> Path:
        path = self.folder / "outgoing" / self._run / folder
        path.mkdir(parents=True, exist_ok=True)
        return path.resolve()

    def _put(self, op: str, prepare: Callable[[], object] | None = None, **content: Any) -> None:
        self._outbox.put({"op": op, "parent": self.run_id, "run": self._run, **content}, prepare)


def location(out: Path, section: TrackingSection) -> tuple[str, Path | None]:
    """Return the tracking URI of a job, and where artifacts of a local store go (None: the server decides)."""
    local = "sqlite:///" + quote(str((out / "mlflow.db").resolve()), safe=_UNQUOTED)
    uri = os.environ.get("MLFLOW_TRACKING_URI") or section.uri or local
    database = database_file(uri)
    return uri, database.parent / "mlartifacts" if database else None


def database_file(uri: str) -> Path | None:
    """Return the file of a ``sqlite:///`` URI, None for a store of another kind."""
    scheme, _, database = uri.partition(":///")
    return Path(unquote(database.partition("?")[0])) if scheme == "sqlite" else None


@contextmanager
def _no_stray_folder(uri: str, database: Path | None) -> Iterator[None]:
    """Remove the empty folder that MLflow makes where a URI of SQLite has encoded characters: it takes them for the folder's name."""
    written = Path(uri.partition(":///")[2]).parent
    made = [path for path in (written, *written.parents) if not path.exists()] if database else []
    yield
    with suppress(OSError):
        for path in made:
            path.rmdir()


def _require_usable(database: Path) -> None:
    """Raise TrackingError where ``database`` cannot be opened: MLflow would try for minutes, and then tell less."""
    try:
        database.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(database, timeout=10.0)) as connection:
            connection.execute("PRAGMA schema_version").fetchall()
    except (OSError, sqlite3.Error) as error:
        raise TrackingError(
            f"the MLflow store {database} cannot be used: {error}. Make room, correct its rights, name another one "
            "(tracking.uri=…, MLFLOW_TRACKING_URI), or move a damaged one away"
        ) from error


def has_store(out: Path, section: TrackingSection) -> bool:
    """Return whether the tracking store of a job is there, as far as that can be told without asking a server."""
    database = database_file(location(out, section)[0])
    return database is None or database.is_file()


def _strict() -> bool:
    return os.environ.get(STRICT_VARIABLE) == "1"


def _stopped(error: BaseException) -> bool:
    return isinstance(error, KeyboardInterrupt | SystemExit | asyncio.CancelledError)


def _milliseconds() -> int:
    return int(time.time() * 1000)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text).strip("_.") or "clip"
