"""Boxes convert there and back, overlap as geometry says, and every fit inverts exactly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from cython_bbox import bbox_overlaps

from tracker.association.lifecycle import corners, measurements
from tracker.boxes import (
    Array,
    Fit,
    fit_center,
    fit_corner,
    fit_corner_rounded,
    fit_stretch,
    iou,
    xywh_to_xyxy,
    xyxy_to_xywh,
)


def xyxy_to_xyah(xyxy: Array) -> Array:
    """The tracker's own conversion, which keeps coordinates in rows, on any leading shape."""
    return measurements(xyxy.reshape(-1, 4)).T.reshape(xyxy.shape)


def xyah_to_xyxy(xyah: Array) -> Array:
    return corners(xyah.reshape(-1, 4).T).reshape(xyah.shape)


FITS = [fit_corner, fit_corner_rounded, fit_center, fit_stretch]


# Conversions


@pytest.mark.parametrize(
    ("xyxy", "xywh", "xyah"),
    [
        ((0, 0, 10, 20), (0, 0, 10, 20), (5, 10, 0.5, 20)),
        ((-4, 2, 2, 5), (-4, 2, 6, 3), (-1, 3.5, 2, 3)),
        ((7, 7, 7, 9), (7, 7, 0, 2), (7, 8, 0, 2)),
        ((7, 7, 7, 7), (7, 7, 0, 0), (7, 7, 0, 0)),
        ((1e6, 1e6, 1e6 + 1, 1e6 + 4), (1e6, 1e6, 1, 4), (1e6 + 0.5, 1e6 + 2, 0.25, 4)),
    ],
    ids=["plain", "left of the image", "no width", "a point", "far away"],
)
def test_one_box_in_three_formats(
    xyxy: tuple[float, ...], xywh: tuple[float, ...], xyah: tuple[float, ...]
) -> None:
    box = np.array(xyxy, np.float64)
    np.testing.assert_array_equal(xyxy_to_xywh(box), xywh)
    np.testing.assert_array_equal(xywh_to_xyxy(np.array(xywh)), xyxy)
    np.testing.assert_array_equal(xyxy_to_xyah(box), xyah)
    np.testing.assert_array_equal(xyah_to_xyxy(np.array(xyah)), xyxy)


@pytest.mark.parametrize("shape", [(4,), (0, 4), (1, 4), (50, 4), (2, 3, 4), (2, 0, 4)], ids=str)
def test_round_trips_keep_any_leading_shape(shape: tuple[int, ...]) -> None:
    low = np.random.default_rng(1).uniform(-500, 500, (*shape[:-1], 2))
    xyxy = np.concatenate((low, low + np.random.default_rng(2).uniform(0.1, 300, low.shape)), axis=-1)
    for there, back in ((xyxy_to_xywh, xywh_to_xyxy), (xyxy_to_xyah, xyah_to_xyxy)):
        assert there(xyxy).shape == shape
        np.testing.assert_allclose(back(there(xyxy)), xyxy, rtol=1e-12, atol=1e-10)


def test_a_box_without_height_has_aspect_0() -> None:
    np.testing.assert_array_equal(xyxy_to_xyah(np.array([[10.0, 5, 30, 5]])), [[20, 5, 0, 0]])


# Intersection over union


@pytest.mark.parametrize(
    ("a", "b", "as_points", "as_pixels"),
    [
        ((0, 0, 10, 10), (0, 0, 10, 10), 1, 1),
        ((0, 0, 10, 10), (5, 0, 15, 10), 1 / 3, 6 / 16),
        ((0, 0, 10, 10), (2, 2, 4, 4), 4 / 100, 9 / 121),
        ((0, 0, 10, 10), (10, 0, 20, 10), 0, 1 / 21),
        ((0, 0, 10, 10), (11, 0, 20, 10), 0, 0),
        ((0, 0, 10, 10), (10, 10, 20, 20), 0, 1 / 241),
        ((0, 0, 10, 10), (50, 50, 60, 60), 0, 0),
        ((5, 5, 5, 5), (5, 5, 5, 5), 0, 1),
        ((0, 5, 10, 5), (0, 5, 10, 5), 0, 1),
        ((0, 0, 10, 10), (5, 5, 5, 5), 0, 1 / 121),
        ((10, 10, 0, 0), (0, 0, 10, 10), 0, 0),
    ],
    ids=[
        "itself",
        "half",
        "contained",
        "edges touch",
        "a pixel between",
        "corners touch",
        "far apart",
        "two points on one spot",
        "two flat boxes",
        "a point inside",
        "inside out",
    ],
)
def test_known_overlaps(
    a: tuple[float, ...], b: tuple[float, ...], as_points: float, as_pixels: float
) -> None:
    first, second = np.array([a], np.float64), np.array([b], np.float64)
    for pixel, expected in ((0.0, as_points), (1.0, as_pixels)):
        np.testing.assert_allclose(iou(first, second, pixel=pixel), [expected], rtol=1e-12)
        np.testing.assert_allclose(iou(second, first, pixel=pixel), [expected], rtol=1e-12)


@pytest.mark.parametrize("grid", [1.0, 1e-3], ids=["whole pixels, many touching", "fractions"])
def test_inclusive_pixels_are_cython_bbox(grid: float) -> None:
    rng = np.random.default_rng(3)
    low = np.round(rng.uniform(0, 60, (2, 200, 2)) / grid) * grid
    size = np.round(rng.uniform(0, 20, (2, 200, 2)) / grid) * grid
    a, b = np.concatenate((low, low + size), axis=2)
    ours = iou(a[:, None], b[None], pixel=1.0)
    np.testing.assert_allclose(ours, bbox_overlaps(a, b), rtol=1e-12)
    assert 0 < (ours > 0).sum() < ours.size


@pytest.mark.parametrize(
    ("a", "b", "shape"),
    [
        ((3, 4), (3, 4), (3,)),
        ((3, 1, 4), (5, 4), (3, 5)),
        ((0, 4), (0, 4), (0,)),
        ((0, 1, 4), (5, 4), (0, 5)),
    ],
    ids=["row by row", "all with all", "none", "none with five"],
)
def test_overlaps_broadcast(a: tuple[int, ...], b: tuple[int, ...], shape: tuple[int, ...]) -> None:
    assert iou(np.zeros(a), np.zeros(b)).shape == shape


# Fitting an image into a network's input


@pytest.mark.parametrize(
    ("source", "target", "resized"),
    [
        ((1920, 1080), (640, 640), (640, 360)),
        ((500, 375), (416, 416), (416, 312)),
        ((333, 500), (640, 640), (426, 640)),  # 426.24 is cut off
        ((599, 1000), (400, 400), (239, 400)),  # and so is 239.6
        ((10, 10), (20, 30), (20, 20)),
        ((1000, 1), (50, 50), (50, 1)),  # never nothing
    ],
)
def test_yolox_truncates_and_starts_in_the_corner(
    source: tuple[int, int], target: tuple[int, int], resized: tuple[int, int]
) -> None:
    assert fit_corner(source, target) == Fit(source, target, resized, (0, 0))


@pytest.mark.parametrize(
    ("source", "resized"),
    [((640, 483), (320, 242)), ((640, 480), (320, 240)), ((599, 1000), (192, 320)), ((1000, 1), (320, 1))],
)
def test_mmdet_rounds_halves_up(source: tuple[int, int], resized: tuple[int, int]) -> None:
    assert fit_corner_rounded(source, (320, 320)) == Fit(source, (320, 320), resized, (0, 0))


@pytest.mark.parametrize(
    ("source", "target", "resized", "offset"),
    [
        ((1920, 1080), (1088, 608), (1081, 608), (3, 0)),  # 1080.9 wide; 3.5 left over on each side
        ((768, 576), (1088, 608), (811, 608), (138, 0)),  # 810.7 wide; 138.5
        ((480, 640), (1088, 608), (456, 608), (316, 0)),
        ((1088, 300), (1088, 608), (1088, 300), (0, 154)),
        ((1088, 301), (1088, 608), (1088, 301), (0, 153)),  # 153.5
        ((1088, 608), (1088, 608), (1088, 608), (0, 0)),
        ((5, 2), (100, 1), (2, 1), (49, 0)),  # 2.5 rounds to even
        ((7, 2), (100, 1), (4, 1), (48, 0)),  # and so does 3.5
        ((1000, 1), (50, 50), (50, 1), (0, 24)),
    ],
)
def test_fairmot_rounds_and_centres(
    source: tuple[int, int], target: tuple[int, int], resized: tuple[int, int], offset: tuple[int, int]
) -> None:
    assert fit_center(source, target) == Fit(source, target, resized, offset)


def test_stretching_fills_the_input() -> None:
    assert fit_stretch((640, 480), (100, 300)) == Fit((640, 480), (100, 300), (100, 300), (0, 0))


@pytest.mark.parametrize("fit", FITS)
def test_to_source_inverts_what_the_fit_did(
    fit: Callable[[tuple[int, int], tuple[int, int]], Fit],
) -> None:
    rng = np.random.default_rng(4)
    for _ in range(300):
        source, target = (tuple(int(n) for n in rng.integers(1, 3000, 2)) for _ in range(2))
        placed = fit(source, target)
        assert all(o >= 0 for o in placed.offset)
        assert all(o + r <= t for o, r, t in zip(placed.offset, placed.resized, target, strict=True))

        xyxy = rng.uniform(-100, 3100, (5, 4))  # (5, 4) source pixels, some outside the image
        scale, shift = np.divide(placed.resized, source), np.array(placed.offset)
        seen = xyxy * np.tile(scale, 2) + np.tile(shift, 2)
        np.testing.assert_allclose(placed.to_source(seen), xyxy, rtol=1e-9, atol=1e-6)

        whole = np.array([[*shift, *(shift + placed.resized)]], np.float64)
        np.testing.assert_allclose(placed.to_source(whole), [[0, 0, *source]], rtol=1e-12)


@pytest.mark.parametrize("fit", FITS)
def test_to_source_takes_zero_boxes(fit: Callable[[tuple[int, int], tuple[int, int]], Fit]) -> None:
    assert fit((640, 480), (416, 416)).to_source(np.empty((0, 4), np.float32)).shape == (0, 4)
