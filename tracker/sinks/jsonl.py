"""Tracks as JSON lines: one object per frame, also for frames without tracks.

    {"frame": 1, "pts_seconds": 0.0, "tracks": [{"id": 1, "xyxy": [x1, y1, x2, y2], "score": 0.9,
     "label": "car"}]}

Frames count from 1, boxes are source pixels (two decimals), pts_seconds is the source's own clock. Strict
JSON in ASCII: other letters are escaped, and NaN or inf never pass.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np

from tracker.sinks.output import LineSink
from tracker.types import Frame, Tracks

_LINE = '{"frame":%d,"pts_seconds":%s,"tracks":[%s]}\n'
_TRACK = '{"id":%d,"xyxy":[%.2f,%.2f,%.2f,%.2f],"score":%.4f,"label":%s}'

# json.dumps knows how to escape, but asked once per track it would be half of the work.
_quoted = lru_cache(maxsize=4096)(json.dumps)


def format_line(frame: Frame, tracks: Tracks) -> str:
    """The frame's line, newline included. Raises ValueError for what JSON has no word for."""
    count = len(tracks)
    numbers = np.empty((count, 5))
    numbers[:, :4] = tracks.xyxy
    numbers[:, 4] = tracks.score
    if not np.isfinite(numbers).all():
        raise ValueError(f"frame {frame.index + 1} has NaN or inf in its tracks, which JSON does not know")
    labels = [_quoted(tracks.name_of(label)) for label in tracks.label.tolist()]
    rows = zip(tracks.id.tolist(), *numbers.T.tolist(), labels, strict=True)
    values = tuple(value for row in rows for value in row)
    rows_text = ",".join([_TRACK] * count) % values
    return _LINE % (frame.index + 1, json.dumps(frame.pts_seconds, allow_nan=False), rows_text)


class JsonlSink(LineSink):
    """Writes `<stem>.jsonl`."""

    def __init__(self, directory: Path, stem: str) -> None:
        super().__init__(directory, stem, suffix=".jsonl", lines_of=format_line)
