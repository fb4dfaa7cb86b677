"""PP-YOLOE+ (Xu et al., "PP-YOLOE", 2022), with PaddleDetection's parameter names.

Its `ppdet/modeling/{backbones/cspresnet,necks/custom_pan,heads/ppyoloe_head}.py`; a normalisation's `_mean`
and `_variance` are called running_mean and running_var here, as everywhere in torch. Levels run from coarse
to fine inside, as Paddle's do, and from fine to coarse in the outputs. Decoding is the front end's.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tracker.models.blocks import ChannelAttention, ConvBN, PooledPyramid, joined

CHANNELS = (64, 128, 256, 512, 1024)
BLOCKS = (3, 6, 6, 3)
PYRAMID = (768, 384, 192)  # coarse to fine
BINS = 17


@dataclass(frozen=True, slots=True, kw_only=True)
class PpyoloeConfig:
    """depth, width: factors on blocks and channels (depth_mult, width_mult)."""

    depth: float = 1.0
    width: float = 1.0
    classes: int = 80


VARIANTS = {
    "s": PpyoloeConfig(depth=0.33, width=0.5),
    "m": PpyoloeConfig(depth=0.67, width=0.75),
    "l": PpyoloeConfig(depth=1.0, width=1.0),
    "x": PpyoloeConfig(depth=1.33, width=1.25),
}


class PPYOLOE(nn.Module):
    def __init__(self, config: PpyoloeConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or PpyoloeConfig()
        channels = [max(round(count * config.width), 1) for count in CHANNELS]
        pyramid = [max(round(count * config.width), 1) for count in PYRAMID]
        self.backbone = _CSPResNet(channels, config.depth)
        self.neck = _PyramidNetwork(channels[:1:-1], pyramid, max(round(3 * config.depth), 1))
        self.yolo_head = _Head(pyramid, config.classes)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """RGB images (B, 3, H, W) in 0…1, H and W multiples of 32 → "logits" (B, C, A) and "bins"
        (B, 68, A): logits of the distances 0 to 16 strides of the left, top, right and bottom side.
        """
        logits, bins = self.yolo_head(self.neck(self.backbone(images)))
        return {"logits": logits, "bins": bins}


class RepVGG(nn.Module):
    """A 3×3 and a weighted 1×1 convolution side by side, which are one: Ding et al., "RepVGG" (2021)."""

    def __init__(self, channels: int, *, weighted: bool) -> None:
        super().__init__()
        self.conv1 = ConvBN(channels, channels, 3, activation="none")
        self.conv2 = ConvBN(channels, channels, 1, activation="none")
        self.alpha = nn.Parameter(torch.ones(1)) if weighted else None

    def forward(self, x: Tensor) -> Tensor:
        side = self.conv2(x)
        answer: Tensor = self.conv1(x) + (side if self.alpha is None else self.alpha * side)
        return answer


class _Block(nn.Module):
    def __init__(self, channels: int, *, shortcut: bool) -> None:
        super().__init__()
        self.conv1 = ConvBN(channels, channels, 3)
        self.conv2 = RepVGG(channels, weighted=shortcut)  # where there is a shortcut, Paddle also has alpha
        self.activate = nn.SiLU()
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.activate(self.conv2(self.conv1(x)))
        return y + x if self.shortcut else y


class _Stage(nn.Module):
    """Of the backbone: halves the size."""

    def __init__(self, inputs: int, outputs: int, blocks: int) -> None:
        super().__init__()
        middle = (inputs + outputs) // 2
        half = middle // 2
        self.conv_down = ConvBN(inputs, middle, 3, 2)
        self.conv1, self.conv2 = ConvBN(middle, half, 1), ConvBN(middle, half, 1)
        self.blocks = nn.Sequential(*(_Block(half, shortcut=True) for _ in range(blocks)))
        self.attn = ChannelAttention(middle)
        self.conv3 = ConvBN(middle, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_down(x)
        parts = [self.conv1(x), self.blocks(self.conv2(x))]
        answer: Tensor = self.conv3(self.attn(torch.cat(parts, dim=1)))
        return answer


class _CSPResNet(nn.Module):
    def __init__(self, channels: list[int], depth: float) -> None:
        super().__init__()
        half = channels[0] // 2
        self.stem = nn.Sequential(
            OrderedDict(
                conv1=ConvBN(3, half, 3, 2), conv2=ConvBN(half, half, 3), conv3=ConvBN(half, channels[0], 3)
            )
        )
        self.stages = nn.Sequential(
            *(
                _Stage(channels[index], channels[index + 1], max(round(count * depth), 1))
                for index, count in enumerate(BLOCKS)
            )
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """Strides 32, 16 and 8."""
        x = self.stages[0](self.stem(images))
        fine = self.stages[1](x)
        middle = self.stages[2](fine)
        return [self.stages[3](middle), middle, fine]


class _Pooling(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pyramid = PooledPyramid()
        self.conv = ConvBN(4 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.conv(self.pyramid(x))
        return answer


class _CSPStage(nn.Module):
    """Of the neck. pooled: a spatial pyramid after the middle block."""

    def __init__(self, inputs: int, outputs: int, blocks: int, *, pooled: bool = False) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1, self.conv2 = ConvBN(inputs, half, 1), ConvBN(inputs, half, 1)
        self.convs = nn.Sequential()
        for index in range(blocks):
            self.convs.add_module(str(index), _Block(half, shortcut=False))
            if pooled and index == (blocks - 1) // 2:
                self.convs.add_module("spp", _Pooling(half))
        self.conv3 = ConvBN(2 * half, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.conv1(x), self.convs(self.conv2(x))]
        answer: Tensor = self.conv3(torch.cat(parts, dim=1))
        return answer


class _PyramidNetwork(nn.Module):
    def __init__(self, inputs: list[int], outputs: list[int], blocks: int) -> None:
        super().__init__()
        coarse, middle, fine = outputs
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.fpn_stages = nn.ModuleList(
            nn.Sequential(stage)
            for stage in (
                _CSPStage(inputs[0], coarse, blocks, pooled=True),
                _CSPStage(inputs[1] + coarse // 2, middle, blocks),
                _CSPStage(inputs[2] + middle // 2, fine, blocks),
            )
        )
        self.fpn_routes = nn.ModuleList([ConvBN(coarse, coarse // 2, 1), ConvBN(middle, middle // 2, 1)])
        self.pan_stages = nn.ModuleList(
            nn.Sequential(stage)
            for stage in (
                _CSPStage(coarse + middle, coarse, blocks),
                _CSPStage(middle + fine, middle, blocks),
            )
        )
        self.pan_routes = nn.ModuleList([ConvBN(middle, middle, 3, 2), ConvBN(fine, fine, 3, 2)])

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        x0, x1, x2 = maps
        top = self.fpn_stages[0](x0)
        merged = self.fpn_stages[1](torch.cat([self.upsample(self.fpn_routes[0](top)), x1], dim=1))
        fine = self.fpn_stages[2](torch.cat([self.upsample(self.fpn_routes[1](merged)), x2], dim=1))
        middle = self.pan_stages[1](torch.cat([self.pan_routes[1](fine), merged], dim=1))
        coarse = self.pan_stages[0](torch.cat([self.pan_routes[0](middle), top], dim=1))
        return [coarse, middle, fine]


class _Gate(nn.Module):
    """Features weighted by channel, from the mean of the map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(channels, channels, 1)
        self.conv = ConvBN(channels, channels, 1)

    def forward(self, x: Tensor, mean: Tensor) -> Tensor:
        answer: Tensor = self.conv(x * torch.sigmoid(self.fc(mean)))
        return answer


class _Head(nn.Module):
    def __init__(self, channels: list[int], classes: int) -> None:
        super().__init__()
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.stem_cls = nn.ModuleList(_Gate(count) for count in channels)
        self.stem_reg = nn.ModuleList(_Gate(count) for count in channels)
        self.pred_cls = nn.ModuleList(nn.Conv2d(count, classes, 3, padding=1) for count in channels)
        self.pred_reg = nn.ModuleList(nn.Conv2d(count, 4 * BINS, 3, padding=1) for count in channels)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        logits, bins = [], []
        for index in reversed(range(len(maps))):
            x = maps[index]
            mean = self.mean(x)
            logits.append(self.pred_cls[index](self.stem_cls[index](x, mean) + x))
            bins.append(self.pred_reg[index](self.stem_reg[index](x, mean)))
        return joined(logits), joined(bins)
