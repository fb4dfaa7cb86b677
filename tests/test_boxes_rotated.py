"""IoU of turned boxes: by hand, against OpenCV's clipped polygons, and where edges coincide."""

from __future__ import annotations

import math

import cv2
import numpy as np
import pytest

from tracker.boxes import iou, rotated_iou


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 4, 2, 0), (0, 0, 4, 2, 0), 1),
        ((0, 0, 4, 2, 0.3), (0, 0, 4, 2, 0.3), 1),
        ((0, 0, 4, 2, 0.3), (0, 0, 4, 2, 0.3 + math.pi), 1),  # half a turn is none
        ((0, 0, 4, 2, 0), (0, 0, 2, 4, math.pi / 2), 1),  # a quarter of a turn exchanges the sides
        ((0, 0, 4, 2, 0), (0, 0, 4, 2, math.pi / 2), 4 / 12),
        ((0, 0, 2, 2, 0), (0, 0, 2, 2, math.pi / 4), 8 * (math.sqrt(2) - 1) / (8 - 8 * (math.sqrt(2) - 1))),
        ((0, 0, 2, 2, 0), (1, 0, 2, 2, 0), 1 / 3),
        ((0, 0, 2, 2, 0.7), (9, 0, 2, 2, 0), 0),
        ((0, 0, 8, 8, 0.2), (0.5, 0.5, 1, 1, 0.9), 1 / 64),  # inside
        ((0, 0, 0, 5, 0.2), (0, 0, 0, 5, 0.2), 0),
    ],
)
def test_by_hand(a: tuple[float, ...], b: tuple[float, ...], expected: float) -> None:
    assert rotated_iou(np.array(a, float), np.array(b, float)) == pytest.approx(expected, abs=1e-9)
    assert rotated_iou(np.array(b, float), np.array(a, float)) == pytest.approx(expected, abs=1e-9)


def test_as_opencv_clips_polygons() -> None:
    rng = np.random.default_rng(1)
    boxes = np.column_stack(
        (rng.random((60, 2)) * 40, rng.random((60, 2)) * 40 + 2, rng.random(60) * 7 - 3.5)
    )
    mine = rotated_iou(boxes[:, None], boxes[None])
    assert (mine > 0.05).sum() > 500
    for i, a in enumerate(boxes):
        for j, b in enumerate(boxes[:i]):
            first, second = (((x, y), (w, h), math.degrees(t)) for x, y, w, h, t in (a, b))
            kind, points = cv2.rotatedRectangleIntersection(first, second)
            inter = 0.0 if kind == cv2.INTERSECT_NONE else cv2.contourArea(cv2.convexHull(points))
            expected = inter / (a[2] * a[3] + b[2] * b[3] - inter)
            assert mine[i, j] == pytest.approx(expected, abs=5e-4)  # its own are float32
    np.testing.assert_allclose(mine, mine.T, atol=1e-12)


def test_without_angles_it_is_the_plain_iou() -> None:
    rng = np.random.default_rng(2)
    boxes = np.column_stack((rng.random((50, 2)) * 20, rng.random((50, 2)) * 20 + 1, np.zeros(50)))
    corners = np.hstack((boxes[:, :2] - boxes[:, 2:4] / 2, boxes[:, :2] + boxes[:, 2:4] / 2))
    np.testing.assert_allclose(
        rotated_iou(boxes[:, None], boxes[None]), iou(corners[:, None], corners[None]), atol=1e-12
    )


def test_nearly_coinciding_edges_count_once() -> None:
    """Where clipping polygons counts an edge twice or never: turns too small to see."""
    box = np.array([10, 10, 30, 8, 0.4])
    for turn in (0, 1e-15, 1e-12, 1e-9, 1e-7, -1e-9):
        assert rotated_iou(box, box + np.array([0, 0, 0, 0, turn])) == pytest.approx(1, abs=1e-5)


def test_no_boxes() -> None:
    assert rotated_iou(np.zeros((0, 1, 5)), np.zeros((1, 3, 5))).shape == (0, 3)
