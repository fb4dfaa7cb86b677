"""Overlapping candidates → the strongest of each class, in fixed shapes and without a wait for the device.

`nms` takes any detector's rows; `decode_yolox` goes from YOLOX's raw rows through it. Rows are float32
(x1, y1, x2, y2, score, label); `rotated_nms` takes those of rotated boxes, (cx, cy, w, h, r, score, label).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from tracker.kernels.best import Candidates, result
from tracker.kernels.launch import EXACT, launch, on_device_of, power_of_two, programs

BLOCK = 128  # rows settled at a time
TURNED_BLOCK = 32  # rotated rows compared at a time: each pair needs many registers


def nms(rows: Tensor, *, iou_threshold: float, limit: int = 1024, out: Tensor | None = None) -> Tensor:
    """(B, K, 6): what greedy suppression keeps of each image, by falling score, then rows of zeros.

    A row is dropped when a kept row of its label and a higher score, or as high and further up, has
    IoU > iou_threshold with it: what `frontends.nms.nms` keeps, groups being image and label.

    rows: (B, N, 6) float32, contiguous; a score of 0 or less means no row. K: `limit`, or N where that is
    less: only the K strongest take part. out: where to write instead of fresh memory, contiguous.
    Raises EngineError for limits above 4096, and for tensors that the kernels cannot take.
    """
    return _suppressed(rows, iou_threshold, limit, out)


def rotated_nms(
    rows: Tensor, *, iou_threshold: float, limit: int = 1024, out: Tensor | None = None
) -> Tensor:
    """As `nms`, of rotated boxes: (B, N, 7) → (B, K, 7), rows being cxcywhr, score and label.

    What `frontends.nms.rotated_nms` keeps, but for pairs whose IoU is within rounding of the threshold.
    """
    return _suppressed(rows, iou_threshold, limit, out)


def _suppressed(rows: Tensor, iou_threshold: float, limit: int, out: Tensor | None) -> Tensor:
    batch, count, values = rows.shape
    rows = rows.contiguous()
    kernels = programs("nms", rows)
    best = Candidates.none(batch, count, limit, count, rows.device)
    with on_device_of(rows):
        launch(
            kernels.list_rows, (-(-count // 1024), batch),
            rows, best.keys, best.state, count,
            ROW=values, INDEX_BITS=best.index_bits, BLOCK=1024, **EXACT,
        )  # fmt: skip
    return _kept(kernels, best, rows, rows, "rows", 1, iou_threshold, out, values)


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
        launch(
            kernels.list_cells, (-(-count // 16), batch),
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
    values: int = 6,
) -> Tensor:
    """From listed candidates to rows: choose, sort, compare, settle. values: of a row, 7 of a rotated one."""
    batch, limit = best.chosen.shape
    words = power_of_two(max(limit, BLOCK)) // 32
    sorted_rows = torch.empty(batch, limit, values, device=source.device)
    covers = torch.empty(batch, limit, words, dtype=torch.int32, device=source.device)
    out = result(out, (batch, limit, values), source.device)
    best.choose()
    with on_device_of(source):
        launch(
            kernels.sort, (-(-limit // 16), batch),
            best.chosen, best.state, source, cells, sorted_rows, limit, *source.stride(),
            ROW=values, KIND=kind, CLASSES=classes, INDEX_BITS=best.index_bits, SLOTS=best.slots,
            BLOCK=16, **EXACT,
        )  # fmt: skip
        if values == 6:
            launch(
                kernels.cover, (-(-limit // BLOCK), -(-limit // 256), batch),
                sorted_rows, best.state, covers, limit, iou_threshold,
                WORDS=words, BLOCK=BLOCK, STEP=8, num_warps=8, **EXACT,
            )  # fmt: skip
        else:
            angle = sorted_rows[..., 4]
            turns = torch.stack((angle.cos(), angle.sin()), dim=2)
            launch(
                kernels.cover_turned, (-(-limit // TURNED_BLOCK), -(-limit // 256), batch),
                sorted_rows, turns, best.state, covers, limit, iou_threshold,
                WORDS=words, BLOCK=TURNED_BLOCK, STEP=8, num_warps=8, **EXACT,
            )  # fmt: skip
        launch(
            kernels.settle, (batch,),
            sorted_rows, best.state, covers, out, limit,
            ROW=values, WORDS=words, BLOCK=BLOCK, num_warps=8, **EXACT,
        )  # fmt: skip
    return out
