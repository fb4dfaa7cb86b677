"""What detectors in two stages have in common: anchors, refined boxes, and regions cut from a pyramid.

Pure functions. Boxes are corners in input pixels, float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tracker.frontends.layout import Size

# Ren et al., "Faster R-CNN" (2015) with mmdet's numbers: `configs/_base_/models/mask-rcnn_r50_fpn.py`.
STRIDES = (4, 8, 16, 32, 64)
ANCHOR_SCALE = 8
ANCHOR_RATIOS = (0.5, 1.0, 2.0)  # height by width
MOST_GROWTH = abs(math.log(16 / 1000))  # `DeltaXYWHBBoxCoder.decode(wh_ratio_clip)`
FINEST = 56  # `SingleRoIExtractor.finest_scale`: up to twice that, regions are cut from the first map


def anchors(size: Size) -> tuple[Tensor, list[int]]:
    """(A, 4) of all levels, each row by row, place by place, and how many of each level there are.

    size: (width, height) of the input, a multiple of 32. `mmdet/models/task_modules/prior_generators/
    anchor_generator.py`, around the places' corners.
    """
    ratio = torch.tensor(ANCHOR_RATIOS).sqrt()
    shape = torch.stack((1 / ratio, ratio), dim=1) * ANCHOR_SCALE  # (3, 2), in strides
    levels = []
    for stride in STRIDES:
        width, height = (-(-side // stride) for side in size)
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        place = torch.stack((x, y), dim=2).reshape(-1, 1, 2) * float(stride)
        half = 0.5 * stride * shape
        levels.append(torch.cat((place - half, place + half), dim=2).reshape(-1, 4))
    return torch.cat(levels), [len(level) for level in levels]


def refined(boxes: Tensor, shifts: Tensor, spread: tuple[float, float]) -> Tensor:
    """Boxes (…, 4) moved by shifts (…, 4) of their size and grown by the exponential of the rest.

    spread: what both are multiplied by before (mmdet's `target_stds`).
    `mmdet/models/task_modules/coders/delta_xywh_bbox_coder.py:delta2bbox`.
    """
    shift, growth = shifts[..., :2] * spread[0], shifts[..., 2:] * spread[1]
    size = boxes[..., 2:] - boxes[..., :2]
    centre = (boxes[..., :2] + boxes[..., 2:]) * 0.5 + size * shift
    size = size * growth.clamp(-MOST_GROWTH, MOST_GROWTH).exp()
    return torch.cat((centre - size * 0.5, centre + size * 0.5), dim=-1)


def levels_of(boxes: Tensor, count: int) -> Tensor:
    """(…,) int32: which of `count` maps each box (…, 4) is cut from, the coarser the larger.

    `mmdet/models/roi_heads/roi_extractors/single_level_roi_extractor.py:map_roi_levels`.
    """
    scale = (boxes[..., 2:] - boxes[..., :2]).prod(dim=-1).sqrt()
    return torch.log2(scale / FINEST + 1e-6).floor().clamp(0, count - 1).int()


def roi_align(maps: Sequence[Tensor], boxes: Tensor, levels: Tensor, side: int) -> Tensor:
    """(B·K, C, side, side) regions of boxes (B, K, 4): `kernels.roi_align` for the host.

    The mean over a grid of bilinear samples is a product of one factor along y and one along x, so a region
    is two matrix products over the cells that it touches.
    """
    batch, count, _ = boxes.shape
    out = maps[0].new_zeros(batch * count, maps[0].shape[1], side, side)
    boxes, levels = boxes.reshape(-1, 4), levels.reshape(-1)
    for level, features in enumerate(maps):
        rows = (levels == level).nonzero()[:, 0]
        box = boxes[rows] / (STRIDES[0] << level) - 0.5
        down, top = _shares(box[:, 1], box[:, 3], side, features.shape[2])
        along, left = _shares(box[:, 0], box[:, 2], side, features.shape[3])
        for row, y, x, y0, x0 in zip(rows.tolist(), down, along, top, left, strict=True):
            window = features[row // count, :, y0 : y0 + y.shape[1], x0 : x0 + x.shape[1]]
            torch.matmul(y, window @ x.T, out=out[row])
    return out


def _shares(low: Tensor, high: Tensor, side: int, length: int) -> tuple[list[Tensor], list[int]]:
    """Of each span (N,), in cells: (side, cells) how much of each cell is in each bin, and the first cell."""
    if not len(low):
        return [], []
    size = ((high - low) / side)[:, None, None]
    count = size.ceil().long()  # samples per bin
    sample = torch.arange(max(int(count.max()), 1))
    offset = (sample.minimum((count - 1).clamp(min=0)) + 0.5) * size / count.clamp(min=1)
    place = low[:, None, None] + torch.arange(side)[:, None] * size + offset  # (N, side, samples)
    inside = (sample < count) & (place >= -1) & (place <= length)
    place = place.clamp(0, length - 1)
    cell = place.floor().clamp(max=max(length - 2, 0))
    second = place - cell
    weight = torch.stack((1 - second, second)) * (inside / count.clamp(min=1))
    first = cell.flatten(1).amin(dim=1)
    cells = cell.flatten(1).amax(dim=1) - first + 2
    near = (cell - first[:, None, None]).long()
    shares = torch.zeros(len(low), side, int(cells.max()))
    for step in range(2):
        shares.scatter_add_(2, near + step, weight[step])
    ends = cells.clamp(max=length).int().tolist()
    return [share[:, :end] for share, end in zip(shares, ends, strict=True)], first.int().tolist()
