"""The feature pyramid (Lin et al., "Feature Pyramid Networks", CVPR 2017) as mmdet has it.

Keys and arithmetic of `mmdet/models/necks/fpn.py` with five outputs, no normalisation, no activation, and no
extra convolutions: what Mask R-CNN and SOLOv2 stand on.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class FPN(nn.Module):
    """inputs: channels of the backbone's maps, each half as wide and high as the one before.

    Sides of the image must be multiples of the coarsest map's stride.
    """

    def __init__(self, inputs: Sequence[int], channels: int = 256) -> None:
        super().__init__()
        self.lateral_convs = nn.ModuleList(_Conv(count, channels, 1) for count in inputs)
        self.fpn_convs = nn.ModuleList(_Conv(channels, channels, 3) for _ in inputs)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.subsample = nn.MaxPool2d(1, 2)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps, finest first → (B, channels, …) at their strides and one more, twice the coarsest."""
        *finer, x = (conv(each) for conv, each in zip(self.lateral_convs, maps, strict=True))
        merged = [x]
        for lateral in reversed(finer):
            x = lateral + self.upsample(x)
            merged.append(x)
        pyramid = [conv(each) for conv, each in zip(self.fpn_convs, reversed(merged), strict=True)]
        return (*pyramid, self.subsample(pyramid[-1]))


class _Conv(nn.Module):
    """mmcv's ConvModule without normalisation and activation: its convolution is called `conv`."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.conv(x)
        return answer
