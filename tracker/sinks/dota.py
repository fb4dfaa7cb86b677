"""Tracks as DOTA's annotations are written, with frame and id before them and the score behind:

    frame id x1 y1 x2 y2 x3 y3 x4 y4 class score

Frames count from 1; corners are source pixels, clockwise on the screen, as in DOTA (Xia et al., CVPR 2018),
whose eight numbers and class stand in the middle. White space in a class is a hyphen here, as in its own
names. Upright boxes have corners too.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tracker.boxes import polygons, turned
from tracker.sinks.output import LineSink
from tracker.types import Frame, Tracks

_ROW = "%d %d %.2f %.2f %.2f %.2f %.2f %.2f %.2f %.2f %s %.4f\n"


def format_rows(frame: Frame, tracks: Tracks) -> str:
    """One line per track, each ending with a newline."""
    count = len(tracks)
    angle = np.zeros(count) if tracks.angle is None else tracks.angle
    corners = polygons(turned(np.asarray(tracks.xyxy, np.float64), angle)).reshape(count, 8).tolist()
    labels = ["-".join(tracks.name_of(label).split()) for label in tracks.label.tolist()]
    rows = zip(tracks.id.tolist(), corners, labels, tracks.score.tolist(), strict=True)
    return "".join(_ROW % (frame.index + 1, id, *corner, label, score) for id, corner, label, score in rows)


class DotaSink(LineSink):
    """Writes `<stem>.dota.txt`."""

    def __init__(self, directory: Path, stem: str) -> None:
        super().__init__(directory, stem, suffix=".dota.txt", lines_of=format_rows)
