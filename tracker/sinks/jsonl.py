"""Tracks as JSON lines: one object per frame, also for frames without tracks.

    {"frame": 1, "pts_seconds": 0.0, "tracks": [{"id": 1, "xyxy": [x1, y1, x2, y2], "score": 0.9,
     "label": "car"}]}

Frames count from 1, boxes are source pixels (two decimals), pts_seconds is the source's own clock. Strict
JSON in ASCII: other letters are escaped, and NaN or inf never pass.

Frames of live sources say more: "size", since a camera may change it; "received", when the frame had come, in
Unix seconds; and "age_ms", how old it was when its tracks were worded here. Where lines or zones are counted
at, the totals so far stand at the end: "counts": [{"name": "gate", "in": 3, "out": 1}].

Rotated boxes say more: "polygon", their four corners, and "angle" in radians, of the side from the first to
the second; their "xyxy" is the upright box around them.

Where the network finds masks, every track has one as COCO's compressed run lengths of the whole picture,
"mask": {"size": [height, width], "counts": "…"}, which pycocotools decodes; null where it has no pixels.
"""

from __future__ import annotations

import json
import time
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tracker.boxes import enclosing, polygons, turned
from tracker.sinks.output import LineSink, LinesOf
from tracker.types import Frame, Tracks

if TYPE_CHECKING:
    from tracker.masks import Masks

_LINE = '{"frame":%d,"pts_seconds":%s,%s"tracks":[%s]}\n'
_LIVE = '"size":[%d,%d],"received":%.3f,"age_ms":%.1f,'
_TRACK = '{"id":%d,"xyxy":[%.2f,%.2f,%.2f,%.2f],"score":%.4f,"label":%s'
_TURNED_TRACK = (
    '{"id":%d,"xyxy":[%.2f,%.2f,%.2f,%.2f],"score":%.4f,'
    '"polygon":[[%.2f,%.2f],[%.2f,%.2f],[%.2f,%.2f],[%.2f,%.2f]],"angle":%.4f,"label":%s'
)
_MASKED = ',"mask":%s'
_MASK = '{"size":[%d,%d],"counts":"%s"}'

# json.dumps knows how to escape, but asked once per track it would be half of the work.
_quoted = lru_cache(maxsize=4096)(json.dumps)


def format_line(frame: Frame, tracks: Tracks) -> str:
    """The frame's line, newline included. Raises ValueError for what JSON has no word for."""
    count = len(tracks)
    if tracks.angle is None:
        words, numbers = _TRACK, np.empty((count, 5))
        numbers[:, :4] = tracks.xyxy
    else:
        words, numbers = _TURNED_TRACK, np.empty((count, 14))
        rotated = turned(tracks.xyxy, tracks.angle)
        numbers[:, :4] = enclosing(rotated)
        numbers[:, 5:13] = polygons(rotated).reshape(count, 8)
        numbers[:, 13] = tracks.angle
    numbers[:, 4] = tracks.score
    if not np.isfinite(numbers).all():
        raise ValueError(f"frame {frame.index + 1} has NaN or inf in its tracks, which JSON does not know")
    labels = [_quoted(tracks.name_of(label)) for label in tracks.label.tolist()]
    columns = [tracks.id.tolist(), *numbers.T.tolist(), labels]
    if tracks.mask is not None:
        words += _MASKED
        columns.append(_mask_words(tracks.mask))
    rows = zip(*columns, strict=True)
    values = tuple(value for row in rows for value in row)
    rows_text = ",".join([words + "}"] * count) % values
    pts_seconds = json.dumps(frame.pts_seconds, allow_nan=False)
    return _LINE % (frame.index + 1, pts_seconds, _live_part(frame), rows_text)


def named_line(name: str, frame: Frame, tracks: Tracks) -> str:
    """The same with "stream" before all else, for those who get the lines of several."""
    return '{"stream":%s,%s' % (_quoted(name), format_line(frame, tracks)[1:])  # noqa: UP031


def with_counts(line: bytes, counts: bytes) -> bytes:
    """A line of one of these forms with counts, a JSON array, at its end."""
    return line[:-2] + b',"counts":' + counts + b"}\n"


def words_json(lines_of: LinesOf) -> bool:
    """Whether that words lines of one of these forms."""
    return getattr(lines_of, "func", lines_of) in (format_line, named_line)


def _mask_words(masks: Masks) -> list[str]:
    """Each mask's object. Of what has a meaning in JSON, run lengths know the backslash alone."""
    width, height = masks.size
    texts = [masks.rle(row).decode() if masks.crop(row).pixels.any() else None for row in range(len(masks))]
    return ["null" if text is None else _MASK % (height, width, text.replace("\\", "\\\\")) for text in texts]


def _live_part(frame: Frame) -> str:
    if frame.received is None:
        return ""
    age = time.monotonic() - frame.received
    return _LIVE % (*frame.size, time.time() - age, 1000 * age)


class JsonlSink(LineSink):
    """Writes `<stem>.jsonl`."""

    def __init__(self, directory: Path, stem: str) -> None:
        super().__init__(directory, stem, suffix=".jsonl", lines_of=format_line)
