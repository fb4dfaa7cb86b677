"""Regions of feature maps resampled to squares (RoIAlign; He et al., "Mask R-CNN", ICCV 2017).

As mmcv has it with aligned=True and sampling_ratio=0 (`mmcv/ops/csrc/common/cuda/roi_align_cuda_kernel.cuh`):
a box is cut into bins, each the mean of bilinear samples about a cell apart, at least one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tracker.kernels.launch import EXACT, launch, on_device_of, power_of_two, programs


def roi_align(
    maps: Sequence[Tensor], boxes: Tensor, levels: Tensor, side: int, *, stride: int = 4, out: Tensor
) -> None:
    """Fill out (B·K, C, side, side), float16 or float32 of any strides, with regions of K boxes per image.

    maps: (B, C, H, W) of any strides, each half as wide and high as the one before; those whose channels do
    not lie together are copied first, which costs less than reading them as they are. boxes: (B, K, 4)
    float32 corners in input pixels, x2 ≥ x1 and y2 ≥ y1. levels: (B, K) index of the map of each box. stride:
    input pixels per cell of the first map.
    """
    batch, count, _ = boxes.shape
    kernels = programs("roi_align", boxes, out, *maps)
    boxes, levels = boxes.contiguous(), levels.to(torch.int32).contiguous()
    with on_device_of(out):
        for level, features in enumerate(maps):
            features = features.contiguous(memory_format=torch.channels_last)
            channels, height, width = features.shape[1:]
            block = min(power_of_two(channels), 256)
            launch(
                kernels.roi_align, (side, batch * count, -(-channels // block)),
                features, boxes, levels, out, level, 1 / (stride << level), count, channels, height, width,
                *features.stride(), *out.stride(), SIDE=side, BLOCK=block, **EXACT,
            )  # fmt: skip
