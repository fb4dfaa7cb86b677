"""Run lengths are COCO's to the character, and what cannot be run lengths is refused."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tracker import rle
from tracker.errors import DetectionsError


def painted(crop: np.ndarray, corner: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    picture = np.zeros(size[::-1], np.uint8, order="F")
    picture[corner[1] :, corner[0] :][: len(crop), : crop.shape[1]] = crop
    return picture


def test_every_mask_reads_as_pycocotools_writes_it() -> None:
    """Sizes, places and densities at random; some fill the picture, or run over its columns' ends."""
    coco = pytest.importorskip("pycocotools.mask", reason="needs pycocotools, which comes with tracker[eval]")
    random = np.random.default_rng(0)
    for _ in range(500):
        size = tuple(random.integers(1, 60, 2).tolist())
        extent = tuple(int(random.integers(1, side + 1)) for side in size)
        corner = tuple(int(random.integers(0, a - b + 1)) for a, b in zip(size, extent, strict=True))
        crop = random.random(extent[::-1]) < random.choice([0, 0.05, 0.5, 0.95, 1])
        picture = painted(crop, corner, size)
        text = rle.encode(crop, corner, size)
        assert text == coco.encode(picture)["counts"]
        np.testing.assert_array_equal(rle.decode(text, size), picture)


@pytest.mark.parametrize(
    ("crop", "corner", "text"),
    [
        (np.zeros((0, 0), bool), (0, 0), b"<"),
        (np.ones((1, 1), bool), (0, 0), b"01;"),
        (np.ones((3, 4), bool), (0, 0), b"0<"),  # no last run where the mask reaches the end
        (np.ones((2, 2), bool), (1, 1), b"42102"),
        (np.array([[0, 1], [0, 0], [1, 0]], bool), (1, 0), b"525"),  # up into the next column
    ],
)
def test_golden_texts(crop: np.ndarray, corner: tuple[int, int], text: bytes) -> None:
    """Of pictures of 4×3 pixels, as pycocotools 2.0.11 writes them."""
    assert rle.encode(crop, corner, (4, 3)) == text


def test_a_run_longer_than_two_to_the_thirty_needs_no_picture() -> None:
    counts = np.array([2**31, 1, 2**30 + 7, 2**20, 3], np.int64)
    np.testing.assert_array_equal(rle.runs(rle.compress(counts)), counts)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"5 5", "characters that run lengths do not"),
        (b"5\xff5", "characters that run lengths do not"),
        (b"5P", "end within a number"),
        (b"P" * 20 + b"1", "longer than any picture"),
        (b"52O52", "negative length"),
        (b"52", "cover 7 pixels, the picture has 12"),
        (b"", "cover 0 pixels"),
    ],
)
def test_what_is_no_mask_of_that_picture_is_refused(text: bytes, says: str) -> None:
    with pytest.raises(DetectionsError, match=re.escape(says)):
        rle.decode(text, (4, 3))
