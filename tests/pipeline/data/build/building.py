"""What the tests of a build's stages share: a store in memory, and what all stages are given."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import DataError
from pipeline.data.build.video import SOURCE_LIMITS
from pipeline.data.reading import VideoLimits


@dataclass
class MemoryStore:
    """A store without a disk."""

    held: dict[str, bytes] = field(default_factory=dict)

    def put(self, data: bytes) -> str:
        name = hashlib.sha256(data).hexdigest()
        self.held[name] = data
        return name

    def get(self, name: str) -> bytes:
        if name not in self.held:
            raise DataError(f"the clip {name} is gone")
        return self.held[name]


@dataclass
class LocalBuild:
    """What a build hands to its stages."""

    root: Path
    store: MemoryStore = field(default_factory=MemoryStore)
    seed: int = 0
    limits: VideoLimits = SOURCE_LIMITS
