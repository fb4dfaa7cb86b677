"""FairMOT's heads → packed rows, in fixed shapes and without a wait for the device.

What `frontends.fairmot.decode(peak_scores(hm), …)` gives, computed in float32 whatever the heads hold.
"""

from __future__ import annotations

from torch import Tensor

from tracker.kernels.best import Candidates, result, strides
from tracker.kernels.launch import EXACT, launch, on_device_of, power_of_two, programs


def decode_heads(
    scores: Tensor,
    wh: Tensor,
    reg: Tensor,
    embedding: Tensor,
    *,
    logits: bool,
    limit: int,
    out: Tensor | None = None,
) -> Tensor:
    """(B, K, 6 + D) float32: corners in cells, score, label and unit embedding of the K strongest peaks.

    scores: (B, C, H, W) logits, or with logits=False scores at peaks and 0 elsewhere. wh: (B, 4 or 2, H, W).
    reg: (B, 2, H, W). embedding: (B, D, H, W). Each float16 or float32, NCHW, channels last, or a part of
    more channels. K: `limit`, or C·H·W where that is less.
    out: where to write instead of fresh memory, contiguous.

    Rows are in order of falling score, of equal scores the first in (class, row, column). Fewer peaks than K
    leave rows of zeros. A NaN among the scores comes first, as the score of a row.
    Raises EngineError for limits above 4096, and for tensors that the kernels cannot take.
    """
    batch, classes, height, width = scores.shape
    cells, dimensions = height * width, embedding.shape[1]
    kernels = programs("heads", scores, wh, reg, embedding)
    best = Candidates.none(batch, classes * cells, limit, classes * cells, scores.device)
    limit = best.chosen.shape[1]
    out = result(out, (batch, limit, 6 + dimensions), scores.device)
    with on_device_of(scores):
        launch(
            kernels.peaks, (-(-classes * cells // 1024), batch),
            scores, best.keys, best.state, classes, height, width, *strides(scores),
            LOGITS=logits, INDEX_BITS=best.index_bits, BLOCK=1024, **EXACT,
        )  # fmt: skip
        best.choose()
        launch(
            kernels.rows, (-(-limit // 8), batch),
            best.chosen, best.state, wh, reg, embedding, out, limit, cells, width, dimensions,
            *strides(wh), *strides(reg), *strides(embedding),
            SIDES=wh.shape[1], INDEX_BITS=best.index_bits, SLOTS=best.slots, BLOCK=8,
            BLOCK_D=power_of_two(dimensions), **EXACT,
        )  # fmt: skip
    return out
