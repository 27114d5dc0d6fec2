"""The toy VNEP world.

For: scenes of coloured shapes, questions, captions with synonyms, a judge of clips.
Not for: training on it (``pipeline.pretrain``).
Begin with ``world``.
"""

from .language import Event, drawable, parse_caption
from .scene import FRAMES, SIZE, Scene, Thing, render
from .shards import write_toy
from .world import SPLITS, ToySample, follow, follow_caption, make_sample, possible_outcomes, read_meta, shown_event

__all__ = [
    "FRAMES",
    "SIZE",
    "SPLITS",
    "Event",
    "Scene",
    "Thing",
    "ToySample",
    "drawable",
    "follow",
    "follow_caption",
    "make_sample",
    "parse_caption",
    "possible_outcomes",
    "read_meta",
    "render",
    "shown_event",
    "write_toy",
]
