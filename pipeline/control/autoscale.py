"""How many workers a pool should have, from what was seen of it lately. Pure: no clock, no Ray.

A pool grows when a request has waited longer than ``target_wait_s``, and shrinks when one worker fewer would still keep well
within it. Three rules keep it calm:

* Nothing changes within ``cooldown_s`` of the last change, whoever made it, and only what was seen since that change counts:
  figures of another size say nothing of this one.
* Growth needs a moment in which every worker that the pool should have was serving. So it does not grow further while new
  workers load their model or wait for room in the cluster, nor because all of them were loading weights.
* A shrink must predict waits below half of the target; the gap keeps one decision from calling for its opposite.

A size outside ``min`` … ``max`` was set by hand (a run starts within them): the pool is left alone until it is within again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from actors.pool.settings import AutoscaleSection
from actors.pool.spec import PoolStats
from actors.pool.state import ALIVE, COMING

CALM = 0.5
"""A pool shrinks only where the predicted wait is below this share of ``target_wait_s``."""
FULL = 0.8
"""… and where the workers that stay would have calls under way for less than this share of the time."""


@dataclass(frozen=True)
class PoolPoint:
    """A pool at one moment: what the autoscaler sees, and a line of ``pools.jsonl``. Times are seconds."""

    at: float
    target: int
    ready: int
    """Workers that serve."""
    coming: int
    """Workers whose process is being started, loads its model or waits for room."""
    busy: int
    """Workers with a call under way."""
    queue_len: int
    oldest_wait_s: float
    inflight: int
    """Requests inside workers."""
    done: int
    service_s: float
    """One call, moving average."""
    busy_ratio: float
    """Share of live workers with a call under way, over about 30 s."""

    @classmethod
    def of(cls, stats: PoolStats, at: float) -> PoolPoint:
        """Return the point of ``stats`` at time ``at``, of any clock."""
        return cls(
            at=round(at, 3),
            target=stats.target,
            ready=stats.ready,
            coming=sum(worker.state in COMING for worker in stats.workers),
            busy=sum(worker.state in ALIVE and worker.inflight > 0 for worker in stats.workers),
            queue_len=stats.queue_len,
            oldest_wait_s=round(stats.oldest_wait_s, 3),
            inflight=stats.inflight,
            done=stats.done,
            service_s=round(stats.service_s, 4),
            busy_ratio=round(stats.busy_ratio, 3),
        )


def decide(settings: AutoscaleSection, trace: Sequence[PoolPoint], now: float) -> int:
    """Return how many workers the pool should have at ``now``.

    ``trace`` is what was seen of it, oldest first, at least one point; it should reach back by ``window_s`` and by
    ``cooldown_s``. The
    answer is the present target, or lies within ``min`` … ``max`` and at most ``step`` away from it.
    """
    size = trace[-1].target
    changed_at = last_change(trace)
    if not settings.enabled or not settings.min <= size <= settings.max or now - changed_at < settings.cooldown_s:
        return size
    seen = [point for point in trace if point.at >= changed_at and point.at >= now - settings.window_s]
    if trace[-1].ready >= size and _too_slow(settings, seen):
        return min(settings.max, size + settings.step)
    if now - changed_at < settings.window_s:
        return size  # what one step needs may not have been seen yet
    for fewer in range(max(settings.min, size - settings.step), size):
        if _enough(settings, seen, fewer):
            return fewer
    return size


class Autoscaler:
    """:func:`decide` with its memory: what was seen of one pool, for as long as it matters."""

    def __init__(self, settings: AutoscaleSection) -> None:
        self.settings = settings
        self.trace: list[PoolPoint] = []

    def see(self, point: PoolPoint) -> int:
        """Remember ``point`` and return how many workers the pool should have now."""
        self.trace.append(point)
        horizon = point.at - max(self.settings.window_s, self.settings.cooldown_s)
        while len(self.trace) > 2 and self.trace[1].at < horizon:  # one older point stays: it shows a change after it
            del self.trace[0]
        return decide(self.settings, self.trace, point.at)


def last_change(trace: Sequence[PoolPoint]) -> float:
    """Return when the target changed last; the first point's time where ``trace`` shows no change."""
    changes = (new.at for old, new in zip(reversed(trace[:-1]), reversed(trace[1:])) if new.target != old.target)
    return next(changes, trace[0].at)


def _too_slow(settings: AutoscaleSection, seen: Sequence[PoolPoint]) -> bool:
    """Return whether a request waited too long although every worker served."""
    return any(point.ready >= point.target and point.oldest_wait_s > settings.target_wait_s for point in seen)


def _enough(settings: AutoscaleSection, seen: Sequence[PoolPoint], workers: int) -> bool:
    """Return whether ``workers`` would have kept waits and load well within limits, had they stood in for those seen.

    A burst takes longer in proportion. Where more than ``workers`` had calls at once, one call waits for another's end.
    """
    if not seen:
        return False
    share = seen[-1].target / workers
    behind = max(point.service_s for point in seen) if any(point.busy > workers for point in seen) else 0.0
    wait = max(point.oldest_wait_s for point in seen) * share + behind
    load = sum(point.busy_ratio * max(point.ready, 1) for point in seen) / len(seen) / workers
    return wait <= CALM * settings.target_wait_s and load <= FULL
