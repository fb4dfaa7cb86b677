"""Tracks as MOTS rows: `frame id class height width rle`, with frames from 1.

The format is `tracker.mots`'s. Class 1 are cars and 2 are persons or pedestrians, as there; another one is
100 and its index, which TrackEval passes over and mots_tools refuses (`--classes person,car` leaves it out).
Ids are the tracks' own: 1000·class + instance, which the official ground truth writes, is what the format's
PNG form needs, and would be ambiguous from the thousandth track on. A pixel belongs to one object in MOTS:
to the one with the highest score, among equals to the oldest. What has no pixel left has no row.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tracker import rle
from tracker.errors import SinkError
from tracker.mots import CAR, PEDESTRIAN
from tracker.sinks.output import LineSink
from tracker.types import Frame, Tracks

if TYPE_CHECKING:
    from tracker.masks import Masks

_CLASSES = {"car": CAR, "person": PEDESTRIAN, "pedestrian": PEDESTRIAN}
_OTHERS = 100


def format_rows(frame: Frame, tracks: Tracks) -> str:
    """One line per track that is seen, each ending with a newline. Raises SinkError without masks."""
    if tracks.mask is None:
        raise SinkError(f"frame {frame.index + 1} has no masks, which MOTS is made of: leave mots out")
    width, height = tracks.mask.size
    seen = _disjoint(tracks.mask, np.lexsort((tracks.id, np.negative(tracks.score))).tolist())
    lines = []
    for row, (identity, label) in enumerate(zip(tracks.id.tolist(), tracks.label.tolist(), strict=True)):
        if row in seen:
            number = _CLASSES.get(tracks.name_of(label), _OTHERS + label)
            lines.append(f"{frame.index + 1} {identity} {number} {height} {width} {seen[row].decode()}\n")
    return "".join(lines)


def _disjoint(masks: Masks, order: list[int]) -> dict[int, bytes]:
    """Run lengths by row of what each mask has for itself, those first in order having the first choice."""
    taken = np.zeros(masks.size[::-1], np.bool_)
    seen = {}
    for row in order:
        x, y, pixels = masks.crop(row)
        window = taken[y : y + pixels.shape[0], x : x + pixels.shape[1]]
        own = pixels & ~window
        if own.any():
            seen[row] = rle.encode(own, (x, y), masks.size)
            window |= own
    return seen


class MotsSink(LineSink):
    """Writes `<stem>.mots.txt`."""

    def __init__(self, directory: Path, stem: str) -> None:
        super().__init__(directory, stem, suffix=".mots.txt", lines_of=format_rows)
