"""Convolutions that see an image at its full size, as others that see it at half of that.

A pixel of theirs is a 2×2 block of the image's, with the block's places as channels. The sums are the same,
but over blocks of 12 channels instead of pixels of 3, and then over 64 channels instead of DLA's 16, as
tensor cores need them. 7×7 kernels become 5×5, 3×3 stay, and no stride of 2 is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import cast

import torch.nn.functional as F  # noqa: N812 (everybody's name for it)
from torch import Tensor, nn

_WIDE = 8  # tensor cores take multiples of so many channels


class Halved(nn.Module):
    """Images (B, C, H, W), H and W even → (B, O, H/2, W/2), as the layers given would, each with its ReLU.

    layers: square and odd convolutions with biases that keep the size, but for the last, whose stride is 2.
    """

    def __init__(self, layers: Sequence[nn.Conv2d]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_halved(layer) for layer in layers)
        first = cast(nn.Conv2d, self.layers[0])
        self._free = -first.in_channels % _WIDE
        weight = F.pad(first.weight.detach(), (0, 0, 0, 0, 0, self._free))
        first.weight, first.in_channels = nn.Parameter(weight), weight.shape[1]

    def forward(self, images: Tensor) -> Tensor:
        batch, channels, height, width = images.shape
        blocks = images.reshape(batch, channels, height // 2, 2, width // 2, 2)
        x = blocks.permute(0, 2, 4, 3, 5, 1).flatten(3)  # (B, H/2, W/2, 4·C), place before channel
        x = F.pad(x, (0, self._free)).permute(0, 3, 1, 2)
        for layer in self.layers:
            x = F.relu(layer(x))
        return x


def halved_weight(weight: Tensor, stride: int, padding: int) -> Tensor:
    """The weight of a convolution on blocks that answers as one on pixels does.

    weight: (O, I, k, k), of any type. stride: 1, or 2: then it gives pixels of half the size, not blocks.
    (P·O, 4·I, n, n) with P 4 or 1, place before channel in both; its padding is n // 2.
    """
    outputs, inputs, size, _ = weight.shape
    places = range(2) if stride == 1 else range(1)
    reach = max(-(-padding // 2), (places[-1] + size - 1 - padding) // 2)
    made = weight.new_zeros(len(places), len(places), outputs, 2, 2, inputs, 2 * reach + 1, 2 * reach + 1)
    for row, column, down, right in product(places, places, range(size), range(size)):
        y, x = row + down - padding, column + right - padding
        target = made[row, column, :, y % 2, x % 2, :, y // 2 + reach, x // 2 + reach]
        target.copy_(weight[:, :, down, right])
    return made.flatten(3, 5).flatten(0, 2)


def _halved(layer: nn.Conv2d) -> nn.Conv2d:
    stride, padding = layer.stride[0], cast(tuple[int, int], layer.padding)[0]
    weight = halved_weight(layer.weight.detach(), stride, padding)
    outputs, inputs, size, _ = weight.shape
    made = nn.Conv2d(inputs, outputs, size, padding=size // 2)
    made.weight = nn.Parameter(weight)
    made.bias = nn.Parameter(cast(Tensor, layer.bias).detach().repeat(outputs // layer.out_channels))
    return made
