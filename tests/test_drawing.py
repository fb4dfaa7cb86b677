"""Stories of drawn tracks: colours, trails, boxes and labels on an image."""

from __future__ import annotations

import numpy as np
import pytest
from results import tracks_of

from tracker.sinks.drawing import Painter, Trails, colours
from tracker.types import Tracks


def test_colours_are_stable_far_apart_and_light_enough_for_dark_ink() -> None:
    ids = np.arange(1, 1001)
    shades = colours(ids)
    assert (colours(ids[::-1])[::-1] == shades).all()
    neighbours = [
        np.linalg.norm(shades[k:].astype(int) - shades[: len(ids) - k], axis=1) for k in range(1, 8)
    ]
    assert min(distances.min() for distances in neighbours) > 40
    linear = ((shades / 255 + 0.055) / 1.055) ** 2.4
    luminance = linear @ (0.0722, 0.7152, 0.2126)
    assert ((luminance.min() + 0.05) / (0.01 + 0.05)) > 4.5  # WCAG's contrast for text


def test_trails_forget_vanished_ids_and_stay_small_for_ever() -> None:
    trails = Trails(frames=20)
    for frame in range(2000):
        trails.add(np.arange(3) + 3 * frame, np.zeros((3, 2)))
    assert len(trails) == 60
    for _ in range(20):
        trails.add(np.empty(0, np.int64), np.empty((0, 2)))
    assert len(trails) == 0
    points, starts, ids, freshness = trails.strokes()
    assert len(points) == len(starts) == len(ids) == len(freshness) == 0


def test_trails_fade_from_now_to_then() -> None:
    trails = Trails(frames=16)
    for frame in range(16):
        trails.add(np.array([5, 2]), np.array([[frame, 0], [frame, 9]], np.float64))
    points, starts, ids, freshness = trails.strokes()
    assert ids.tolist() == [2] * 8 + [5] * 8
    assert points[:16, 1].tolist() == [9] * 16
    assert points[16:, 0].tolist() == list(range(16))
    assert starts.tolist() == list(range(0, 32, 2))
    assert freshness.tolist() == [k / 8 for k in range(1, 9)] * 2


def drawn(size: tuple[int, int], tracks: Tracks) -> np.ndarray:
    image = np.full((size[1], size[0], 3), 128, np.uint8)
    Painter(frame_rate=10).draw(image, tracks)
    return image


@pytest.mark.parametrize("size", [(480, 360), (1920, 1080)])
def test_a_box_is_drawn_in_its_colour_where_it_is(size: tuple[int, int]) -> None:
    x1, y1, x2, y2 = (round(v) for v in np.array([0.25, 0.5, 0.5, 0.75]) * np.tile(size, 2))
    image = drawn(size, tracks_of((9, x1, y1, x2, y2, 0.9, 0)))
    shade = colours(np.array([9]))[0].astype(int)
    for row, column in ((y2, x1 + 40), ((y1 + y2) // 2, x1), ((y1 + y2) // 2, x2)):
        assert np.abs(image[row, column] - shade).max() <= 30
    assert (image[(y1 + y2) // 2, (x1 + x2) // 2] == 128).all()


@pytest.mark.parametrize(
    "box",
    [(-50, -40, -10, -5), (700, 10, 720, 40), (10, 400, 30, 450), (1e9, 1e9, 2e9, 2e9), (-9e9, 0, -8e9, 9)],
)
def test_a_box_outside_leaves_no_mark(box: tuple[float, ...]) -> None:
    assert (drawn((480, 360), tracks_of((1, *box, 0.9, 0))) == 128).all()


@pytest.mark.parametrize("corner", [(0, 0), (470, 0), (0, 350), (470, 350), (-5, 180)])
def test_a_label_stays_inside_the_image(corner: tuple[int, int]) -> None:
    x, y = corner
    image = drawn((480, 360), tracks_of((1, x, y, x + 10, y + 10, 0.9, 0)))
    shade = colours(np.array([1]))[0]
    assert (image == shade).all(axis=-1).sum() > 60 * 10  # most of a chip, whatever the corner


def test_where_labels_collide_every_id_remains() -> None:
    """Two people side by side: the nearer keeps its words, the other its number."""
    far, near = (1, 100, 100, 130, 180, 0.9, 0), (2, 140, 101, 170, 190, 0.9, 0)
    alone = [
        (drawn((480, 360), tracks_of(row)) == colours(np.array([row[0]]))[0]).all(axis=-1)
        for row in (far, near)
    ]
    both = drawn((480, 360), tracks_of(far, near))
    chips = [(both == colours(np.array([i]))[0]).all(axis=-1)[78:98].sum() for i in (1, 2)]
    assert chips[1] == alone[1][78:98].sum()
    assert 50 < chips[0] < alone[0][78:98].sum() / 2
