"""Runs an experiment: every row of every seed, then the same held-out questions for all rows of a seed.

Resumable at every level: a finished row is kept, one that was cut short continues from its checkpoint, answers that exist are
not asked for again. The order of rows does not matter to their figures: each is a function of (experiment, seed).
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from rich.console import Console

from actors.records import Sample
from cluster.errors import ConfigError, PlacementError, StorageError, TrainingError, VansError
from cluster.harmless import redacted
from cluster.session import connect
from pipeline.checkpoint import CheckpointStore
from pipeline.config import RunConfig, config_digest, load_config
from pipeline.config.load import override_of
from pipeline.data.folder import open_dataset
from pipeline.evaluate.evaluation import answer_with_progress, load_samples, score_systems
from pipeline.evaluate.predictions import FILE, Prediction, read_predictions, write_predictions
from pipeline.evaluate.sheets import evaluation_sheet
from pipeline.evaluate.table import EvaluationTable
from pipeline.fleet.kinds import kinds_of
from pipeline.fleet.models import resolve_model
from pipeline.fleet.open import Fleet, measuring, open_fleet, pool_sections, serve_trained
from pipeline.fleet.rewards import reward_models
from pipeline.lock import hold
from pipeline.reproduce.asking import as_asked, background_of, data_folder, make_samples, said, shown
from pipeline.reproduce.report import write_report
from pipeline.reproduce.spec import Asked, Experiment, Row
from pipeline.support import terminal
from pipeline.support.interrupt import RunStopped, stop_on_signals
from pipeline.support.progress import waiting
from pipeline.tracking.history import Series, read_stages

KEPT_METRICS = ("reward/", "alarm/", "rollout/format_rate", "rollout/unique_caption_ratio", "anchor/", "time/step_s")
ROLES: tuple[Literal["vlm", "vdm", "clip"], ...] = ("vlm", "vdm", "clip")
MARKER = "row.json"
SHEET_ROWS = ("sft", "joint")


@dataclass(frozen=True)
class RowResult:
    """What a row of one seed came to: the models it answers with, and its training's figures."""

    key: str
    vlm: str | None = None  # adapter folder, or model folder after plain SFT or lora.rank=0; None: the SFT pair's own
    vdm: str | None = None
    full: bool = False  # vlm and vdm come from SFT: loaded instead of the pair, whole or as adapters of it
    stages: dict[str, Series] = field(default_factory=dict)
    wall_s: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0  # from start to end, start-up included, of the process that finished it

    @classmethod
    def read(cls, path: Path) -> RowResult:
        """Return what :meth:`write` wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        """Write the result whole or not at all."""
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        partial.replace(path)


def reproduce(
    experiment: Experiment,
    out: Path,
    *,
    seeds: Sequence[int],
    rows: Sequence[str] = (),
    split: str = "test",
    command: str = "",
    console: Console | None = None,
) -> Path:
    """Run ``rows`` (all by default, with those that they are made of) for ``seeds`` into ``out``; returns the report's path.

    ``split`` is what the rows are judged on: ``val`` while an experiment is being designed, ``test`` for its report. Raises
    ConfigError where ``out`` holds another experiment's rows or rows that were made of other data, and TrainingError where rows
    failed, after the others are done.
    """
    console = console or terminal.console()
    keys, out = experiment.needed(list(rows)), out.resolve()
    failed: list[str] = []
    again = f"the same command continues{': ' + command if command else ''}"
    started, done, todo = time.monotonic(), 0, len(keys) * len(seeds)
    with (
        stop_on_signals(lambda stop: f"stopped by {stop.name}; {again}"),
        hold(out, "vans reproduce"),
        connect(),
    ):
        terminal.keep_log_in(out)
        _claim(out, experiment)
        with waiting(console, "making the toy world"):
            make_samples(experiment, out)
        _claim_data(out)
        for seed in seeds:
            one = _Seed(experiment, out, seed, split, console)
            one.remember()
            for key in keys:
                console.rule(f"seed {seed} · {experiment.rows[key].title}")
                if problem := one.attempt(key):
                    failed.append(f"seed {seed}, {key}: {problem}")
                    console.print(failed[-1], style="bold red", highlight=False, markup=False, soft_wrap=True)
                done += 1
                spent = (time.monotonic() - started) / 60
                console.print(f"{done} of {todo} rows, {spent:.0f} min so far", highlight=False)
            if one.results and not one.judged():
                one.judge()
        # Rows of earlier calls stand in the report too, where every seed has them.
        whole = [k for k in experiment.rows if all((out / f"seed{s}" / k / MARKER).is_file() for s in seeds)]
        report = (
            write_report(experiment, out, seeds=list(seeds), keys=whole, split=split, command=command)
            if whole
            else None
        )
    if failed or report is None:
        raise TrainingError(
            f"{len(failed)} of {todo} rows failed; {report or 'there is no report'} has those that every seed has; {again}\n"
            + "\n".join(failed)
        )
    return report


def _claim(out: Path, experiment: Experiment) -> None:
    """Note whose rows ``out`` holds (experiment, base run, models), or refuse to mix two."""
    base = load_config(experiment.base, experiment.set)
    models: dict[str, str] = {role: _digest(resolve_model(getattr(base.models, role), role)) for role in ROLES}
    facts = {"experiment": experiment.model_dump(mode="json"), "base": config_digest(base), "models": models}
    measured = load_config(experiment.base, [*experiment.set, *_measures(experiment)])
    kinds = kinds_of(measured)
    for name in reward_models(measured):
        models[name] = _digest(str(kinds[name].arguments(measured)["options"].get("path", "")))
    facts["evaluate"] = base.evaluate.model_dump(mode="json")
    path, mine = out / "experiment.json", json.dumps(facts, indent=1)
    if path.is_file() and path.read_text(encoding="utf-8") != mine:
        raise ConfigError(
            f"{out} holds rows of another experiment, base run or models ({path} differs); choose another --out"
        )
    path.write_text(mine, encoding="utf-8")


def _claim_data(out: Path) -> None:
    """Note the digests of the datasets that the rows in ``out`` are made of, or refuse to mix two."""
    splits = sorted(
        path for folder in out.glob("data*") if folder.is_dir() for path in folder.iterdir() if path.is_dir()
    )
    path, mine = out / "data.json", {str(split.relative_to(out)): open_dataset(split).digest for split in splits}
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != mine:
        raise ConfigError(f"{out} holds rows that were made of other data ({path} differs); choose another --out")
    path.write_text(json.dumps(mine, indent=1), encoding="utf-8")


def _measures(experiment: Experiment) -> list[str]:
    """Return the override by which answers are measured by the experiment's rewards too; the rows' own runs have no pool for them."""
    return [f"evaluate.rewards={json.dumps(experiment.rewards)}"] if experiment.rewards else []


def _digest(model: str) -> str:
    """Return a digest of a model folder's weights; a hub name stands for itself."""
    files = sorted(Path(model).rglob("*.safetensors")) if Path(model).is_dir() else []
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:16] if files else model


def _answering(config: RunConfig) -> tuple[str, ...]:
    """Return the pools that answer; what they answered is measured afterwards, by others."""
    return tuple(name for name in pool_sections(config) if name in ("vlm", "embed", "vdm"))


def _places(made: dict[str, str | None]) -> dict[str, str | None]:
    """Return the keys of a run's section ``models`` at which the folders (or names) of tuned models belong."""
    adapters = {role for role, folder in made.items() if folder and (Path(folder) / "adapter_config.json").is_file()}
    return {f"{role}_adapter" if role in adapters else role: folder for role, folder in made.items()}


@dataclass
class _Seed:
    """All rows of one seed: ``results`` are those that are done."""

    experiment: Experiment
    out: Path
    seed: int
    split: str
    console: Console
    results: dict[str, RowResult] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where the seed's rows lie."""
        return self.out / f"seed{self.seed}"

    def remember(self) -> None:
        """Take up the rows that earlier calls finished."""
        for key in self.experiment.rows:
            if (marker := self.folder / key / MARKER).is_file():
                self.results[key] = RowResult.read(marker)

    def attempt(self, key: str) -> str | None:
        """Run row ``key``; returns why there is no result, after which the other rows can go on."""
        row = self.experiment.rows[key]
        if lost := [other for other in (row.vlm, row.vdm, *row.sft_like) if other and other not in self.results]:
            return f"it is made of {' and '.join(lost)}, which failed"
        try:
            self.run(key)
        except (RunStopped, StorageError, PlacementError):
            raise  # of no row: the next one would not go better
        except VansError as error:
            return redacted(str(error))
        return None

    def run(self, key: str) -> None:
        """Make sure that row ``key`` is done."""
        if key in self.results:
            self.console.print("done before", style="dim")
            return
        folder = self.folder / key
        folder.mkdir(parents=True, exist_ok=True)
        row, started = self.experiment.rows[key], time.monotonic()
        if row.sft_like:
            result = self._supervise(key, folder)
        elif row.set is not None:
            result = self._train(key, folder)
        else:
            vlm, vdm = (self.results[other] if other else None for other in (row.vlm, row.vdm))
            result = RowResult(key, vlm.vlm if vlm else None, vdm.vdm if vdm else None)
        self.results[key] = replace(result, seconds=round(time.monotonic() - started, 1))
        self.results[key].write(folder / MARKER)

    def config(self, row: Row, folder: Path, split: str, more: Sequence[str] = ()) -> RunConfig:
        """Return the run of ``row``: the base run, the experiment's and the row's overrides, ``more``, and other rows' adapters."""
        overrides = [
            override_of("name", folder.name),
            override_of("out", folder),
            f"seed={self.seed}",
            f"data.seed={self.seed}",
            override_of("data.train", self.out / "data" / "train"),
            override_of("data.eval", data_folder(self.out, background_of(row)) / split),
            f"evaluate.samples={self.experiment.test_samples}",
            *self.experiment.set,
            *(row.set or ()),
            *more,
        ]
        for role, other in (("vlm", row.vlm), ("vdm", row.vdm)):
            if other is not None and (adapter := getattr(self.results[other], role)) is not None:
                overrides.append(override_of(f"models.{role}_adapter", adapter))
        return load_config(self.experiment.base, overrides)

    def _train(self, key: str, folder: Path) -> RowResult:
        from pipeline.run.learners import export_name
        from pipeline.run.train import run_training

        config = self.config(self.experiment.rows[key], folder, "train")
        resume = bool(CheckpointStore(folder / "checkpoints", config.checkpoint.keep).paths())
        report = run_training(config, resume=resume, console=self.console)
        stages = read_stages(report.tracking_uri, report.run_id, KEPT_METRICS)
        for name, result in report.stages.items():
            told = len(stages.get(name, {}).get("time/step_s", []))
            if told != result.steps:
                raise TrainingError(
                    f"{folder}: MLflow ({report.tracking_uri}) holds {told} of the {result.steps} steps of {name}, so the row has no "
                    "times and curves; when the store answers again, run the row again in an empty folder"
                )
        made = {role: folder / export_name(config, role) for role in ("vlm", "vdm")}
        return RowResult(
            key,
            vlm=str(made["vlm"]) if made["vlm"].is_dir() else config.models.vlm_adapter,
            vdm=str(made["vdm"]) if made["vdm"].is_dir() else config.models.vdm_adapter,
            stages=stages,
            wall_s={name: round(sum(v for _, v in s.get("time/step_s", [])), 1) for name, s in stages.items()},
        )

    def _supervise(self, key: str, folder: Path) -> RowResult:
        """Continue the pair's SFT for the wall time of the rows it is compared with: VLM as long as stage 1, VDM as stage 2.

        All but the length is as in the base run's section ``sft``, at a constant rate. A model that those rows did not
        train stays as it is.
        """
        from pipeline.sft.command import run_configured_sft

        experiment = self.experiment
        models = load_config(experiment.base, experiment.set).models
        made = {"vlm": models.vlm, "vdm": models.vdm}
        walls: dict[str, float] = {}
        roles: tuple[tuple[Literal["vlm", "vdm"], str, str], ...] = (
            ("vlm", "stage1", "sft"),
            ("vdm", "stage2", "artist"),
        )
        for role, stage, split in roles:
            seconds = sum(self.results[other].wall_s.get(stage, 0.0) for other in experiment.rows[key].sft_like)
            if not seconds:
                continue
            length = {"steps": "null", "epochs": "null", "max_wall_s": seconds, "optim.schedule": "constant"}
            overrides = [f"sft.{role}.{name}={value}" for name, value in length.items()]
            config = load_config(experiment.base, [*experiment.set, f"seed={self.seed + 1}", *overrides])
            result = run_configured_sft(
                config, role, data=self.out / "data" / split, out=folder / role, console=self.console
            )
            made[role], walls[f"sft_{role}"] = str(result.folder), round(result.train_s, 1)
        return RowResult(key, vlm=made["vlm"], vdm=made["vdm"], full=True, wall_s=walls)

    # --- the held-out questions -------------------------------------------------------------------------------------

    def judged(self) -> bool:
        """Whether the seed's table is there, of the very rows that are done and not older than one of their answers."""
        table = self.folder / self.split / "table.json"
        answers = [self._answers(key) / FILE for key in self.results]
        if not table.is_file() or not all(path.is_file() for path in answers):
            return False
        made = table.stat().st_mtime
        return (
            json.loads(table.read_text(encoding="utf-8"))["systems"].keys() == self.results.keys()
            and max(path.stat().st_mtime for path in answers) <= made
        )

    def judge(self) -> None:
        """Answer the held-out questions with every row's models, score all answers together, and write the seed's table."""
        self.console.rule(f"seed {self.seed} · answers to the {self.split} questions")
        config = self.config(Row(title="held out"), self.folder, self.split, _measures(self.experiment))
        rows = self.experiment.rows
        scenes = dict.fromkeys(background_of(rows[key]) for key in self.results)
        samples = {scene: self._samples(scene) for scene in scenes}
        asyncio.run(self._answer_all(config, samples))
        table = asyncio.run(self._score_all(config, samples))
        table.write(self.folder / self.split)
        sheet = {rows[k].title: read_predictions(self._answers(k)) for k in SHEET_ROWS if k in self.results}
        if sheet:
            path = self.folder / self.split / "contact_sheet.png"
            evaluation_sheet(samples[None], sheet, path, table=table, title=" against ".join(sheet))

    def _samples(self, background: str | None) -> list[Sample]:
        asked = None if background is None else Asked(background=background)
        return load_samples(self.config(Row(title="held out", asked=asked), self.folder, self.split))

    def _answers(self, key: str) -> Path:
        return self.folder / key / self.split

    async def _answer_all(self, config: RunConfig, samples: Mapping[str | None, list[Sample]]) -> None:
        """Ask every row that has not answered. Rows whose artists see their input alike share the pools; what SFT made has its own."""
        todo = [r for r in self.results.values() if not (self._answers(r.key) / FILE).is_file()]
        alike: dict[str, list[RowResult]] = {}
        for result in todo:
            if not result.full:
                asked = as_asked(config, self.experiment.rows[result.key])
                alike.setdefault(asked.video.model_dump_json(), []).append(result)
        for results in alike.values():
            its = as_asked(config, self.experiment.rows[results[0].key])
            async with open_fleet(its, only=_answering(config)) as fleet:
                for version, result in enumerate(results, start=1):
                    for pool, trained in ((fleet.vlm, result.vlm), (fleet.vdm, result.vdm)):
                        if trained is None:
                            await pool.set_weights(version, None)
                        else:
                            await serve_trained(pool, trained, version)
                    await self._answer(its, fleet, result.key, samples)
        for result in (r for r in todo if r.full):
            models = config.models.model_copy(update=_places({"vlm": result.vlm, "vdm": result.vdm}))
            async with open_fleet(config.model_copy(update={"models": models}), only=_answering(config)) as fleet:
                await self._answer(config, fleet, result.key, samples)

    async def _answer(
        self, config: RunConfig, fleet: Fleet, key: str, samples: Mapping[str | None, list[Sample]]
    ) -> None:
        row = self.experiment.rows[key]
        questions = samples[background_of(row)]
        answers = await answer_with_progress(config, fleet, questions, self.console, row.title[:22], said=said(row))
        write_predictions(self._answers(key), [shown(row, answer) for answer in answers], config.video.fps)

    async def _score_all(self, config: RunConfig, samples: Mapping[str | None, list[Sample]]) -> EvaluationTable:
        """Return the table of all rows; those that are asked about other scenes are measured on theirs."""
        systems: dict[str | None, dict[str, list[Prediction]]] = {scene: {} for scene in samples}
        for key in self.results:
            systems[background_of(self.experiment.rows[key])][key] = read_predictions(self._answers(key))
        async with open_fleet(config, only=measuring(config)) as fleet:
            tables = [await score_systems(config, fleet, found, samples[scene]) for scene, found in systems.items()]
        return replace(tables[0], systems={key: r for table in tables for key, r in table.systems.items()})
