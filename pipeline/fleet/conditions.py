"""What clips are conditioned on, made once for a run: caption embeddings and reference latents from the embed pool.

Keys are contents, the caption's text and a hash of the frames, so a group's members, the learner, later steps and both
stages share one embedding and one encoding. Whoever asks first sends the request; who asks meanwhile waits for the same
answer. The models are frozen for the length of a run (the stages compare their hashes), so the keys need no version.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Any

from actors.policy.cache import Cache, content_key
from actors.records import Conditioning, EmbedRequest, EncodeRequest, RenderRequest

Submit = Callable[[Any], Awaitable[Any]]


@dataclass
class Made:
    """How often something was asked for, and how often it had to be made."""

    asked: int = 0
    made: int = 0


class Conditions:
    """Hands out conditions; ``submit`` is the embed pool's. Lives in the driver's event loop."""

    def __init__(self, submit: Submit, cache_bytes: int) -> None:
        self._submit = submit
        self._cache: Cache[Any] = Cache(cache_bytes)
        self._coming: dict[Hashable, asyncio.Task[Any]] = {}
        self.captions, self.references = Made(), Made()

    async def of(self, request: RenderRequest) -> Conditioning:
        """Return what ``request`` is conditioned on. Raises what the pool raises: SampleFailed for what cannot be used."""
        frames = request.reference_frames
        text = self._get(self.captions, ("text", request.caption), EmbedRequest(request.caption))
        negative = references = image = None
        wanted = [text]
        if request.guidance != 1.0:
            wanted.append(self._get(self.captions, ("negative",), EmbedRequest(None)))
        if len(frames):
            key = ("references", content_key(frames), request.num_frames)
            ask = EncodeRequest(request.sample_id, frames, request.num_frames)
            wanted.append(self._get(self.references, key, ask))
        found = await asyncio.gather(*wanted)
        if request.guidance != 1.0:
            negative = found[1].rows
        if len(frames):
            references, image = found[-1].latents, found[-1].image
        return Conditioning(found[0].rows, negative, references, found[0].max_tokens, image)

    def counters(self) -> dict[str, float]:
        """Return how much was made and asked for since the start."""
        return {
            "captions": float(self.captions.made),
            "captions_asked": float(self.captions.asked),
            "references": float(self.references.made),
            "references_asked": float(self.references.asked),
        }

    async def _get(self, tally: Made, key: Hashable, request: Any) -> Any:
        tally.asked += 1
        found = self._cache.find(key)
        if found is not None:
            return found
        task = self._coming.get(key)
        if task is None:
            tally.made += 1
            task = self._coming[key] = asyncio.create_task(self._make(request))
            task.add_done_callback(functools.partial(self._arrived, key))
        # Others may wait for the same answer: who is cancelled does not cancel it.
        return await asyncio.shield(task)

    async def _make(self, request: Any) -> Any:
        return await self._submit(request)

    def _arrived(self, key: Hashable, task: asyncio.Task[Any]) -> None:
        del self._coming[key]
        if not task.cancelled() and task.exception() is None:
            self._cache.put(key, task.result())
