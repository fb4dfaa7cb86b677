"""ResNet (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016) as a backbone: four maps.

Keys as in torchvision and mmdet (`mmdet/models/backbones/resnet.py`, style "pytorch"): the stride of a
bottleneck is in its 3×3 convolution. The classifier is left out.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

Depth = Literal[34, 50]
BLOCKS = (3, 4, 6, 3)  # of both depths


class ResNet(nn.Module):
    """channels: of the four maps."""

    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module

    def __init__(self, depth: Depth = 50) -> None:
        super().__init__()
        block: type[_BasicBlock | _Bottleneck] = _BasicBlock if depth == 34 else _Bottleneck
        self.channels = tuple(block.expansion * 64 << index for index in range(4))
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), nn.BatchNorm2d(64)
        self.relu, self.maxpool = nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        inputs = 64
        for index, (count, outputs) in enumerate(zip(BLOCKS, self.channels, strict=True)):
            layer: list[nn.Module] = []
            for number in range(count):
                layer.append(block(inputs, 64 << index, 2 if index and not number else 1))
                inputs = outputs
            self.add_module(f"layer{index + 1}", nn.Sequential(*layer))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) → maps at strides 4, 8, 16 and 32."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        maps = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            maps.append(x)
        return tuple(maps)


class _BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, hidden: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, hidden, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2, self.bn2 = nn.Conv2d(hidden, hidden, 3, padding=1, bias=False), nn.BatchNorm2d(hidden)
        self.relu, self.downsample = nn.ReLU(), _shortcut(inputs, hidden, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        answer: Tensor = self.relu(self.bn2(self.conv2(y)) + self.downsample(x))
        return answer


class _Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, inputs: int, hidden: int, stride: int) -> None:
        super().__init__()
        outputs = self.expansion * hidden
        self.conv1, self.bn1 = nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3, self.bn3 = nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu, self.downsample = nn.ReLU(), _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        answer: Tensor = self.relu(self.bn3(self.conv3(y)) + self.downsample(x))
        return answer


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
