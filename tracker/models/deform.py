"""Deformable convolution v2 as a layer of networks, differentiable: 3×3, stride 1, one offset group.

Zhu et al., "Deformable ConvNets v2" (CVPR 2019). On CUDA, where nothing is learnt, the layer is one fused
kernel (`kernels.deform`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tracker.kernels.deform import pack_weight
from tracker.kernels.deform_reference import TAPS, deform_conv2d, sampling_grid

__all__ = ["TAPS", "DeformConv", "deform_conv2d", "sampling_grid"]

_FUSED_CHANNELS = 16  # the fused kernel takes multiples of it
_FUSED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class DeformConv(nn.Module):
    """The convolution with its own offsets and masks, predicted from its input by a plain 3×3 convolution.

    Parameters are named as in the DCNv2 package that FairMOT uses. Starts as half a plain convolution:
    offsets 0, masks ½.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 3, 3))
        self.bias = nn.Parameter(torch.zeros(outputs))
        self.conv_offset_mask = nn.Conv2d(inputs, 3 * TAPS, 3, padding=1)
        bound = 1 / math.sqrt(inputs * TAPS)
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.conv_offset_mask.weight)
        nn.init.zeros_(self.conv_offset_mask.bias)  # type: ignore[arg-type]

    @property
    def fusible(self) -> bool:
        """Whether the fused kernel takes so many channels."""
        return self.weight.shape[1] % _FUSED_CHANNELS == 0

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) → (B, outputs, H, W)."""
        shifts = self.conv_offset_mask(x)
        learning = torch.is_grad_enabled() and shifts.requires_grad
        if x.is_cuda and self.fusible and x.dtype in _FUSED_DTYPES and not learning:
            offset, logits = shifts[:, : 2 * TAPS], shifts[:, 2 * TAPS :]
            weight = pack_weight(self.weight)
            fused: Tensor = torch.ops.tracker.deform_conv2d(x, offset, logits, weight, self.bias, True)
            return fused
        offset, mask = shifts[:, : 2 * TAPS], shifts[:, 2 * TAPS :].sigmoid()
        arguments = (x, offset, mask, self.weight, self.bias)
        if not learning:
            return deform_conv2d(*arguments)
        # Sampling again costs less than keeping 18·C·H·W samples of every layer for the backward pass.
        answer: Tensor = checkpoint(deform_conv2d, *arguments, use_reentrant=False)
        return answer
