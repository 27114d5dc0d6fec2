"""Video in and out with PyAV: fidelity, time, geometry, limits, and files that are not what they seem."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from cluster.errors import DataError
from pipeline.data.real import packaged_clips
from pipeline.data.video import VideoLimits, decode_timed, decode_video, encode_mp4, probe


def shapes(frames: int, height: int, width: int) -> np.ndarray:
    """Saturated squares moving over grey: the hardest colours for a video codec."""
    out = np.full((frames, height, width, 3), 40, np.uint8)
    for t in range(frames):
        out[t, 2 + t : 9 + t, 3:10] = (250, 20, 30)
        out[t, height - 9 : height - 3, 4 + t : 11 + t] = (20, 40, 250)
    return out


def flat(*values: int, height: int = 32, width: int = 32) -> np.ndarray:
    return np.stack([np.full((height, width, 3), value, np.uint8) for value in values])


def write(
    frames: np.ndarray,
    times: list[float] | None = None,
    rotation: int = 0,
    container: str = "mp4",
    codec: str = "libx264",
    aspect: Fraction | None = None,
    path: Path | None = None,
    **options: str,
) -> bytes:
    """Encode with chosen presentation times (s), as a camera or another program would."""
    buffer = path or io.BytesIO()
    with av.open(str(buffer) if path else buffer, "w", format=container, options=options) as out:
        stream = out.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        if codec == "libx264":
            stream.options = {"crf": "1"}
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if rotation:
            stream.set_display_rotation(rotation)
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for index, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times:
                frame.pts, frame.time_base = round(times[index] * 1000), Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path.read_bytes() if path else buffer.getvalue()  # type: ignore[union-attr]


def levels(frames: np.ndarray) -> list[int]:
    return [round(float(value)) for value in frames.mean((1, 2, 3))]


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 31), (20, 47), (1, 1)])
def test_near_lossless_keeps_colour_at_any_size(height: int, width: int) -> None:
    frames = shapes(9, height, width) if min(height, width) > 12 else flat(10, 200, height=1, width=1)
    data = encode_mp4(frames, 8.0)
    decoded = decode_video(data, len(frames), height, width)
    assert np.abs(decoded.astype(int) - frames).max() <= 3
    assert data == encode_mp4(frames, 8.0), "the same frames give the same bytes"


def test_playable_encoding_pads_odd_sizes_and_keeps_the_rate() -> None:
    info = probe(encode_mp4(shapes(12, 33, 31), 12.5, near_lossless=False))
    assert (info.height, info.width, info.frames, round(info.fps, 9)) == (34, 32, 12, 12.5)
    assert info.codec == "h264"


@pytest.mark.parametrize(
    "bad", [np.zeros((0, 8, 8, 3), np.uint8), np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8, 3))]
)
def test_encoding_refuses_other_shapes_and_types(bad: np.ndarray) -> None:
    with pytest.raises(DataError, match="uint8"):
        encode_mp4(bad, 8.0)
    with pytest.raises(DataError, match="fps"):
        encode_mp4(flat(1), float("nan"))


@pytest.mark.parametrize("fps", [1e-5, 1 / 2500, 0.0331, 0.5, 1.0, 24_000 / 1001, 29.97, 1000.0])
def test_slow_and_fast_rates_are_written_as_they_are(fps: float) -> None:
    """A rate of less than one in a thousand is not nothing, from which an encoder makes 24."""
    with av.open(io.BytesIO(encode_mp4(flat(20, 60, 100), fps))) as container:
        times = [frame.time for frame in container.decode(video=0)]
    assert times == pytest.approx([0, 1 / fps, 2 / fps], rel=1e-6)


def test_variable_frame_rate_is_sampled_by_time_not_by_index() -> None:
    data = write(flat(20, 60, 100, 140, 220), times=[0.0, 0.1, 0.2, 0.3, 2.0])
    frames, seconds = decode_timed(data, 5, 32, 32)
    assert levels(frames) == pytest.approx([20, 140, 140, 140, 220], abs=2)
    assert seconds == pytest.approx(2.0)
    assert levels(decode_video(data, 3, 32, 32, start=0.1, end=0.31)) == pytest.approx([60, 100, 140], abs=2)


@pytest.mark.parametrize("container", ["mp4", "matroska"])
def test_as_many_frames_as_there_are_come_back_one_to_one(container: str) -> None:
    values = list(range(20, 220, 20))
    times = [index / 30 for index in range(10)]  # matroska rounds these to milliseconds
    assert levels(decode_video(write(flat(*values), times, container=container), 10, 32, 32)) == pytest.approx(
        values, abs=2
    )


def test_short_videos_repeat_frames_and_one_wanted_frame_is_the_last() -> None:
    data = encode_mp4(flat(50, 150), 8.0)
    assert levels(decode_video(data, 5, 32, 32)) == pytest.approx([50, 50, 50, 50, 150], abs=2)
    assert levels(decode_video(data, 1, 32, 32)) == pytest.approx([150], abs=2)
    assert levels(decode_video(encode_mp4(flat(90), 8.0), 3, 32, 32)) == pytest.approx([90] * 3, abs=2)


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotation_metadata_is_honoured(rotation: int) -> None:
    frames = np.zeros((3, 40, 60, 3), np.uint8)
    frames[:, :20, :, 0], frames[:, :, :30, 2] = 255, 255
    data = write(frames, rotation=rotation)
    info = probe(data)
    expected = np.rot90(frames, rotation // 90 % 4, axes=(1, 2))
    assert (info.height, info.width) == expected.shape[1:3] and info.rotation == rotation % 360
    assert np.abs(decode_video(data, 3, info.height, info.width).astype(int) - expected).mean() < 4


def test_scaling_covers_and_crops_the_centre_and_honours_pixel_aspect() -> None:
    frames = flat(0, 0, 0, height=40, width=80)
    frames[:, :, 20:60] = 200
    assert decode_video(write(frames), 2, 20, 20).min() > 180, "only the middle half of a wide picture is left"
    wide = write(flat(9, 9, height=40, width=40), aspect=Fraction(2, 1))
    assert (probe(wide).height, probe(wide).width) == (40, 80)


def test_other_containers_and_codecs_are_read() -> None:
    avi = write(flat(*range(30, 210, 30)), container="avi", codec="mpeg4")  # B-frame-less, times only in decoding order
    assert levels(decode_video(avi, 6, 32, 32)) == pytest.approx(list(range(30, 210, 30)), abs=4)


def empty_video() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=8)
        stream.height = stream.width = 32
        out.start_encoding()
    return buffer.getvalue()


def sound_only() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="wav") as out:
        stream = out.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return buffer.getvalue()


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nother.mp4\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"no video at all" * 20, "broken video"),
        (PLAYLIST, "broken video"),
        (empty_video(), "no video stream"),
        (sound_only(), "no video stream"),
        (encode_mp4(shapes(9, 32, 32), 8.0)[:900], "broken video"),
    ],
    ids=["empty", "text", "playlist", "no-frames", "sound-only", "cut-off"],
)
def test_files_without_a_video_say_so(data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode_video(data, 4, 16, 16)
    with pytest.raises(DataError, match=message):
        probe(data)


def test_a_truncated_video_is_not_taken_for_a_short_one(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3), np.uint8)
    data = write(noise, path=tmp_path / "v.mp4", movflags="+faststart")  # index first: it opens, then ends early
    assert probe(data).frames == 30
    with pytest.raises(DataError, match=r"truncated|broken|damaged"):
        decode_video(data[: len(data) // 2], 4, 16, 16)


def test_damage_inside_is_an_error_and_not_grey_frames() -> None:
    data = bytearray(encode_mp4(np.random.default_rng(0).integers(0, 255, (30, 64, 64, 3), np.uint8), 8.0))
    middle = len(data) // 2
    data[middle : middle + 20000] = b"\xff" * 20000
    with pytest.raises(DataError, match="broken"):
        decode_video(bytes(data), 4, 16, 16)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        (VideoLimits(max_pixels=1000), "32x32 are 1024 pixels; at most 1000"),
        (VideoLimits(max_frames=4), "more than 4 frames"),
        (VideoLimits(max_seconds=0.4), "longer than 0.4 s"),
        (VideoLimits(max_bytes=100), "at most 100 are accepted"),
    ],
)
def test_limits_are_enforced(limits: VideoLimits, message: str) -> None:
    data = encode_mp4(flat(1, 2, 3, 4, 5, 6), 8.0)
    with pytest.raises(DataError, match=message):
        decode_video(data, 4, 16, 16, limits)


def test_limits_apply_to_the_part_that_is_read(tmp_path: Path) -> None:
    path = tmp_path / "long.mp4"
    path.write_bytes(encode_mp4(flat(*range(10, 110)), 10.0))
    few = VideoLimits(max_frames=12)
    assert levels(decode_video(path, 3, 32, 32, few, start=5.0, end=6.05)) == pytest.approx([60, 65, 70], abs=2)
    info = probe(path, few, start=5.0, end=6.0)
    assert (info.frames, round(info.seconds, 3), round(info.fps, 3)) == (10, 1.0, 10.0)
    with pytest.raises(DataError, match="no frames between start and end"):
        decode_video(path, 3, 32, 32, start=20.0, end=21.0)
    with pytest.raises(DataError, match=r"end=1.0 must be later than start=2.0"):
        decode_video(path, 3, 32, 32, start=2.0, end=1.0)
    with pytest.raises(DataError, match="no such video file"):
        decode_video(tmp_path / "none.mp4", 3, 32, 32)


def test_the_same_pictures_give_the_same_bytes_wherever_in_memory_they_lie() -> None:
    bikes = next(path for path in packaged_clips() if path.name == "bikes.mp4")
    draw = np.random.default_rng(0)
    found = set()
    for _ in range(16):
        between = [draw.integers(0, 255, int(draw.integers(1_000, 300_000)), np.uint8) for _ in range(8)]
        found.add(encode_mp4(decode_video(bikes, 30, 136, 320, end=1.2), 25.0, near_lossless=False))
        del between
    assert len(found) == 1
