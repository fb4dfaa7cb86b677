"""Matrix NMS: candidates lose score by what stronger ones cover of them, all at once.

Wang et al., "SOLOv2" (NeurIPS 2020), section 3.3; mmdet's `mmdet/models/layers/matrix_nms.py`. No candidate
is dropped and none waits for another, so shapes are fixed and a device is never waited for.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIGMA = 2.0  # of the Gaussian; mmdet's and the official configurations'


def matrix_nms(inside: Tensor, area: Tensor, label: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """(K,) decayed scores of candidates by falling score before it, and which candidate each is.

    inside: (K, P) float32, 1 where a pixel is in the mask, else 0. area: (K,) their sums. label, score: (K,).
    Candidates of score 0 take none from others, as if they were not there.
    """
    score, order = score.sort(descending=True, stable=True)
    common = (inside @ inside.mT)[order][:, order]
    area, label = area[order], label[order]
    union = area[:, None] + area - common
    covered = torch.where(label[:, None] == label, common / union.clamp(min=1), 0.0).triu(diagonal=1)
    itself = covered.amax(dim=0)  # how much stronger ones cover those that cover
    decay = torch.exp(-SIGMA * (covered.square() - itself.square()[:, None]).amax(dim=0))
    return score * decay, order
