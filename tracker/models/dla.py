"""Deep layer aggregation: the DLA backbone and the up-sampling that joins its levels again.

Yu et al., "Deep Layer Aggregation" (CVPR 2018), with the up-sampling of Zhou et al., "Objects as Points"
(2019). Module names give the state-dict keys of the published checkpoints. Knows no heads and no tasks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tracker.models.deform import DeformConv


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """A convolution that keeps the size (divided by stride), and its batch normalisation."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return [conv, nn.BatchNorm2d(outputs)]


class BasicBlock(nn.Module):
    """Two 3×3 convolutions, and a residual from elsewhere."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(inputs, outputs, 3, stride)
        self.conv2, self.bn2 = conv_bn(outputs, outputs, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.bn2(self.conv2(x)) + residual
        answer: Tensor = self.relu(x)
        return answer


class Root(nn.Module):
    """Where the branches of a tree meet: concatenated, then mixed by a 1×1 convolution."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv, self.bn = conv_bn(inputs, outputs, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, branches: Sequence[Tensor]) -> Tensor:
        answer: Tensor = self.relu(self.bn(self.conv(torch.cat(list(branches), dim=1))))
        return answer


class Tree(nn.Module):
    """A binary tree of 2^depth blocks whose root also sees `aggregated` channels from further up.

    keep_input: whether the tree's own down-sampled input is among what its last root sees.
    """

    def __init__(
        self,
        depth: int,
        inputs: int,
        outputs: int,
        stride: int = 1,
        *,
        keep_input: bool = False,
        aggregated: int = 0,
    ) -> None:
        super().__init__()
        aggregated += inputs if keep_input else 0
        self.keep_input = keep_input
        self.downsample = nn.MaxPool2d(stride) if stride > 1 else nn.Identity()
        if depth > 1:  # the published networks also have a `project` here, whose output nothing uses
            self.tree1: nn.Module = Tree(depth - 1, inputs, outputs, stride)
            self.tree2: nn.Module = Tree(depth - 1, outputs, outputs, aggregated=aggregated + outputs)
            return
        self.tree1 = BasicBlock(inputs, outputs, stride)
        self.tree2 = BasicBlock(outputs, outputs)
        self.root = Root(2 * outputs + aggregated, outputs)
        self.project = nn.Sequential(*conv_bn(inputs, outputs, 1)) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, branches: Sequence[Tensor] = ()) -> Tensor:
        bottom = self.downsample(x)
        if self.keep_input:
            branches = (*branches, bottom)
        if isinstance(self.tree1, Tree):
            first = self.tree1(x)
            answer: Tensor = self.tree2(first, (*branches, first))
        else:
            first = self.tree1(x, self.project(bottom))
            answer = self.root((self.tree2(first, first), first, *branches))
        return answer


class DLA(nn.Module):
    """The backbone.

    channels: of levels 0 to 5. levels: convolutions in levels 0 and 1, depth of the trees in levels 2 to 5.
    stem_stride: 1, or 2 to halve the image in the first convolution instead of in level 1.
    """

    def __init__(self, channels: Sequence[int], levels: Sequence[int], stem_stride: int = 1) -> None:
        super().__init__()
        self.base_layer = nn.Sequential(*conv_bn(3, channels[0], 7, stem_stride), nn.ReLU(inplace=True))
        self.level0 = _convolutions(channels[0], channels[0], levels[0], stride=1)
        self.level1 = _convolutions(channels[0], channels[1], levels[1], stride=2 // stem_stride)
        self.level2 = Tree(levels[2], channels[1], channels[2], 2)
        self.level3 = Tree(levels[3], channels[2], channels[3], 2, keep_input=True)
        self.level4 = Tree(levels[4], channels[3], channels[4], 2, keep_input=True)
        self.level5 = Tree(levels[5], channels[4], channels[5], 2, keep_input=True)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images (B, 3, H, W) → what levels 2 to 5 give, at strides 4, 8, 16 and 32."""
        x = self.level1(self.level0(self.base_layer(images)))
        answers = []
        for level in (self.level2, self.level3, self.level4, self.level5):
            x = level(x)
            answers.append(x)
        return answers


def _convolutions(inputs: int, outputs: int, count: int, stride: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(count):
        layers += conv_bn(outputs if index else inputs, outputs, 3, 1 if index else stride)
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class UpConv(nn.Module):
    """A 3×3 convolution, deformable or plain, with its normalisation."""

    def __init__(self, inputs: int, outputs: int, *, deformable: bool) -> None:
        super().__init__()
        plain = DeformConv(inputs, outputs) if deformable else nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv: nn.Module = plain
        self.actf = nn.Sequential(nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.actf(self.conv(x))
        return answer


class IDAUp(nn.Module):
    """Iterative deep aggregation: each coarser map is projected, enlarged by its factor and merged into the
    finer one before it. inputs, factors: of the maps after the first, which has `outputs` channels.
    """

    def __init__(
        self, inputs: Sequence[int], outputs: int, factors: Sequence[int], *, deformable: bool
    ) -> None:
        super().__init__()
        for index, (count, factor) in enumerate(zip(inputs, factors, strict=True), start=1):
            self.add_module(f"proj_{index}", UpConv(count, outputs, deformable=deformable))
            self.add_module(f"up_{index}", _bilinear_upsampling(outputs, factor))
            self.add_module(f"node_{index}", UpConv(outputs, outputs, deformable=deformable))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """maps[0] and what each merge gives, all at its size; maps[k] is factors[k − 1] times smaller."""
        merged = [maps[0]]
        for index, coarse in enumerate(maps[1:], start=1):
            enlarged = self.get_submodule(f"up_{index}")(self.get_submodule(f"proj_{index}")(coarse))
            merged.append(self.get_submodule(f"node_{index}")(enlarged + merged[-1]))
        return merged


def _bilinear_upsampling(channels: int, factor: int) -> nn.ConvTranspose2d:
    """A learnt enlargement of each channel by itself that starts as the bilinear one."""
    up = nn.ConvTranspose2d(
        channels, channels, 2 * factor, factor, padding=factor // 2, groups=channels, bias=False
    )
    ramp = 1 - ((torch.arange(2 * factor) + 0.5) / factor - 1).abs()
    with torch.no_grad():
        up.weight.copy_(ramp[:, None] * ramp)
    return up


class DLAUp(nn.Module):
    """Merges the maps of a pyramid from the coarse end until each is refined by all that are coarser."""

    def __init__(self, channels: Sequence[int], *, deformable: bool) -> None:
        super().__init__()
        for index, outputs in enumerate(channels[-2::-1]):
            # Everything coarser has by then become as wide and as large as the next map.
            inputs = [channels[-1 - index]] * (index + 1)
            self.add_module(f"ida_{index}", IDAUp(inputs, outputs, [2] * (index + 1), deformable=deformable))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps from fine to coarse → as many, refined, in the same order and sizes."""
        level = [maps[-1]]
        answers = [maps[-1]]
        for index, finer in enumerate(maps[-2::-1]):
            level = self.get_submodule(f"ida_{index}")([finer, *level])
            answers.insert(0, level[-1])
        return answers
