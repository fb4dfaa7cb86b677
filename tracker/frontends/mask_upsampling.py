"""Mask probabilities on a network's map → bits in source pixels, and the boxes around them.

mmdet resizes twice, both times bilinearly: the map to the network input, of which it cuts out the image, and
that to the source (`mmdet/models/dense_heads/solov2_head.py`, `_predict_by_feat_single`). Both are linear and
go by rows and columns, so a source pixel is a weighted sum of three by three cells, with one table of weights
for its row and one for its column. Nothing lies between the map and the bits, and only what the mask's cells
can reach is computed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (everybody's name for it)
from numpy.typing import NDArray
from torch import Tensor

from tracker.boxes import Fit
from tracker.kernels.mask_bits import mask_bits

TAPS = 3  # cells that a source pixel is made of, along one axis


class Taps(NamedTuple):
    """first: (S,) int64, for each source coordinate its first cell, never falling. weight: (S, TAPS)."""

    first: Tensor
    weight: Tensor


@lru_cache(maxsize=256)
def taps(cells: int, stride: int, offset: int, length: int, source: int, device: torch.device) -> Taps:
    """Along one axis: a map of `cells` at `stride`, of whose input `length` pixels from `offset` on show a
    source of that many.
    """
    unit = torch.eye(cells)[None]
    enlarged = F.interpolate(unit, size=cells * stride, mode="linear")[..., offset : offset + length]
    share = F.interpolate(enlarged, size=source, mode="linear")[0].T  # (source, cells)
    first = (share > 0).to(torch.uint8).argmax(dim=1).clamp(max=cells - TAPS)
    weight = share.gather(1, first[:, None] + torch.arange(TAPS))
    there = Taps(first.to(device), weight.to(device))
    if device.type == "cuda":  # once: from now on any stream may read it
        torch.cuda.current_stream(device).synchronize()
    return there


def taps_of(fit: Fit, cells: tuple[int, int], device: torch.device) -> tuple[Taps, Taps]:
    """For columns and for rows. cells: (width, height) of the map."""
    x, y = (
        taps(count, size // count, offset, length, source, device)
        for count, size, offset, length, source in zip(
            cells, fit.input_size, fit.offset, fit.resized, fit.source_size, strict=True
        )
    )
    return x, y


def upsampled(probability: Tensor, score: Tensor, fit: Fit, threshold: float) -> tuple[Tensor, Tensor]:
    """(N, H, ceil(W / 8)) uint8 bits as `masks.MaskBits` has them, and (N, 4) float32 corners of the boxes
    around their pixels, without width where there are none. Waits for a device for the first frame of a size
    alone.

    probability: (N, h, w) float32. A pixel whose probability is above the threshold is in the mask. score:
    (N,) float32; of 0 or less, there is no mask.
    """
    across, down = taps_of(fit, (probability.shape[2], probability.shape[1]), probability.device)
    if probability.is_cuda:
        return mask_bits(probability, score, across, down, threshold=threshold)
    return _on_host(probability, score, fit, across, down, threshold)


def _on_host(
    probability: Tensor, score: Tensor, fit: Fit, across: Taps, down: Taps, threshold: float
) -> tuple[Tensor, Tensor]:
    width, height = fit.source_size
    bits = np.zeros((len(probability), height, -(-width // 8)), np.uint8)
    boxes = np.zeros((len(probability), 4), np.float32)
    for number, cells in enumerate(probability.numpy()):
        inside = (cells > threshold) & (float(score[number]) > 0)
        (x1, x2), (y1, y2) = _reach(across, inside.any(axis=0)), _reach(down, inside.any(axis=1))
        if x1 >= x2 or y1 >= y2:
            continue
        x1 -= x1 % 8  # whole bytes
        pixels = _sampled(torch.from_numpy(cells), across, down, (x1, x2), (y1, y2)).numpy() > threshold
        packed = np.packbits(pixels, axis=1)
        bits[number, y1:y2, x1 // 8 : x1 // 8 + packed.shape[1]] = packed
        columns, rows = np.flatnonzero(pixels.any(axis=0)), np.flatnonzero(pixels.any(axis=1))
        if len(columns):
            boxes[number] = x1 + columns[0], y1 + rows[0], x1 + columns[-1] + 1, y1 + rows[-1] + 1
    return torch.from_numpy(bits), torch.from_numpy(boxes)


def _reach(axis: Taps, inside: NDArray[np.bool_]) -> tuple[int, int]:
    """From which source coordinate to which one a cell of these can be seen."""
    found = np.flatnonzero(inside)
    if not len(found):
        return 0, 0
    first = axis.first.numpy()
    begin = np.searchsorted(first, found[0] - TAPS + 1, side="left")
    return int(begin), int(np.searchsorted(first, found[-1], side="right"))


def _sampled(cells: Tensor, across: Taps, down: Taps, x: tuple[int, int], y: tuple[int, int]) -> Tensor:
    """(rows, columns) probabilities in a window of the source, from cells (h, w)."""
    first_x, weight_x = across.first[slice(*x)], across.weight[slice(*x)]
    first_y, weight_y = down.first[slice(*y)], down.weight[slice(*y)]
    low, high = int(first_y[0]), int(first_y[-1]) + TAPS
    lines = cells[low:high]
    wide = sum(lines[:, first_x + tap] * weight_x[:, tap] for tap in range(TAPS))
    assert isinstance(wide, Tensor)
    high_too = sum(wide[first_y - low + tap] * weight_y[:, tap, None] for tap in range(TAPS))
    assert isinstance(high_too, Tensor)
    return high_too
