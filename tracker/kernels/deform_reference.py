"""Deformable convolution v2 in plain torch: 3×3, stride 1, one offset group; any device, differentiable.

Zhu et al., "Deformable ConvNets v2" (CVPR 2019). The same arithmetic as ONNX `DeformConv` (opset 19) and
torchvision's `deform_conv2d`, whose layout of the offsets is used. What the fused kernel (`deform`) is
checked against, and what its operator does on a CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (everybody's name for it)
from torch import Tensor

TAPS = 9  # of a 3×3 kernel, row by row


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


def deform_conv2d(
    images: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """(B, O, H, W): the 3×3 convolution of images (B, C, H, W) sampled at shifted taps, zero outside.

    offset: (B, 18, H, W) as in `sampling_grid`. mask: (B, 9, H, W) factor of each tap. weight: (O, C, 3, 3).
    bias: (O,). Holds 9·C·H·W samples per image.
    """
    batch, channels, height, width = images.shape
    wide = torch.promote_types(images.dtype, torch.float32)
    grid = sampling_grid(offset.to(wide))
    taps = F.grid_sample(images.to(wide), grid, padding_mode="zeros", align_corners=False)
    taps = taps.view(batch, channels, TAPS, height, width) * mask[:, None]
    columns = taps.reshape(batch, channels * TAPS, height, width).to(weight.dtype)
    return F.conv2d(columns, weight.flatten(1)[..., None, None], bias)
