"""Transformers that answer a set of objects: DETR and RT-DETR. No NMS: each object is one query's.

Carion et al., "End-to-End Object Detection with Transformers" (ECCV 2020), github.com/facebookresearch/detr,
`models/detr.py:PostProcess`; Zhao et al., "DETRs Beat YOLOs" (CVPR 2024), github.com/lyuwenyu/RT-DETR.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tracker.frontends.coco import COCO_NAMES
from tracker.frontends.dense import DenseDetector
from tracker.frontends.geometry import centred
from tracker.frontends.lanes import Outputs
from tracker.frontends.layout import Layout, Raw, Size, Spec
from tracker.manifest import IMAGENET_MEAN, IMAGENET_STD

# COCO's category ids, which number DETR's outputs: of 0 to 90, eleven belong to no class.
_UNUSED = (0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
_named = iter(COCO_NAMES)
COCO_IDS = tuple(f"unused {number}" if number in _UNUSED else next(_named) for number in range(91))


def _in_pixels(boxes: Tensor, size: Size) -> Tensor:
    """Centre and size in shares of the input → in its pixels.

    Nothing is copied from the host, which no CUDA graph could capture.
    """
    width, height = size
    pixels = torch.full((4,), float(width), device=boxes.device)
    pixels[1::2] = height
    return boxes.float() * pixels


def _without_none(logits: Tensor) -> Tensor:
    """Scores of the classes; the last logit is for no object."""
    return logits.float().softmax(dim=-1)[..., :-1]


def _softmax(outputs: Outputs, size: Size) -> Raw:
    return Raw(_in_pixels(outputs["boxes"], size), _without_none(outputs["logits"]))


def _focal(outputs: Outputs, size: Size) -> Raw:
    return Raw(_in_pixels(outputs["boxes"], size), outputs["logits"])


def _rows(outputs: Outputs, size: Size) -> Raw:
    rows = outputs["rows"]
    return Raw(_in_pixels(rows[..., :4], size), rows[..., 4:])


_CALLED = {"logits": ("pred_logits",), "boxes": ("pred_boxes",)}

# Resized without padding, since the engine has no mask for it: give the export the shape of your video.
# The official resize is Pillow's, which averages where it shrinks: by 0.65, "area" is off by 1.1 of 255
# levels and "linear" by 2.5 in the mean; enlarging by 1.7, they are by 1.6 and 0.2. Video mostly shrinks.
DETR = Spec(
    name="detr",
    title="DETR",
    layouts={
        "softmax": Layout(
            outputs={"logits": ("K", "1+C"), "boxes": ("K", "4")},
            split=_softmax, boxes=centred, suppress=False, called=_CALLED,
        ),
    },
    nms_iou=1.0,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    resize="stretch",
    interpolation="area",
    names=COCO_IDS,
)  # fmt: skip

RTDETR = Spec(
    name="rtdetr",
    title="RT-DETR",
    layouts={
        "sigmoid": Layout(
            outputs={"logits": ("K", "C"), "boxes": ("K", "4")},
            split=_focal, boxes=centred, sigmoid=True, suppress=False, called=_CALLED,
        ),
        "rows": Layout(outputs={"rows": ("K", "4+C")}, split=_rows, boxes=centred, suppress=False),
    },
    nms_iou=1.0,
    resize="stretch",
)  # fmt: skip


class Detr(DenseDetector):
    spec = DETR


class Rtdetr(DenseDetector):
    spec = RTDETR
