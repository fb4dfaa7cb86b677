"""Detectors by the name that manifests and options use."""

from tracker.frontends.yolox import Yolox

FRONTENDS = {"yolox": Yolox}
