"""The files of a build's source videos, below a folder or a URI of a store: which there are, and one of them by its path.

Of a store nothing is copied: a video is read where it lies, as much of it as is needed. Not responsible for what a file holds
(``reading``) or for which of them are taken (``annotations``).
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from cluster.errors import DataError
from cluster.harmless import short
from pipeline.data.importers.clips import composed, confined
from pipeline.support.location import Uri, facts_of, listing, opened

_CONTAINERS = ("3gp", "avi", "flv", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "mts", "mxf", "ogv", "ts", "webm", "wmv")
SUFFIXES = frozenset(f".{name}" for name in _CONTAINERS)  # of the containers that ``reading`` opens


def placed(root: Path | Uri, path: str) -> Path | Uri:
    """Return where the video ``path`` below ``root`` lies. Raises DataError for a path that leads elsewhere, or to no file."""
    if isinstance(root, Path):
        return confined(root, path)
    parts = path.split("/")
    if not path or any(part in ("", ".", "..") for part in parts):
        raise DataError(f"{path!r} must be a path inside the folder of videos: not absolute, without '..'")
    return root / path


def stamp_of(place: Path | Uri) -> list[int]:
    """Return the bytes of a file and when it was changed, in ns: what says that it is another one. Raises OSError, StorageError."""
    if isinstance(place, Path):
        facts = place.stat()
        return [facts.st_size, facts.st_mtime_ns]
    found = facts_of(place)
    if not found.is_file:
        raise FileNotFoundError(str(place))
    return [found.size, found.mtime_ns]


class VideoFiles:
    """The videos below ``root``, by path and by id. Raises DataError where there is no such folder, StorageError."""

    def __init__(self, root: Path | Uri) -> None:
        self.root = root
        self._by_id: dict[str, list[str]] = defaultdict(list)
        self._taken: dict[str, str] = {}  # file → the video that it is
        # Path → bytes.
        self.sizes = dict(_in_store(root) if isinstance(root, Uri) else _in_folder(root))
        for path in self.sizes:
            self._by_id[composed(PurePosixPath(path).stem)].append(path)

    def named(self) -> Iterator[tuple[str, str]]:
        """Yield (name, path) of each, in the order of paths: the path without its suffix, unless two files share that."""
        paths = sorted(self.sizes)
        times = Counter(map(_bare, paths))
        for path in paths:
            yield (path if times[_bare(path)] > 1 else _bare(path)), path

    def find(self, name: str) -> str:
        """Return the path below the folder of the video ``name``, which no other video has; raises DataError."""
        found = self._path(name)
        first = self._taken.setdefault(found, name)
        if first != name:
            raise DataError(f"{short(name)} and {short(first)} are the same file, {short(found)}")
        return found

    def _path(self, name: str) -> str:
        alike = self._by_id.get(composed(PurePosixPath(name).name), [])
        if PurePosixPath(name).suffix.lower() in SUFFIXES:
            if isinstance(self.root, Path):
                return confined(self.root, name).relative_to(self.root.resolve()).as_posix()
            stem = composed(PurePosixPath(name).stem)
            alike = [path for path in self._by_id.get(stem, []) if composed(path) == composed(name)]
        elif "/" in name:
            alike = [path for path in alike if composed(_bare(path)) == composed(name)]
        if len(alike) > 1:
            raise DataError(f"{short(name)} could be any of {', '.join(map(short, sorted(alike)[:3]))}")
        if not alike:
            raise DataError(f"there is no video {short(name)} below {self.root}")
        if isinstance(self.root, Path):
            return confined(self.root, alike[0]).relative_to(self.root.resolve()).as_posix()
        return alike[0]


def _in_folder(root: Path) -> Iterator[tuple[str, int]]:
    """Yield (path below ``root``, bytes) of its videos; hidden files, and those in hidden folders, are passed over."""
    if not root.is_dir():
        raise DataError(f"the folder of videos {root} does not exist")
    for folder, below, names in os.walk(root):
        below[:] = sorted(name for name in below if not name.startswith((".", "_")))
        for name in names:
            path = Path(folder, name)
            if _is_video(name):
                yield path.relative_to(root).as_posix(), _bytes(path)


def _in_store(root: Uri) -> Iterator[tuple[str, int]]:
    above = f"{opened(root)[1].rstrip('/')}/"
    for facts in listing(root, recursive=True):
        path = facts.path.removeprefix(above)
        hidden = any(part.startswith((".", "_")) for part in path.split("/")[:-1])
        if facts.is_file and not hidden and _is_video(facts.base_name):
            yield path, facts.size


def _is_video(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES and not name.startswith(".")


def _bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a link that leads nowhere
        return -1


def _bare(path: str) -> str:
    return str(PurePosixPath(path).with_suffix(""))
