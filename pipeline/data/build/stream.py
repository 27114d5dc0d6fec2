"""The stages of a build as one Ray Data pipeline: a row a video, streamed, in the order of the sources.

Not responsible for what becomes of the videos that come out (``run``).
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Generator, Sequence
from typing import Any

from cluster.errors import PlacementError
from pipeline.data.build.recipe import Recipe, StagePlan
from pipeline.data.build.worker import FATAL, Sources, StageWorker, Task, Travel, travels_of

SPARE_CPUS = 1  # for the task that reads sources
TASK_CPUS = 0.5
ENGINE_CPUS = 6  # of the tasks around an engine: what waits, pictures, template, tokens in, tokens out, what is kept
AHEAD = 256 << 20  # bytes between the stages; a video is some kilobytes of JSON
PREFETCH = 2


def require_room(recipe: Recipe, cpus: float, gpus: float) -> None:
    """Raise PlacementError where the workers of all stages, and the engines, do not fit beside each other into the cluster."""
    needed, needed_gpus = room(recipe)
    if needed > cpus or needed_gpus > gpus:
        raise PlacementError(
            f"the stages' workers and engines ask for {needed:g} CPUs and {needed_gpus:g} GPUs, and the cluster has {cpus:g} and "
            f"{gpus:g}: lower workers, cpus or gpus of the stages, or replicas of the engines"
        )


def room(recipe: Recipe) -> tuple[float, float]:
    """Return the CPUs and GPUs of all workers and engines together."""
    stages = recipe.stages.values()
    engines = [model.engine for model in recipe.models.values() if model.engine is not None]
    cpus = sum(stage.workers * stage.cpus for stage in stages) + TASK_CPUS
    cpus += sum(engine.replicas * engine.cpus for engine in engines) + ENGINE_CPUS * bool(engines)
    gpus = sum(stage.workers * stage.gpus for stage in stages) + sum(each.replicas * each.gpus for each in engines)
    return cpus, gpus


def slots(recipe: Recipe) -> int:
    """Return the CPU slots that an embedded cluster needs; no fewer than it has by itself."""
    return max(4 * (os.cpu_count() or 1), math.ceil(room(recipe)[0]) + SPARE_CPUS)


def pipeline(sources: Sources, tasks: Sequence[tuple[StagePlan, Task]], first: int, count: int) -> Any:
    """Return the lazy ``ray.data.Dataset`` of the videos ``first`` … ``count`` - 1 behind all stages; Ray must be running."""
    import ray.data

    from pipeline.data.patience import Patience

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
    together = min(plan.section.batch for plan, _ in tasks)
    dataset = ray.data.range(count - first, override_num_blocks=math.ceil((count - first) / together))
    context = dataset.context
    context.enable_progress_bars = False
    if Patience not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(Patience)
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(object_store_memory=AHEAD)
    dataset = dataset.map_batches(
        sources, fn_kwargs={"first": first}, batch_size=together, batch_format="pyarrow", num_cpus=TASK_CPUS
    )
    for plan, task in tasks:
        section = plan.section
        dataset = dataset.map_batches(
            StageWorker,
            fn_constructor_kwargs={"task": task},
            batch_size=section.batch,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                size=section.workers, max_concurrent_calls_per_actor=task.threads, enable_true_multi_threading=True
            ),
            num_cpus=section.cpus,
            num_gpus=section.gpus or None,
        )
    return dataset


def travelled(dataset: Any) -> Generator[Travel, None, None]:
    """Yield the videos that come out of ``dataset``; raises the error that ends the build when its turn comes."""
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=PREFETCH):
        for travel in travels_of(block):
            if travel.state == FATAL:
                raise travel.error()
            yield travel
