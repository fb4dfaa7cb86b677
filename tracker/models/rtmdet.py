"""RTMDet (Lyu et al., 2022), with the state-dict keys of mmdet.

Its `models/backbones/cspnext.py`, `necks/cspnext_pafpn.py`, `dense_heads/rtmdet_head.py` (RTMDetSepBNHead)
and `configs/rtmdet/`. Decoding is the front end's.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tracker.models.blocks import ChannelAttention, ConvBN, PooledPyramid, joined

CHANNELS = (64, 128, 256, 512, 1024)
STAGES = ((3, True), (6, True), (6, True), (3, False))  # blocks, whether they have shortcuts


@dataclass(frozen=True, slots=True, kw_only=True)
class RtmdetConfig:
    """depth, width: factors on blocks and channels. exponential: the head gives logarithms of distances
    (exp_on_reg). angle: a third branch of it, one number per cell (RTMDet-R).
    """

    depth: float = 1.0
    width: float = 1.0
    exponential: bool = True
    classes: int = 80
    angle: bool = False


VARIANTS = {
    "tiny": RtmdetConfig(depth=0.167, width=0.375, exponential=False),
    "s": RtmdetConfig(depth=0.33, width=0.5, exponential=False),
    "m": RtmdetConfig(depth=0.67, width=0.75),
    "l": RtmdetConfig(depth=1.0, width=1.0),
    "x": RtmdetConfig(depth=1.33, width=1.25),
}

# RTMDet-R on DOTA's 15 classes (mmrotate 1.x, `configs/rotated_rtmdet/`).
ROTATED_VARIANTS = {
    name: dataclasses.replace(VARIANTS[name], classes=15, angle=True) for name in ("tiny", "s", "m", "l")
}


class RTMDet(nn.Module):
    def __init__(self, config: RtmdetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or RtmdetConfig()
        channels = [int(count * config.width) for count in CHANNELS]
        self.backbone = _CSPNeXt(channels, config.depth)
        self.neck = _PyramidNetwork(channels[2:], max(1, round(3 * config.depth)))
        self.bbox_head = _Head(channels[2], config)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """BGR images (B, 3, H, W), normalised, H and W multiples of 32 → "logits" (B, C, A) and "distances"
        or "log_distances" (B, 4, A) of the left, top, right and bottom side, in strides; with an angle,
        also "angle" (B, 1, A) in radians.
        """
        logits, distances, angles = self.bbox_head(self.neck(self.backbone(images)))
        found = {
            "logits": logits,
            "log_distances" if self.config.exponential else "distances": distances,
        }
        return found | ({"angle": angles} if self.config.angle else {})


class _Separable(nn.Module):
    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        self.depthwise_conv = ConvBN(channels, channels, kernel, groups=channels)
        self.pointwise_conv = ConvBN(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.pointwise_conv(self.depthwise_conv(x))
        return answer


class _Block(nn.Module):
    def __init__(self, channels: int, *, shortcut: bool) -> None:
        super().__init__()
        self.conv1 = ConvBN(channels, channels, 3)
        self.conv2 = _Separable(channels, 5)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(self.conv1(x))
        return y + x if self.shortcut else y


class _CSPLayer(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, blocks: int, *, shortcut: bool = False, attention: bool = False
    ) -> None:
        super().__init__()
        hidden = outputs // 2
        self.main_conv, self.short_conv = ConvBN(inputs, hidden, 1), ConvBN(inputs, hidden, 1)
        self.final_conv = ConvBN(2 * hidden, outputs, 1)
        self.blocks = nn.Sequential(*(_Block(hidden, shortcut=shortcut) for _ in range(blocks)))
        self.attention = ChannelAttention(2 * hidden) if attention else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        short = self.short_conv(x)
        main = self.blocks(self.main_conv(x))
        answer: Tensor = self.final_conv(self.attention(torch.cat([main, short], dim=1)))
        return answer


class _Pooling(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvBN(channels, channels // 2, 1)
        self.pyramid = PooledPyramid()
        self.conv2 = ConvBN(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.conv2(self.pyramid(self.conv1(x)))
        return answer


class _CSPNeXt(nn.Module):
    stage1: nn.Module
    stage2: nn.Module
    stage3: nn.Module
    stage4: nn.Module

    def __init__(self, channels: list[int], depth: float) -> None:
        super().__init__()
        half = channels[0] // 2
        self.stem = nn.Sequential(ConvBN(3, half, 3, 2), ConvBN(half, half, 3), ConvBN(half, channels[0], 3))
        for index, (blocks, shortcut) in enumerate(STAGES):
            inputs, outputs, count = channels[index], channels[index + 1], max(round(blocks * depth), 1)
            stage: list[nn.Module] = [ConvBN(inputs, outputs, 3, 2)]
            stage += [_Pooling(outputs)] if index == len(STAGES) - 1 else []
            stage.append(_CSPLayer(outputs, outputs, count, shortcut=shortcut, attention=True))
            self.add_module(f"stage{index + 1}", nn.Sequential(*stage))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Strides 8, 16 and 32."""
        x = self.stage1(self.stem(images))
        fine = self.stage2(x)
        middle = self.stage3(fine)
        return [fine, middle, self.stage4(middle)]


class _PyramidNetwork(nn.Module):
    def __init__(self, channels: list[int], blocks: int) -> None:
        super().__init__()
        fine, middle, coarse = channels
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.reduce_layers = nn.ModuleList([ConvBN(coarse, middle, 1), ConvBN(middle, fine, 1)])
        self.top_down_blocks = nn.ModuleList(
            [_CSPLayer(2 * middle, middle, blocks), _CSPLayer(2 * fine, fine, blocks)]
        )
        self.downsamples = nn.ModuleList([ConvBN(fine, fine, 3, 2), ConvBN(middle, middle, 3, 2)])
        self.bottom_up_blocks = nn.ModuleList(
            [_CSPLayer(2 * fine, middle, blocks), _CSPLayer(2 * middle, coarse, blocks)]
        )
        self.out_convs = nn.ModuleList(ConvBN(count, fine, 3) for count in channels)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        x2, x1, x0 = maps
        top = self.reduce_layers[0](x0)
        merged = self.top_down_blocks[0](torch.cat([self.upsample(top), x1], dim=1))
        reduced = self.reduce_layers[1](merged)
        fine = self.top_down_blocks[1](torch.cat([self.upsample(reduced), x2], dim=1))
        middle = self.bottom_up_blocks[0](torch.cat([self.downsamples[0](fine), reduced], dim=1))
        coarse = self.bottom_up_blocks[1](torch.cat([self.downsamples[1](middle), top], dim=1))
        return [conv(each) for conv, each in zip(self.out_convs, (fine, middle, coarse), strict=True)]


class _Head(nn.Module):
    """Levels share their convolutions and have normalisations of their own."""

    def __init__(self, channels: int, config: RtmdetConfig) -> None:
        super().__init__()
        levels = range(3)
        self.angle = config.angle

        def towers() -> nn.ModuleList:
            built = [[ConvBN(channels, channels, 3) for _ in range(2)] for _ in levels]
            for tower in built[1:]:
                for own, first in zip(tower, built[0], strict=True):
                    own.conv = first.conv
            return nn.ModuleList(nn.Sequential(*tower) for tower in built)

        def predictions(outputs: int) -> nn.ModuleList:
            return nn.ModuleList(nn.Conv2d(channels, outputs, 1) for _ in levels)

        self.cls_convs, self.reg_convs = towers(), towers()
        self.rtm_cls, self.rtm_reg = predictions(config.classes), predictions(4)
        if self.angle:
            self.rtm_ang = predictions(1)

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor, Tensor | None]:
        logits, distances, angles = [], [], []
        for index, features in enumerate(maps):
            kinds, boxes = self.cls_convs[index](features), self.reg_convs[index](features)
            logits.append(self.rtm_cls[index](kinds))
            distances.append(self.rtm_reg[index](boxes))
            if self.angle:
                angles.append(self.rtm_ang[index](boxes))
        return joined(logits), joined(distances), joined(angles) if self.angle else None
