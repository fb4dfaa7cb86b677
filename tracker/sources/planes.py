"""A decoder's picture as an `Image`: its planes as arrays, upright, with the right colour tags.

Knows FFmpeg's pixel formats and display matrices; does not know where pictures come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import av
import numpy as np
from av.buffer import Buffer
from av.sidedata.sidedata import SideDataContainer
from numpy.typing import NDArray

from tracker.types import Image, YuvMatrix

Pixels = NDArray[np.uint8]

# How many times smaller chroma is (across, down) → the 8-bit format with one plane each for Y, U and V.
_EIGHT_BIT_PLANAR = {
    (1, 1): "yuv444p",
    (2, 1): "yuv422p",
    (2, 2): "yuv420p",
    (1, 2): "yuv440p",
    (4, 1): "yuv411p",
    (4, 4): "yuv410p",
}
# Code points of ITU-T H.273, table 4. What is untagged (2) or rarer is taken as BT.601 limited, the
# assumption of FFmpeg's swscale and so of OpenCV: whoever trained on their pixels expects it. SMPTE 240M
# differs from BT.709 by a hundredth in one coefficient.
_MATRICES: dict[int, YuvMatrix] = {1: "bt709", 7: "bt709", 9: "bt2020", 10: "bt2020"}
_FULL_RANGE = 2
_UPRIGHT = (1.0, 0.0, 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Turn:
    """One of the eight turns and mirrorings: first rows become columns, then both are turned about."""

    turned: bool = False
    mirrored: bool = False
    flipped: bool = False


@dataclass(frozen=True, slots=True)
class Colours:
    """How Y, U, V become R, G, B: see `types.Image`."""

    matrix: YuvMatrix
    full_range: bool


def image_of(picture: av.VideoFrame) -> Image:
    """The picture upright. Its planes are views of the decoder's memory where the format allows.

    Each array keeps the picture alive, and so its buffer from being decoded into again. Rows are
    contiguous, but a row's stride may exceed its width.
    """
    # Conversions run in one thread: swscale's others write past the last row of their slice, into the
    # first pixels of the next (rgb24 to yuv444p16le at 97×63: 8 wrong pixels in one run of a hundred).
    layout = _planar_layout(picture.format.name)
    turn = turn_of(picture)
    if layout is None:
        bgr = np.asarray(picture.to_ndarray(format="bgr24", threads=1), np.uint8)
        return Image(format="bgr", planes=_upright((bgr,), turn))
    colours = colours_of(picture)
    planar = (
        picture if _is_layout(picture.format.name, layout) else picture.reformat(format=layout, threads=1)
    )
    return Image(
        format="yuv",
        planes=_upright(tuple(_view(plane) for plane in planar.planes[:3]), turn),
        matrix=colours.matrix,
        full_range=colours.full_range,
    )


def colours_of(picture: av.VideoFrame) -> Colours:
    full_range = picture.color_range == _FULL_RANGE or picture.format.name.startswith("yuvj")
    return Colours(_MATRICES.get(picture.colorspace, "bt601"), full_range)


def turn_of(picture: av.VideoFrame) -> Turn:
    """As the display matrix wants the picture shown."""
    a, b, c, d = _display_matrix(picture)
    turned = abs(b) > abs(a)  # rows become columns
    mirrored, flipped = (c < 0, b < 0) if turned else (a < 0, d < 0)
    return Turn(turned, mirrored, flipped)


@lru_cache
def _planar_layout(format_name: str) -> str | None:
    """The 8-bit planar YUV format of the same subsampling; None for RGB, palettes, grey and XYZ."""
    form = av.VideoFormat(format_name, 64, 64)
    if form.is_rgb or len(form.components) < 3 or format_name.startswith("xyz"):
        return None
    return _EIGHT_BIT_PLANAR.get((64 // form.chroma_width(64), 64 // form.chroma_height(64)))


def _is_layout(format_name: str, layout: str) -> bool:
    """Whether the first three planes have that layout already: by itself, as full range, or with alpha."""
    return format_name in (layout, layout.replace("yuv", "yuvj"), layout.replace("yuv", "yuva"))


def _view(plane: av.video.plane.VideoPlane) -> Pixels:
    """(height, width) without the padding at each line's end. The array's base holds plane and picture."""
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(plane.height, -1)[:, : plane.width]
    return rows if plane.line_size > 0 else rows[::-1]  # a negative line size: stored from the bottom up


def _upright(planes: tuple[Pixels, ...], turn: Turn) -> tuple[Pixels, ...]:
    if turn == Turn():
        return planes
    steps = slice(None, None, -1 if turn.flipped else 1), slice(None, None, -1 if turn.mirrored else 1)
    return tuple(
        np.ascontiguousarray((plane.swapaxes(0, 1) if turn.turned else plane)[steps]) for plane in planes
    )


def _display_matrix(picture: av.VideoFrame) -> tuple[float, ...]:
    """(a, b, c, d) of x' = a·x + c·y, y' = b·x + d·y, as in the mp4 track header."""
    try:
        # Not picture.side_data: a picture keeps what that gives, which keeps the picture, so that each would
        # stay in memory until Python looks for such circles.
        matrix = SideDataContainer(picture).get("DISPLAYMATRIX")  # type: ignore[call-arg]  # its stubs miss it
    except ValueError:
        # PyAV does not know every kind of side data (Exif, for one) and then gives none of it. The angle
        # it reads by another way; only a mirroring goes unnoticed.
        angle = math.radians(picture.rotation)
        return math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
    if not isinstance(matrix, Buffer):
        return _UPRIGHT
    return tuple(np.frombuffer(memoryview(matrix), np.int32)[[0, 1, 3, 4]].tolist())
