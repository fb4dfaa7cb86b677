"""Counting lines and zones: who crosses, who does not, and the demo's pedestrians."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cameras import ROOT
from results import tracks_of

from tracker.counters import MAX_COUNTERS, Counters, shape_of
from tracker.counting import Count, Shape, distance_to_line, distance_to_zone, feet
from tracker.errors import ConfigError, SinkError
from tracker.types import Frame

SIZE = (100, 100)
LEVEL = Shape(kind="line", name="level", points=((0.2, 0.5), (0.8, 0.5)))  # drawn from left to right
SQUARE = Shape(kind="zone", name="square", points=((0.2, 0.2), (0.8, 0.2), (0.8, 0.8), (0.2, 0.8)))


def walk(
    shape: Shape, *ways: list[tuple[float, float] | None], height: float = 10.0, size: tuple[int, int] = SIZE
) -> Count:
    """Each way is one track's foot, frame by frame, in a picture of 100×100; None while it is not seen."""
    count = Count(shape)
    scale = size[0] / 100
    for index in range(len(ways[0])):
        rows = [
            (number, x - 2, y - height, x + 2, y, 0.9, number % 2)
            for number, way in enumerate(ways)
            if (foot := way[index]) is not None
            for x, y in [foot]
        ]
        scaled = [(row[0], *(scale * each for each in row[1:5]), *row[5:]) for row in rows]
        count.update(Frame(index=index, pts_seconds=index / 10, size=size), tracks_of(*scaled))
    return count


def along(*stops: tuple[float, float], steps: int = 10) -> list[tuple[float, float] | None]:
    shares = np.linspace(0, len(stops) - 1, steps * (len(stops) - 1) + 1)
    x, y = (np.interp(shares, range(len(stops)), [stop[k] for stop in stops]).tolist() for k in (0, 1))
    return list(zip(x, y, strict=True))


@pytest.mark.parametrize(
    ("way", "into", "out"),
    [
        (along((50, 20), (50, 80)), 1, 0),  # to the right hand of one who walks along the line
        (along((50, 80), (50, 20)), 0, 1),
        (along((50, 20), (50, 80), (50, 20)), 1, 1),
        (along((50, 20), (50, 45), (50, 20)), 0, 0),  # turns back before it
        (along((10, 20), (10, 80)), 0, 0),  # passes beyond its end
        (along((10, 20), (10, 80), (50, 80), (50, 20)), 0, 1),  # around the end, then across
        (along((25, 40), (75, 60)), 1, 0),
        ([(50, 20), (50, 80)], 1, 0),  # from one frame to the next
        ([(50, 45), None, None, None, (50, 55)], 1, 0),  # hidden while it crosses
        ([(50, 50), (50, 60)], 0, 0),  # began on the line: nobody knows where it came from
    ],
)
def test_a_line_counts_who_crosses_it(way: list[tuple[float, float] | None], into: int, out: int) -> None:
    count = walk(LEVEL, way)
    assert (count.into.total(), count.out.total()) == (into, out)


def test_who_walks_along_a_line_bobbing_is_not_counted() -> None:
    bobbing = [(20 + step, 50 + (0.9 if step % 2 else -0.9)) for step in range(60)]
    assert walk(LEVEL, [*bobbing]).totals() == {"name": "level", "in": 0, "out": 0}
    counted_once = walk(LEVEL, [(20.0, 40.0), *bobbing, (80.0, 60.0), (80.0, 60.0)])
    assert counted_once.totals() == {"name": "level", "in": 1, "out": 0}


def test_a_line_turned_around_swaps_in_and_out() -> None:
    turned = Shape(kind="line", name="turned", points=LEVEL.points[::-1])
    assert walk(turned, along((50, 20), (50, 80))).totals() == {"name": "turned", "in": 0, "out": 1}


def test_classes_are_counted_apart() -> None:
    count = walk(LEVEL, along((40, 20), (40, 80)), along((50, 20), (50, 80)), along((60, 20), (60, 80)))
    assert count.into == {"person": 2, "car": 1}


@pytest.mark.parametrize(
    ("way", "into", "out", "inside"),
    [
        (along((50, 5), (50, 50)), 1, 0, 1),
        (along((50, 5), (50, 50), (50, 99)), 1, 1, 0),
        (along((50, 50), (50, 99)), 0, 1, 0),  # appeared inside
        ([(50, 50), (50, 50)], 0, 0, 1),
        ([(50, 50), None], 0, 0, 0),
        (along((5, 5), (95, 5), (95, 95)), 0, 0, 0),  # around it
    ],
)
def test_a_zone_counts_who_comes_and_goes(
    way: list[tuple[float, float] | None], into: int, out: int, inside: int
) -> None:
    assert walk(SQUARE, way).totals() == {"name": "square", "in": into, "out": out, "inside": inside}


def test_who_stands_at_the_border_of_a_zone_is_counted_once() -> None:
    trembling = [(20 + (0.5 if step % 2 else -0.5), 50.0) for step in range(40)]
    assert walk(SQUARE, [(10.0, 50.0), *trembling]).totals()["in"] == 1


def test_feet_below_the_picture_stand_at_its_edge() -> None:
    below = tracks_of((1, 40, 60, 60, 140, 0.9, 0))
    assert feet(below, SIZE).tolist() == [[50, 99]]
    whole = Shape(kind="zone", name="all", points=((0, 0), (1, 0), (1, 1), (0, 1)))
    assert walk(whole, [(50, 140)], height=80).inside == 1


def test_a_camera_that_changes_its_resolution_changes_no_count() -> None:
    count = Count(LEVEL)
    for index, (size, y) in enumerate([((100, 100), 40), ((200, 200), 90), ((200, 200), 120)]):
        frame = Frame(index=index, pts_seconds=index, size=size)
        count.update(frame, tracks_of((1, size[0] / 2 - 2, y - 10, size[0] / 2 + 2, y, 0.9, 0)))
    assert count.totals() == {"name": "level", "in": 1, "out": 0}


def test_nobody_is_remembered_for_ever() -> None:
    count = Count(LEVEL)
    for index in range(2000):
        frame = Frame(index=index, pts_seconds=float(index), size=SIZE)
        count.update(frame, tracks_of((index + 1, 48, 30, 52, 40, 0.9, 0)))
    assert len(count._ids) <= 31


def test_distances_have_signs() -> None:
    points = np.array([[50.0, 60.0], [50.0, 40.0]])
    assert distance_to_line(points, np.array([[0.0, 50.0], [100.0, 50.0]])).tolist() == [10, -10]
    ell = np.array([[0, 0], [40, 0], [40, 20], [20, 20], [20, 40], [0, 40]], np.float64)
    assert distance_to_zone(np.array([[10.0, 30.0], [30.0, 30.0], [50.0, 10.0]]), ell) == pytest.approx(
        [10, -10, -10]
    )
    assert distance_to_zone(np.empty((0, 2)), ell).shape == (0,)


def test_the_demos_pedestrians_are_counted_as_its_ground_truth_has_them() -> None:
    """By hand: the side of each pedestrian's first and last foot, wherever nobody turns back at the line."""
    rows = np.loadtxt(ROOT / "videos" / "demo_gt.txt", delimiter=",")
    rows = rows[rows[:, 7] == 1]
    shape = Shape(kind="line", name="gate", points=((0, 0.5), (1, 0.35)))
    count = Count(shape)
    for index in range(500):
        found = [
            (row[1], row[2], row[3], row[2] + row[4], row[3] + row[5], 1, 0)
            for row in rows[rows[:, 0] == index + 1]
        ]
        count.update(Frame(index=index, pts_seconds=index / 25, size=(640, 360)), tracks_of(*found))
    by_hand = [0, 0]
    for number in np.unique(rows[:, 1]):
        way = rows[rows[:, 1] == number]
        x, y = way[[0, -1], 2] + way[[0, -1], 4] / 2, (way[:, 3] + way[:, 5])[[0, -1]]
        first, last = y > 360 * (0.5 - 0.15 * x / 640)
        by_hand[0] += bool(last and not first)
        by_hand[1] += bool(first and not last)
    assert [count.into.total(), count.out.total()] == by_hand == [4, 4]


# Shapes and their keeping


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"kind": "line", "name": "x", "points": [[0, 0]]}, "a line has 2"),
        ({"kind": "zone", "name": "x", "points": [[0, 0], [1, 1]]}, "a zone 3 to 32"),
        ({"kind": "ring", "name": "x", "points": [[0, 0], [1, 1]]}, "a line has 2"),
        ({"kind": "line", "name": "", "points": [[0, 0], [1, 1]]}, "name has 1 to 40"),
        ({"kind": "line", "name": "a\nb", "points": [[0, 0], [1, 1]]}, "printable"),
        ({"kind": "line", "name": "x", "points": [[0, 0], [1, 1.01]]}, "between 0 and 1"),
        ({"kind": "line", "name": "x", "points": [[0, 0], [1, float("nan")]]}, "between 0 and 1"),
        ({"kind": "line", "name": "x", "points": [[0.5, 0.5], [0.5, 0.5]]}, "too small"),
        ({"kind": "zone", "name": "x", "points": [[0, 0], [1, 0], [0.5, 0]]}, "too small"),
        ({"kind": "line", "name": "x", "points": [[0, 0, 0], [1, 1]]}, "a counter is like"),
        ({"kind": "line", "name": "x"}, "a counter is like"),
        ([], "a counter is like"),
        ({"kind": [], "name": "x", "points": [[0, 0], [1, 1]]}, "a counter is like"),
    ],
)
def test_what_is_no_line_and_no_zone_is_refused(value: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        shape_of(value)


def test_shapes_are_kept_for_the_next_run_and_counts_are_not(tmp_path: Path) -> None:
    path = tmp_path / "out" / "gate.counters.json"
    counters = Counters(path)
    assert counters.update(Frame(index=0, pts_seconds=0, size=SIZE), tracks_of()) == b""
    line, zone = counters.add(LEVEL), counters.add(SQUARE)
    for index, y in enumerate((30, 45, 55, 70)):
        frame = Frame(index=index, pts_seconds=index / 10, size=SIZE)
        words = counters.update(frame, tracks_of((1, 48, y - 10, 52, y, 0.9, 0)))
    assert json.loads(words) == [
        {"name": "level", "in": 1, "out": 0},
        {"name": "square", "in": 0, "out": 0, "inside": 1},
    ]
    assert counters.to_json()[0]["by_class"] == {"person": {"in": 1, "out": 0}}

    counters.replace(line, Shape(kind="line", name="gate", points=LEVEL.points))
    assert [each["in"] for each in counters.to_json()] == [1, 0]  # another name goes on counting
    again = Counters(path)
    assert [each["name"] for each in again.to_json()] == ["gate", "square"]
    assert [each["in"] for each in again.to_json()] == [0, 0]

    counters.replace(line, Shape(kind="line", name="gate", points=((0, 0.6), (1, 0.6))))
    assert counters.to_json()[0]["in"] == 0  # another line begins anew
    counters.remove(zone)
    assert len(Counters(path)) == len(counters) == 1
    with pytest.raises(ConfigError, match="no counter 2"):
        counters.remove(zone)


def test_counters_are_bounded_and_a_broken_file_is_said(tmp_path: Path) -> None:
    counters = Counters()
    for _ in range(MAX_COUNTERS):
        counters.add(LEVEL)
    with pytest.raises(ConfigError, match="32 counters already"):
        counters.add(LEVEL)
    path = tmp_path / "x.counters.json"
    for text in ("{", "[1]", "7", '[{"kind": "line"}]'):
        path.write_text(text)
        with pytest.raises(ConfigError, match="mend the file or remove it"):
            Counters(path)
    kept = Counters(tmp_path / "taken.json")
    (tmp_path / "taken.json").mkdir()
    with pytest.raises(SinkError, match="cannot keep"):
        kept.add(LEVEL)
    assert len(kept) == 0


def test_what_is_seen_from_above_stands_where_its_centre_is() -> None:
    upright = tracks_of((1, 40.0, 10.0, 50.0, 30.0, 0.9, 0))
    assert feet(upright, SIZE).tolist() == [[45.0, 30.0]]
    assert feet(replace(upright, angle=np.array([0.4], np.float32)), SIZE).tolist() == [[45.0, 20.0]]
