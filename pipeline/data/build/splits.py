"""Which split a video belongs to: a whole video to one, and videos that show the same to the same one."""

from __future__ import annotations

from collections.abc import Mapping

from actors.records import derive_seed
from pipeline.data.build.hashes import SeenClips
from pipeline.data.build.video import Lost, Video

STAGE = "splits"  # the name that what is lost here is counted under
TRAIN = "train"
FRAMES = 8  # of a clip that are remembered, some 40 bytes each: a million clips fit into the driver's memory


def split_of(name: str, shares: Mapping[str, float], seed: int) -> str:
    """Return the split of the video ``name``: a pure function of it, the shares and the seed. What they leave is ``train``."""
    place = derive_seed(seed, "split", name) / 2**63
    for split, share in shares.items():
        if place < share:
            return split
        place -= share
    return TRAIN


class Splitter:
    """Gives each video its split, in the order of the sources.

    A video goes where :func:`split_of` says, unless a clip of it shows what a clip of an earlier video does: then it goes
    where that one is. One that shows what lies in two splits is lost. So the same videos in the same order are split alike, and each
    video must be given, also one whose rows were written before.
    """

    def __init__(self, shares: Mapping[str, float], seed: int) -> None:
        self._shares, self._seed = dict(shares), seed
        self._seen: SeenClips[tuple[str, str]] = SeenClips(FRAMES)  # (split, video)

    def assign(self, video: Video) -> str | None:
        """Return the split of ``video``, or None: then the reason is in ``video.lost``."""
        if not self._shares:
            return TRAIN
        near: dict[str, str] = {}  # split → the first video there that shows the same
        for clip in video.clips:
            for split, name in self._seen.find(clip.hashes):
                near[split] = min(near.get(split, name), name)
        if len(near) > 1:
            where = " and ".join(f"{name!r} ({split})" for split, name in sorted(near.items()))
            video.lost.append(Lost(STAGE, "video", "near two splits", f"it shows what is in {where}"))
            return None
        chosen = next(iter(near), None) or split_of(video.name, self._shares, self._seed)
        for clip in video.clips:
            self._seen.add((chosen, video.name), clip.hashes)
        return chosen
