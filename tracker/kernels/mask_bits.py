"""Mask probabilities on a network's map → bits in source pixels, in fixed shapes and without a wait.

What `frontends.mask_upsampling.upsampled` gives, but for pixels whose probability is within rounding of the
threshold.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tracker.kernels.launch import EXACT, launch, on_device_of, programs

ROWS, BYTES = 8, 32  # of a tile


def mask_bits(
    probability: Tensor,
    score: Tensor,
    across: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    *,
    threshold: float,
) -> tuple[Tensor, Tensor]:
    """(N, H, ceil(W / 8)) uint8 bits as `masks.MaskBits` has them, and (N, 4) float32 corners of the boxes
    around their pixels, inside out where there are none.

    probability: (N, h, w) float32. score: (N,) float32; of 0 or less, there is no mask. across, down: of each
    source column or row the first of the three cells that it is made of, (S,) int64, and their weights (S, 3)
    float32. Raises EngineError for tensors that the kernel cannot take.
    """
    probability, score = probability.contiguous(), score.contiguous()
    count, rows, columns = probability.shape
    width, height = len(across[0]), len(down[0])
    in_bytes = -(-width // 8)
    inside = probability > threshold
    bits = torch.zeros((count, height, in_bytes), dtype=torch.uint8, device=probability.device)
    box = torch.zeros((count, 4), dtype=torch.int32, device=probability.device)
    box[:, 0], box[:, 1] = width, height
    kernels = programs("mask_bits", probability, score, *across, *down)
    with on_device_of(probability):
        launch(
            kernels.mask_bits, (-(-in_bytes // BYTES), -(-height // ROWS), count),
            probability, score, inside.any(dim=2), inside.any(dim=1), *across, *down, bits, box,
            rows, columns, height, width, in_bytes, threshold,
            ROWS=ROWS, BYTES=BYTES, **EXACT,
        )  # fmt: skip
    return bits, box.float()
