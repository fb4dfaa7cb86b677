"""Boxes as geometry: conversions, IoU, and fitting an image into a network's input.

Pure functions over NumPy arrays; knows nothing of tracks, detectors or pixels' colours.
Formats are in the names: xyxy are corners, xywh the top-left corner and size, cxcywhr turned boxes: centre,
size and angle.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_TINY = np.finfo(np.float64).tiny


def xywh_to_xyxy(xywh: Array) -> Array:
    """(..., 4) top-left and size → corners."""
    return np.concatenate((xywh[..., :2], xywh[..., :2] + xywh[..., 2:]), axis=-1)


def xyxy_to_xywh(xyxy: Array) -> Array:
    """(..., 4) corners → top-left and size."""
    return np.concatenate((xyxy[..., :2], xyxy[..., 2:] - xyxy[..., :2]), axis=-1)


def iou(a_xyxy: Array, b_xyxy: Array, *, pixel: float = 0.0) -> Array:
    """Intersection over union of matching rows, (..., 4) with (..., 4) → (...); broadcasts.

    pixel: what a box's width and height gain. 0 for corners as points of the plane; 1 for corners as
    inclusive pixel indices, the convention of cython_bbox and so of FairMOT and ByteTrack.
    Two boxes without area have IoU 0.
    """
    # Component by component: reductions over an axis of two would cost more than the arithmetic.
    ax1, ay1, ax2, ay2 = a_xyxy[..., 0], a_xyxy[..., 1], a_xyxy[..., 2], a_xyxy[..., 3]
    bx1, by1, bx2, by2 = b_xyxy[..., 0], b_xyxy[..., 1], b_xyxy[..., 2], b_xyxy[..., 3]
    width = np.maximum(np.minimum(ax2, bx2) - np.maximum(ax1, bx1) + pixel, 0.0)
    height = np.maximum(np.minimum(ay2, by2) - np.maximum(ay1, by1) + pixel, 0.0)
    inter = width * height
    area_a = (ax2 - ax1 + pixel) * (ay2 - ay1 + pixel)
    union = area_a + (bx2 - bx1 + pixel) * (by2 - by1 + pixel) - inter
    # inter is 0 wherever union is: any divisor will do there.
    shared: Array = inter / np.maximum(union, _TINY)
    return shared


@dataclass(frozen=True, slots=True)
class Fit:
    """How an image of source_size was placed in a network input of input_size (both width, height).

    The image was resized to `resized` and its top-left corner put at `offset`; the rest is padding.
    A source point p lies at p · resized / source_size + offset, and `to_source` inverts exactly that,
    rounding of the resized size included (scaling by the ideal ratio instead is up to a pixel off).
    """

    source_size: tuple[int, int]
    input_size: tuple[int, int]
    resized: tuple[int, int]
    offset: tuple[int, int]

    def to_source(self, xyxy: Array) -> Array:
        """(..., 4) corners in the network input → corners in source pixels, unclipped."""
        offset, scale = _inverse(self)
        source: Array = (xyxy - offset) * scale
        return source


@lru_cache
def _inverse(fit: Fit) -> tuple[Array, Array]:
    """(4,) offset and (4,) scale of `to_source`: the same for every frame of a source."""
    scale = np.array(fit.source_size, np.float64) / np.array(fit.resized)
    return np.tile(fit.offset, 2), np.tile(scale, 2)


def fit_corner(source_size: tuple[int, int], input_size: tuple[int, int]) -> Fit:
    """Keep the aspect ratio, image at the top-left, padding right and below.

    The rule of YOLOX (`yolox/data/data_augment.py:preproc`): sizes are truncated, not rounded.
    """
    ratio = min(input_size[0] / source_size[0], input_size[1] / source_size[1])
    resized = (max(1, int(source_size[0] * ratio)), max(1, int(source_size[1] * ratio)))
    return Fit(source_size, input_size, resized, (0, 0))


def fit_corner_rounded(source_size: tuple[int, int], input_size: tuple[int, int]) -> Fit:
    """As `fit_corner`, sizes rounded, halves up: mmdet's rule (`mmcv/image/geometric.py:_scale_size`)."""
    ratio = min(input_size[0] / source_size[0], input_size[1] / source_size[1])
    resized = (max(1, int(source_size[0] * ratio + 0.5)), max(1, int(source_size[1] * ratio + 0.5)))
    return Fit(source_size, input_size, resized, (0, 0))


def fit_center(source_size: tuple[int, int], input_size: tuple[int, int]) -> Fit:
    """Keep the aspect ratio, image in the middle, padding around: the letterbox.

    The rule of FairMOT (`src/lib/datasets/dataset/jde.py:letterbox`): the size is rounded half to even,
    the smaller half of an odd padding goes left and above.
    """
    ratio = min(input_size[0] / source_size[0], input_size[1] / source_size[1])
    resized = (max(1, round(source_size[0] * ratio)), max(1, round(source_size[1] * ratio)))
    offset = tuple(round((full - part) / 2 - 0.1) for full, part in zip(input_size, resized, strict=True))
    return Fit(source_size, input_size, resized, (offset[0], offset[1]))


def fit_stretch(source_size: tuple[int, int], input_size: tuple[int, int]) -> Fit:
    """Fill the input, aspect ratio ignored."""
    return Fit(source_size, input_size, input_size, (0, 0))


def turned(xyxy: Array, angle: Array) -> Array:
    """(..., 4) corners of boxes before their turn, (...) angles → (..., 5) cxcywhr.

    cxcywhr: centre, width, height, and the angle r in radians by which the box is turned around its centre,
    from the x axis towards the y axis.
    """
    low, high = xyxy[..., :2], xyxy[..., 2:]
    return np.concatenate(((low + high) / 2, high - low, angle[..., None]), axis=-1)


def unturned(cxcywhr: Array) -> Array:
    """(..., 5) → (..., 4) corners of the boxes turned back to the axes: the inverse of `turned`."""
    half = cxcywhr[..., 2:4] / 2
    return np.concatenate((cxcywhr[..., :2] - half, cxcywhr[..., :2] + half), axis=-1)


def polygons(cxcywhr: Array) -> Array:
    """(..., 5) → (..., 4, 2) corners of the turned boxes: those that lie top left, top right, bottom right
    and bottom left before the turn.
    """
    cos, sin = np.cos(cxcywhr[..., 4]), np.sin(cxcywhr[..., 4])
    half = cxcywhr[..., 2:4] / 2
    across = half[..., :1] * np.stack((cos, sin), axis=-1)
    down = half[..., 1:] * np.stack((-sin, cos), axis=-1)
    centre = cxcywhr[..., :2]
    corners = (centre - across - down, centre + across - down, centre + across + down, centre - across + down)
    return np.stack(corners, axis=-2)


def enclosing(cxcywhr: Array) -> Array:
    """(..., 5) → (..., 4) corners of the smallest upright boxes around the turned ones."""
    cos, sin = np.abs(np.cos(cxcywhr[..., 4:])), np.abs(np.sin(cxcywhr[..., 4:]))
    width, height = cxcywhr[..., 2:3] / 2, cxcywhr[..., 3:4] / 2
    reach = np.concatenate((width * cos + height * sin, width * sin + height * cos), axis=-1)
    return np.concatenate((cxcywhr[..., :2] - reach, cxcywhr[..., :2] + reach), axis=-1)


def half_turned(angle: Array) -> Array:
    """The same boxes' angles in [−π/2, π/2): half a turn changes no box."""
    wrapped: Array = (angle + np.pi / 2) % np.pi - np.pi / 2
    return wrapped


def long_side_first(cxcywhr: Array) -> Array:
    """The same boxes (..., 5) with width ≥ height and the angle in [−π/2, π/2): le90, as DOTA's tools and
    mmrotate call it (`mmrotate/structures/bbox/rotated_boxes.py`, regularize_boxes).
    """
    low, high = cxcywhr[..., 2:4].min(axis=-1), cxcywhr[..., 2:4].max(axis=-1)
    quarter = np.where(cxcywhr[..., 2] < cxcywhr[..., 3], np.pi / 2, 0.0)
    angle = half_turned(cxcywhr[..., 4] + quarter)
    return np.stack((cxcywhr[..., 0], cxcywhr[..., 1], high, low, angle), axis=-1)


def scaled(cxcywhr: Array, x: float, y: float) -> Array:
    """Turned boxes (..., 5) in a picture x times as wide and y times as high.

    Where x and y differ they become parallelograms: their sides' lengths are right, and the first one's
    direction, as nearly as a box can have them.
    """
    width, height = cxcywhr[..., 2], cxcywhr[..., 3]
    cos, sin = np.cos(cxcywhr[..., 4]), np.sin(cxcywhr[..., 4])
    turn = np.arctan2(y * sin, x * cos) - np.arctan2(sin, cos)
    return np.stack(
        (
            cxcywhr[..., 0] * x,
            cxcywhr[..., 1] * y,
            width * np.hypot(x * cos, y * sin),
            height * np.hypot(x * sin, y * cos),
            cxcywhr[..., 4] + turn,
        ),
        axis=-1,
    )


def rotated_iou(a: Array, b: Array) -> Array:
    """IoU of matching rows of turned boxes, cxcywhr (..., 5) with (..., 5) → (...); broadcasts.

    Two boxes without area have IoU 0.

    The area common to a box and an upright one is the integral of dx dy; by Green's theorem that of
    min(max(x, left), right) dy along the part of the first's edges between the second's top and bottom: four
    edges in closed form, without the cases of a clipped polygon, and continuous where edges coincide.
    """
    cos, sin = np.cos(b[..., 4]), np.sin(b[..., 4])
    dx, dy = a[..., 0] - b[..., 0], a[..., 1] - b[..., 1]
    x, y, turn = dx * cos + dy * sin, dy * cos - dx * sin, a[..., 4] - b[..., 4]  # a as b sees it
    across, along = np.cos(turn), np.sin(turn)
    half_width, half_height = a[..., 2] / 2, a[..., 3] / 2
    corners = [
        (
            x + i * half_width * across - j * half_height * along,
            y + i * half_width * along + j * half_height * across,
        )
        for i, j in ((-1, -1), (1, -1), (1, 1), (-1, 1))
    ]
    right, bottom = b[..., 2] / 2, b[..., 3] / 2
    inter = 0.0
    for (x1, y1), (x2, y2) in zip(corners, [*corners[1:], corners[0]], strict=True):
        low, high = np.clip(y1, -bottom, bottom), np.clip(y2, -bottom, bottom)
        slope = (x2 - x1) / np.where(y2 == y1, 1.0, y2 - y1)
        inter = inter + (high - low) * _mean_clipped(x1 + slope * (low - y1), x1 + slope * (high - y1), right)
    inter = np.maximum(inter, 0.0)
    union = a[..., 2] * a[..., 3] + b[..., 2] * b[..., 3] - inter
    shared: Array = inter / np.maximum(union, _TINY)
    return shared


def _mean_clipped(first: Array, last: Array, limit: Array) -> Array:
    """The mean of min(max(x, −limit), limit) over x from first to last."""
    begin, end = np.clip(first, -limit, limit), np.clip(last, -limit, limit)
    span, inside = last - first, end - begin
    # Between begin and end whatever is rounded: no case apart where the span is next to nothing.
    mean: Array = begin + inside * ((last - end + inside / 2) / np.where(span == 0, 1.0, span))
    return mean
