"""The learner group as the driver sees it: N ranks, asyncio methods, a deadline on every wait, and no call that hangs.

Responsible for placement, starting, racing the ranks' answers, merging their figures. Not responsible for learning
(``trainer``). A rank that dies fails the running call within seconds, and the group with it: its shards died with it,
so it is closed and must be started anew and restored from a checkpoint.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.learner.batches import plan_batch
from actors.learner.spec import LearnerSpec
from actors.records import Experience
from cluster.errors import PlacementError, TrainingError, VansError, WorkerTimeoutError

if TYPE_CHECKING:  # a rank loads peft and transformers, which takes seconds; the driver needs neither
    from actors.learner.rank import RankInfo
    from actors.learner.trainer import RankReport

__all__ = [
    "LOST",
    "LearnerGroup",
    "LearnerSpec",
    "RankDiedError",
    "RankSilentError",
]

_GRACE_S = 2.0  # after a first failure: how long others may still tell a better reason
_CONNECTION = re.compile(r"Connection (closed by peer|reset by peer|refused)|ncclRemoteError|DistNetworkError")
_PER_STEP = (
    "ratio",
    "kl",
    "clipped",
    "clipped_low",
    "clipped_high",
    "truncated",
    "bounded",
    "entropy",
    "good",
    "velocity_gap",
)


class RankDiedError(TrainingError):
    """A rank's process or node is gone; restore the group from its last checkpoint."""


class RankSilentError(WorkerTimeoutError):
    """A rank did not answer within its deadline; the group has been ended, restore it from its last checkpoint."""


LOST = (RankDiedError, RankSilentError)
"""What ends a group without anything being wrong with what it was asked: a new one, restored, can go on."""


class LearnerGroup:
    """N learner ranks. Calls run one after another (a lock keeps collectives in the same order on all ranks)."""

    def __init__(
        self, spec: LearnerSpec, placement_group: PlacementGroup | None = None, bundles: Sequence[int] | None = None
    ) -> None:
        """``placement_group`` holds the ranks, on its ``bundles`` where given; None makes one of its own."""
        self.spec = spec
        self.first_version = 0  # what the ranks' own count of versions starts from: a pool's versions never go back
        self._version = 0
        self.ranks: list[Any] = []
        self.infos: list[RankInfo] = []
        self._pg, self._bundles, self._own_pg = placement_group, bundles, placement_group is None
        self._where = [f"rank {r}" for r in range(spec.settings.ranks)]
        self._lock = asyncio.Lock()
        self._down: str | None = "it has not been started"

    @property
    def version(self) -> int:
        """The version of the weights, as the pools are told it."""
        return self.first_version + self._version

    # --- life
    # -------------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Place and start the ranks, load and shard the policy.

        Raises:
            PlacementError: no room within ``start_timeout_s``.
            TrainingError: ranks loaded different weights, or one failed.
            RankDiedError: a rank's process is gone.
            RankSilentError: a rank did not answer within ``start_timeout_s``; names it.
        """
        from actors.learner.rank import LearnerRank

        spec = self.spec
        if self._pg is None:
            await self._place()
        self._down = None
        actor = ray.remote(LearnerRank)
        tag = uuid.uuid4().hex[:6]
        try:
            for rank in range(spec.settings.ranks):
                strategy = PlacementGroupSchedulingStrategy(
                    self._pg, placement_group_bundle_index=self._bundles[rank] if self._bundles else -1
                )
                options = {
                    "num_cpus": spec.settings.cpus,
                    "num_gpus": spec.settings.gpus,
                    "max_restarts": 0,
                    "max_task_retries": 0,
                }
                name = f"{spec.name}-{tag}-rank{rank}"
                self.ranks.append(actor.options(name=name, scheduling_strategy=strategy, **options).remote(spec, rank))
            places = await self._call("where", timeout_s=spec.settings.start_timeout_s)
            self._where = [f"rank {r} (node {node}, pid {pid})" for r, (node, pid) in enumerate(places)]
            address = await self._race(
                [self.ranks[0].pick_address.remote()], "pick_address", spec.settings.start_timeout_s
            )
            self.infos = await self._call("setup", address[0], timeout_s=spec.settings.start_timeout_s)
            if len({info.checksum for info in self.infos}) > 1:
                raise TrainingError(
                    f"{spec.name}: ranks loaded different trained weights ({[i.checksum for i in self.infos]}); the "
                    "policy's "
                    "load must be a function of its arguments alone (seed the LoRA)"
                )
        except BaseException:
            self._kill("its start failed")
            self._release()
            raise

    async def _place(self) -> None:
        spec = self.spec
        bundle = {k: v for k, v in {"CPU": spec.settings.cpus, "GPU": spec.settings.gpus}.items() if v > 0} or {
            "CPU": 0.001
        }
        self._pg = placement_group(
            [bundle] * spec.settings.ranks, strategy="PACK", name=f"{spec.name}-{uuid.uuid4().hex[:6]}"
        )
        try:
            await asyncio.wait_for(self._pg.ready(), spec.settings.start_timeout_s)
        except TimeoutError as error:
            remove_placement_group(self._pg)
            self._pg = None
            raise PlacementError(
                f"{spec.name}: no room for {spec.settings.ranks} ranks of {bundle} within {spec.settings.start_timeout_s:.0f} s; the "
                "cluster has "
                f"{ray.cluster_resources().get('CPU', 0):g} CPU and {ray.cluster_resources().get('GPU', 0):g} GPU in "
                "all, free are "
                f"{ray.available_resources().get('CPU', 0):g} and {ray.available_resources().get('GPU', 0):g}. "
                "Use fewer ranks, or smaller ones"
            ) from error

    async def close(self) -> None:
        """End the ranks; safe to call at any time, more than once."""
        if self.ranks and self._down is None:
            leaving = [asyncio.ensure_future(_value(rank.leave.remote())) for rank in self.ranks]
            _, pending = await asyncio.wait(leaving, timeout=5.0)
            for task in pending:
                task.cancel()
            await asyncio.gather(*leaving, return_exceptions=True)  # they are killed next, whatever they said
        self._kill("it has been closed")
        self._release()

    def _release(self) -> None:
        if self._own_pg and self._pg is not None:
            remove_placement_group(self._pg)
            self._pg = None

    def _kill(self, reason: str) -> None:
        for rank in self.ranks:
            ray.kill(rank, no_restart=True)
        self.ranks = []
        self._down = reason

    # --- learning
    # ---------------------------------------------------------------------------------------------------------

    async def update(self, items: Sequence[Experience], *, updates: int = 1, epochs: int = 1) -> dict[str, float]:
        """Learn from ``items`` in ``updates`` optimizer steps (fewer where there are fewer groups), ``epochs`` times.

        Every epoch's ratios are relative to the policy before the first step. Returns metrics.

        Metrics (means are over steps, i.e. tokens or SDE steps, of all ranks): ``loss``, ``ratio``, ``ratio_max_dev``,
        ``clip_frac``, ``clip_frac_low``, ``clip_frac_high``, ``bounded_frac``, ``grad_norm``, ``lr``, ``skipped`` (since the start),
        ``updates``, ``applied``, ``steps``, ``logp_diff_mean``, ``logp_diff_max``; ``kl`` with a KL, ``entropy``
        where the policy has it, ``prompt_hit_ratio`` of the VLM's, ``truncated_frac`` with rollout log-probabilities,
        ``logp_diff_tNN`` per denoising step of the flow, ``logp_diff_pNNNN`` per bucket of token positions that starts
        at NNNN.

        Raises:
            TrainingError: see ``Trainer.update``; RankDiedError where a rank is gone.
            RankSilentError: a rank did not answer within ``step_timeout_s``.
        """
        settings, sharers = self.spec.settings, self.spec.settings.sharers(self.spec.kind)
        plans = plan_batch(
            items,
            ranks=settings.ranks // sharers,
            micro_batch=settings.at_once(self.spec.kind),
            updates=updates,
        )
        answers = await self._call("update", per_rank=[(plan, epochs) for plan in plans for _ in range(sharers)])
        self._version = answers[0][1]
        return merge_reports([report for report, _ in answers[::sharers]])  # each item counts once

    async def publish(self, *, averaged: bool = False, receivers: int = 0) -> list[Any]:
        """Gather the trained weights into the object store; returns what ``actors.weights.fetch`` and ``receive`` take.

        They are the weights themselves, which rollouts need; ``averaged``: their moving average, where one is kept.
        The driver owns the object: it outlives the group and is freed when the list is dropped. Full weights are offered by
        broadcast too, where the spec says so, to the ``receivers`` processes that are expected to come at once.
        """
        async with self._lock:
            self._check()
            pairs = [rank.publish.options(num_returns=2).remote(averaged, receivers) for rank in self.ranks]
            told = await self._race([second for _, second in pairs], "publish", self.spec.settings.step_timeout_s)
        self._version, offer = told[0]
        return [pairs[0][0]] if offer is None else [pairs[0][0], offer]

    # --- state
    # ------------------------------------------------------------------------------------------------------------

    async def save(self, folder: str) -> None:
        """Write the group's resumable state (all ranks) into ``folder``, which every node must see.

        CheckpointWriteError where a rank cannot write; the group goes on working.
        """
        await self._call("save", str(folder))

    async def restore(self, folder: str) -> None:
        """Restore what ``save`` wrote, by any number of ranks. CheckpointError where it does not fit."""
        self._version = (await self._call("restore", str(folder)))[0]

    async def export(self, folder: str) -> None:
        """Write an ordinary adapter folder (LoRA) or model folder (full weights): the moving average where one is kept."""
        await self._call("export", str(folder))

    async def base_hash(self) -> str:
        """Return the hash of the frozen parameters, whatever the number of ranks."""
        return self._agree("base_hash", await self._call("base_hash"))

    async def checksum(self) -> str:
        """Return the hash of the trained parameters; TrainingError where ranks disagree."""
        return self._agree("checksum", await self._call("checksum"))

    def _agree(self, what: str, values: list[str]) -> str:
        if len(set(values)) > 1:
            raise TrainingError(f"{self.spec.name}: ranks disagree on {what}: {dict(zip(self._where, values))}")
        return values[0]

    # --- remote calls
    # -----------------------------------------------------------------------------------------------------

    async def _call(
        self, method: str, *args: Any, per_rank: list[tuple[Any, ...]] | None = None, timeout_s: float | None = None
    ) -> list[Any]:
        async with self._lock:
            self._check()
            arguments = per_rank or [args] * len(self.ranks)
            refs = [getattr(rank, method).remote(*a) for rank, a in zip(self.ranks, arguments)]
            return await self._race(refs, method, timeout_s or self.spec.settings.step_timeout_s)

    def _check(self) -> None:
        if self._down is not None:
            raise TrainingError(f"{self.spec.name}: the learner group cannot work: {self._down}")

    async def _race(self, refs: list[ray.ObjectRef], method: str, timeout_s: float) -> list[Any]:
        """Return all answers; the first failure of any rank fails the call, so that nobody waits for a dead rank's
        peers.
        """
        tasks = [asyncio.ensure_future(_value(ref)) for ref in refs]
        try:
            _, pending = await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
            failed = any(t.done() and t.exception() for t in tasks)
            if failed and pending:
                await asyncio.wait(pending, timeout=_GRACE_S)
            if failed:
                errors = {r: t.exception() for r, t in enumerate(tasks) if t.done() and t.exception()}
                raise self._verdict(errors, method)  # type: ignore[arg-type]
            if pending:
                late = ", ".join(self._where[r] for r, t in enumerate(tasks) if not t.done())
                self._kill(f"{late} did not answer {method} within {timeout_s:.0f} s")
                raise RankSilentError(f"{self.spec.name}: {late} did not answer {method} within {timeout_s:.0f} s")
            return [t.result() for t in tasks]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _verdict(self, errors: dict[int, BaseException], method: str) -> Exception:
        """Return the error that explains the others: a death first (its peers only lost their connection), then our
        own.
        """
        for rank, error in errors.items():
            if isinstance(error, ray.exceptions.RayActorError):
                reason = f"{self._where[rank]} died during {method}"
                self._kill(reason)
                died = RankDiedError(f"{self.spec.name}: {reason}; restart the group and restore its last checkpoint")
                died.__cause__ = error
                return died
        causes = {r: getattr(e, "cause", None) or e for r, e in errors.items()}
        own = next((e for e in causes.values() if isinstance(e, VansError)), None)
        if own is not None:
            return own
        rank = min(errors)
        if all(
            _CONNECTION.search(str(error)) for error in errors.values()
        ):  # its peer's death has not been reported yet
            reason = f"{self._where[rank]} lost its connection to the other ranks during {method}"
            self._kill(reason)
            lost = RankDiedError(f"{self.spec.name}: {reason}; restart the group and restore its last checkpoint")
            lost.__cause__ = errors[rank]
            return lost
        self._kill(f"{self._where[rank]} failed in {method}")
        failed = TrainingError(f"{self.spec.name}: {self._where[rank]} failed in {method}: {errors[rank]}")
        failed.__cause__ = errors[rank]
        return failed


async def _value(ref: ray.ObjectRef) -> Any:
    return await ref


def merge_reports(reports: Sequence[RankReport]) -> dict[str, float]:
    """Return the metrics of an update from the ranks' sums (see ``LearnerGroup.update``)."""
    sums: dict[str, float] = {}
    maxima: dict[str, float] = {}
    for report in reports:
        for name, value in report.sums.items():
            sums[name] = sums.get(name, 0.0) + value
        for name, value in report.maxima.items():
            maxima[name] = max(maxima.get(name, 0.0), value)
    metrics = {**reports[0].common, **maxima, "steps": sums["steps"], "applied": sums.get("applied", 0.0)}
    metrics["loss"] = sums["loss"] / metrics["updates"]
    renamed = {
        "clipped": "clip_frac",
        "clipped_low": "clip_frac_low",
        "clipped_high": "clip_frac_high",
        "good": "good_share",
    }
    renamed |= {name: f"{name}_frac" for name in ("truncated", "bounded")}
    for name in _PER_STEP:
        if name in sums:
            metrics[renamed.get(name, name)] = sums[name] / max(sums["steps"], 1.0)
    if asked := sums.get("prompts_asked"):
        metrics["prompt_hit_ratio"] = 1.0 - sums["prompts"] / asked
    if "logp_diff" in sums:
        metrics["logp_diff_mean"] = sums["logp_diff"] / max(sums["logp_diff_steps"], 1.0)
    for name in sums:
        if name.startswith(("logp_diff_t", "logp_diff_p")) and not name.endswith("_steps"):
            metrics[name] = sums[name] / sums[f"{name}_steps"]
    return metrics
