"""Detectors by the name that manifests and options use."""

from tracker.frontends.dense import DenseDetector
from tracker.frontends.detector import Detector
from tracker.frontends.detr import Detr, Rtdetr
from tracker.frontends.fairmot import Fairmot
from tracker.frontends.ppyoloe import Ppyoloe, PpyoloePlus
from tracker.frontends.rtmdet import Rtmdet
from tracker.frontends.rtmdet_r import RtmdetR
from tracker.frontends.yolo import Yolo11, Yolo26, Yolov5, Yolov6, Yolov7, Yolov8, Yolov9, Yolov10
from tracker.frontends.yolox import Yolox

_DENSE: tuple[type[DenseDetector], ...] = (
    Yolov5, Yolov6, Yolov7, Yolov8, Yolov9, Yolov10, Yolo11, Yolo26,
    Ppyoloe, PpyoloePlus, Rtmdet, RtmdetR, Detr, Rtdetr,
)  # fmt: skip

FRONTENDS: dict[str, type[Detector]] = {
    "yolox": Yolox,
    "fairmot": Fairmot,
    **{kind.spec.name: kind for kind in _DENSE},
}
