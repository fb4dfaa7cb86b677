"""Choosing among overlapping candidates: the strongest, and those no stronger one covers.

Pure functions over torch tensors on any device; knows boxes and scores, not detectors. Sizes of results
depend on the data, so on a GPU each call waits for it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tracker.boxes import enclosing, rotated_iou


def strongest(score: Tensor, group: Tensor, limit: int) -> Tensor:
    """Indices of the `limit` highest scores (K,) within each group (K,); of equal scores the first ones."""
    order = score.argsort(descending=True, stable=True)
    order = order[group[order].argsort(stable=True)]  # group by group, best first
    count = torch.bincount(group)
    first = count.cumsum(0) - count
    rank = torch.arange(len(order), device=order.device) - first[group[order]]
    return order[rank < limit]


def nms(xyxy: Tensor, score: Tensor, group: Tensor, *, iou_threshold: float, block: int = 128) -> Tensor:
    """Indices of what greedy non-maximum suppression keeps, by falling score; of equal scores the first.

    A box is dropped when a kept box of its group with a higher score has IoU > iou_threshold with it:
    exactly the loop over boxes by falling score, done for `block` boxes at a time.

    xyxy: (K, 4) float32 corners. score: (K,). group: (K,) whatever keeps boxes apart, such as image and
    class, as numbers below 2²⁴.
    """
    area = (xyxy[:, 2:] - xyxy[:, :2]).prod(dim=1, keepdim=True)
    return _greedy(torch.cat((xyxy, area, group[:, None]), dim=1), score, iou_threshold, block, _covers)


def rotated_nms(
    cxcywhr: Tensor, score: Tensor, group: Tensor, *, iou_threshold: float, block: int = 128
) -> Tensor:
    """As `nms`, of rotated boxes (K, 5) in the host's memory."""
    around = torch.from_numpy(enclosing(cxcywhr.numpy()))
    rows = torch.cat((around, group[:, None], cxcywhr), dim=1).double()
    return _greedy(rows, score, iou_threshold, block, _covers_turned)


def _greedy(
    rows: Tensor,
    score: Tensor,
    iou_threshold: float,
    block: int,
    covers: Callable[[Tensor, Tensor, float], Tensor],
) -> Tensor:
    """`nms` of rows (K, V). covers: of two parts of them, (V, N) and (V, M), as `_covers`."""
    order = score.argsort(descending=True, stable=True)
    boxes = rows[order].T.contiguous()  # (V, K)
    kept = [order[:0]]
    while len(order):
        head, boxes = boxes[:, :block], boxes[:, block:]
        strong = _unsuppressed(covers(head, head, iou_threshold))
        kept.append(order[:block][strong])
        order = order[block:]
        if len(order):
            free = covers(head[:, strong], boxes, iou_threshold).sum(dim=0) == 0
            boxes, order = boxes[:, free], order[free]
    return torch.cat(kept)


def _covers(first: Tensor, second: Tensor, iou_threshold: float) -> Tensor:
    """(N, M) 1 where a box of `first` (6, N) suppresses one of `second` (6, M) if it is stronger, else 0.

    Rows of both: corners, area, group.
    """
    first, second = first[:, :, None], second[:, None]
    size = torch.minimum(first[2:4], second[2:4]) - torch.maximum(first[:2], second[:2])  # (2, N, M)
    size.clamp_(min=0)
    inter = size[0].mul_(size[1])
    union = (first[4] + second[4]).sub_(inter)
    return inter.gt_(union.mul_(iou_threshold)).mul_(first[5] == second[5])


def _covers_turned(first: Tensor, second: Tensor, iou_threshold: float) -> Tensor:
    """As `_covers`. Rows of both: the enclosing boxes' corners, group, cxcywhr."""
    a, b = first[:, :, None], second[:, None]
    near = (torch.minimum(a[2:4], b[2:4]) > torch.maximum(a[:2], b[:2])).all(dim=0) & (a[4] == b[4])
    row, column = near.nonzero(as_tuple=True)
    shared = rotated_iou(first[5:, row].T.numpy(), second[5:, column].T.numpy())
    covers = torch.zeros(near.shape)
    covers[row, column] = torch.from_numpy(shared > iou_threshold).float()
    return covers


def _unsuppressed(covers: Tensor) -> Tensor:
    """(N,) bool, what the greedy loop keeps, from covers (N, N) of boxes by falling score.

    "Kept, unless a stronger kept box covers it" holds for exactly one set: the first box is settled, then
    each next one. Starting from all kept, turn t settles at least the first t boxes, so the answer stops
    changing, mostly after two or three turns, and is then the loop's.
    """
    covers.triu_(diagonal=1)
    keep = covers.new_ones(len(covers))
    while True:
        settled = (keep @ covers).lt_(0.5)
        if torch.equal(settled, keep):
            return keep.bool()
        keep = settled
