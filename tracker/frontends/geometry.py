"""What the numbers of a detector's box may mean, as functions of rows: (…, V) → corners in input pixels.

Each takes the rows and their cells (…, 3): column, row and stride. Float32 in, float32 out, any device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Boxes = Callable[[Tensor, Tensor], Tensor]


def corners(box: Tensor, cell: Tensor) -> Tensor:
    """(…, 4) already corners."""
    return box


def centred(box: Tensor, cell: Tensor) -> Tensor:
    """(…, 4) centre and size."""
    half = box[..., 2:] / 2
    return torch.cat((box[..., :2] - half, box[..., :2] + half), dim=-1)


def sides(*, offset: float, exponential: bool = False) -> Boxes:
    """(…, 4) distances of the left, top, right and bottom side from a point of the cell, in strides.

    offset: where in its cell the point is, in strides. exponential: the distances' logarithms.
    Tian et al., "FCOS" (ICCV 2019), eq. 1.
    """

    def boxes(box: Tensor, cell: Tensor) -> Tensor:
        box = box.exp() if exponential else box
        stride, point = cell[..., 2:], cell[..., :2] + offset
        return torch.cat((point - box[..., :2], point + box[..., 2:]), dim=-1) * stride

    return boxes


def binned_sides(*, offset: float) -> Boxes:
    """(…, 4·N) logits of the distances 0 … N − 1 for each side: the expected distance, then as `sides`.

    Li et al., "Generalized Focal Loss" (NeurIPS 2020), eq. 5.
    """
    decode = sides(offset=offset)

    def boxes(box: Tensor, cell: Tensor) -> Tensor:
        share = torch.unflatten(box, -1, (4, -1)).softmax(dim=-1)
        distance = torch.arange(share.shape[-1], dtype=box.dtype, device=box.device)
        return decode((share * distance).sum(dim=-1), cell)

    return boxes


def turned_sides(*, offset: float, exponential: bool = False) -> Boxes:
    """(…, 5) distances as in `sides` and the angle in radians → (…, 5) cxcywhr, see `boxes.turned`.

    The sides are those of the turned box, seen from the point: its centre lies off by half their differences,
    turned with it (mmrotate, `distance_angle_point_coder.py`).
    """

    def boxes(box: Tensor, cell: Tensor) -> Tensor:
        distance, angle = box[..., :4], box[..., 4:]
        distance = (distance.exp() if exponential else distance) * cell[..., 2:]
        low, high = distance[..., :2], distance[..., 2:]
        point = (cell[..., :2] + offset) * cell[..., 2:]
        shift, cos, sin = (high - low) / 2, angle.cos(), angle.sin()
        x, y = shift[..., :1], shift[..., 1:]
        centre = point + torch.cat((x * cos - y * sin, x * sin + y * cos), dim=-1)
        return torch.cat((centre, (low + high).clamp(min=0), angle), dim=-1)

    return boxes
