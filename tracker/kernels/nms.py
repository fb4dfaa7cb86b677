"""Overlapping candidates → the strongest of each class, in fixed shapes and without a wait for the device.

`nms` takes any detector's rows; `decode_yolox` goes from YOLOX's raw rows through it. Rows are float32
(x1, y1, x2, y2, score, label).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from tracker.kernels.best import Candidates, result
from tracker.kernels.launch import EXACT, on_device_of, power_of_two, programs

BLOCK = 128  # rows settled at a time


def nms(rows: Tensor, *, iou_threshold: float, limit: int = 1024, out: Tensor | None = None) -> Tensor:
    """(B, K, 6): what greedy suppression keeps of each image, by falling score, then rows of zeros.

    A row is dropped when a kept row of its label and a higher score, or as high and further up, has
    IoU > iou_threshold with it: what `frontends.nms.nms` keeps, groups being image and label.

    rows: (B, N, 6) float32, contiguous; a score of 0 or less means no row. K: `limit`, or N where that is
    less: only the K strongest take part. out: where to write instead of fresh memory, contiguous.
    Raises EngineError for limits above 4096, and for tensors that the kernels cannot take.
    """
    batch, count, _ = rows.shape
    rows = rows.contiguous()
    kernels = programs("nms", rows)
    best = Candidates.none(batch, count, limit, count, rows.device)
    with on_device_of(rows):
        kernels.list_rows[-(-count // 1024), batch](
            rows, best.keys, best.state, count, INDEX_BITS=best.index_bits, BLOCK=1024, **EXACT
        )
    return _kept(kernels, best, rows, rows, "rows", 1, iou_threshold, out)


def decode_yolox(
    raw: Tensor,
    cells: Tensor,
    wanted: Tensor,
    *,
    layout: Literal["undecoded", "decoded"],
    conf: float,
    iou_threshold: float,
    limit: int = 1024,
    out: Tensor | None = None,
) -> Tensor:
    """(B, K, 6): objects in input pixels that suppression keeps, by falling score, then rows of zeros.

    What `frontends.yolox` decodes, computed in float32: of the wanted classes, those whose objectness × best
    class score is `conf` or more; the K = `limit` strongest of an image take part in the suppression.

    raw: (B, A, 5 + C) float16 or float32 of any strides: box, objectness, class scores. layout: what a box
    is, as in `frontends.yolox`. cells: (A, 3) float32 column, row and stride. wanted: (C,) bool.
    NaN or inf in any objectness, or in a row whose objectness is `conf` or more, makes the score of the
    image's first row NaN. Raises EngineError as `nms` does.
    """
    batch, count, values = raw.shape
    classes = power_of_two(values - 5)
    kernels = programs("nms", raw, cells, wanted)
    best = Candidates.none(batch, count, limit, count * classes, raw.device)
    with on_device_of(raw):
        kernels.list_cells[-(-count // 16), batch](
            raw, wanted, best.keys, best.state, count, values - 5, conf, *raw.stride(),
            INDEX_BITS=best.index_bits, BLOCK=16, BLOCK_C=classes, **EXACT,
        )  # fmt: skip
    return _kept(kernels, best, raw, cells, layout, classes, iou_threshold, out)


def _kept(
    kernels: Any,
    best: Candidates,
    source: Tensor,
    cells: Tensor,
    kind: str,
    classes: int,
    iou_threshold: float,
    out: Tensor | None,
) -> Tensor:
    """From listed candidates to rows: choose, sort, compare, settle."""
    batch, limit = best.chosen.shape
    words = power_of_two(max(limit, BLOCK)) // 32
    sorted_rows = torch.empty(batch, limit, 6, device=source.device)
    covers = torch.empty(batch, limit, words, dtype=torch.int32, device=source.device)
    out = result(out, (batch, limit, 6), source.device)
    best.choose()
    with on_device_of(source):
        kernels.sort[-(-limit // 16), batch](
            best.chosen, best.state, source, cells, sorted_rows, limit, *source.stride(),
            KIND=kind, CLASSES=classes, INDEX_BITS=best.index_bits, SLOTS=best.slots, BLOCK=16, **EXACT,
        )  # fmt: skip
        kernels.cover[-(-limit // BLOCK), -(-limit // 256), batch](
            sorted_rows,
            best.state,
            covers,
            limit,
            iou_threshold,
            WORDS=words,
            BLOCK=BLOCK,
            STEP=8,
            num_warps=8,
            **EXACT,
        )
        kernels.settle[batch,](
            sorted_rows, best.state, covers, out, limit, WORDS=words, BLOCK=BLOCK, num_warps=8, **EXACT
        )
    return out
