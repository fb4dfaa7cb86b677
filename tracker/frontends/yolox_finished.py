"""YOLOX whose file suppresses by itself: what mmyolo's easydeploy and mmdeploy write of it."""

from __future__ import annotations

from tracker.frontends.dense import DenseDetector
from tracker.frontends.finished import DETS, END_TO_END
from tracker.frontends.layout import Spec

# mmyolo, `configs/yolox/yolox_s_fast_8xb8-300e_coco.py`: BGR as it is, kept in proportion, padded right and
# below.
YOLOX_END_TO_END = Spec(
    name="yolox-end2end",
    title="YOLOX with NMS",
    layouts={"end2end": END_TO_END, "dets": DETS},
    nms_iou=0.65,
    colour="bgr",
    std=(1.0, 1.0, 1.0),
    resize="corner_rounded",
)


class YoloxEndToEnd(DenseDetector):
    spec = YOLOX_END_TO_END
