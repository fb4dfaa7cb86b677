"""PP-YOLOE and PP-YOLOE+ (github.com/PaddlePaddle/PaddleDetection, `modeling/heads/ppyoloe_head.py`)."""

from __future__ import annotations

from dataclasses import replace

from tracker.frontends.dense import DenseDetector
from tracker.frontends.finished import END_TO_END
from tracker.frontends.geometry import binned_sides, corners
from tracker.frontends.lanes import Outputs
from tracker.frontends.layout import Layout, Raw, Size, Spec
from tracker.manifest import IMAGENET_MEAN, IMAGENET_STD

BINS = 17  # distances 0 to 16 strides, reg_max of the official head


def _heads(outputs: Outputs, size: Size) -> Raw:
    return Raw(outputs["bins"].mT, outputs["logits"].mT)


def _concatenated(outputs: Outputs, size: Size) -> Raw:
    rows = outputs["decoded"]
    return Raw(rows[..., :4], rows[..., 4:])


# tools/export.py: the last convolutions' own numbers, so that what needs FP32 is computed here.
HEADS = Layout(
    outputs={"logits": ("C", "A"), "bins": (str(4 * BINS), "A")},
    split=_heads,
    boxes=binned_sides(offset=0.5),
    sigmoid=True,
)
# Paddle's export_model.py with exclude_post_process=True, then paddle2onnx: corners and scores.
DECODED = Layout(outputs={"decoded": ("A", "4+C")}, split=_concatenated, boxes=corners)

# `configs/ppyoloe/_base_/ppyoloe_plus_{reader,crn}.yml`: stretched, bicubic, in 0…1.
PPYOLOE_PLUS = Spec(
    name="ppyoloe_plus",
    title="PP-YOLOE+",
    layouts={"heads": HEADS, "decoded": DECODED, "end2end": END_TO_END},
    nms_iou=0.7,
    resize="stretch",
    interpolation="cubic",
)


class PpyoloePlus(DenseDetector):
    spec = PPYOLOE_PLUS


class Ppyoloe(DenseDetector):
    """Before the plus: ImageNet's mean and standard deviation (`ppyoloe_reader.yml`)."""

    spec = replace(
        PPYOLOE_PLUS,
        name="ppyoloe",
        title="PP-YOLOE",
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )
