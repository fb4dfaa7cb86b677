"""Boxes as geometry: conversions, IoU, and fitting an image into a network's input.

Pure functions over NumPy arrays; knows nothing of tracks, detectors or pixels' colours.
Formats are in the names: xyxy are corners, xywh the top-left corner and size.
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
