"""The systems that the support table has rows for, and an ONNX file of each with random weights.

Random, because speed, precision and whether a graph can be built do not ask for the weights' meaning, and
nothing has to be fetched: whoever runs this gets the same files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tracker.deploy.detectors import DetectorExport, export_detector
from tracker.deploy.export import Export, ExportConfig, export_fairmot
from tracker.deploy.support.stand_ins import export_rtdetr, export_yolo
from tracker.errors import ConfigError
from tracker.models.fairmot import random_fairmot
from tracker.models.zoo import NAMES, network_of, random_detector
from tracker.types import Frame

Size = tuple[int, int]
Exporter = Callable[["System", Path, Sequence[Frame]], Export]


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One row. title: for people. size: (width, height) of its input. export: writes it, its batch open.
    network: as tools/export.py takes it; of a stand-in the front end's name. stands_in: what is inside where
    weights and exporter are the user's own.
    """

    title: str
    network: str
    size: Size
    export: Exporter
    stands_in: str = ""


def _detector(system: System, out: Path, frames: Sequence[Frame]) -> Export:
    config = DetectorExport(name=system.network, size=system.size, batch=None)
    return export_detector(random_detector(system.network, system.size), out, config, frames)


def _fairmot(system: System, out: Path, frames: Sequence[Frame]) -> Export:
    return export_fairmot(random_fairmot(), out, ExportConfig(size=system.size, batch=None), frames)


def _yolo(system: System, out: Path, frames: Sequence[Frame]) -> Export:
    return export_yolo(system.network, system.size, out, frames)


def _rtdetr(system: System, out: Path, frames: Sequence[Frame]) -> Export:
    return export_rtdetr(system.size, out, frames)


def _of_zoo(title: str, network: str, size: Size | None = None) -> System:
    return System(title=title, network=network, size=size or network_of(network)[0].size, export=_detector)


SYSTEMS: dict[str, System] = {
    "fairmot": System(title="FairMOT DLA-34", network="fairmot", size=(1088, 608), export=_fairmot),
    **{
        network: _of_zoo(title, network, size)
        for network, title, size in (
            ("solov2-light-r34", "SOLOv2-light R34", None),
            ("solov2-r50", "SOLOv2 R50", None),
            ("maskrcnn-r50", "Mask R-CNN R50-FPN", None),
            ("detr-r50", "DETR R50", None),
            ("yolox-s", "YOLOX-s", None),
            ("ppyoloe-plus-s", "PP-YOLOE+ s", None),
            ("rtmdet-s", "RTMDet-s", None),
            ("rtmdet-r-tiny", "RTMDet-R tiny, rotated", None),
        )
        if network in NAMES
    },
    **{
        name: System(title=title, network=name, size=(640, 640), export=_yolo, stands_in="YOLOX-s")
        for name, title in (
            ("yolov5", "YOLOv5"),
            ("yolov6", "YOLOv6"),
            ("yolov7", "YOLOv7"),
            ("yolov8", "YOLOv8, v9, 11"),
        )
    },
    "rtdetr": System(
        title="RT-DETR", network="rtdetr", size=(640, 640), export=_rtdetr, stands_in="DETR R50"
    ),
}


def system_of(name: str) -> System:
    """ConfigError for a name that has no row."""
    if name not in SYSTEMS:
        raise ConfigError(f"system is {name!r}; there is {', '.join(SYSTEMS)}")
    return SYSTEMS[name]
