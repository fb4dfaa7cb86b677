"""Detectors by the name that manifests and options use."""

from tracker.frontends.detector import Detector
from tracker.frontends.fairmot import Fairmot
from tracker.frontends.yolox import Yolox

FRONTENDS: dict[str, type[Detector]] = {"yolox": Yolox, "fairmot": Fairmot}
