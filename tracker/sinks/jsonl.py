"""Tracks as JSON lines: one object per frame, also for frames without tracks.

    {"frame": 1, "pts_seconds": 0.0, "tracks": [{"id": 1, "xyxy": [x1, y1, x2, y2], "score": 0.9,
     "label": "car"}]}

Frames count from 1, boxes are source pixels (two decimals), pts_seconds is the source's own clock. Strict
JSON in ASCII: other letters are escaped, and NaN or inf never pass.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tracker.sinks.output import LineSink
from tracker.types import Frame, Tracks


def format_line(frame: Frame, tracks: Tracks) -> str:
    """The frame's line, newline included."""
    columns = (
        tracks.id.tolist(),
        np.asarray(tracks.xyxy, np.float64).round(2).tolist(),
        np.asarray(tracks.score, np.float64).round(4).tolist(),
        map(tracks.name_of, tracks.label.tolist()),
    )
    rows = [
        {"id": id_, "xyxy": xyxy, "score": score, "label": label}
        for id_, xyxy, score, label in zip(*columns, strict=True)
    ]
    line = {"frame": frame.index + 1, "pts_seconds": frame.pts_seconds, "tracks": rows}
    return json.dumps(line, allow_nan=False, separators=(",", ":")) + "\n"


class JsonlSink(LineSink):
    """Writes `<stem>.jsonl`."""

    def __init__(self, directory: Path, stem: str) -> None:
        super().__init__(directory, stem, suffix=".jsonl", lines_of=format_line)
