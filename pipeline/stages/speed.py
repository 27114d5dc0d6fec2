"""How fast samplers and learners work: tokens or latents per second, operations per second, and their share of the GPUs' peak.

Work is what the workers of a pool counted themselves (evaluations and refills included) and what a learner was given. Seconds are
those in which they were at work, so idle time lowers no speed: ``profile/`` has that. Responsible for the ``speed/`` metrics; what a
unit of work costs is ``pipeline.plan.work`` and ``actors.architectures.cost``.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from statistics import fmean
from typing import Any

from actors.architectures import Architecture, architecture
from actors.architectures import cost as costs
from actors.learner.group import LearnerGroup
from actors.vdm.shapes import VdmTokens
from cluster.hardware import peak_flops
from cluster.resources import accelerators
from pipeline.config import RunConfig
from pipeline.fleet.kinds import section_of
from pipeline.fleet.models import resolve_model
from pipeline.fleet.open import Fleet
from pipeline.plan.memory import completions_of_a_row
from pipeline.plan.models import prompt_tokens
from pipeline.plan.work import (
    CAPTION_TOKENS,
    clip_tokens,
    experience_flops,
    frames_flops,
    trajectory_forward,
)
from pipeline.stages.caches import Counts, worker_counts

log = logging.getLogger(__name__)

UNITS = {"vlm": "tokens", "vdm": "latents"}
"""What a sampler makes and its learner reads: sampled tokens, or latents (a clip after one denoising step)."""


def gained(before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return what a pool's workers counted between two looks; one that was lost takes its own with it."""
    found: dict[str, float] = {}
    for worker, counts in after.items():
        for name, value in counts.items():
            found[name] = found.get(name, 0.0) + value - before.get(worker, {}).get(name, 0.0)
    return found


class WorkCosts:
    """Operations of the run's units of work, from the configurations of its models."""

    def __init__(self, config: RunConfig, thinker: Mapping[str, Any]) -> None:
        """``thinker`` is the configuration of the VLM with all its values, as a worker has it: to read it here would load
        transformers, which takes seconds.
        """
        self.config = config
        self.vlm = Architecture("vlm", resolve_model(config.models.vlm, "vlm"), {"model": thinker})
        self.shapes = architecture(resolve_model(config.models.vdm, "vdm"), "vdm").shapes
        video = config.video
        self.prompt = prompt_tokens(self.vlm, video.input_frames, *video.vlm_largest)
        self.clip: VdmTokens = clip_tokens(config, self.shapes)
        self.decode, self.condition = frames_flops(config, self.shapes)

    def sampled(self, pool: str, done: Mapping[str, float]) -> float:
        """Return the operations of what the workers of ``pool`` counted. Assumed are the tokens of a caption alone."""
        return self._answers(done) if pool == "vlm" else self._clips(done)

    def _answers(self, done: Mapping[str, float]) -> float:
        prompts, completions = done.get("prompts", 0.0), done.get("completions", 0.0)
        if not prompts or not completions:
            return 0.0
        read, new = done["prompt_tokens"] / prompts, done["tokens"] / completions
        once = costs.language_flops(self.vlm, read, 1) * prompts
        videos = costs.vision_flops(self.vlm, self.prompt) * done.get("videos", 0.0)
        return (once + videos + costs.language_flops(self.vlm, new, new, context=read) * completions).total

    def _clips(self, done: Mapping[str, float]) -> float:
        flops = self.shapes.transformer_flops(self.clip).total * done.get("passes", 0.0)
        flops += self.decode * done.get("clips", 0.0) + self.condition * done.get("references", 0.0)
        captions = done.get("captions", 0.0)  # with an embed pool a sampler embeds none
        return flops + (self.shapes.text_encoder_flops(CAPTION_TOKENS).total * captions if captions else 0.0)

    def learnt(self, policy: str, experiences: int, units: float, read: float | None) -> float:
        """Return the operations of an update on ``experiences`` with ``units`` tokens or steps in all, each counted once an epoch.

        Recomputed activations are not counted. ``read``: the mean tokens of the prompts; None takes the assumed.
        """
        config = self.config
        if policy == "vdm":
            forward = trajectory_forward(config, self.shapes, self.clip)
            return experiences * experience_flops(config, "vdm", forward, recomputed=False)
        prompt = self.prompt if read is None else replace(self.prompt, text=max(0, round(read) - self.prompt.video))
        new = units / (experiences * config.stage1.learning.epochs_per_batch)
        forward = costs.completion_flops(self.vlm, prompt, round(new), completions_of_a_row(config))
        return experiences * experience_flops(config, "vlm", forward, recomputed=False)


class Speeds:
    """The ``speed/`` metrics of a run, step by step."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._costs: asyncio.Task[WorkCosts | None] | None = None
        self._counts: Counts = {}
        self._prompt: float | None = None  # mean tokens of the prompts so far

    async def begin(self, fleet: Fleet) -> None:
        """Begin to count."""
        self._counts = await worker_counts(fleet)
        found = [*(await fleet.vlm.call_all("config")).values()] if self._costs is None else []
        if found:
            self._costs = asyncio.create_task(asyncio.to_thread(self._read, found[0]))

    def _read(self, thinker: Mapping[str, Any]) -> WorkCosts | None:
        try:
            return WorkCosts(self.config, thinker)
        except Exception as error:  # noqa: BLE001 - a model that cannot be counted is trained all the same
            log.warning("there will be no FLOP/s among the metrics, since the models cannot be counted: %s", error)
            return None

    async def samplers(self, fleet: Fleet, counts: Counts, times: Mapping[str, float]) -> dict[str, float]:
        """Return the speeds of the samplers since the last call; ``times`` has the step's ``profile/`` metrics."""
        before, self._counts = self._counts, counts
        found: dict[str, float] = {}
        for name, pool in (("vlm", fleet.vlm), ("vdm", fleet.vdm)):
            done = gained(before.get(name, {}), counts[name])
            if done.get("prompts"):
                self._prompt = done["prompt_tokens"] / done["prompts"]
            busy, idle, step = (times.get(f"profile/{part}", 0.0) for part in _parts(name))
            if busy <= 0 or step <= 0:
                continue
            workers = (busy + idle) / step  # as many lived, in the mean
            found |= await self._figures(
                f"speed/{name}/",
                UNITS[name],
                done.get(UNITS[name], 0.0),
                partial(WorkCosts.sampled, pool=name, done=done),
                busy / workers,
                self._peak(section_of(self.config, name), pool.infos, workers),
            )
        return found

    async def learner(
        self, prefix: str, policy: str, group: LearnerGroup, experiences: int, units: float, update_s: float
    ) -> dict[str, float]:
        """Return the speeds of an update of ``update_s`` seconds on ``experiences`` with ``units`` tokens or latents in all."""
        settings = self.config.learner
        return await self._figures(
            f"speed/{prefix}",
            UNITS[policy],
            units,
            partial(WorkCosts.learnt, policy=policy, experiences=experiences, units=units, read=self._prompt),
            update_s,
            self._peak(settings, lambda: dict(enumerate(group.infos)), settings.ranks),
        )

    def _peak(self, section: Any, infos: Callable[[], Mapping[Any, Any]], workers: float) -> float | None:
        """Return the peak FLOP/s of all GPUs of ``workers``, in their dtype. A shared GPU counts whole.

        None on CPUs, and where one of the cards is not known.
        """
        if section.gpus <= 0:
            return None
        known = accelerators()
        peaks = [peak_flops(known.get(info.node, ""), section.dtype) for info in infos().values()]
        if not peaks or None in peaks:
            return None
        return workers * math.ceil(section.gpus) * fmean(peak for peak in peaks if peak is not None)

    async def _figures(
        self,
        prefix: str,
        unit: str,
        number: float,
        flops: Callable[[WorkCosts], float],
        seconds: float,
        peak: float | None,
    ) -> dict[str, float]:
        """Return the metrics of one party. Where nothing was done, or something is not known, there is no metric: that is not 0."""
        if number <= 0 or seconds <= 0:
            return {}
        found = {f"{prefix}{unit}_per_s": number / seconds}
        known = await self._costs if self._costs is not None else None
        if known is not None:
            rate = flops(known) / seconds
            found[f"{prefix}flops_per_s"] = rate
            if peak is not None:
                found[f"{prefix}mfu"] = rate / peak
        return found


def _parts(pool: str) -> tuple[str, str, str]:
    return f"{pool}/busy_s", f"{pool}/idle_s", "step_s"
