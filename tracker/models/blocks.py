"""What convolutional detectors are made of. Submodules carry the names that their checkpoints share: `conv`
and `bn`. Knows no network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 (everybody's name for it)
from torch import Tensor, nn

Activation = Literal["silu", "none"]
_ACTIVATIONS: dict[Activation, type[nn.Module]] = {"silu": nn.SiLU, "none": nn.Identity}


class ConvBN(nn.Module):
    """A convolution that keeps the size (divided by stride), its batch normalisation, an activation."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        *,
        groups: int = 1,
        activation: Activation = "silu",
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.conv: nn.Module = nn.Conv2d(
            inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(outputs, eps=eps)
        self.activate = _ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.activate(self.bn(self.conv(x)))
        return answer


class Constant(nn.Module):
    """A tensor that belongs to the network's size, not to its weights."""

    value: Tensor

    def __init__(self, make: Callable[[], Tensor]) -> None:
        super().__init__()
        self.register_buffer("value", make(), persistent=False)

    def forward(self) -> Tensor:
        return self.value


class ChannelAttention(nn.Module):
    """A weight per channel from its mean."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Conv2d(channels, channels, 1)
        self.act = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = x * self.act(self.fc(self.mean(x)))
        return answer


class FocusConv(nn.Conv2d):
    """A 3×3 convolution over the four pixels of each 2×2 block, stacked as channels in the order top left,
    bottom left, top right, bottom right; computed as one 6×6 convolution of stride 2, which it is.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(4 * inputs, outputs, 3, padding=1, bias=False)

    def whole(self) -> Tensor:
        """(outputs, inputs, 6, 6) weights of the convolution over the unstacked image."""
        outputs, channels = self.weight.shape[0], self.weight.shape[1] // 4
        split = self.weight.reshape(outputs, 2, 2, channels, 3, 3)  # by column and row in the block
        return split.permute(0, 3, 4, 2, 5, 1).reshape(outputs, channels, 6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.whole(), stride=2, padding=2)


class PooledPyramid(nn.Module):
    """A map beside its maxima over 5×5, 9×9 and 13×13: He et al., "Spatial Pyramid Pooling" (2014)."""

    def __init__(self, sizes: Sequence[int] = (5, 9, 13)) -> None:
        super().__init__()
        self.pools = nn.ModuleList(nn.MaxPool2d(size, 1, size // 2) for size in sizes)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, *(pool(x) for pool in self.pools)], dim=1)


def joined(maps: Sequence[Tensor]) -> Tensor:
    """Maps (B, V, H, W) of several sizes → (B, V, A): all their cells, map by map, row by row."""
    return torch.cat([torch.flatten(each, 2) for each in maps], dim=2)
