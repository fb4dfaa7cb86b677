"""The YOLO family but for YOLOX: v5 to v7 and their layout, v8 to 11 and theirs, v10 and 26 without NMS.

Read from what the upstream exporters write, and from `projects/easydeploy` of mmyolo; no code or weights of
theirs are used. All take RGB in 0…1, letterboxed on grey 114.
"""

from __future__ import annotations

from dataclasses import replace

from tracker.frontends.dense import DenseDetector
from tracker.frontends.finished import END_TO_END, FINAL
from tracker.frontends.geometry import centred
from tracker.frontends.lanes import Outputs
from tracker.frontends.layout import Layout, Raw, Size, Spec

# With P6 heads, and with P2 heads for small objects.
PYRAMIDS = ((8, 16, 32), (8, 16, 32, 64), (4, 8, 16, 32))


def _with_objectness(outputs: Outputs, size: Size) -> Raw:
    rows = outputs["decoded"]
    return Raw(rows[..., :4], rows[..., 5:], objectness=rows[..., 4])


def _yolov7(outputs: Outputs, size: Size) -> Raw:
    """A YOLOv7 of one class never trains its class score: it stays 0.5 (`utils/general.py`, nc == 1)."""
    rows = outputs["decoded"]
    one = rows.shape[2] == 6
    return Raw(rows[..., :4], rows[..., 4:5] if one else rows[..., 5:], None if one else rows[..., 4])


def _transposed(outputs: Outputs, size: Size) -> Raw:
    rows = outputs["decoded"].mT
    return Raw(rows[..., :4], rows[..., 4:])


# Centre, size, objectness, class scores: `export.py` of yolov5 and, with --grid, of yolov7.
OBJECTNESS = Layout(outputs={"decoded": ("A", "5+C")}, split=_with_objectness, boxes=centred)
# Centre, size, class scores, transposed: `yolo export format=onnx`.
TRANSPOSED = Layout(outputs={"decoded": ("4+C", "A")}, split=_transposed, boxes=centred)

YOLOV5 = Spec(
    name="yolov5",
    title="YOLOv5",
    layouts={"decoded": OBJECTNESS, "end2end": END_TO_END, "final": FINAL},
    nms_iou=0.45,
    pyramids=PYRAMIDS,
    anchors=3,
)
# Its export has an objectness too, which is always 1 (`yolov6/models/effidehead.py`).
YOLOV6 = replace(YOLOV5, name="yolov6", title="YOLOv6", anchors=1)
YOLOV7 = replace(
    YOLOV5,
    name="yolov7",
    title="YOLOv7",
    layouts={**YOLOV5.layouts, "decoded": replace(OBJECTNESS, split=_yolov7)},
)
YOLOV8 = Spec(
    name="yolov8",
    title="YOLOv8",
    layouts={"decoded": TRANSPOSED, "end2end": END_TO_END, "final": FINAL},
    nms_iou=0.7,
    pyramids=PYRAMIDS,
)
YOLOV10 = replace(YOLOV8, name="yolov10", title="YOLOv10", layouts={"final": FINAL, "decoded": TRANSPOSED})


class Yolov5(DenseDetector):
    spec = YOLOV5


class Yolov6(DenseDetector):
    spec = YOLOV6


class Yolov7(DenseDetector):
    spec = YOLOV7


class Yolov8(DenseDetector):
    spec = YOLOV8


class Yolov9(DenseDetector):
    spec = replace(YOLOV8, name="yolov9", title="YOLOv9")


class Yolov10(DenseDetector):
    spec = YOLOV10


class Yolo11(DenseDetector):
    spec = replace(YOLOV8, name="yolo11", title="YOLO11")


class Yolo26(DenseDetector):
    spec = replace(YOLOV10, name="yolo26", title="YOLO26")
