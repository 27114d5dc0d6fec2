"""Which pictures come at which times: every kind of container, whole and in parts, against the numbers on the frames."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

from cluster.errors import DataError
from pipeline.data.reading import VideoLimits, part_of
from pipeline.data.video import decode_timed, decode_video, probe
from tests.pipeline.data.numbered import GOP, HEIGHT, MPEG, NO_B_FRAMES, WIDTH, encoded, numbered, numbers

OPEN_GOP = {**GOP, "x264-params": "scenecut=0:b-adapt=0:open-gop=1"}
REFRESH = {
    "crf": "1",
    "g": "25",
    "bf": "0",
    "x264-params": "scenecut=0:intra-refresh=1",
}  # no key frames after the first
HEVC = {"crf": "4", "x265-params": "log-level=none:keyint=25:bframes=3:open-gop=1"}
VP9 = {"b:v": "4M", "g": "25"}
FRAGMENTS = {"movflags": "frag_keyframe+empty_moov"}
FILES: dict[str, Callable[[], bytes]] = {
    "mp4": lambda: encoded(options=GOP),
    "mp4 open gop": lambda: encoded(options=OPEN_GOP),
    "mp4 intra refresh": lambda: encoded(options=REFRESH),
    "mp4 in fragments": lambda: encoded(options=GOP, muxer=FRAGMENTS),
    "mp4 hevc open gop": lambda: encoded(codec="libx265", options=HEVC),
    "mpegts": lambda: encoded(container="mpegts", options=GOP),
    "mpegts, one key frame": lambda: encoded(container="mpegts", options={**GOP, "g": "250"}),
    "mpegts from 1000 s": lambda: encoded(container="mpegts", options=GOP, first=25_000),
    "mpegts intra refresh": lambda: encoded(container="mpegts", options=REFRESH),
    "mpegts mpeg4": lambda: encoded(container="mpegts", codec="mpeg4", options=MPEG),
    "mpegts hevc open gop": lambda: encoded(container="mpegts", codec="libx265", options=HEVC),
    "mpeg-ps": lambda: encoded(container="mpeg", codec="mpeg2video", options=MPEG),
    "avi h264 with b-frames": lambda: encoded(container="avi", options=GOP),
    "avi mpeg4 with b-frames": lambda: encoded(container="avi", codec="mpeg4", options=MPEG),
    "avi mpeg4": lambda: encoded(container="avi", codec="mpeg4", options=NO_B_FRAMES),
    "mkv": lambda: encoded(container="matroska", options=OPEN_GOP),
    "webm without cues": lambda: encoded(container="webm", codec="libvpx-vp9", options=VP9, muxer={"live": "1"}),
    "flv": lambda: encoded(container="flv", options=GOP),
    "gif": lambda: encoded(container="gif", codec="gif"),
    "bare h264": lambda: encoded(container="h264", options=GOP),
    "bare hevc": lambda: encoded(container="hevc", codec="libx265", options=HEVC),
    "bare m4v": lambda: encoded(container="m4v", codec="mpeg4", options=MPEG),
    "bare mpeg-1": lambda: encoded(container="mpeg1video", codec="mpeg1video", options=MPEG),
}
PARTS = [
    (0.2, 0.6),
    (0.88, 1.2),
    (0.92, 1.0),
    (0.96, 1.5),
    (1.0, 1.1),
    (1.96, 2.2),
    (2.0, None),
    (2.32, 2.4),
    (None, 0.5),
]


def read(data: bytes, count: int, start: float | None = None, end: float | None = None) -> list[int]:
    return numbers(decode_video(data, count, HEIGHT, WIDTH, start=start, end=end))


@pytest.mark.parametrize("name", FILES)
def test_every_frame_has_its_time_whole_and_in_parts(name: str) -> None:
    data = FILES[name]()
    info = probe(data)
    frames, seconds = decode_timed(data, 60, HEIGHT, WIDTH)
    assert numbers(frames) == list(range(60))
    assert (info.frames, info.fps, seconds) == (60, pytest.approx(25, abs=0.02), pytest.approx(2.36, abs=0.002))
    for start, end in PARTS:
        wanted = [k for k in range(60) if (start or 0) - 1e-3 <= k / 25 < (end or 99) - 1e-3]
        frames, seconds = decode_timed(data, len(wanted), HEIGHT, WIDTH, start=start, end=end)
        assert numbers(frames) == wanted, (start, end)
        assert seconds == pytest.approx((len(wanted) - 1) / 25, abs=0.002)
        assert probe(data, start=start, end=end).frames == len(wanted)


def test_a_part_far_into_a_long_file_is_not_read_from_its_start() -> None:
    long = {**GOP, "preset": "ultrafast"}
    for container in ("mp4", "matroska", "mpegts"):
        data = encoded(240, container, options=long)
        part = part_of(data, VideoLimits(), 8.0, 8.4)
        assert part.skip == 200 if container == "mpegts" else part.seek == pytest.approx(part.start)
        assert read(data, 10, 8.0, 8.4) == list(range(200, 210))


@pytest.mark.parametrize("name", ["mp4", "mkv", "mpegts"])
def test_a_frame_just_before_the_end_belongs_to_what_follows(name: str) -> None:
    """Containers round to milliseconds: a frame within one of ``end`` is the next part's first, and no part's last."""
    data = FILES[name]()
    assert read(data, 5, 0.4, 0.6005) == [10, 11, 12, 13, 14]
    assert probe(data, start=0.4, end=0.6005).frames == 5
    assert read(data, 5, 0.6005, 0.8) == [15, 16, 17, 18, 19]


def test_a_stream_that_begins_within_a_gop_begins_with_its_first_key_frame() -> None:
    """An MPEG-4 decoder would show grey for the pictures before it."""
    for codec, options in (("libx264", GOP), ("libx265", HEVC), ("mpeg2video", MPEG), ("mpeg4", MPEG)):
        data = encoded(container="mpegts", codec=codec, options=options)[30 * 188 :]
        first = 25 if codec.startswith("lib") else 24
        found = read(data, 60 - first)
        assert found == list(range(first, 60)), codec
        assert probe(data).frames == 60 - first
        assert read(data, 10, 0.0, 0.4) == found[:10], "a part counts from the first picture that there is"


def test_damage_before_the_first_key_frame_does_no_harm() -> None:
    data = bytearray(encoded(container="mpegts", options=GOP)[30 * 188 :])
    for slices in list(re.finditer(rb"\x00\x00\x01[\x01\x21\x41\x61]", data))[:6]:
        data[slices.end() + 1 : slices.end() + 9] = b"\x55" * 8
    assert read(bytes(data), 35) == list(range(25, 60))


def test_a_stream_most_of_which_cannot_be_decoded_is_refused() -> None:
    data = encoded(container="mpegts", options={**GOP, "g": "50"})[12 * 188 :]  # the first key frame left is number 50
    for attempt in (lambda: decode_video(data, 4, HEIGHT, WIDTH), lambda: probe(data)):
        with pytest.raises(
            DataError, match=r"only 0\.36 of its 2\.\d\d s can be decoded; does it begin with a key frame"
        ):
            attempt()


def test_times_that_go_back_are_refused() -> None:
    data = encoded(container="mpegts", options=GOP)
    with pytest.raises(DataError, match=r"the time of its frames goes back, from 2\.44 s to 0\.08 s.*join them anew"):
        decode_video(data + data, 4, HEIGHT, WIDTH)


def test_segments_whose_times_go_on_are_one_film_also_where_sound_begins_later() -> None:
    """As a live stream's segments are joined; PyAV stumbles behind the last packet over a stream that appears on the way."""
    quick = {**GOP, "bf": "0"}
    second = io.BytesIO()
    with (
        av.open(io.BytesIO(encoded(30, "mpegts", options=quick, first=30))) as given,
        av.open(second, "w", format="mpegts") as out,
    ):
        source = given.streams.video[0]
        film, sound = out.add_stream_from_template(source), out.add_stream("mp2", rate=48_000)
        for packet in (item for item in given.demux(source) if item.dts is not None):
            packet.stream = film
            out.mux(packet)
        for index in range(50):
            noise = av.AudioFrame.from_ndarray(np.zeros((1, 2 * 1152), np.int16), format="s16", layout="stereo")
            noise.sample_rate, noise.pts = 48_000, 57_600 + 1152 * index
            out.mux(sound.encode(noise))
        out.mux(sound.encode(None))
    joined = encoded(30, "mpegts", options=quick) + second.getvalue()
    assert read(joined, 60) == [*range(30), *range(30)]
    assert read(joined, 10, 1.6, 2.0) == list(range(10, 20))


@pytest.mark.parametrize("name", ["mp4", "mkv", "mpegts", "avi mpeg4", "bare h264"])
@pytest.mark.parametrize("start", [3.0, 1e9, 1e18, 1e300])
def test_a_part_behind_the_end_is_refused(name: str, start: float) -> None:
    for attempt in (lambda data: probe(data, start=start), lambda data: decode_video(data, 2, 8, 8, start=start)):
        with pytest.raises(DataError, match="no frames between start and end"):
            attempt(FILES[name]())


def test_what_an_edit_list_leaves_out_is_neither_shown_nor_missed() -> None:
    """An mp4 trimmed in a player keeps its frames: here 43 of 60 are left out, and the index still counts them."""
    data = encoded(options=GOP)
    at = data.index(b"elst") + 12
    trimmed = data[:at] + struct.pack(">Ii", 700, 1024 + int(1.3 * 12_800)) + data[at + 8 :]
    assert read(trimmed, 17) == list(range(33, 50))
    assert probe(trimmed).frames == 17
    assert read(trimmed, 4, 0.52, 0.68) == list(range(46, 50))
    hidden = encoded(options=GOP, first=-10)  # frames before zero: the container hides them
    assert read(hidden, 50) == list(range(10, 60))


# --- bare streams ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [10, Fraction(24_000, 1001), 60])
def test_bare_streams_are_read_at_the_rate_that_they_state(rate: Fraction | int) -> None:
    for container, codec, options in (("h264", "libx264", GOP), ("hevc", "libx265", HEVC), ("m4v", "mpeg4", MPEG)):
        data = encoded(30, container, codec, rate=rate, options=options)
        info = probe(data)
        assert (info.frames, info.fps) == (30, pytest.approx(float(rate))), container
        assert read(data, 30) == list(range(30))


def test_a_bare_stream_without_a_rate_is_refused_with_the_cure() -> None:
    silent = {"x265-params": "log-level=none:vui-timing-info=0"}
    data = encoded(30, "hevc", "libx265", options=silent)
    for attempt in (lambda: decode_video(data, 4, HEIGHT, WIDTH), lambda: probe(data)):
        with pytest.raises(
            DataError, match=r"bare hevc stream, which states no frame rate.*ffmpeg -framerate 25 -i FILE new\.mp4"
        ):
            attempt()
    ticks = encoded(30, "h264", rate=90_000, options=GOP)  # of a clock, and no rate of pictures
    with pytest.raises(DataError, match="bare h264 stream, which states no frame rate"):
        probe(ticks)


# --- few frames, long gaps ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts", "flv"])
def test_two_frames_far_apart_and_a_single_one(container: str) -> None:
    pair = encoded(2, container, times=[0, 2500], options={"crf": "1"})
    info = probe(pair)
    assert (info.frames, info.seconds, info.fps) == (2, pytest.approx(5000), pytest.approx(1 / 2500))
    assert read(pair, 3) == [0, 0, 1]
    with pytest.raises(DataError, match="longer than 3600 s"):
        probe(encoded(2, container, times=[0, 5000], options={"crf": "1"}))
    one = encoded(1, container, options={"crf": "1"})
    assert (probe(one).frames, probe(one).seconds, read(one, 2)) == (1, 0, [0, 0])


def test_frames_that_were_dropped_from_an_avi_are_not_missed() -> None:
    data = encoded(6, "avi", "mpeg4", times=[0, 0.1, 0.2, 0.3, 3.0, 3.1], options=NO_B_FRAMES)
    assert probe(data).frames == 6
    assert read(data, 32) == [0, 1, 2] + [3] * 27 + [4, 5]
    one = encoded(1, "avi", options={"crf": "1"})
    assert (probe(one).frames, read(one, 2)) == (1, [0, 0])


@pytest.mark.parametrize("name", ["mp4 faststart", "mp4 in fragments", "avi", "mkv", "webm", "flv", "mxf", "ivf"])
def test_a_file_cut_at_70_percent_is_not_taken_for_a_short_one(name: str, tmp_path: Path) -> None:
    sizes = {"options": {"qmin": "1", "qmax": "3", "g": "6"}}  # much of the file is pictures
    files: dict[str, Callable[[], bytes]] = {
        "mp4 in fragments": lambda: encoded(options=GOP, muxer=FRAGMENTS),
        "avi": lambda: encoded(container="avi", codec="mjpeg", **sizes),
        "mkv": lambda: encoded(container="matroska", codec="mpeg4", **sizes),
        "webm": lambda: encoded(container="webm", codec="libvpx-vp9", options=VP9),
        "flv": lambda: encoded(container="flv", options=GOP),
        "mxf": lambda: encoded(container="mxf", codec="mpeg2video", **sizes),
        "ivf": lambda: encoded(container="ivf", codec="libvpx-vp9", options=VP9),
    }
    data = faststart(tmp_path / "v.mp4") if name == "mp4 faststart" else files[name]()
    assert probe(data).frames == (40 if name == "mp4 faststart" else 60)
    cut = data[: len(data) * 7 // 10]
    for attempt in (lambda: decode_video(cut, 4, 16, 16), lambda: probe(cut)):
        with pytest.raises(DataError, match="broken video" if name == "mp4 in fragments" else "truncated video"):
            attempt()


def faststart(path: Path) -> bytes:
    """An mp4 with its index in front and 40 frames of one size: at 70 % of the file, some 28 of them are there."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 64, 3), np.uint8)
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as out:  # the muxer reads its own file again
        stream = out.add_stream("libx264", rate=10, options={"g": "1", "crf": "20"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for image in noise:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        out.mux(stream.encode(None))
    return path.read_bytes()


# --- which stream is the film ---------------------------------------------------------------------------------------


def with_cover(container: str, cover: str, marked: bool, first: bool = True, film: str | None = "libx264") -> bytes:
    """Return a film of 20 numbered frames with a larger still picture in another stream, before or after it."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:

        def still() -> av.VideoStream:
            stream = out.add_stream(cover, rate=10)
            stream.width, stream.height = 400, 300
            stream.pix_fmt = {"png": "rgb24", "mjpeg": "yuvj420p"}.get(cover, "yuv420p")
            if marked:
                stream.disposition = Disposition.attached_pic
            return stream

        picture = still() if first else None
        moving = out.add_stream(film, rate=10, options={"crf": "1"}) if film else None
        if moving is not None:
            moving.width, moving.height = WIDTH, HEIGHT
            moving.pix_fmt = "yuvj420p" if film == "mjpeg" else "yuv420p"
        picture = picture or still()
        image = av.VideoFrame.from_ndarray(np.full((300, 400, 3), 99, np.uint8), format="rgb24")
        for packet in picture.encode(image) + picture.encode(None):
            out.mux(packet)
        for frame in numbered(20) if moving is not None else ():
            out.mux(moving.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        if moving is not None:
            out.mux(moving.encode(None))
    return buffer.getvalue()


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("marked", [True, False], ids=["marked", "unmarked"])
@pytest.mark.parametrize(("container", "cover"), [("mp4", "png"), ("mp4", "mjpeg"), ("matroska", "mjpeg")])
def test_a_cover_picture_is_not_the_film(container: str, cover: str, marked: bool, first: bool) -> None:
    data = with_cover(container, cover, marked, first)
    info = probe(data)
    assert (info.width, info.height, info.frames, info.codec) == (WIDTH, HEIGHT, 20, "h264")
    assert read(data, 20) == list(range(20))


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
def test_a_still_in_the_codec_of_the_film_is_not_the_film(container: str) -> None:
    assert read(with_cover(container, "libx264", marked=False), 20) == list(range(20))
    if container != "mpegts":
        assert probe(with_cover(container, "mjpeg", marked=False, film="mjpeg")).frames == 20


def films(*streams: tuple[str, int, bool]) -> bytes:
    """Return an mp4 with a film of four black frames for each (codec, side, whether it is marked as default)."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        made = []
        for codec, side, default in streams:
            stream = out.add_stream(codec, rate=10)
            stream.width = stream.height = side
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            stream.disposition = Disposition.default if default else Disposition(0)
            made.append(stream)
        for stream in made:
            for _ in range(4):
                picture = np.zeros((stream.height, stream.width, 3), np.uint8)
                out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            out.mux(stream.encode(None))
    return buffer.getvalue()


def test_of_several_films_the_default_is_read_then_the_larger_and_previews_last() -> None:
    small, large = ("libx264", 32), ("libx264", 64)
    for streams, side in (
        (((*small, True), (*large, False)), 32),
        (((*small, False), (*large, True)), 64),
        (((*small, True), (*large, True)), 64),
        ((("mjpeg", 96, True), (*large, False)), 64),
    ):
        info = probe(films(*streams))
        assert (info.width, info.frames, info.codec) == (side, 4, "h264")


def test_a_cover_alone_is_no_video() -> None:
    with pytest.raises(DataError, match="only a cover picture, and no video stream"):
        probe(with_cover("mp4", "mjpeg", marked=True, film=None))


def test_a_file_that_may_not_be_read_is_not_called_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "v.mp4"
    path.write_bytes(encoded(2))

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(DataError, match=r"cannot read .*v\.mp4.*Permission denied"):
        probe(path)
