"""SOLOv2 (Wang et al., "SOLOv2: Dynamic and Fast Instance Segmentation", NeurIPS 2020); keys as in mmdet.

Its `mmdet/models/dense_heads/{solo,solov2}_head.py`, for one input size: the grids of coordinates are then
constants, and since a convolution is linear, what one makes of them is a constant too, added to what it makes
of the features. So nothing is concatenated and nothing depends on the batch. Categories are logits: which of
neighbouring cells is the strongest ("points NMS"), what masks look like and which of them cover each other
is the front end's, in FP32 and on few candidates. Neighbours rounded to half precision can be equal, and
then both would stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812 (everybody's name for it)
from torch import Tensor, nn

from tracker.models.blocks import Constant
from tracker.models.fpn import FPN
from tracker.models.resnet import Depth, ResNet

STRIDES = (4, 8, 16, 32, 64)  # of the pyramid
GROUPS = 32  # of every normalisation


@dataclass(frozen=True, slots=True, kw_only=True)
class SOLOv2Config:
    """Defaults are mmdet's `configs/solov2/solov2_r50_fpn_1x_coco.py`.

    size: (width, height) of the input. depth: of the ResNet. hidden, layers: of both branches of the head.
    kernel: numbers that make an object's 1×1 convolution, and channels that it is applied to. mask_hidden: of
    the branch that makes these. grids: cells along either side, by level.
    """

    size: tuple[int, int] = (1344, 800)
    classes: int = 80
    depth: Depth = 50
    hidden: int = 512
    layers: int = 4
    kernel: int = 256
    mask_hidden: int = 128
    grids: tuple[int, ...] = (40, 36, 24, 16, 12)


# "light" as in `solov2-light_r50_fpn_ms-3x_coco.py` and the official `solov2_light_448_r34_fpn_8gpu_3x.py`.
VARIANTS = {"r50": SOLOv2Config()}
LIGHT_VARIANTS = {
    "r34": SOLOv2Config(size=(768, 448), depth=34, hidden=256, layers=2, kernel=128),
    "r50": SOLOv2Config(size=(768, 448), depth=50, hidden=256, layers=2, kernel=128),
}

# mmdet's names for what the official repository (github.com/WXinlong/SOLO) calls otherwise, by their start.
OFFICIAL_NAMES = {
    "bbox_head.cate_convs.": "mask_head.cls_convs.",
    "bbox_head.kernel_convs.": "mask_head.kernel_convs.",
    "bbox_head.solo_cate.": "mask_head.conv_cls.",
    "bbox_head.solo_kernel.": "mask_head.conv_kernel.",
    "mask_feat_head.conv_pred.0.": "mask_head.mask_feature_head.conv_pred.",
    "mask_feat_head.": "mask_head.mask_feature_head.",
}


class SOLOv2(nn.Module):
    """Sides of the input must be multiples of 32."""

    def __init__(self, config: SOLOv2Config | None = None) -> None:
        super().__init__()
        self.config = config = config or SOLOv2Config()
        self.backbone = ResNet(config.depth)
        self.neck = FPN(self.backbone.channels)
        self.mask_head = _Head(config)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """RGB images (B, 3, H, W), normalised → by name, with A = Σ grids² cells, level by level, row by row:

        "cate_logits" (B, A, classes). "kernel" (B, A, kernel): of each cell the weights of a 1×1 convolution
        of "seg" (B, kernel, H/4, W/4), which gives the logits of its object's mask.
        """
        answers: dict[str, Tensor] = self.mask_head(self.neck(self.backbone(images)))
        return answers


class CoordConv(nn.Conv2d):
    """A convolution over features and coordinates: the last two of its input channels are coordinates, the
    same for every image.
    """

    def forward(self, x: Tensor, coordinates: Tensor) -> Tensor:  # type: ignore[override]
        """x: (B, C, H, W). coordinates: (1, 2, H, W)."""
        features = F.conv2d(x, self.weight[:, :-2], self.bias, self.stride, self.padding)
        return features + self.share(coordinates)

    def share(self, coordinates: Tensor) -> Tensor:
        """What the coordinates add: (1, outputs, H, W)."""
        return F.conv2d(coordinates, self.weight[:, -2:], None, self.stride, self.padding)


def coordinates(size: tuple[int, int], grid: tuple[int, int] | None = None) -> Tensor:
    """−1 to 1 across a map and down it, resized to a grid as its features are: (1, 2, rows, columns).

    size, grid: (width, height).
    """
    x, y = (torch.linspace(-1, 1, side) for side in size)
    value = torch.stack(torch.meshgrid(x, y, indexing="xy"))[None]
    return value if grid is None else F.interpolate(value, size=grid[::-1], mode="bilinear")


class BilinearResize(nn.Module):
    """To a fixed size (width, height), between pixels, neither averaging nor aligning corners."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, size=self.size[::-1], mode="bilinear")


class _ConvGN(nn.Module):
    """mmcv's ConvModule: convolution, group normalisation, ReLU. coordinates: see `CoordConv`."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, *, coordinates: bool = False) -> None:
        super().__init__()
        layer = CoordConv if coordinates else nn.Conv2d
        self.conv = layer(inputs + 2 * coordinates, outputs, kernel, padding=kernel // 2, bias=False)
        self.gn = nn.GroupNorm(GROUPS, outputs)
        self.activate = nn.ReLU()

    def forward(self, x: Tensor, *coordinates: Tensor) -> Tensor:
        answer: Tensor = self.activate(self.gn(self.conv(x, *coordinates)))
        return answer


class _MaskFeatures(nn.Module):
    """The four finer maps, each brought to the finest one's size step by step, summed."""

    def __init__(self, inputs: int, config: SOLOv2Config) -> None:
        super().__init__()
        width, height = config.size
        hidden, coarsest = config.mask_hidden, len(STRIDES) - 2
        self.convs_all_levels = nn.ModuleList(nn.Module() for _ in range(coarsest + 1))
        for level, convs in enumerate(self.convs_all_levels):
            for step in range(max(1, level)):
                first = inputs if step == 0 else hidden
                conv = _ConvGN(first, hidden, coordinates=level == coarsest and step == 0)
                convs.add_module(f"conv{step}", conv)
        self.conv_pred = _ConvGN(hidden, config.kernel, 1)
        self.upsample = nn.Upsample(scale_factor=2, mode="bilinear")
        self.coordinates = Constant(
            lambda: coordinates((width // STRIDES[coarsest], height // STRIDES[coarsest]))
        )

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        parts = []
        for level, (convs, x) in enumerate(zip(self.convs_all_levels, maps, strict=True)):
            last = level == len(maps) - 1
            for step, conv in enumerate(convs.children()):
                x = conv(x, self.coordinates()) if last and step == 0 else conv(x)
                x = self.upsample(x) if level else x
            parts.append(x)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        answer: Tensor = self.conv_pred(total)
        return answer


class _Head(nn.Module):
    def __init__(self, config: SOLOv2Config, inputs: int = 256) -> None:
        super().__init__()
        hidden = config.hidden
        self.mask_feature_head = _MaskFeatures(inputs, config)
        self.cls_convs = nn.ModuleList(
            _ConvGN(hidden if layer else inputs, hidden) for layer in range(config.layers)
        )
        self.kernel_convs = nn.ModuleList(
            _ConvGN(hidden if layer else inputs, hidden, coordinates=not layer)
            for layer in range(config.layers)
        )
        self.conv_cls = nn.Conv2d(hidden, config.classes, 3, padding=1)
        self.conv_kernel = nn.Conv2d(hidden, config.kernel, 3, padding=1)
        # The finest map is read at the next one's size, and the coarsest at the one before's.
        width, height = config.size
        sizes = [(-(-width // stride), -(-height // stride)) for stride in STRIDES]
        sizes = [sizes[1], *sizes[1:-1], sizes[-2]]
        self.finer, self.coarser = BilinearResize(sizes[0]), BilinearResize(sizes[-1])
        grids = [(count, count) for count in config.grids]
        self.resizes = nn.ModuleList(BilinearResize(grid) for grid in grids)
        self.coordinates = nn.ModuleList(
            Constant(partial(coordinates, size, grid)) for size, grid in zip(sizes, grids, strict=True)
        )

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        """maps: of the whole pyramid."""
        levels = [self.finer(maps[0]), *maps[1:-1], self.coarser(maps[-1])]
        categories, kernels = [], []
        for level, resize, coordinates in zip(levels, self.resizes, self.coordinates, strict=True):
            category = kernel = resize(level)
            for layer, conv in enumerate(self.kernel_convs):
                kernel = conv(kernel) if layer else conv(kernel, coordinates())
            for conv in self.cls_convs:
                category = conv(category)
            categories.append(torch.flatten(self.conv_cls(category), 2))
            kernels.append(torch.flatten(self.conv_kernel(kernel), 2))
        return {
            "cate_logits": torch.permute(torch.cat(categories, dim=2), (0, 2, 1)),
            "kernel": torch.permute(torch.cat(kernels, dim=2), (0, 2, 1)),
            "seg": self.mask_feature_head(maps[:-1]),
        }
