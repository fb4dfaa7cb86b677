"""Layouts of engines that suppress by themselves: what they answer are objects already."""

from __future__ import annotations

import torch

from tracker.frontends.geometry import corners
from tracker.frontends.lanes import Outputs
from tracker.frontends.layout import Layout, Raw, Size


def _counted(outputs: Outputs, size: Size) -> Raw:
    """Rows from num_dets on hold anything: TensorRT's EfficientNMS leaves there what was there before, and
    mmyolo's ONNX graph zeros with label −1.
    """
    score = outputs["scores"]
    there = torch.arange(score.shape[1], device=score.device) < outputs["num_dets"]
    return Raw(outputs["boxes"], torch.where(there, score, 0.0)[..., None], label=outputs["labels"])


def _rows(outputs: Outputs, size: Size) -> Raw:
    rows = outputs["final"]
    return Raw(rows[..., :4], rows[..., 4:5], label=rows[..., 5])


def _dets(outputs: Outputs, size: Size) -> Raw:
    dets = outputs["dets"]
    return Raw(dets[..., :4], dets[..., 4:5], label=outputs["labels"])


# mmyolo's easydeploy (`projects/easydeploy/tools/export_onnx.py`), and TensorRT's EfficientNMS plugin as
# YOLOv6 and YOLOv7 name its outputs. Boxes are corners in input pixels in all of them.
END_TO_END = Layout(
    outputs={"num_dets": ("1",), "boxes": ("K", "4"), "scores": ("K",), "labels": ("K",)},
    called={
        "boxes": ("det_boxes", "detection_boxes"),
        "scores": ("det_scores", "detection_scores"),
        "labels": ("det_classes", "detection_classes"),
        "num_dets": ("num_detections",),
    },
    split=_counted,
    boxes=corners,
    suppress=False,
)

# Ultralytics' one-to-one heads (v10, 26) and its exports with nms=True: corners, score, class.
FINAL = Layout(outputs={"final": ("K", "6")}, split=_rows, boxes=corners, suppress=False)

# mmdeploy's (`mmdeploy/codebase/mmdet/deploy/object_detection.py`): corners and score, class.
DETS = Layout(outputs={"dets": ("K", "5"), "labels": ("K",)}, split=_dets, boxes=corners, suppress=False)
