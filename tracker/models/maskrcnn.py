"""Mask R-CNN with a ResNet-50 and a feature pyramid (He et al., ICCV 2017); state-dict keys as in mmdet.

`configs/_base_/models/mask-rcnn_r50_fpn.py`. Three parts that share no layer: the trunk proposes regions, the
box head says what is in them, the mask head where. What lies between is the front end's: choosing proposals
takes a top-K and NMS of sizes that depend on the picture, and no TensorRT but the newest has RoIAlign.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tracker.models.fpn import FPN
from tracker.models.resnet import ResNet

ANCHORS = 3  # per place: the shapes 2:1, 1:1 and 1:2
LEVELS = ("p2", "p3", "p4", "p5")  # maps that regions are cut from
BOX_SIDE, MASK_SIDE = 7, 14  # of a region as the heads take it


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskRCNNConfig:
    """channels: of the pyramid. hidden: of the box head. convolutions: of the mask head."""

    classes: int = 80
    channels: int = 256
    hidden: int = 1024
    convolutions: int = 4


def parts(config: MaskRCNNConfig) -> dict[str, tuple[int, int, int]]:
    """The heads' inputs, and (C, H, W) of one region."""
    sides = {"box_regions": BOX_SIDE, "mask_regions": MASK_SIDE}
    return {name: (config.channels, side, side) for name, side in sides.items()}


@torch.no_grad()
def settle(model: MaskRCNN, images: Tensor) -> None:
    """Shift and scale the last layers, so that random weights answer as strongly as trained ones.

    Features then deviate by 1, shifts are small beside anchors, regions are of many classes and some surely
    of one, half of a mask is set. images: pixels from 0 to 1.
    """
    images = (images - 0.5) * 4  # as normalised ones spread
    deviation = float(model.trunk(images)["p2"].std())
    for weight in model.neck.fpn_convs.parameters():
        weight.div_(deviation)
    rpn, heads, found = model.rpn_head, model.roi_head, model.trunk(images)
    _spread(rpn.rpn_cls, found["objectness"].reshape(-1, ANCHORS), 2.0)
    _spread(rpn.rpn_reg, found["shifts"].reshape(-1, 4 * ANCHORS), 0.2)
    box_regions, mask_regions = (_tiles(found["p2"], side) for side in (BOX_SIDE, MASK_SIDE))
    found = model.boxes(box_regions)
    _spread(heads.bbox_head.fc_cls, found["logits"], 4.0)
    _spread(heads.bbox_head.fc_reg, found["refinements"], 0.5)
    _spread(heads.mask_head.conv_logits, model.masks(mask_regions)["masks"], 2.0)


def _spread(layer: nn.Conv2d | nn.Linear, answers: Tensor, deviation: float) -> None:
    """Each output of the layer (N, outputs, …) around 0, all of them that far apart."""
    assert layer.bias is not None
    rows = answers.transpose(0, 1).flatten(1)
    layer.bias.sub_(rows.mean(dim=1))
    factor = deviation / float((rows - rows.mean(dim=1, keepdim=True)).std())
    layer.weight.mul_(factor)
    layer.bias.mul_(factor)


def _tiles(features: Tensor, side: int) -> Tensor:
    """(N, C, side, side) squares of maps (B, C, H, W), overlapping by half."""
    tiles = features.unfold(2, side, side // 2).unfold(3, side, side // 2)  # (B, C, n, m, side, side)
    return tiles.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)


class MaskRCNN(nn.Module):
    """The whole of it. `forward` does all three parts at once, each on an input of its own."""

    def __init__(self, config: MaskRCNNConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or MaskRCNNConfig()
        self.backbone = ResNet(50)
        self.neck = FPN(self.backbone.channels, config.channels)
        self.rpn_head = _ProposalHead(config.channels)
        self.roi_head = _Heads(config)

    def forward(self, images: Tensor, box_regions: Tensor, mask_regions: Tensor) -> dict[str, Tensor]:
        """What `trunk`, `boxes` and `masks` answer, together."""
        return self.trunk(images) | self.boxes(box_regions) | self.masks(mask_regions)

    def trunk(self, images: Tensor) -> dict[str, Tensor]:
        """RGB images (B, 3, H, W), normalised → "p2" … "p5" (B, channels, …) at strides 4 to 32; "objectness"
        (B, A), logits, and "shifts" (B, A, 4) of all anchors: levels from stride 4 to 64, then row by row.
        """
        maps = self.neck(self.backbone(images))
        scores, shifts = zip(*map(self.rpn_head, maps), strict=True)
        proposals = {"objectness": torch.cat(scores, dim=1), "shifts": torch.cat(shifts, dim=1)}
        return dict(zip(LEVELS, maps, strict=False)) | proposals

    def boxes(self, box_regions: Tensor) -> dict[str, Tensor]:
        """Regions (N, channels, 7, 7) → "logits" (N, classes + 1), the last for none, and "refinements"
        (N, 4 · classes).
        """
        answer: dict[str, Tensor] = self.roi_head.bbox_head(box_regions)
        return answer

    def masks(self, mask_regions: Tensor) -> dict[str, Tensor]:
        """Regions (N, channels, 14, 14) → "masks" (N, classes, 28, 28), logits."""
        return {"masks": self.roi_head.mask_head(mask_regions)}


class _ProposalHead(nn.Module):
    """`mmdet/models/dense_heads/rpn_head.py`, its answers in the order of the anchors."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.rpn_conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.rpn_cls = nn.Conv2d(channels, ANCHORS, 1)
        self.rpn_reg = nn.Conv2d(channels, 4 * ANCHORS, 1)
        self.relu = nn.ReLU()

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, channels, H, W) → (B, H·W·ANCHORS) and (B, H·W·ANCHORS, 4)"""
        x = self.relu(self.rpn_conv(features))
        score = torch.flatten(torch.permute(self.rpn_cls(x), (0, 2, 3, 1)), 1)
        shift = torch.flatten(torch.permute(self.rpn_reg(x), (0, 2, 3, 1)), 1)
        return score, torch.unflatten(shift, 1, (-1, 4))


class _Heads(nn.Module):
    def __init__(self, config: MaskRCNNConfig) -> None:
        super().__init__()
        self.bbox_head = _BoxHead(config)
        self.mask_head = _MaskHead(config)


class _BoxHead(nn.Module):
    """`mmdet/models/roi_heads/bbox_heads/convfc_bbox_head.py:Shared2FCBBoxHead`."""

    def __init__(self, config: MaskRCNNConfig) -> None:
        super().__init__()
        self.shared_fcs = nn.ModuleList(
            [
                nn.Linear(config.channels * BOX_SIDE * BOX_SIDE, config.hidden),
                nn.Linear(config.hidden, config.hidden),
            ]
        )
        self.fc_cls = nn.Linear(config.hidden, config.classes + 1)
        self.fc_reg = nn.Linear(config.hidden, 4 * config.classes)
        self.relu = nn.ReLU()

    def forward(self, regions: Tensor) -> dict[str, Tensor]:
        x = torch.flatten(regions, 1)
        for layer in self.shared_fcs:
            x = self.relu(layer(x))
        return {"logits": self.fc_cls(x), "refinements": self.fc_reg(x)}


class _MaskHead(nn.Module):
    """`mmdet/models/roi_heads/mask_heads/fcn_mask_head.py`."""

    def __init__(self, config: MaskRCNNConfig) -> None:
        super().__init__()
        channels = config.channels
        self.convs = nn.ModuleList(_Conv(channels) for _ in range(config.convolutions))
        self.upsample = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.conv_logits = nn.Conv2d(channels, config.classes, 1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.convs:
            x = layer(x)
        answer: Tensor = self.conv_logits(self.relu(self.upsample(x)))
        return answer


class _Conv(nn.Module):
    """mmcv's ConvModule without normalisation: its convolution is called `conv`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.relu(self.conv(x))
        return answer
