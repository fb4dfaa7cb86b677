"""YOLOX (Ge et al., 2021), with the state-dict keys of github.com/Megvii-BaseDetection/YOLOX.

Its `yolox/models/{darknet,network_blocks,yolo_pafpn,yolo_head}.py`; normalisation's epsilon is set in
`exp/yolox_base.py`. Decoding is the front end's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tracker.models.blocks import ConvBN, FocusConv, PooledPyramid, joined

EPSILON = 1e-3
Conv = partial(ConvBN, eps=EPSILON)


@dataclass(frozen=True, slots=True, kw_only=True)
class YoloxConfig:
    """depth, width: factors on blocks and channels. depthwise: separable 3×3 convolutions (nano)."""

    depth: float = 1.0
    width: float = 1.0
    depthwise: bool = False
    classes: int = 80


VARIANTS = {
    "nano": YoloxConfig(depth=0.33, width=0.25, depthwise=True),
    "tiny": YoloxConfig(depth=0.33, width=0.375),
    "s": YoloxConfig(depth=0.33, width=0.5),
    "m": YoloxConfig(depth=0.67, width=0.75),
    "l": YoloxConfig(depth=1.0, width=1.0),
    "x": YoloxConfig(depth=1.33, width=1.25),
}


def settle(model: YOLOX, images: Tensor) -> None:
    """Scale random weights so that boxes deviate by 1 before decoding: widths are powers of e. On large,
    coarse pictures, to which a random network answers a hundred times as strongly.
    """
    boxes = model(nn.functional.interpolate(images, scale_factor=8.0))["output"][..., :4]
    for weight in model.head.reg_preds.parameters():
        weight.div_(boxes.std())


class YOLOX(nn.Module):
    def __init__(self, config: YoloxConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or YoloxConfig()
        self.backbone = _PyramidNetwork(config)
        self.head = _Head(config)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """BGR images (B, 3, H, W) in 0…255, H and W multiples of 32 → "output" (B, A, 5 + C): rows as the
        official exporter writes them, undecoded, objectness and class scores after their sigmoid.
        """
        return {"output": self.head(self.backbone(images))}


class _Separable(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.dconv = Conv(inputs, inputs, kernel, stride, groups=inputs)
        self.pconv = Conv(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.pconv(self.dconv(x))
        return answer


def _conv3(inputs: int, outputs: int, stride: int = 1, *, depthwise: bool) -> nn.Module:
    return _Separable(inputs, outputs, 3, stride) if depthwise else Conv(inputs, outputs, 3, stride)


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, *, shortcut: bool, depthwise: bool) -> None:
        super().__init__()
        self.conv1 = Conv(channels, channels, 1)
        self.conv2 = _conv3(channels, channels, depthwise=depthwise)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(self.conv1(x))
        return y + x if self.shortcut else y


class _CSPLayer(nn.Module):
    """Half of the channels through bottlenecks, half around: Wang et al., "CSPNet" (2020)."""

    def __init__(
        self, inputs: int, outputs: int, blocks: int, *, depthwise: bool, shortcut: bool = False
    ) -> None:
        super().__init__()
        hidden = outputs // 2
        self.conv1, self.conv2 = Conv(inputs, hidden, 1), Conv(inputs, hidden, 1)
        self.conv3 = Conv(2 * hidden, outputs, 1)
        self.m = nn.Sequential(
            *(_Bottleneck(hidden, shortcut=shortcut, depthwise=depthwise) for _ in range(blocks))
        )

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.conv3(torch.cat([self.m(self.conv1(x)), self.conv2(x)], dim=1))
        return answer


class _Pooling(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = Conv(channels, channels // 2, 1)
        self.pyramid = PooledPyramid()
        self.conv2 = Conv(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.conv2(self.pyramid(self.conv1(x)))
        return answer


class _Stem(nn.Module):
    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.conv = Conv(3, outputs, 3)
        self.conv.conv = FocusConv(3, outputs)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.conv(x)
        return answer


class _Darknet(nn.Module):
    dark2: nn.Module
    dark3: nn.Module
    dark4: nn.Module
    dark5: nn.Module

    def __init__(self, config: YoloxConfig) -> None:
        super().__init__()
        base, blocks = int(config.width * 64), max(round(config.depth * 3), 1)
        depthwise = config.depthwise
        self.stem = _Stem(base)
        for index, count in enumerate((blocks, 3 * blocks, 3 * blocks, blocks)):
            inputs, outputs, last = base << index, base << (index + 1), index == 3
            stage: list[nn.Module] = [_conv3(inputs, outputs, 2, depthwise=depthwise)]
            stage += [_Pooling(outputs)] if last else []
            stage.append(_CSPLayer(outputs, outputs, count, depthwise=depthwise, shortcut=not last))
            self.add_module(f"dark{index + 2}", nn.Sequential(*stage))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Strides 8, 16 and 32."""
        x = self.dark2(self.stem(images))
        fine = self.dark3(x)
        middle = self.dark4(fine)
        return [fine, middle, self.dark5(middle)]


class _PyramidNetwork(nn.Module):
    """Down the pyramid and up again: Liu et al., "Path Aggregation Network" (CVPR 2018)."""

    def __init__(self, config: YoloxConfig) -> None:
        super().__init__()
        fine, middle, coarse = (int(channels * config.width) for channels in (256, 512, 1024))
        blocks, depthwise = round(3 * config.depth), config.depthwise
        self.backbone = _Darknet(config)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.lateral_conv0 = Conv(coarse, middle, 1)
        self.C3_p4 = _CSPLayer(2 * middle, middle, blocks, depthwise=depthwise)
        self.reduce_conv1 = Conv(middle, fine, 1)
        self.C3_p3 = _CSPLayer(2 * fine, fine, blocks, depthwise=depthwise)
        self.bu_conv2 = _conv3(fine, fine, 2, depthwise=depthwise)
        self.C3_n3 = _CSPLayer(2 * fine, middle, blocks, depthwise=depthwise)
        self.bu_conv1 = _conv3(middle, middle, 2, depthwise=depthwise)
        self.C3_n4 = _CSPLayer(2 * middle, coarse, blocks, depthwise=depthwise)

    def forward(self, images: Tensor) -> list[Tensor]:
        x2, x1, x0 = self.backbone(images)
        top = self.lateral_conv0(x0)
        merged = self.C3_p4(torch.cat([self.upsample(top), x1], dim=1))
        reduced = self.reduce_conv1(merged)
        fine = self.C3_p3(torch.cat([self.upsample(reduced), x2], dim=1))
        middle = self.C3_n3(torch.cat([self.bu_conv2(fine), reduced], dim=1))
        coarse = self.C3_n4(torch.cat([self.bu_conv1(middle), top], dim=1))
        return [fine, middle, coarse]


class _Head(nn.Module):
    def __init__(self, config: YoloxConfig) -> None:
        super().__init__()
        hidden, depthwise = int(256 * config.width), config.depthwise

        def tower() -> nn.Sequential:
            return nn.Sequential(*(_conv3(hidden, hidden, depthwise=depthwise) for _ in range(2)))

        inputs = [int(channels * config.width) for channels in (256, 512, 1024)]
        self.stems = nn.ModuleList(Conv(count, hidden, 1) for count in inputs)
        self.cls_convs = nn.ModuleList(tower() for _ in inputs)
        self.reg_convs = nn.ModuleList(tower() for _ in inputs)
        self.cls_preds = nn.ModuleList(nn.Conv2d(hidden, config.classes, 1) for _ in inputs)
        self.reg_preds = nn.ModuleList(nn.Conv2d(hidden, 4, 1) for _ in inputs)
        self.obj_preds = nn.ModuleList(nn.Conv2d(hidden, 1, 1) for _ in inputs)

    def forward(self, maps: list[Tensor]) -> Tensor:
        levels = []
        for index, features in enumerate(maps):
            x = self.stems[index](features)
            boxes, kinds = self.reg_convs[index](x), self.cls_convs[index](x)
            objectness = torch.sigmoid(self.obj_preds[index](boxes))
            scores = torch.sigmoid(self.cls_preds[index](kinds))
            levels.append(torch.cat([self.reg_preds[index](boxes), objectness, scores], dim=1))
        return torch.permute(joined(levels), (0, 2, 1))
