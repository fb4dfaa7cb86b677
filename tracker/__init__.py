"""A multi-object tracking runtime: video in, tracks out.

    import tracker

    for frame, tracks in tracker.track("video.mp4", engine="engines/yolox_nano.onnx"):
        ...  # tracks: list[Track], with .id .xyxy .score .label

Everything else is for those who build on the parts: see DESIGN in the README.
"""

from tracker.api import track
from tracker.errors import (
    ConfigError,
    DetectionsError,
    EngineError,
    SinkError,
    SourceError,
    TrackerError,
)
from tracker.types import Detections, Frame, Track, Tracks

__all__ = [
    "ConfigError",
    "Detections",
    "DetectionsError",
    "EngineError",
    "Frame",
    "SinkError",
    "SourceError",
    "Track",
    "TrackerError",
    "Tracks",
    "track",
]
