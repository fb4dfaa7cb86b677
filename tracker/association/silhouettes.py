"""How much a track's mask is like a detection's: mask IoU of pairs, on the masks' device.

A silhouette is a mask in the coordinates of its own box: SIDE × SIDE cells, in the mask or not. So a track
keeps 1 kB of its last matched mask, whatever the picture's size; and the mask moves and is stretched with its
box, as the Kalman filter predicts it: nothing is drawn anew.

Pairs are compared on a grid over what their boxes share, all in one batch, whose shape is the same from frame
to frame, or nearly; then the host waits for their IoU, once in a frame. Knows nothing of a track's life.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tracker.errors import DetectionsError, DeviceError
from tracker.graphs import first_line
from tracker.masks import cell_centres
from tracker.matching import Array, Indices

if TYPE_CHECKING:
    from tracker.types import Detections

# Cells along a silhouette's side, and points along a side of what two boxes share. Against masks of thin
# things, 90 to 180 pixels high, compared pixel by pixel, it errs by 0.01 IoU on the mean.
SIDE = 32

# Pairs at once: 10 MB of points.
_CHUNK = 512


class Silhouettes:
    """Those of a table's tracks, in its order after each `settle`, and those of the frame's detections."""

    def __init__(self) -> None:
        self._tracks: Tensor | None = None  # (N, SIDE, SIDE) bool
        self._found: Tensor | None = None  # (M, SIDE, SIDE) bool

    def look(self, detections: Detections) -> None:
        """The masks of another frame. Does not wait.

        Raises DetectionsError for detections without masks, or with rotated boxes.
        """
        self._found = None
        if not len(detections):
            return
        if detections.mask is None:
            raise DetectionsError(
                "cost mask needs masks and the detections have none: take an engine that finds masks, or "
                "cost box"
            )
        if detections.angle is not None:
            raise DetectionsError(
                "cost mask compares masks in upright boxes, and these are rotated: take cost box"
            )
        mask = detections.mask
        try:
            xyxy = torch.from_numpy(detections.xyxy.astype(np.float32)).to(mask.device, non_blocking=True)
            self._found = mask.patches(xyxy, SIDE)
        except RuntimeError as error:
            raise _device_error(error) from error

    def likeness(self, rows: Indices, columns: Indices, tracks: Array, found: Array) -> NDArray[np.float64]:
        """(P,) of tracks `rows` and detections `columns`: the mean of two mask IoUs, 0…1.

        One with both where they are, in boxes `tracks` and `found`, (P, 4) corners in pixels; one with the
        track's mask brought into the detection's box, since thin things that were predicted a little off
        share nothing in place. Waits for the device.
        """
        if self._tracks is None or self._found is None or not len(rows):
            return np.zeros(len(rows))
        pairs = np.zeros(
            (_padded(len(rows)), 10), np.float32
        )  # one upload for all; indices stay exact to 2²⁴
        pairs[: len(rows)] = np.column_stack((rows, columns, tracks, found))
        try:
            there = torch.from_numpy(pairs).to(self._found.device, non_blocking=True)
            chunks = (there[first : first + _CHUNK] for first in range(0, len(there), _CHUNK))
            alike = [_likeness(self._tracks, self._found, chunk) for chunk in chunks]
            return torch.cat(alike).cpu().numpy()[: len(rows)].astype(np.float64)  # the one wait
        except RuntimeError as error:
            raise _device_error(error) from error

    def settle(self, last: Indices) -> None:
        """Which silhouette each track has from now on, (N,): first come those the tracks had, in their order,
        then those of the frame's detections.
        """
        if not len(last):
            self._tracks = None
            return
        known = [part for part in (self._tracks, self._found) if part is not None]
        try:
            index = torch.from_numpy(last).to(known[0].device, non_blocking=True)
            self._tracks = torch.cat(known)[index]
        except RuntimeError as error:
            raise _device_error(error) from error


def _padded(count: int) -> int:
    """Room for so many pairs: few different sizes, so that memory is found where the last frame left it."""
    return max(32, 1 << (count - 1).bit_length()) if count <= _CHUNK else -(-count // _CHUNK) * _CHUNK


def _likeness(tracks: Tensor, found: Tensor, pairs: Tensor) -> Tensor:
    """(P,) of pairs (P, 10): row, column, and their boxes."""
    row, column = pairs[:, :2].long().unbind(dim=1)
    in_place = _iou(tracks, found, row, column, pairs[:, 2:6], pairs[:, 6:])
    a, b = tracks[row], found[column]
    in_one_box = (a & b).sum(dim=(1, 2)) / (a | b).sum(dim=(1, 2)).clamp(min=1)
    return (in_place + in_one_box) / 2


def _iou(tracks: Tensor, found: Tensor, row: Tensor, column: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(P,) of tracks `row` in boxes a (P, 4) with detections `column` in boxes b (P, 4)."""
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    point = cell_centres(torch.cat((low, high), dim=1), SIDE)  # (P, SIDE, 2)
    both = _sampled(tracks, row, a, point) & _sampled(found, column, b, point)
    inter = both.float().mean(dim=(1, 2)) * _extent(low, high)
    mine = _share(tracks)[row] * _extent(a[:, :2], a[:, 2:])
    theirs = _share(found)[column] * _extent(b[:, :2], b[:, 2:])
    return (inter / (mine + theirs - inter).clamp(min=1e-6)).clamp(max=1.0)


def _sampled(silhouettes: Tensor, index: Tensor, xyxy: Tensor, point: Tensor) -> Tensor:
    """(P, SIDE, SIDE) bool: silhouettes `index`, in boxes (P, 4), at the points (P, SIDE, 2)."""
    low, size = xyxy[:, None, :2], (xyxy[:, None, 2:] - xyxy[:, None, :2]).clamp(min=1e-6)
    x, y = ((point - low) / size * SIDE).long().clamp(0, SIDE - 1).unbind(dim=-1)
    cell = (index[:, None] * SIDE + y)[:, :, None] * SIDE + x[:, None, :]
    # As flat bytes: on a CPU in half the time of indexing by three tensors.
    return silhouettes.flatten().view(torch.uint8).index_select(0, cell.flatten()).view(cell.shape).bool()


def _share(silhouettes: Tensor) -> Tensor:
    """(N,) how much of its box each one fills."""
    return silhouettes.float().mean(dim=(1, 2))


def _extent(low: Tensor, high: Tensor) -> Tensor:
    return (high - low).clamp(min=0).prod(dim=1)


def _device_error(error: RuntimeError) -> DeviceError:
    return DeviceError(f"comparing masks failed: {first_line(error)}")
