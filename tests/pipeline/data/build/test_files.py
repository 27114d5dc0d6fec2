"""The source videos of a build, in a folder and in a store: the same are found, and read where they lie."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from cluster.errors import DataError, StorageError
from pipeline.data.build.annotations import annotated_videos, unannotated_videos
from pipeline.data.build.files import VideoFiles, placed, stamp_of
from pipeline.data.importers.clips import ClipSpec, copy_clip
from pipeline.data.reading import opened
from pipeline.data.video import VideoLimits, decode_video, encode_mp4, probe
from pipeline.support.location import AHEAD, Uri, sha256_of, upload
from tests.pipeline.data.build.stages import write_videos
from tests.s3_server import S3Server

LEFT_OUT = ("notes.txt", ".hidden.mp4", "_work/v.mp4", ".cache/v.mp4")


def filled(root: Path) -> Path:
    """Fill ``root`` with videos, one of them in a folder below, and with what is none."""
    write_videos(root, 3)
    write_videos(root / "kitchen" / "tea", 1)
    for name in LEFT_OUT:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"no video")
    return root


def copied(root: Path, bucket: Uri) -> Uri:
    for path in root.rglob("*"):
        if path.is_file():
            upload(path, bucket / "raw" / path.relative_to(root).as_posix())
    return bucket / "raw"


def test_a_store_holds_the_videos_that_the_folder_holds(tmp_path: Path, s3: S3Server) -> None:
    folder = filled(tmp_path)
    store = copied(folder, s3.bucket("found"))
    here, there = VideoFiles(folder), VideoFiles(store)
    assert here.sizes == there.sizes
    assert [path for _, path in here.named()] == ["kitchen/tea/v000.mp4", "v000.mp4", "v001.mp4", "v002.mp4"]
    assert list(here.named()) == list(there.named())
    assert list(unannotated_videos(folder)) == list(unannotated_videos(str(store)))


@pytest.mark.parametrize("name", ["v001", "v001.mp4", "kitchen/tea/v000", "kitchen/tea/v000.mp4"])
def test_a_name_leads_to_the_same_video_in_both(name: str, tmp_path: Path, s3: S3Server) -> None:
    folder = filled(tmp_path)
    store = copied(folder, s3.bucket(f"named-{name.replace('/', '-')}"))
    found = VideoFiles(folder).find(name)
    assert found == VideoFiles(store).find(name)
    assert sha256_of(placed(folder, found)) == sha256_of(placed(store, found))
    assert stamp_of(placed(folder, found))[0] == stamp_of(placed(store, found))[0]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v000", "could be any of"),
        ("v009", "there is no video"),
        ("v009.mp4", "there is no video"),
        ("../raw/v000.mp4", "there is no video"),
    ],
)
def test_a_name_that_leads_nowhere_is_told(name: str, told: str, tmp_path: Path, s3: S3Server) -> None:
    store = copied(filled(tmp_path), s3.bucket(f"nowhere-{abs(hash(name))}"))
    with pytest.raises(DataError, match=told):
        VideoFiles(store).find(name)


@pytest.mark.parametrize("path", ["", "../x.mp4", "/x.mp4", "a//x.mp4", "a/./x.mp4"])
def test_no_path_leads_out_of_a_store_s_folder(path: str) -> None:
    with pytest.raises(DataError):
        placed(Uri("s3://bucket/raw"), path)


def test_a_store_without_the_folder_or_the_bucket_is_told(tmp_path: Path, s3: S3Server) -> None:
    bucket = s3.bucket("empty")
    with pytest.raises(DataError, match="there is no video in s3://empty/raw"):
        unannotated_videos(bucket / "raw")
    steps = tmp_path / "steps.jsonl"
    steps.write_text('{"video": "a", "start": 0, "end": 1, "label": "cut"}\n')
    with pytest.raises(DataError, match="none of the 1 videos is below s3://empty/raw"):
        annotated_videos([steps], bucket / "raw")
    with pytest.raises(StorageError, match="there is no bucket"):
        unannotated_videos(s3.uri("never-made/raw"))


def test_a_video_in_a_store_is_probed_decoded_and_cut_as_in_a_folder(tmp_path: Path, s3: S3Server) -> None:
    folder = filled(tmp_path)
    here, there = folder / "v002.mp4", copied(folder, s3.bucket("read")) / "v002.mp4"
    assert probe(here) == probe(there)
    assert np.array_equal(
        decode_video(here, 5, 32, 32, start=1.0, end=2.0), decode_video(there, 5, 32, 32, start=1.0, end=2.0)
    )
    assert copy_clip(here, 0.5, 1.5, ClipSpec()) == copy_clip(there, 0.5, 1.5, ClipSpec())
    with pytest.raises(DataError, match=r"no such video file: s3://read/raw/gone\.mp4"):
        probe(there.parent / "gone.mp4")


@pytest.mark.chaos
def test_a_store_that_fails_while_it_is_read_is_not_taken_for_a_broken_video(tmp_path: Path) -> None:
    server = S3Server()
    server.start()
    try:
        noise = np.random.default_rng(0).integers(0, 256, (40, 256, 256, 3), np.uint8)
        film = tmp_path / "v.mp4"
        film.write_bytes(encode_mp4(noise, 8.0))
        assert film.stat().st_size > 4 * AHEAD
        place = server.bucket("dies") / "v.mp4"
        upload(film, place)
        with opened(place, VideoLimits()) as (container, _):
            server.stop()
            with pytest.raises(StorageError, match=re.escape(str(place))):
                list(container.demux())
    finally:
        server.stop()
