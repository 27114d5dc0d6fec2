"""A learner group that is lost (a rank killed, hung, or its node gone) is started anew and restored, within the run.

The new group takes the newest checkpoint of the stage, or the stage's own beginning, and the steps since then are repeated
from that checkpoint's cursor: the same samples with the same seeds. Not responsible for how a group starts or restores.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from actors.learner.group import LOST
from cluster.errors import TrainingError
from pipeline.checkpoint import Checkpoint
from pipeline.stages.loop import Learners, Stage, StageResult, pool_of

Attempt = Callable[[Checkpoint | None], Awaitable[StageResult]]


@dataclass
class Restarts:
    """How often a stage has lost its learner group and gone on; ``limit`` is learner.max_restarts."""

    stage: str
    limit: int
    resume_command: str
    count: int = 0

    def again(self, error: Exception, newest: Checkpoint | None) -> str:
        """Count one more and return a line for people; raises TrainingError where that is one too many."""
        if self.count >= self.limit:
            goes_on = f"`{self.resume_command}` goes on from {newest.path}" if newest else "There is no checkpoint yet"
            raise TrainingError(
                f"{self.stage} lost its learner group, and learner.max_restarts={self.limit} allows no further restart: "
                f"{error}. {goes_on}"
            ) from error
        self.count += 1
        where = f"from step {newest.step}" if newest else f"from the start of {self.stage}"
        return f"{error}\nrestart {self.count} of at most {self.limit}: a new group goes on {where}"


async def train_with_restarts(
    attempt: Attempt,
    first: Checkpoint | None,
    restarts: Restarts,
    newest: Callable[[], Checkpoint | None],
    on_restart: Callable[[str, Checkpoint | None], Awaitable[None]],
) -> StageResult:
    """Return what ``attempt`` returns; where it loses its learner group, attempt again from the ``newest`` checkpoint.

    ``first`` is where the first attempt starts (None: the stage's beginning). ``on_restart`` is awaited before each further
    one. Raises TrainingError when the restarts are used up, and every other error of ``attempt`` as it is.
    """
    here = first
    while True:
        try:
            return await attempt(here)
        except LOST as error:
            here = newest()
            await on_restart(restarts.again(error, here), here)


async def serve_restarted(stage: Stage, learners: Learners, restored: bool) -> None:
    """Set the pools back to what a restarted group holds, under version numbers above all that were served before.

    ``restored``: the group comes from a checkpoint; otherwise it, and the pools, are at the stage's beginning.
    """
    for policy, learner in learners.items():
        pool = pool_of(stage, policy)
        learner.first_version += max(0, pool.stats().version + 1 - learner.version)
        await pool.set_weights(learner.version, await learner.publish() if restored else None)
