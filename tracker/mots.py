"""MOTS files as arrays: `frame id class height width rle`, one mask per line, separated by spaces.

The format is that of Voigtlaender et al., "MOTS: Multi-Object Tracking and Segmentation" (CVPR 2019) and of
its official reader (mots_tools, `mots_common/io.py`): frames from 1, rle as COCO's compressed counts, and no
pixel in two masks of a frame. Knows nothing of tracking, nor of how masks are scored.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tracker import rle
from tracker.errors import DetectionsError, SourceError
from tracker.motchallenge import MAX_FRAME

# All classes there are in the official files; IGNORED marks regions, in ground truth only.
CAR, PEDESTRIAN, IGNORED = 1, 2, 10

_FIELDS = ("frame", "id", "class", "height", "width")
_LEAST = (1, 0, 0, 1, 1)
_MOST = (MAX_FRAME, 2**63 - 1, 2**31 - 1, 2**16, 2**16)


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskRows:
    """The R rows of a file, in its order.

    frame: (R,) from 1. id, label: (R,). counts: R times COCO's compressed run lengths, each of a picture of
    size (width, height) in pixels; None where there are no rows.
    """

    frame: NDArray[np.int64]
    id: NDArray[np.int64]
    label: NDArray[np.int64]
    counts: list[bytes]
    size: tuple[int, int] | None

    def __len__(self) -> int:
        return len(self.frame)


def read_masks(path: Path) -> MaskRows:
    """All rows of a MOTS text file; blank lines are skipped, and an empty file has none.

    Raises SourceError when the file cannot be read, DetectionsError for its first line that is no MOTS row
    or of another size than those before.
    """
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DetectionsError(f"{path} is not text in ASCII, which MOTS files are") from error
    numbers: list[list[int]] = []
    counts: list[bytes] = []
    for number, line in enumerate(lines, start=1):
        fields = line.split()
        if not fields:
            continue
        try:
            row, text = _parse(fields)
            if numbers and row[3:] != numbers[0][3:]:
                raise DetectionsError(
                    f"a picture of {row[4]}×{row[3]}, but {numbers[0][4]}×{numbers[0][3]} in the lines before"
                )
        except DetectionsError as error:
            raise DetectionsError(f"{path}, line {number}: {error}") from error
        numbers.append(row)
        counts.append(text)
    table = np.array(numbers, np.int64).reshape(-1, len(_FIELDS))
    return MaskRows(
        frame=table[:, 0],
        id=table[:, 1],
        label=table[:, 2],
        counts=counts,
        size=(numbers[0][4], numbers[0][3]) if numbers else None,
    )


def _parse(fields: list[str]) -> tuple[list[int], bytes]:
    if len(fields) != len(_FIELDS) + 1:
        raise DetectionsError(f"{len(fields)} fields; a MOTS row has six: {' '.join(_FIELDS)} rle")
    row = []
    for name, text, least, most in zip(_FIELDS, fields, _LEAST, _MOST, strict=False):
        if not text.isdecimal() or not least <= int(text) <= most:
            raise DetectionsError(f"{name} is {text!r}; it must be a whole number from {least} to {most}")
        row.append(int(text))
    counts = fields[-1].encode()
    covered, area = int(rle.runs(counts).sum()), row[3] * row[4]
    if covered != area:
        raise DetectionsError(f"rle covers {covered} pixels, the picture has {row[4]}×{row[3]} = {area}")
    return row, counts
