"""How pictures are laid down and scaled: display matrices, pixel shapes, covering, filters."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
import pytest
from av.bitstream import BitStreamFilterContext

from cluster.errors import DataError
from pipeline.data.geometry import Orientation
from pipeline.data.importers.clips import ClipSpec, copy_clip
from pipeline.data.video import VideoLimits, decode_video, encode_mp4, probe

ONE, UNIT = 1 << 16, 1 << 30  # of a display matrix: 16.16 fixed point, and 2.30 in its last column
PICTURE = np.zeros((40, 60, 3), np.uint8)  # no two of its eight layings are equal
PICTURE[:20, :, 0], PICTURE[:, :30, 2], PICTURE[:10, :10, 1] = 220, 200, 255


def filmed(
    container: str = "mp4",
    matrix: Sequence[int] | None = None,
    aspect: Fraction | None = None,
    picture: np.ndarray = PICTURE,
) -> bytes:
    """Return three frames of ``picture`` with a display matrix ((a, b, u), (c, d, v), (x, y, w)) of nine integers."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuv420p"
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        if matrix:
            stream.set_display_matrix(matrix)
        for _ in range(3):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode(None))
    return buffer.getvalue()


def matrix_of(a: float, b: float, c: float, d: float) -> list[int]:
    return [round(a * ONE), round(b * ONE), 0, round(c * ONE), round(d * ONE), 0, 0, 0, UNIT]


# The picture as it is to be seen, from the meaning of the matrix: pixel (column p, row q) goes to column a·p + c·q and row
# b·p + d·q, counted from the border that the sign says; then degrees counterclockwise, and whether mirrored after that.
LAYINGS = {
    (1, 0, 0, 1): (PICTURE, 0, False),
    (-1, 0, 0, 1): (PICTURE[:, ::-1], 0, True),
    (-1, 0, 0, -1): (PICTURE[::-1, ::-1], 180, False),
    (1, 0, 0, -1): (PICTURE[::-1], 180, True),
    (0, -1, 1, 0): (np.rot90(PICTURE), 90, False),
    (0, -1, -1, 0): (np.rot90(PICTURE)[:, ::-1], 90, True),
    (0, 1, -1, 0): (np.rot90(PICTURE, -1), 270, False),
    (0, 1, 1, 0): (PICTURE.swapaxes(0, 1), 270, True),
}


@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize("laying", LAYINGS)
def test_all_eight_orientations(laying: tuple[int, int, int, int], container: str) -> None:
    expected, rotation, mirrored = LAYINGS[laying]
    data = filmed(container, matrix_of(*laying))
    info = probe(data)
    assert (info.height, info.width, info.rotation, info.mirrored) == (*expected.shape[:2], rotation, mirrored)
    found = decode_video(data, 3, info.height, info.width).astype(int)
    assert np.abs(found - expected).mean() < 3
    again = np.rot90(PICTURE, rotation // 90)
    assert np.array_equal(again[:, ::-1] if mirrored else again, expected), "what probe says is what is shown"


@pytest.mark.parametrize("laying", LAYINGS)
def test_copies_are_upright(laying: tuple[int, int, int, int], tmp_path) -> None:
    expected = LAYINGS[laying][0]
    path = tmp_path / "v.mp4"
    path.write_bytes(filmed(matrix=matrix_of(*laying)))
    copy = copy_clip(path, None, None, ClipSpec())
    info = probe(copy)
    assert (info.height, info.width, info.rotation, info.mirrored) == (*expected.shape[:2], 0, False)
    assert np.abs(decode_video(copy, 3, info.height, info.width).astype(int) - expected).mean() < 6


@pytest.mark.parametrize(
    ("laying", "size"), [((1, 0, 0, 1), (40, 60)), ((0, -1, 1, 0), (60, 40)), ((-1, 0, 0, 1), (40, 60))]
)
@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_a_matrix_that_scales_both_sides_alike_only_orients(
    laying: tuple[int, ...], size: tuple[int, int], scale: float
) -> None:
    data = filmed(matrix=matrix_of(*(scale * value for value in laying)))
    info = probe(data)
    assert (info.height, info.width) == size
    assert np.abs(decode_video(data, 3, *size).astype(int) - LAYINGS[laying][0]).mean() < 3


def test_a_matrix_that_scales_the_sides_unevenly_shapes_the_pixels() -> None:
    for matrix, size in (
        (matrix_of(2, 0, 0, 1), (40, 120)),
        (matrix_of(-2, 0, 0, 1), (40, 120)),
        (matrix_of(0, 2, -1, 0), (120, 40)),  # 60 columns become 120 rows
        (matrix_of(0, -1, 3, 0), (20, 40)),  # 40 rows become 120 columns: thirds of it, since rows are kept
    ):
        info = probe(filmed(matrix=matrix))
        assert (info.height, info.width) == size
    turned = probe(filmed(matrix=matrix_of(0, 1, -1, 0), aspect=Fraction(2, 1)))
    assert (turned.height, turned.width) == (120, 40), "a pixel's shape belongs to the coded picture"


def test_angles_that_are_no_right_ones_are_refused_and_rounding_is_not() -> None:
    half = 0.5**0.5
    for bad in ((half, half, -half, half), (1, 0, 0.5, 1), (1, 0, 0, 0), (0.98, 0.19, -0.19, 0.98)):
        for attempt in (lambda data: probe(data), lambda data: decode_video(data, 2, 8, 8)):
            with pytest.raises(DataError, match="only multiples of 90° and mirror images are read"):
                attempt(filmed(matrix=matrix_of(*bad)))
    assert probe(filmed(matrix=matrix_of(0.0001, 1, -1, 0.0001))).rotation == 270
    assert Orientation.of(np.zeros((3, 3), np.int32)) == Orientation(), "a matrix of zeros says nothing"


@pytest.mark.parametrize(
    ("said", "rotation", "mirrored"),
    [("rotate=90", 90, False), ("flip=horizontal", 0, True), ("flip=vertical", 180, True)],
)
def test_a_stream_may_say_itself_how_it_is_laid_down_and_goes_before_its_container(
    said: str, rotation: int, mirrored: bool
) -> None:
    for container, matrix in (("mpegts", None), ("mp4", matrix_of(-1, 0, 0, -1))):
        out = io.BytesIO()
        with av.open(io.BytesIO(filmed())) as given, av.open(out, "w", format=container) as made:
            source = given.streams.video[0]
            target = made.add_stream_from_template(source)
            if matrix:
                target.set_display_matrix(matrix)
            wanted = f"h264_metadata=display_orientation=insert:{said}"
            filtering = BitStreamFilterContext(wanted, in_stream=source, out_stream=target)
            for packet in (*(item for item in given.demux(source) if item.dts is not None), None):
                for changed in filtering.filter(packet):
                    changed.stream = target
                    made.mux(changed)
        info = probe(out.getvalue())
        assert (info.rotation, info.mirrored) == (rotation, mirrored), container


# --- scaling and cropping -------------------------------------------------------------------------------------------


def test_the_scaled_picture_covers_every_size_to_the_last_pixel() -> None:
    """Some n are more than 49 · (n / 49) in floating point: the product is rounded, and not cut off."""
    inexact = [size for size in range(2, 60) if int(49 * (size / 49)) < size]
    assert inexact
    data = encode_mp4(np.full((1, 49, 49, 3), 200, np.uint8), 8.0)
    sizes = [(size, size) for size in inexact] + [(size, 2) for size in inexact] + [(2, size) for size in inexact]
    for height, width in [*sizes, (1, 1), (1, 97), (89, 1), (49, 49), (50, 48), (98, 147)]:
        frame = decode_video(data, 1, height, width)[0]
        assert frame.shape == (height, width, 3)
        assert frame.min() > 190, "no edge is left empty"


def test_shrinking_averages_and_enlarging_is_smooth() -> None:
    """A mean of two levels lies between them; a cubic filter goes beyond on both sides of an edge."""
    edge = np.full((1, 64, 64, 3), 60, np.uint8)
    edge[:, :, 30:] = 200
    data = encode_mp4(edge, 8.0)
    small = decode_video(data, 1, 16, 16).astype(int)
    assert small.min() >= 57 and small.max() <= 203
    assert small[0, :, 7].mean() == pytest.approx((2 * 60 + 2 * 200) / 4, abs=4), (
        "a column half on each side of the edge"
    )
    large = decode_video(data, 1, 192, 192).astype(int)
    assert large.max() > 206 and large.min() < 54


def test_pictures_too_long_and_thin_to_cover_are_refused_before_they_are_made() -> None:
    """Covering 480 rows, a film of 16 rows and 8192 columns would be 245 760 pixels wide."""
    long = filmed(picture=np.zeros((16, 4096, 3), np.uint8))
    with pytest.raises(DataError, match="4096x16, too long and thin for 480x480"):
        decode_video(long, 2, 480, 480)
    assert decode_video(long, 2, 16, 16, VideoLimits(max_pixels=16 * 4096)).shape == (2, 16, 16, 3)
    wide = filmed(matrix=matrix_of(30_000, 0, 0, 1))  # pixels 30 000 times as wide as high
    with pytest.raises(DataError, match="too long and thin"):
        decode_video(wide, 2, 64, 64)
