"""Detectors by the name that manifests and options use."""

from tracker.frontends.dense import DenseDetector
from tracker.frontends.detector import Detector
from tracker.frontends.detr import Detr, Rtdetr
from tracker.frontends.fairmot import Fairmot
from tracker.frontends.maskrcnn import MaskRcnn
from tracker.frontends.ppyoloe import Ppyoloe, PpyoloePlus
from tracker.frontends.rtmdet import Rtmdet
from tracker.frontends.rtmdet_r import RtmdetR
from tracker.frontends.solov2 import Solov2
from tracker.frontends.yolo import Yolo11, Yolo26, Yolov5, Yolov6, Yolov7, Yolov8, Yolov9, Yolov10
from tracker.frontends.yolox import Yolox
from tracker.frontends.yolox_finished import YoloxEndToEnd

_DENSE: tuple[type[DenseDetector], ...] = (
    Yolov5, Yolov6, Yolov7, Yolov8, Yolov9, Yolov10, Yolo11, Yolo26,
    Ppyoloe, PpyoloePlus, Rtmdet, RtmdetR, Detr, Rtdetr, YoloxEndToEnd,
)  # fmt: skip

FRONTENDS: dict[str, type[Detector]] = {
    "yolox": Yolox,
    "fairmot": Fairmot,
    "maskrcnn": MaskRcnn,
    "solov2": Solov2,
    **{kind.spec.name: kind for kind in _DENSE},
}
