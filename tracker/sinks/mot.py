"""Tracks as MOTChallenge rows: `frame,id,x,y,w,h,score,-1,-1,-1`.

Frames count from 1. x and y are the top-left corner in plain source pixels, counted from 0: the format's
own corner counts from 1, but the official FairMOT and ByteTrack writers do not shift, and results should
be comparable with theirs. Classes have no column; frames without tracks have no rows. Of rotated boxes the
upright ones around them are written.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tracker.boxes import enclosing, turned
from tracker.sinks.output import LineSink
from tracker.types import Frame, Tracks

_ROW = "%d,%d,%.4f,%.4f,%.4f,%.4f,%.4f,-1,-1,-1\n"


def format_rows(frame_number: int, tracks: Tracks) -> str:
    """One line per track, each ending with a newline. frame_number: from 1."""
    count = len(tracks)
    rows = np.empty((count, 7))
    rows[:, 0] = frame_number
    rows[:, 1] = tracks.id
    rows[:, 2:6] = tracks.xyxy if tracks.angle is None else enclosing(turned(tracks.xyxy, tracks.angle))
    rows[:, 4:6] -= rows[:, 2:4]
    rows[:, 6] = tracks.score
    return _ROW * count % tuple(rows.ravel().tolist())  # one formatting for all: a call per row costs twice


class MotSink(LineSink):
    """Writes `<stem>.txt`."""

    def __init__(self, directory: Path, stem: str) -> None:
        super().__init__(directory, stem, suffix=".txt", lines_of=_rows_of)


def _rows_of(frame: Frame, tracks: Tracks) -> str:
    return format_rows(frame.index + 1, tracks)
