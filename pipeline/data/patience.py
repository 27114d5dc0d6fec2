"""Let a Ray Data execution rest while there is nothing for it to do.

Its scheduling loop waits for decoding tasks that have a block to hand over. Where one has, and may not because enough lies decoded
already, the loop would spin, and take a core from whoever trains.
"""

from __future__ import annotations

import time
from typing import Any

from ray.data._internal.execution.execution_callback import ExecutionCallback

SHORTEST_S, LONGEST_S = 0.001, 0.032


class Patience(ExecutionCallback):
    """For ``DataContext.custom_execution_callback_classes``; one per execution."""

    def __init__(self) -> None:
        self._progress = -1
        self._since = 0.0
        self._pause_s = SHORTEST_S

    def on_execution_step(self, executor: Any) -> None:
        """Sleep after a step that began no task, took no block and did not wait for one; longer each time in a row."""
        metrics = [operator.metrics for operator in executor._topology]
        progress = sum(m.num_tasks_submitted + m.num_task_outputs_generated + m.num_outputs_taken for m in metrics)
        if progress != self._progress or time.perf_counter() - self._since > LONGEST_S:
            self._pause_s = SHORTEST_S
        else:
            time.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, LONGEST_S)
        self._progress, self._since = progress, time.perf_counter()
