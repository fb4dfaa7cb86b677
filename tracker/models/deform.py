"""Deformable convolution v2 in torch: 3×3, stride 1, one offset group; any device, differentiable.

Zhu et al., "Deformable ConvNets v2" (CVPR 2019). The same arithmetic as ONNX `DeformConv` (opset 19) and
torchvision's `deform_conv2d`, whose layout of the offsets is used. On CUDA, where nothing is learnt, the
layer is one fused kernel (`kernels.deform`), which this is the reference of.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812 (everybody's name for it)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tracker.kernels.deform import pack_weight

TAPS = 9  # of a 3×3 kernel, row by row
_FUSED_CHANNELS = 16  # the fused kernel takes multiples of it
_FUSED_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def sampling_grid(offset: Tensor) -> Tensor:
    """Where each tap of each output pixel samples, as a grid for `grid_sample` (align_corners=False).

    offset: (B, 18, H, W), for each tap its shift down, then right, in pixels; at least float32, because
    FP16 knows only every eighth of a pixel beyond 128. Returns (B, 9·H, W, 2), x then y, in −1..1.
    """
    batch, _, height, width = offset.shape
    taps = torch.arange(-1, 2, device=offset.device, dtype=offset.dtype)
    rows = torch.arange(height, device=offset.device, dtype=offset.dtype)
    columns = torch.arange(width, device=offset.device, dtype=offset.dtype)
    down, right = offset.view(batch, TAPS, 2, height, width).unbind(2)  # (B, 9, H, W) each
    y = down + (taps.repeat_interleave(3)[:, None] + rows)[..., None]  # taps first: as DeformConv rounds
    x = right + (taps.repeat(3)[:, None] + columns)[:, None]
    grid = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), dim=-1)
    return grid.view(batch, TAPS * height, width, 2)


def deform_conv2d(images: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(B, O, H, W): the 3×3 convolution of images (B, C, H, W) sampled at shifted taps, zero outside.

    offset: (B, 18, H, W) as in `sampling_grid`. mask: (B, 9, H, W) factor of each tap. weight: (O, C, 3, 3).
    bias: (O,). Holds 9·C·H·W samples per image.
    """
    batch, channels, height, width = images.shape
    wide = torch.promote_types(images.dtype, torch.float32)
    grid = sampling_grid(offset.to(wide))
    taps = F.grid_sample(images.to(wide), grid, padding_mode="zeros", align_corners=False)
    taps = taps.view(batch, channels, TAPS, height, width) * mask[:, None]
    columns = taps.view(batch, channels * TAPS, height, width).to(weight.dtype)
    return F.conv2d(columns, weight.flatten(1)[..., None, None], bias)


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

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) → (B, outputs, H, W)."""
        shifts = self.conv_offset_mask(x)
        learning = torch.is_grad_enabled() and shifts.requires_grad
        fusible = x.shape[1] % _FUSED_CHANNELS == 0 and x.dtype in _FUSED_DTYPES
        if x.is_cuda and fusible and not learning:
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
