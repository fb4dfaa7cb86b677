"""Masks as COCO's compressed run lengths: the `counts` of its annotations, of MOTS, of pycocotools.

A picture is read column by column; runs of background and object take turns, background first. From the
fourth on a run is told by how much it differs from the one two before. Each number is spelled in groups of
five bits, the least significant first, with a sixth bit for "more follows", as the characters "0" to "o".
That is pycocotools' `maskApi.c` (rleEncode, rleToString, rleFrString; P. Dollár, T.-Y. Lin), to the
character; but what is outside a mask's box is not looked at here, which for objects in a large picture is
most of the work.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracker.errors import DetectionsError

Counts = NDArray[np.int64]
Pixels = NDArray[np.bool_]

_BITS, _MORE, _FIRST = 5, 0x20, ord("0")
_GROUPS = 7  # of five bits: a picture of 2**34 pixels
_SHIFTS = _BITS * np.arange(_GROUPS)
_LIMITS = 1 << (_SHIFTS[1:] - 1)  # what is below the k-th needs k groups, one bit being the sign


def encode(crop: Pixels, corner: tuple[int, int], size: tuple[int, int]) -> bytes:
    """Compressed counts of a mask whose pixels all lie in `crop`.

    crop: (h, w). corner: x and y of its top left pixel in the picture, whose (width, height) is size; it must
    lie inside. Everything is in pixels.
    """
    height, width = crop.shape
    # A row of background on both ends of every column: so each run has two edges within its column.
    columns = np.zeros((width, height + 2), np.bool_)
    columns[:, 1:-1] = crop.T
    flat = columns.reshape(-1)
    column, row = np.divmod(np.flatnonzero(flat[1:] != flat[:-1]) + 1, height + 2)
    edges = (corner[0] + column) * size[1] + corner[1] + row - 1
    # A run from the picture's lower edge goes on at its upper one, in the next column.
    joined = np.flatnonzero(edges[1:] == edges[:-1])
    edges = np.delete(edges, np.concatenate((joined, joined + 1)))
    area = size[0] * size[1]
    end = [] if len(edges) and edges[-1] == area else [area]
    positions: Counts = np.concatenate(([0], edges, end)).astype(np.int64)
    return compress(positions[1:] - positions[:-1])


def compress(counts: Counts) -> bytes:
    """(R,) run lengths → their text."""
    told = counts.copy()
    told[3:] -= counts[1:-2]
    groups = np.searchsorted(_LIMITS, np.where(told < 0, ~told, told), side="right") + 1
    characters = (told[:, None] >> _SHIFTS) & (_MORE - 1)
    place = np.arange(_GROUPS)
    characters[place < groups[:, None] - 1] |= _MORE
    return (characters[place < groups[:, None]] + _FIRST).astype(np.uint8).tobytes()


def runs(text: bytes) -> Counts:
    """The text → (R,) run lengths. Raises DetectionsError for what `compress` cannot have written."""
    characters = np.frombuffer(text, np.uint8).astype(np.int64) - _FIRST
    if not len(characters):
        return np.empty(0, np.int64)
    if characters.min() < 0 or characters.max() >= 2 * _MORE or characters[-1] & _MORE:
        raise DetectionsError("counts have characters that run lengths do not, or end within a number")
    last = np.flatnonzero(characters & _MORE == 0)
    first = np.concatenate(([0], last[:-1] + 1))
    groups = last - first + 1
    if groups.max() > _GROUPS:
        raise DetectionsError("counts have a run that is longer than any picture")
    place = np.arange(len(characters)) - np.repeat(first, groups)
    told = np.add.reduceat((characters & (_MORE - 1)) << (_BITS * place), first)
    told -= np.where(characters[last] & (_MORE >> 1), 1 << (_BITS * groups), 0)
    for parity in (1, 2):
        told[parity::2] = np.cumsum(told[parity::2])
    if (told < 0).any():
        raise DetectionsError("counts have a run of negative length")
    return told


def decode(text: bytes, size: tuple[int, int]) -> Pixels:
    """The whole picture, (height, width) for size (width, height). Raises DetectionsError if they differ."""
    counts, (width, height) = runs(text), size
    if counts.sum() != width * height:
        raise DetectionsError(f"counts cover {counts.sum()} pixels, the picture has {width * height}")
    pixels: NDArray[Any] = np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T
    return pixels
