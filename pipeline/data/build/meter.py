"""What a build has spent, counted in one place for all workers and all calls of the command."""

from __future__ import annotations

import time
from typing import Any

from pipeline.data.build.store import WorkArea, digest_of

KIND = "spent"
KEY = digest_of(KIND)
WRITE_EVERY_S = 1.0


class Account:
    """Tokens and cost since the build began. Runs as an actor; ``area`` keeps the sums for the next call."""

    def __init__(self, area: WorkArea, max_tokens: int | None, max_cost: float | None) -> None:
        self._area, self._max_tokens, self._max_cost = area, max_tokens, max_cost
        kept = area.read(KIND, KEY) or {}
        self.tokens, self.cost = int(kept.get("tokens", 0)), float(kept.get("cost", 0.0))
        self._written = 0.0

    def allows(self) -> bool:
        """Return whether anything may be asked. What is under way when the budget is spent is still paid for."""
        tokens = self._max_tokens is None or self.tokens < self._max_tokens
        return tokens and (self._max_cost is None or self.cost < self._max_cost)

    def add(self, tokens: int, cost: float) -> None:
        """Count a reply."""
        self.tokens, self.cost = self.tokens + tokens, self.cost + cost
        if time.monotonic() - self._written > WRITE_EVERY_S or not self.allows():
            self.save()

    def save(self) -> tuple[int, float]:
        """Write the sums down, and return them."""
        self._area.write(KIND, KEY, {"tokens": self.tokens, "cost": self.cost})
        self._written = time.monotonic()
        return self.tokens, self.cost


class ActorMeter:
    """The account as workers have it. ``bounded``: there is a budget, so each ask has to be allowed."""

    def __init__(self, actor: Any, bounded: bool) -> None:
        self._actor, self._bounded = actor, bounded

    def allows(self) -> bool:
        """Return whether anything may be asked."""
        import ray

        return not self._bounded or bool(ray.get(self._actor.allows.remote()))

    def add(self, tokens: int, cost: float) -> None:
        """Count a reply."""
        done = self._actor.add.remote(tokens, cost)
        if self._bounded:
            import ray

            ray.get(done)


def start_account(area: WorkArea, max_tokens: int | None, max_cost: float | None) -> Any:
    """Return the actor that counts."""
    import ray

    return ray.remote(num_cpus=0, max_restarts=-1)(Account).remote(area, max_tokens, max_cost)
