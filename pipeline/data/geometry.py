"""How a decoded picture is shown: turned, mirrored, with which pixel shape, at which size.

Responsible for the display matrix and the pixel aspect of frames, and for scaling and cropping them to a wanted size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import av
import numpy as np
from av.video.reformatter import Interpolation
from PIL import Image

from cluster.errors import DataError

_NEARLY = math.tan(math.radians(1))  # a matrix this close to a right angle is one: its makers round
_UNEVEN = 0.01  # ffmpeg takes scalings that differ by less than this for equal ones
_LONGEST = 200  # times its short side that a picture may be long to be shown whole: Qwen's own limit
_COVER = 16  # times the wanted pixels that a picture may have when it is scaled to cover them


@dataclass(frozen=True)
class Orientation:
    """One of the eight ways to lay a picture down: rows and columns are exchanged first, then each may be reversed."""

    transposed: bool = False
    rows_reversed: bool = False
    columns_reversed: bool = False

    @classmethod
    def of(cls, matrix: np.ndarray) -> Orientation:
        """Return the orientation in a display matrix, (3, 3) as ISO/IEC 14496-12 defines it; raises DataError.

        A coded pixel (column p, row q) is shown at column a·p + c·q + x and row b·p + d·q + y, where the matrix is
        ((a, b, u), (c, d, v), (x, y, w)). Scaling does not matter here (:func:`pixel_aspect`). A matrix of zeros says
        nothing. Angles that are no multiple of 90° (within 1°), shears and flat matrices are refused.
        """
        (a, b), (c, d) = np.asarray(matrix, np.float64)[:2, :2]
        if not any((a, b, c, d)):
            return cls()
        if a and d and abs(b) <= _NEARLY * abs(a) and abs(c) <= _NEARLY * abs(d):
            return cls(False, rows_reversed=bool(d < 0), columns_reversed=bool(a < 0))
        if b and c and abs(a) <= _NEARLY * abs(b) and abs(d) <= _NEARLY * abs(c):
            return cls(True, rows_reversed=bool(b < 0), columns_reversed=bool(c < 0))
        raise DataError(
            f"its display matrix turns the picture by {math.degrees(math.atan2(-b, a)):.0f}° or shears it; only multiples "
            "of 90° and mirror images are read. Write the video upright with an editor, or with ffmpeg"
        )

    @property
    def mirrored(self) -> bool:
        """Whether the picture is mirrored, left to right, after it was turned by ``rotation``."""
        return self.transposed ^ self.rows_reversed ^ self.columns_reversed

    @property
    def rotation(self) -> int:
        """Degrees counterclockwise by which the coded picture is turned: 0, 90, 180 or 270."""
        return (90 if self.rows_reversed else 270) if self.transposed else (180 if self.rows_reversed else 0)

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Return ``image`` (H, W, …) as it is shown; a view."""
        if self.transposed:
            image = image.swapaxes(0, 1)
        return image[:: -1 if self.rows_reversed else 1, :: -1 if self.columns_reversed else 1]


def display_matrix(frame: av.VideoFrame) -> np.ndarray | None:
    """Return the (3, 3) display matrix of ``frame``, from its container or its own stream, or None."""
    found = frame.side_data.get("DISPLAYMATRIX")
    return None if found is None else np.frombuffer(bytes(found), np.int32)[:9].reshape(3, 3)


def orientation(frame: av.VideoFrame) -> Orientation:
    """Return how ``frame`` is shown; raises DataError as :meth:`Orientation.of`."""
    matrix = display_matrix(frame)
    return Orientation() if matrix is None else Orientation.of(matrix)


def _pixel_aspect(matrix: np.ndarray | None, stream: av.VideoStream) -> float:
    """Return width by height of one coded pixel, before the picture is turned; ``matrix``: the frame's display matrix.

    A display matrix may scale the two sides unevenly. ffmpeg puts such a scaling in the place of the stream's aspect,
    for pictures that are turned the wrong way round: it is taken from the matrix here.
    """
    stated = stream.sample_aspect_ratio
    if matrix is not None:
        across, down = (float(math.hypot(*side)) for side in np.asarray(matrix, np.float64)[:2, :2])
        if across and down and abs(across / down - 1) > _UNEVEN:
            return across / down * float(stream.codec_context.sample_aspect_ratio or 1)
    return float(stated) if stated else 1.0


def shown_size(frame: av.VideoFrame, stream: av.VideoStream) -> tuple[int, int]:
    """Return (height, width) as a player shows the frame."""
    return _laid_out(frame, stream)[1:]


def _laid_out(frame: av.VideoFrame, stream: av.VideoStream) -> tuple[Orientation, int, int]:
    """Return how ``frame`` is shown, and its (height, width) then. Its side data are asked once: that is slow."""
    matrix = display_matrix(frame)
    laid = Orientation() if matrix is None else Orientation.of(matrix)
    height, width = frame.height, frame.width * _pixel_aspect(matrix, stream)
    if laid.transposed:
        width, height = height, width
    return laid, max(1, round(height)), max(1, round(width))


@dataclass(frozen=True)
class PixelBudget:
    """How large the thinker sees a picture that keeps its shape: sides are multiples of ``multiple``, ``least`` to ``most`` pixels."""

    least: int
    most: int
    multiple: int

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Return (height, width) for a picture shown as ``height`` x ``width``: the nearest multiples, scaled where these are
        outside of the budget. It is Qwen2-VL's rule (arXiv 2409.12191; ``smart_resize`` in transformers).

        Raises DataError for a picture too long and thin for any size in the budget.
        """
        unit = self.multiple
        sides = max(unit, round(height / unit) * unit), max(unit, round(width / unit) * unit)
        if sides[0] * sides[1] > self.most:
            shrink = math.sqrt(height * width / self.most) * unit
            sides = max(1, math.floor(height / shrink)) * unit, max(1, math.floor(width / shrink)) * unit
        elif sides[0] * sides[1] < self.least:
            grow = math.sqrt(self.least / (height * width)) / unit
            sides = math.ceil(height * grow) * unit, math.ceil(width * grow) * unit
        if sides[0] * sides[1] > self.most or max(height, width) > _LONGEST * min(height, width):
            raise DataError(
                f"frames are shown as {width}x{height}, too long and thin for {self.most} pixels in multiples of {unit}"
            )
        return sides


def stretched(frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
    """Return the whole frame as uint8 (height, width, 3): upright, scaled to this very size, bicubic and without aliasing."""
    image = orientation(frame).apply(frame.to_ndarray(format="rgb24")).astype(np.float32)
    # Each colour in float: in bytes, Pillow cuts what overshoots between its two passes.
    planes = (Image.fromarray(image[..., i]).resize((width, height), Image.Resampling.BICUBIC) for i in range(3))
    return np.stack([np.asarray(plane) for plane in planes], axis=-1).clip(0, 255).round().astype(np.uint8)


def fitted(frame: av.VideoFrame, height: int, width: int, stream: av.VideoStream, max_pixels: int) -> np.ndarray:
    """Return the frame as uint8 (height, width, 3): upright, scaled to cover, cropped around the centre.

    Raises DataError where the covering picture would have more than ``max_pixels``, and far more than are wanted.
    """
    laid, shown_height, shown_width = _laid_out(frame, stream)
    scale = max(height / shown_height, width / shown_width)
    cover_height, cover_width = round(shown_height * scale), round(shown_width * scale)
    if cover_height * cover_width > max(max_pixels, _COVER * height * width):
        raise DataError(
            f"frames are shown as {shown_width}x{shown_height}, too long and thin for {width}x{height}; "
            f"at most {max_pixels} pixels are made of one frame"
        )
    coded = (cover_width, cover_height) if laid.transposed else (cover_height, cover_width)
    # Averaging over the area is right for shrinking (no aliasing), cubic for enlarging.
    kind = Interpolation.AREA if scale < 1 else Interpolation.BICUBIC
    image = frame.to_ndarray(format="rgb24", height=coded[0], width=coded[1], interpolation=kind)
    top, left = (cover_height - height) // 2, (cover_width - width) // 2
    return laid.apply(image)[top : top + height, left : left + width]
