"""Where a step's time went: busy, idle and waiting seconds of the pools, and the least that the step could have taken. Pure.

The lower bound is that of any schedule: a pool cannot be done before its work, divided by its workers, and without staleness
the update and its publication cannot begin before the last score.
"""

from __future__ import annotations

from collections.abc import Mapping

LEARNING = ("time/rest_s", "time/update_s", "time/publish_s")
TOTALS = {"busy_total_s": "busy_s", "queue_wait_total_s": "wait_s"}


def profile(
    before: Mapping[str, float],
    after: Mapping[str, float],
    times: Mapping[str, float],
    step_s: float,
    *,
    overlaps: bool,
) -> dict[str, float]:
    """Return the ``profile/`` metrics of a step of ``step_s`` seconds.

    ``before``, ``after``: the pools' metrics at its beginning and end. ``times``: the step's own. ``overlaps``: the learner works
    beside the rollout of another step (max_staleness above 0).
    """
    found: dict[str, float] = {}
    bound = 0.0
    for pool in sorted({name.split("/")[1] for name in after if name.startswith("pool/")}):

        def spent(total: str, pool: str = pool) -> float:
            name = f"pool/{pool}/{total}"
            return max(0.0, after.get(name, 0.0) - before.get(name, 0.0))

        lived = spent("worker_total_s")
        found |= {f"profile/{pool}/{short}": spent(total) for total, short in TOTALS.items()}
        found[f"profile/{pool}/idle_s"] = max(0.0, lived - spent("busy_total_s"))
        if lived > 0:
            bound = max(
                bound, step_s * spent("busy_total_s") / lived
            )  # its workers are the lived seconds over the step's
    learning = sum(times.get(name, 0.0) for name in LEARNING)
    bound = min(step_s, max(bound, learning) if overlaps else bound + learning)
    gap = step_s - bound
    return found | {
        "profile/step_s": step_s,
        "profile/lower_bound_s": bound,
        "profile/gap_s": gap,
        "profile/gap_ratio": gap / step_s if step_s > 0 else 0.0,
    }
