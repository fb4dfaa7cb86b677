"""MOTChallenge files as arrays: rows of boxes, detections with embeddings, seqinfo.ini.

Reads numbers and refuses what no tracker or evaluation may accept. Knows nothing of tracking, of
videos, or of what the columns after the confidence mean.

The format is that of motchallenge.net/instructions: one box per line, `frame,id,x,y,w,h,conf[,…]`,
frames from 1, x and y the top-left corner in pixels.
"""

from __future__ import annotations

import configparser
import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tracker.boxes import xywh_to_xyxy
from tracker.errors import ConfigError, DetectionsError, SourceError
from tracker.types import Detections

COLUMNS = 7  # frame, id, x, y, w, h, conf
# Eleven days at 10 frames per second. Frames without rows are frames too, so a timestamp in the frame
# column would otherwise mean billions of them.
MAX_FRAME = 10_000_000

Rows = NDArray[np.float64]


def read_rows(path: Path) -> Rows:
    """The numbers of a MOT text file or of a .npy with the same columns, in file order.

    Text may be separated by commas or white space; blank lines are skipped. An empty file is (0, 7).

    Returns (R, C) float64, C ≥ 7, everything finite, column 0 whole frame numbers from 1.
    Raises SourceError when the file cannot be read, DetectionsError for its first row that breaks these
    rules.
    """
    rows, lines = _read_npy(path) if path.suffix == ".npy" else _read_text(path)
    if rows.shape[1] < COLUMNS:
        raise DetectionsError(
            f"{path} has {rows.shape[1]} columns, at least {COLUMNS} are needed: frame,id,x,y,w,h,conf"
        )
    finite = np.isfinite(rows)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise DetectionsError(
            f"{path}, line {lines[row]}: column {column + 1} is {rows[row, column]}, not a finite number; "
            "remove the row or correct what wrote it"
        )
    frames = rows[:, 0]
    wrong = (frames < 1) | (frames > MAX_FRAME) | (frames % 1 != 0)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DetectionsError(
            f"{path}, line {lines[row]}: frame {frames[row]:.15g} is not a whole number from 1 to "
            f"{MAX_FRAME}; "
            "MOTChallenge counts frames from 1"
        )
    return rows


def read_detections(
    path: Path, *, embedding_dim: int | None = None, last_frame: int = 0
) -> Iterator[tuple[int, Detections]]:
    """Detections of every frame from 1 to the last, frames without any included, row order kept.

    embedding_dim: how many of the last columns are the embedding; 0 for none. By default all columns
        after the confidence of a .npy are, and none of a text file (there they are world coordinates).
    last_frame: go on to this frame if the rows end earlier; the sequence's length, usually.

    Yields (frame number from 1, detections: label 0, float32 throughout). Corners are computed in
    float64 and then rounded, as the official results this project compares itself with were made.
    Raises what `read_rows` raises, DetectionsError for a negative width or height, and ConfigError for an
    embedding_dim the columns cannot hold; all of it at the call, before the first frame.
    """
    rows = read_rows(path)
    count, columns = rows.shape
    if embedding_dim is None:
        embedding_dim = columns - COLUMNS if path.suffix == ".npy" else 0
    room = columns - COLUMNS if count else embedding_dim  # no rows: the empty arrays take any shape
    if not 0 <= embedding_dim <= room:
        raise ConfigError(
            f"embedding dimension {embedding_dim} is impossible: {path} has {columns - COLUMNS} columns "
            f"after the first {COLUMNS}"
        )
    if not count:
        rows = np.empty((0, COLUMNS + embedding_dim))
    negative = (rows[:, 4:6] < 0).any(axis=1)
    if negative.any():
        row = rows[np.argmax(negative)]
        raise DetectionsError(
            f"{path}, frame {row[0]:.0f}: a box is {row[4]:g} × {row[5]:g}, sizes cannot be negative; "
            "columns 3 to 6 are x,y,w,h, not corners"
        )
    if (np.diff(rows[:, 0]) < 0).any():
        rows = rows[np.argsort(rows[:, 0], kind="stable")]
    return _frames(rows, embedding_dim, max(last_frame, int(rows[-1, 0]) if count else 0))


def _frames(rows: Rows, embedding_dim: int, last: int) -> Iterator[tuple[int, Detections]]:
    """Views of the sorted rows, frame by frame."""
    xyxy = xywh_to_xyxy(rows[:, 2:6]).astype(np.float32)  # (R, 4)
    score = rows[:, 6].astype(np.float32)
    label = np.zeros(len(rows), np.int64)
    embedding = rows[:, -embedding_dim:].astype(np.float32) if embedding_dim else None  # (R, D)
    starts = np.searchsorted(rows[:, 0], np.arange(1, last + 2)).tolist()
    for frame in range(1, last + 1):
        part = slice(starts[frame - 1], starts[frame])
        yield (
            frame,
            Detections(
                xyxy=xyxy[part],
                score=score[part],
                label=label[part],
                embedding=None if embedding is None else embedding[part],
            ),
        )


def _read_text(path: Path) -> tuple[Rows, NDArray[np.int64]]:
    """Rows and the line each stands on."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DetectionsError(f"{path} is not text; arrays need the suffix .npy") from error
    values, lines, width = array("d"), array("q"), 0
    for number, line in enumerate(text.splitlines(), start=1):
        fields = line.rstrip(", \t").split(",") if "," in line else line.split()
        if not fields:
            continue
        width = width or len(fields)
        if len(fields) != width:
            raise DetectionsError(
                f"{path}, line {number}: {len(fields)} columns, but {width} in the lines before; "
                "is the file cut off or two files in one?"
            )
        try:
            values.extend(map(float, fields))
        except ValueError as error:
            raise DetectionsError(
                f"{path}, line {number}: {error.args[0].partition(': ')[2]} is not a number"
            ) from error
        lines.append(number)
    rows = np.frombuffer(values, np.float64).reshape(len(lines), width or COLUMNS)
    return rows, np.frombuffer(lines, np.int64)


def _read_npy(path: Path) -> tuple[Rows, NDArray[np.int64]]:
    """Rows and their numbers from 1."""
    try:
        rows = np.load(path, allow_pickle=False)  # a pickle could run any code
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        raise DetectionsError(
            f"{path} is not a plain array of numbers ({error}); save one with numpy.save, without pickle"
        ) from error
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.dtype.kind not in "iuf":
        raise DetectionsError(
            f"{path} holds {getattr(rows, 'dtype', 'an archive')} of shape {getattr(rows, 'shape', ())}; "
            "numbers of shape (rows, columns) are needed"
        )
    return rows.astype(np.float64), np.arange(1, len(rows) + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeqInfo:
    """What a seqinfo.ini says. length: frames. frame_rate: per second. size: (width, height) in pixels."""

    name: str
    frame_rate: float
    length: int
    size: tuple[int, int]


def read_seqinfo(path: Path) -> SeqInfo:
    """A MOTChallenge seqinfo.ini.

    Raises SourceError when it cannot be read, ConfigError for a missing or impossible entry.
    """
    ini = configparser.ConfigParser(interpolation=None)
    try:
        ini.read_string(path.read_text(encoding="utf-8-sig"), source=str(path))
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    except (configparser.Error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not an .ini file: {str(error).splitlines()[0]}") from error

    def positive(key: str) -> float:
        text = ini.get("Sequence", key, fallback="")
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not 0 < value < math.inf:
            raise ConfigError(f"{path}: [Sequence] needs {key}=N with N > 0, got {text or 'nothing'!r}")
        return value

    def whole(key: str) -> int:
        value = positive(key)
        if value % 1 != 0:
            raise ConfigError(f"{path}: [Sequence] {key}={value} is not a whole number")
        return int(value)

    return SeqInfo(
        name=ini.get("Sequence", "name", fallback=path.parent.name),
        frame_rate=positive("frameRate"),
        length=whole("seqLength"),
        size=(whole("imWidth"), whole("imHeight")),
    )
