"""Where data and checkpoints lie: a path of this machine, or a URI of a store that pyarrow reaches (S3, GCS, HDFS).

``pathlib`` would make ``s3:/bucket`` of ``s3://bucket``, so a URI has a type of its own, with the few parts of ``Path`` that are
used here: ``/``, ``name``, ``parent``. Credentials never stand in a URI: a configuration is logged, and stands in every checkpoint.
What a store holds is for others (``data.schema``, ``checkpoint.mirror``).
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, unquote, urlsplit

from pydantic import BeforeValidator, PlainSerializer

from cluster.errors import ConfigError, StorageError
from cluster.harmless import redacted, short

BUCKETS = ("s3", "gs", "gcs")  # stores whose URI begins with a bucket
SCHEMES = (*BUCKETS, "hdfs", "viewfs", "file")
CHUNK = 8 << 20  # bytes that are copied at a time
AHEAD = 1 << 20  # bytes that are fetched at a time of an object that is read here and there
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(/*)")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_SECRET = re.compile(r"(?:^|[&;])([^=&;]*(?:secret|password|token|access_key|credential)[^=&;]*)=", re.IGNORECASE)
_ENVIRONMENT = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile or the machine's role",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS or the machine's service account",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS or the machine's service account",
    "hdfs": "Kerberos (KRB5CCNAME)",
    "viewfs": "Kerberos (KRB5CCNAME)",
}


class LocationError(ConfigError, ValueError):
    """Text that is neither a path nor a URI of a store; also a ValueError, so that pydantic names the key."""


@dataclass(frozen=True, order=True)
class Uri:
    """A file or folder in a store: ``base`` without a slash at its end, and the ``query`` that tells pyarrow how to reach it."""

    base: str
    query: str = ""

    def __str__(self) -> str:
        return f"{self.base}?{self.query}" if self.query else self.base

    def __truediv__(self, name: str) -> Uri:
        return Uri(f"{self.base}/{quote(name)}", self.query)

    @property
    def scheme(self) -> str:
        """``s3``, ``gs``, ``hdfs`` …"""
        return self.base.partition(":")[0]

    @property
    def name(self) -> str:
        """The last part; of a store's root its bucket or host."""
        return unquote(self.base.rpartition("/")[2])

    @property
    def parent(self) -> Uri:
        """What holds it; the root of a store holds itself."""
        above = self.base.rpartition("/")[0]
        return self if above.endswith("/") else Uri(above, self.query)


def parse_location(value: object) -> Path | Uri:
    """Return the path or URI that ``value`` (text, Path or Uri) names; nothing is opened.

    Raises LocationError for an unknown scheme, a missing bucket, and for credentials, which it does not repeat.
    """
    if isinstance(value, Uri):
        return value
    if not isinstance(value, str | Path):
        raise LocationError(f"{short(value)} is neither a path nor a URI such as s3://bucket/folder")
    text = str(value)
    found = _SCHEME.match(text)
    scheme, slashes = (found[1].lower(), len(found[2])) if found else ("", 0)
    if slashes < 2 and scheme not in SCHEMES:
        return _expanded(Path(value))
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise LocationError(
            f"{short(text)} has the unknown scheme {scheme!r}: use a path, or a URI that begins with {known}"
        )
    if slashes < 2 or (scheme in BUCKETS and slashes > 2):
        rest = text[found.end() :] if found and slashes < 2 else "BUCKET/FOLDER"
        what = "names no bucket" if slashes > 2 else "is no URI"
        raise LocationError(f"{short(text)} {what}: write {short(f'{scheme}://{rest}')}")
    return _uri(text, scheme)


def _expanded(path: Path) -> Path:
    """Return ``path`` with the home in place of a leading ``~``; the name of a user that there is not stays a name."""
    try:
        return path.expanduser()
    except RuntimeError as error:
        if path.parts[:1] == ("~",):
            raise LocationError(
                f"{path}: there is no home to put in place of ~; set HOME, or write the whole path"
            ) from error
        return path


def _uri(text: str, scheme: str) -> Uri:
    parts = urlsplit(text)
    user, at, host = parts.netloc.rpartition("@")
    query = unquote(parts.query)
    if ":" in user or (scheme in BUCKETS and (at or ":" in parts.netloc)):
        where = "credentials"
    elif secret := _SECRET.search(query):
        where = f"the credential {secret[1]!r}"
    else:
        where = "a password" if redacted(query) != query else ""
    if where:
        raise LocationError(
            f"{scheme}://*** holds {where}, which would be logged with the run; leave them to the environment "
            f"({_ENVIRONMENT.get(scheme, 'as the store has it')})"
        )
    if scheme in BUCKETS and not _BUCKET.fullmatch(host):
        raise LocationError(f"{short(text)} names no bucket: write {scheme}://BUCKET/FOLDER")
    if parts.fragment or any(c.isspace() or not c.isprintable() for c in text):
        raise LocationError(f"{short(text)} holds '#', a space or a control character: write it as %23, %20 …")
    path = parts.path.rstrip("/")
    if any(part in ("", ".", "..") for part in unquote(path).split("/")[1:]):
        raise LocationError(f"{short(text)} has an empty part, '.' or '..' in its path")
    return Uri(f"{scheme}://{parts.netloc}{path}", parts.query)


Location = Annotated[Path | Uri, BeforeValidator(parse_location), PlainSerializer(str, return_type=str)]
"""A configuration's key that takes a path or a URI."""


def local_path(value: object) -> Path:
    """Return ``value`` as a path of this machine; raises LocationError for a URI."""
    location = parse_location(value)
    if isinstance(location, Uri):
        raise LocationError(
            f"{short(str(location))} is a URI, and this has to be a path of this machine (checkpoint.mirror copies a run to a store)"
        )
    return location


LocalPath = Annotated[Path, BeforeValidator(local_path)]
"""A configuration's key that takes a path of this machine only."""


# --- stores -----------------------------------------------------------------------------------------------------------


def opened(location: Path | Uri) -> tuple[Any, str]:
    """Return the ``pyarrow.fs.FileSystem`` that holds ``location``, and its path there; raises StorageError.

    S3 is found as AWS's own tools find it: AWS_ENDPOINT_URL, AWS_REGION, and credentials from the environment, a profile or
    the machine's role. In the URI, ``?endpoint_override=`` and ``?region=`` win.
    """
    from pyarrow import fs

    if isinstance(location, Path):
        return fs.LocalFileSystem(), str(location.absolute())
    parts = urlsplit(location.base)
    store, root = open_store(str(Uri(f"{location.scheme}://{parts.netloc}/", location.query)))
    return store, f"{root.rstrip('/')}{unquote(parts.path)}"


@lru_cache(maxsize=16)
def open_store(root: str) -> tuple[Any, str]:
    """Return the filesystem of a store's root and the root's path there; one client serves all of a process."""
    from pyarrow import fs

    with storage_errors(root):
        return fs.FileSystem.from_uri(root)


@contextmanager
def storage_errors(location: Path | Uri | str) -> Iterator[None]:
    """Turn what pyarrow raises within the block into a StorageError that names ``location``.

    FileNotFoundError passes: it says that the store answered.
    """
    from pyarrow import ArrowException

    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, ArrowException) as error:
        raise StorageError(_reason(location, error)) from error


def _reason(location: Path | Uri | str, error: BaseException) -> str:
    told = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    told = re.sub(r" \(Request ID: \S*\)", "", told)
    if "NO_SUCH_BUCKET" in told or "bucket does not exist" in told:
        bucket = urlsplit(str(location)).netloc
        return f"{location}: there is no bucket {bucket!r}; make it, or write the name of one that there is"
    if "ACCESS_DENIED" in told or "InvalidAccessKeyId" in told or "SignatureDoesNotMatch" in told:
        return f"{location}: the store refuses the credentials of this environment ({told[:300]})"
    return f"{location}: {told[:400]}"


def facts_of(location: Path | Uri) -> Any:
    """Return the ``pyarrow.fs.FileInfo`` of ``location``, which is of the type NotFound where nothing is. Raises StorageError."""
    store, path = opened(location)
    with storage_errors(location):
        return store.get_file_info(path)


def size_of(location: Path | Uri) -> int | None:
    """Return the bytes of a file; None where there is no file. Raises StorageError."""
    if isinstance(location, Path):
        return location.stat().st_size if location.is_file() else None
    facts = facts_of(location)
    return facts.size if facts.is_file else None


def listing(folder: Path | Uri, *, recursive: bool = False) -> list[Any]:
    """Return the ``pyarrow.fs.FileInfo`` of what lies in ``folder``, in name order; none where there is no such folder.

    ``recursive``: also of what lies in the folders below it, in the order of paths. Raises StorageError where the store does not
    answer, or has no such bucket.
    """
    from pyarrow import fs

    store, path = opened(folder)
    with storage_errors(folder):
        found = store.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=recursive))
        if not found and isinstance(folder, Uri) and folder.scheme in BUCKETS:
            bucket = path.partition("/")[0]  # a store lists nothing in a bucket that it does not have
            if store.get_file_info(bucket).type == fs.FileType.NotFound:
                raise OSError("NO_SUCH_BUCKET")
    return sorted(found, key=lambda info: info.path)


class StoredFile(io.RawIOBase):
    """A file in a store, open for reading. Its failures are a StorageError, here and while it is read: not damage of what it holds."""

    def __init__(self, location: Uri) -> None:
        self._location = location
        store, path = opened(location)
        with storage_errors(location):
            self._stream = store.open_input_file(path)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with storage_errors(self._location):
            return int(self._stream.readinto(buffer))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        with storage_errors(self._location):
            return int(self._stream.seek(offset, whence))

    def tell(self) -> int:
        return int(self._stream.tell())

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()


def open_file(location: Path | Uri) -> io.BufferedReader:
    """Open a file for reading, here and there in it; of a store no more is fetched than is read, a mebibyte at a time.

    Raises OSError for a path, StorageError for a URI, also while it is read; FileNotFoundError for both.
    """
    return location.open("rb") if isinstance(location, Path) else io.BufferedReader(StoredFile(location), AHEAD)


def sha256_of(location: Path | Uri) -> str:
    """Return the sha256 of a file, in hexadecimal. Raises as :func:`open_file`."""
    with open_file(location) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_bytes(location: Path | Uri) -> bytes:
    """Return the content of a small file; raises StorageError, and FileNotFoundError where it is not there."""
    store, path = opened(location)
    with storage_errors(location), store.open_input_stream(path) as stream:
        return stream.read()


def write_bytes(location: Path | Uri, content: bytes) -> None:
    """Write a small file whole; raises StorageError."""
    store, path = opened(location)
    with storage_errors(location):
        _make_parent(store, path)
        with store.open_output_stream(path) as stream:
            stream.write(content)


def upload(path: Path, location: Path | Uri, seen: Callable[[bytes], object] = len) -> None:
    """Copy the local file ``path`` to ``location``; ``seen`` gets each chunk before it is sent, and may raise to end it.

    A store shows a file when it is closed, and pyarrow closes one also where writing ends early: until a manifest says
    otherwise, what lies at ``location`` after an error means nothing. Raises StorageError, and OSError of the local file.
    """
    store, target = opened(location)
    with path.open("rb") as file:
        with storage_errors(location):
            _make_parent(store, target)
            stream = store.open_output_stream(target)
        try:
            while chunk := file.read(CHUNK):
                seen(chunk)
                with storage_errors(location):
                    stream.write(chunk)
        except BaseException:
            with suppress(StorageError):  # what went wrong before says more
                with storage_errors(location):
                    stream.close()
            raise
        with storage_errors(location):
            stream.close()


def download(location: Path | Uri, path: Path, size: int, seen: Callable[[bytes], object] = len) -> int:
    """Copy ``location`` to the local file ``path``, at most a byte more than ``size``; returns the bytes that were copied.

    ``seen`` gets each chunk. Raises StorageError, FileNotFoundError where there is no such file.
    """
    store, source = opened(location)
    copied = 0
    with storage_errors(location):
        stream = store.open_input_stream(source)
    with path.open("wb") as file, stream:
        while copied <= size:
            with storage_errors(location):
                chunk = stream.read(min(CHUNK, size + 1 - copied))
            if not chunk:
                break
            seen(chunk)
            file.write(chunk)
            copied += len(chunk)
    return copied


def remove(location: Path | Uri, *, folder: bool = False) -> None:
    """Remove a file, or a ``folder`` with all that is in it; nothing happens where there is none. Raises StorageError."""
    store, path = opened(location)
    with storage_errors(location), suppress(FileNotFoundError):
        store.delete_dir(path) if folder else store.delete_file(path)


def _make_parent(store: Any, path: str) -> None:
    if store.type_name not in ("s3", "gcs"):  # there a folder is a part of a name
        store.create_dir(path.rpartition("/")[0], recursive=True)
