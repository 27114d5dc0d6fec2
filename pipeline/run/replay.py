"""``vans replay``: a stored step is fed to the learner alone, and its figures are compared with the run's.

The learner begins with the weights that the run had before the step: those of its checkpoint, or of the stage's beginning. No
pool is started, so a trainer can be debugged apart from samplers. In a deterministic run all figures agree to the last bit.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from actors.learner.group import LearnerGroup
from actors.records import Experience
from cluster.errors import ConfigError
from pipeline.checkpoint import CheckpointStore
from pipeline.config import RunConfig, load_config
from pipeline.fleet.open import cluster_session
from pipeline.run.learners import learner_spec
from pipeline.stages.table import STAGES, AnyStage
from pipeline.tracking.experiences import experiences_path, read_experiences
from pipeline.tracking.rollouts import StoredStep, read_note, stored_steps

OF_THE_PROCESS = ("prompt_hit_ratio",)
"""Figures that say what the learner's process had cached, and nothing of what it learnt."""


@dataclass(frozen=True)
class Compared:
    """One figure of the update: the run's, and the replay's; None where one of them has none."""

    name: str
    run: float | None
    replay: float | None

    @property
    def equal(self) -> bool:
        """Whether both are the same to the last bit."""
        return self.run == self.replay or (self.run != self.run and self.replay != self.replay)


@dataclass(frozen=True)
class Replay:
    """A replayed step; ``begun`` says which weights it began with."""

    stage: str
    step: int
    begun: str
    figures: tuple[Compared, ...]

    @property
    def equal(self) -> bool:
        """Whether all figures are the run's."""
        return all(figure.equal for figure in self.figures)


def replay(folder: Path, step: int, stage: str | None = None) -> Replay:
    """Feed the stored ``step`` of the run in ``folder`` to new learners, and compare; ``stage`` is needed where two have it.

    Raises ConfigError where it is no run's folder, the step or its tensors are not stored, or there are no weights to begin with.
    """
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder}: not a run's folder, there is no config.yaml in it (a run's is its `out`)")
    config = load_config(folder / "config.yaml")
    found = _stored(folder, config, step, stage)
    kind = next(each for each in STAGES[config.training] if each.name == found.stage)
    begins, begun = _weights_before(folder, config, kind, step)
    experiences = read_experiences(experiences_path(found.path))
    if not any(experiences.values()):
        raise ConfigError(f"{found.path}: {found.stage} learnt nothing in step {step}: it had no group to learn from")
    figures = read_note(found.path)["figures"]
    with cluster_session(config):
        replayed = asyncio.run(_update(config, kind(config, None), experiences, begins))  # type: ignore[arg-type]
    return Replay(found.stage, step, begun, tuple(_compared(figures, replayed)))


async def _update(
    config: RunConfig, stage: AnyStage, experiences: dict[str, list[Experience]], begins: Path | None
) -> dict[str, float]:
    """Return the figures of the update, as the loop names them; policies learn one after the other."""
    section = stage.section.learning
    figures: dict[str, float] = {}
    for policy, items in experiences.items():
        if not items:
            continue
        learner = LearnerGroup(learner_spec(config, stage, policy))
        try:
            await learner.start()
            if begins is not None:
                await learner.restore(str(begins / f"{policy}_learner"))
            done = await learner.update(items, updates=section.updates_per_batch, epochs=section.epochs_per_batch)
        finally:
            await learner.close()
        prefix = "learner/" if len(experiences) == 1 else f"learner/{policy}/"
        figures |= {f"{prefix}{name}": value for name, value in done.items()}
    return figures


def _compared(run: dict[str, float], replayed: dict[str, float]) -> list[Compared]:
    prefixes = {name.rpartition("/")[0] for name in replayed}
    names = {*replayed, *(name for name in run if name.rpartition("/")[0] in prefixes)}
    return [
        Compared(name, run.get(name), replayed.get(name))
        for name in sorted(names)
        if name.rpartition("/")[2] not in OF_THE_PROCESS
    ]


def _stored(folder: Path, config: RunConfig, step: int, stage: str | None) -> StoredStep:
    kept = [each for each in stored_steps(folder) if experiences_path(each.path).is_file()]
    found = [each for each in kept if each.step == step and stage in (None, each.stage)]
    if len(found) > 1:
        raise ConfigError(f"step {step} is stored of {' and '.join(each.stage for each in found)}; say which: --stage")
    if not found:
        there = ", ".join(f"{each.stage} {each.step}" for each in kept) or "none"
        raise ConfigError(
            f"{folder}: the tensors of step {step} are not stored. Stored are: {there}. A run stores them with "
            "tracking.rollouts.replay=true"
        )
    return found[0]


def _weights_before(folder: Path, config: RunConfig, kind: type[AnyStage], step: int) -> tuple[Path | None, str]:
    """Return the checkpoint from which ``step`` is next, None for the stage's beginning, and what to call it."""
    path = folder / "checkpoints" / f"{kind.name}-step{step:06d}"
    if path.is_dir():
        return CheckpointStore(folder / "checkpoints").load(path).path, path.name
    if step == 0:
        return None, f"the beginning of {kind.name}"
    there = [each.name for each in CheckpointStore(folder / "checkpoints").paths(kind.name)]
    raise ConfigError(
        f"{folder}: there are no weights from before step {step} of {kind.name}: a step can be replayed that follows a "
        f"checkpoint, or that is the first. Checkpoints: {', '.join(there) or 'none'} (the number is the next step's)"
    )
