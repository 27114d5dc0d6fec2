"""Before a run: whether it may begin, where it begins, and what a person is told when it has been stopped."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from cluster.errors import CheckpointError, ConfigError
from pipeline.checkpoint import (
    Checkpoint,
    CheckpointStore,
    Inputs,
    Mirror,
    TrainState,
    compare_inputs,
    free_besides,
    newest_of_both,
    require_same_config,
)
from pipeline.config import RunConfig, to_yaml
from pipeline.data.source import Cursor, SampleSource
from pipeline.data.sources import run_inputs, training_source
from pipeline.evaluate.table import require_metric
from pipeline.fleet.models import SHARERS, require_drawable, require_shareable
from pipeline.fleet.open import placement_plan
from pipeline.run.best import BEST
from pipeline.run.learners import export_name, section_of
from pipeline.stages.feed import FeedCursor
from pipeline.stages.stage2 import Stage2, window_warnings
from pipeline.stages.table import STAGES
from pipeline.support import terminal
from pipeline.support.interrupt import StopRequest


def resume_command(config: RunConfig) -> str:
    """Return the command that continues the run of ``config``, whatever command started it."""
    return f"vans train {shlex.quote(str(config.out / 'config.yaml'))} --resume"


def stopped_message(config: RunConfig, stop: StopRequest) -> str:
    """Return what a person is told when a signal has ended the run."""
    newest = next(iter(CheckpointStore(config.out / "checkpoints", config.checkpoint.keep).paths()), None)
    if newest is None:
        return f"stopped by {stop.name}, and there is no checkpoint yet; the same command starts the run again"
    return f"stopped by {stop.name}; {newest} is kept. Go on with: {resume_command(config)}"


def has_checkpoint(config: RunConfig) -> bool:
    """Return whether the folder of ``config`` holds a checkpoint, whole or not, or its mirror a whole one."""
    if CheckpointStore(config.out / "checkpoints", config.checkpoint.keep).paths():
        return True
    mirror = mirror_of(config)
    return mirror is not None and bool(mirror.checkpoints())


def print_plan(config: RunConfig) -> None:
    """Print the resolved configuration and what it asks of the cluster; raises ConfigError for an unknown metric."""
    require_metric(config.evaluate.metric, config.evaluate.rewards)
    console = terminal.console()
    console.print(to_yaml(config), highlight=False, markup=False)
    for warning in window_warnings(config):
        console.print(warning, style="bold yellow", markup=False, highlight=False, soft_wrap=True)
    plan = placement_plan(config)
    console.print(plan.table(), highlight=False, markup=False)
    if "GPU" in plan.total():
        console.print(
            "whether it fits into the GPUs' memory, and how long a step takes: vans plan CONFIG --gpus 8x80",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )


def mirror_of(config: RunConfig) -> Mirror | None:
    """Return the mirror that ``config`` copies its checkpoints to, None where it has none; nothing is opened."""
    section = config.checkpoint
    return None if section.mirror is None else Mirror(section.mirror, section.keep)


@dataclass(frozen=True)
class Beginning:
    """Where a run begins: at ``checkpoint`` (None: step 0), with the data of ``source``; ``told`` is for people, line by line."""

    checkpoint: Checkpoint | None
    source: SampleSource
    inputs: Inputs
    told: tuple[str, ...] = ()


def beginning(config: RunConfig, resume: bool, restart_data: bool, mirror: Mirror | None) -> Beginning:
    """Return where the run of ``config`` begins; nothing is started.

    Raises ConfigError, DataError, StorageError or CheckpointError where it may not begin, or not go on.
    """
    checkpoint = starting_point(config, resume, restart_data, mirror)
    source = training_source(config)
    inputs = run_inputs(config, source)
    if checkpoint is None:
        return Beginning(None, source, inputs)
    state, where = checkpoint.state, str(checkpoint.path)
    earlier = Inputs.from_json(state.inputs)
    inputs, told = compare_inputs(earlier, inputs, state.cursor, where=where, restart_data=restart_data)
    return Beginning(checkpoint, source, inputs, tuple(told))


def cursor_of(state: TrainState, inputs: Inputs) -> FeedCursor:
    """Return where a run of ``inputs`` that goes on at ``state`` draws: the beginning, where the data were begun anew since then."""
    earlier = Inputs.from_json(state.inputs)
    if len(inputs.restarts) > len(earlier.restarts) and not inputs.continues(earlier):
        return FeedCursor(Cursor())
    return FeedCursor.from_json(state.cursor)


def starting_point(config: RunConfig, resume: bool, restart_data: bool, mirror: Mirror | None) -> Checkpoint | None:
    """Return the checkpoint that a run of ``config`` goes on from, brought back from its mirror if need be; None for a new run."""
    store = CheckpointStore(config.out / "checkpoints", config.checkpoint.keep)
    if not resume:
        if store.paths():
            raise ConfigError(
                f"out={config.out} already holds a run; continue it with --resume, or choose another folder (out=…)"
            )
        if mirror is not None:
            mirror.require_unused()
        return None
    if mirror is None:
        checkpoint = store.latest()
    else:
        checkpoint = newest_of_both(store, mirror, [*(export_name(config, policy) for policy in ("vlm", "vdm")), BEST])
    if checkpoint is None:
        where = store.root if mirror is None else f"{store.root} or {mirror.root}"
        raise CheckpointError(f"--resume: there is no checkpoint under {where}; start the run without --resume")
    state = checkpoint.state
    require_same_config(state, config, free_besides(state, restart_data=restart_data))
    return checkpoint


def require_trainable(config: RunConfig) -> None:
    """Raise ConfigError where a model that starts from an adapter is to be trained as full weights, where the artist cannot draw clips
    of the run's size or the learner's ranks or a sampler's processes not share them, or where evaluate.metric is unknown.
    """
    require_metric(config.evaluate.metric, config.evaluate.rewards)
    require_drawable(config)
    for stage in STAGES[config.training]:
        for policy in stage.policies:
            steps = config.stage2.steps if stage is Stage2 else config.stage1.steps
            adapter = getattr(config.models, f"{policy}_adapter")
            if steps and adapter is not None and section_of(config, policy).lora.rank == 0:
                key = "stage1" if policy == "vlm" else "stage2"
                raise ConfigError(
                    f"models.{policy}_adapter={adapter!r} with {key}.lora.rank=0: full weights cannot be trained through an "
                    f"adapter; set {key}.lora.rank to the adapter's, or start from a whole model (models.{policy})"
                )
    for key in SHARERS:
        require_shareable(config, key)
