"""RTMDet (Lyu et al., "RTMDet", 2022; mmdet, `models/dense_heads/rtmdet_head.py`)."""

from __future__ import annotations

from tracker.frontends.dense import DenseDetector
from tracker.frontends.finished import DETS, END_TO_END
from tracker.frontends.geometry import sides
from tracker.frontends.lanes import Outputs
from tracker.frontends.layout import Layout, Raw, Size, Spec
from tracker.manifest import IMAGENET_MEAN, IMAGENET_STD


def _linear(outputs: Outputs, size: Size) -> Raw:
    return Raw(outputs["distances"].mT, outputs["logits"].mT)


def _exponential(outputs: Outputs, size: Size) -> Raw:
    return Raw(outputs["log_distances"].mT, outputs["logits"].mT)


# tools/export.py: the last convolutions' own numbers. Of mmdet's configurations m, l and x take the
# exponential of the distances (exp_on_reg), tiny and s do not; mmyolo's never do.
LINEAR = Layout(
    outputs={"logits": ("C", "A"), "distances": ("4", "A")},
    split=_linear,
    boxes=sides(offset=0.0),
    sigmoid=True,
)
EXPONENTIAL = Layout(
    outputs={"logits": ("C", "A"), "log_distances": ("4", "A")},
    split=_exponential,
    boxes=sides(offset=0.0, exponential=True),
    sigmoid=True,
)

# `configs/rtmdet/rtmdet_l_8xb32-300e_coco.py`: BGR, kept in proportion, padded right and below.
RTMDET = Spec(
    name="rtmdet",
    title="RTMDet",
    layouts={"linear": LINEAR, "exponential": EXPONENTIAL, "end2end": END_TO_END, "dets": DETS},
    nms_iou=0.65,
    colour="bgr",
    mean=IMAGENET_MEAN[::-1],
    std=IMAGENET_STD[::-1],
    resize="corner_rounded",
)


class Rtmdet(DenseDetector):
    spec = RTMDET
