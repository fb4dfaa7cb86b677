"""Rotated boxes from detections to results: what turns keeps its id, and is written as it lies.

Angles are radians from the x axis towards the y axis, so clockwise on the screen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
from aerial import CAR, Vehicle, clear_mot, clip_of, junction, upright
from clips import write_clip
from onnx import helper, numpy_helper
from onnx_files import save
from results import tracks_of
from scenes import TRACKERS, tracker_of

from tracker import boxes, kalman
from tracker.association import make_association
from tracker.cli import main
from tracker.crew import LocalCrew, ProcessCrew
from tracker.crew_worker import Duty
from tracker.errors import DetectionsError
from tracker.matching import gated, turned_overlaps
from tracker.sinks.dota import format_rows as dota_rows
from tracker.sinks.drawing import Painter, colours
from tracker.sinks.jsonl import format_line
from tracker.sinks.mot import format_rows as mot_rows
from tracker.types import Detections, Frame, Tracks

QUARTER = math.pi / 2


def random_boxes(count: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    place, size = rng.uniform(0, 90, (count, 2)), rng.uniform(1, 40, (count, 2))
    return np.column_stack((place, size, rng.uniform(-7, 7, count)))


# Geometry.


def test_corners_are_opencvs() -> None:
    for box, corners in zip(random_boxes(20), boxes.polygons(random_boxes(20)), strict=True):
        x, y, w, h, r = box.tolist()
        expected = cv2.boxPoints(((x, y), (w, h), math.degrees(r)))
        assert np.abs(corners[:, None] - expected[None]).sum(axis=2).min(axis=0).max() < 1e-3


def test_upright_boxes_around_touch_the_corners() -> None:
    corners = boxes.polygons(random_boxes(20))
    expected = np.concatenate((corners.min(axis=1), corners.max(axis=1)), axis=1)
    np.testing.assert_allclose(boxes.enclosing(random_boxes(20)), expected, atol=1e-9)


def test_the_longer_side_first_says_the_same_boxes() -> None:
    given = random_boxes(200)
    said = boxes.long_side_first(given)
    np.testing.assert_allclose(boxes.rotated_iou(given, said), 1, atol=1e-9)
    assert (said[:, 2] >= said[:, 3]).all()
    assert (said[:, 4] >= -QUARTER).all() and (said[:, 4] < QUARTER).all()
    np.testing.assert_allclose(boxes.long_side_first(said), said, atol=1e-12)


def test_turning_there_and_back() -> None:
    given = random_boxes(20)
    np.testing.assert_allclose(boxes.turned(boxes.unturned(given), given[:, 4]), given, atol=1e-12)


def test_a_picture_of_another_size_holds_the_same_boxes() -> None:
    given = random_boxes(50)
    corners = boxes.polygons(boxes.scaled(given, 2.5, 2.5))
    np.testing.assert_allclose(corners, boxes.polygons(given) * 2.5, atol=1e-9)
    stretched = boxes.scaled(
        given, 3.0, 2.0
    )  # parallelograms: their sides keep length, the first its direction
    corners = boxes.polygons(given) * (3.0, 2.0)
    side, other = corners[:, 1] - corners[:, 0], corners[:, 3] - corners[:, 0]
    np.testing.assert_allclose(stretched[:, :2], corners.mean(axis=1))
    np.testing.assert_allclose(stretched[:, 2], np.hypot(*side.T))
    np.testing.assert_allclose(stretched[:, 3], np.hypot(*other.T))
    direction = boxes.half_turned(np.arctan2(side[:, 1], side[:, 0]) - stretched[:, 4])
    np.testing.assert_allclose(direction, 0, atol=1e-9)
    assert np.abs(stretched[:, 4] - given[:, 4]).max() < QUARTER  # a state's angle must not jump


def test_overlapping_pairs_are_all_that_overlap() -> None:
    a, b = random_boxes(40, 1), random_boxes(30, 2)
    shared = boxes.rotated_iou(a[:, None], b[None])
    pairs = turned_overlaps(a, b)
    real = pairs.keep(pairs.cost < 1 - 1e-9)  # boxes apart may share what was rounded
    expected = zip(*(axis.tolist() for axis in (shared > 1e-9).nonzero()), strict=True)
    assert sorted(zip(real.row.tolist(), real.column.tolist(), strict=True)) == list(expected)
    assert len(real.row) > 100
    np.testing.assert_allclose(pairs.cost, 1 - shared[pairs.row, pairs.column])
    assert len(turned_overlaps(a[:0], b).row) == len(turned_overlaps(a, b[:0]).row) == 0


# The filter.


def measured(angle: float, *, aspect: float = 2.0, height: float = 10.0) -> np.ndarray:
    return np.array([[50.0], [50.0], [aspect], [height], [angle]])


@pytest.mark.parametrize(
    ("known", "seen", "expected"),
    [
        ((1.5, 2.0), (-1.6, 2.0, 10.0), (-1.6 + math.pi, 2.0, 10.0)),  # across 90°: half a turn is none
        ((-1.5, 2.0), (1.6, 2.0, 10.0), (1.6 - math.pi, 2.0, 10.0)),
        ((9.4, 2.0), (0.1, 2.0, 10.0), (0.1 + 3 * math.pi, 2.0, 10.0)),  # after one and a half turns
        ((0.1, 1.05), (-1.5, 1.04, 10.0), (-1.5 + QUARTER, 1 / 1.04, 10.4)),  # nearly square: as if turned
        ((0.1, 3.0), (1.5, 3.0, 10.0), (1.5, 3.0, 10.0)),  # long: truly turned
        ((0.1, 0.5), (0.2, 0.0, 10.0), (0.2, 0.0, 10.0)),  # without width
    ],
)  # fmt: skip
def test_measurements_are_worded_as_the_state_is(
    known: tuple[float, float], seen: tuple[float, float, float], expected: tuple[float, float, float]
) -> None:
    angle, aspect, height = seen
    mean = measured(known[0], aspect=known[1])
    after = kalman.aligned(mean, measured(angle, aspect=aspect, height=height))
    np.testing.assert_allclose(after[[4, 2, 3], 0], expected, atol=1e-12)


def test_the_angle_is_a_filter_of_its_own_beside_the_other_four() -> None:
    """Two-by-two matrices by hand; the other coordinates do not know of it."""
    rng = np.random.default_rng(3)
    angles = 0.03 * np.arange(60) + rng.normal(0, 0.02, 60)
    x, p = np.array([angles[0], 0.0]), np.diag([(2 / 20) ** 2, (10 / 160) ** 2])
    state = kalman.initiate(measured(angles[0]))
    four = kalman.initiate(measured(angles[0])[:4])
    move = np.array([[1.0, 1.0], [0.0, 1.0]])
    for angle in angles[1:]:
        x, p = move @ x, move @ p @ move.T + np.diag([(1 / 20) ** 2, (1 / 160) ** 2])
        gain = p[:, 0] / (p[0, 0] + (1 / 20) ** 2)
        x, p = x + gain * (angle - x[0]), p - np.outer(gain, p[0])
        state = kalman.update(kalman.predict(state), measured(angle))
        four = kalman.update(kalman.predict(four), measured(angle)[:4])
        mean, covariance = kalman.dense(state)
        np.testing.assert_allclose(mean[0, [4, 9]], x)
        np.testing.assert_allclose(covariance[0][np.ix_([4, 9], [4, 9])], p, rtol=1e-6)
        np.testing.assert_array_equal(state[:, :4], four)
    assert state[kalman.VELOCITY, kalman.ANGLE, 0] == pytest.approx(0.03, abs=0.005)


def test_the_gate_sees_the_angle_but_not_how_it_is_worded() -> None:
    state = kalman.predict(kalman.initiate(measured(1.55, aspect=3.0)))
    found = np.hstack([measured(1.55 - math.pi + 0.05, aspect=3.0), measured(0.4, aspect=3.0)])
    pairs = gated(state, found)
    assert pairs.column.tolist() == [0]
    assert pairs.cost[0] < 0.2


# Association.


def seen(*cxcywhr: Sequence[float], labels: Sequence[int] | None = None) -> Detections:
    """Rotated boxes as a detector says them, the longer side first; embeddings at right angles."""
    rows = boxes.long_side_first(np.array(cxcywhr, float).reshape(-1, 5))
    return Detections(
        xyxy=boxes.unturned(rows),
        score=np.full(len(rows), 0.9),
        label=np.zeros(len(rows), np.int64) if labels is None else np.array(labels),
        embedding=np.eye(8, dtype=np.float32)[: len(rows)],
        angle=rows[:, 4],
    )


@pytest.mark.parametrize("kind", TRACKERS)
@pytest.mark.parametrize("size", [CAR, (20.0, 19.6)], ids=["a car", "nearly square"])
@pytest.mark.parametrize("turn", [math.pi, -math.pi, 6 * math.pi], ids=["right", "left", "round and round"])
def test_what_turns_through_ninety_degrees_keeps_its_id_and_its_rate(
    kind: str, size: tuple[float, float], turn: float
) -> None:
    association, rng = tracker_of(kind), np.random.default_rng(5)
    path = Vehicle(size, (50, 200), 0.3, 2.0, ((10, 120, turn),)).drive(140)
    angles = []
    for index, box in enumerate(path):
        tracks = association.update(index, seen(box + rng.normal(0, (0.3, 0.3, 0.2, 0.2, 0.02))))
        assert tracks.id.tolist() == [1] and tracks.angle is not None
        angles.append(float(tracks.angle[0]))
        state = association.table.state[:, kalman.ANGLE, 0]
        if 40 < index < 125:
            assert abs(state[kalman.VELOCITY] - turn / 120) < 0.06
    assert np.abs(np.diff(angles)).max() > 1  # what is reported does go round
    # The filter has followed all of it, counting from the angle that the first detection was worded as.
    assert state[kalman.MEAN] - angles[0] == pytest.approx(path[-1, 4] - path[0, 4], abs=0.15)


@pytest.mark.parametrize("kind", TRACKERS)
def test_a_turning_car_is_found_again_after_a_gap_across_ninety_degrees(kind: str) -> None:
    association = tracker_of(kind)
    path = Vehicle(CAR, (50, 200), 1.0, 1.0, ((0, 60, 1.5),)).drive(60)
    for index, box in enumerate(path):
        hidden = 20 <= index < 25
        tracks = association.update(index, seen(*([] if hidden else [box])))
        assert tracks.id.tolist() == ([] if hidden else [1])
        assert tracks.angle is not None


@pytest.mark.parametrize("kind", TRACKERS)
def test_slanting_neighbours_do_not_overlap(kind: str) -> None:
    """Upright boxes around them share a third; turned, one may vanish and nobody takes its track."""
    two = [(100, 100, *CAR, math.pi / 4), (114, 86, *CAR, math.pi / 4)]
    association = tracker_of(kind)
    for index in range(5):
        assert association.update(index, seen(*two)).id.tolist() == [1, 2]
    detections = seen(two[1])
    detections = replace(detections, embedding=np.eye(8, dtype=np.float32)[[1]])
    assert association.update(5, detections).id.tolist() == [2]


@pytest.mark.parametrize("kind", TRACKERS)
def test_detections_are_reported_as_they_were_found(kind: str) -> None:
    association = tracker_of(kind)
    for index in range(3):
        given = seen((100, 100 + index, 30, 10, 0.5))
        tracks = association.update(index, given)
        assert given.angle is not None and tracks.angle is not None
        np.testing.assert_allclose(tracks.xyxy, given.xyxy)
        np.testing.assert_allclose(tracks.angle, given.angle)
        assert tracks[0].angle == pytest.approx(0.5) and next(iter(tracks)).angle == pytest.approx(0.5)


@pytest.mark.parametrize("kind", TRACKERS)
def test_frames_with_and_without_angles_do_not_mix(kind: str) -> None:
    association = tracker_of(kind)
    association.update(0, seen((100, 100, 30, 10, 0.5)))
    association.update(1, replace(seen(), angle=None))  # nobody is nobody
    with pytest.raises(
        DetectionsError, match="are upright boxes, earlier ones were not: give all of a source"
    ):
        association.update(2, replace(seen((100, 100, 30, 10, 0.5)), angle=None))


@pytest.mark.parametrize(("kind", "compat"), [("jde", "fairmot"), ("byte", "bytetrack")])
def test_published_trackers_have_no_angles(kind: str, compat: str) -> None:
    with pytest.raises(DetectionsError, match="know no rotated boxes: leave out compat"):
        tracker_of(kind, compat).update(0, seen((100, 100, 30, 10, 0.5)))


@pytest.mark.parametrize("kind", TRACKERS)
@pytest.mark.parametrize("stretch", [(2.0, 2.0), (2.0, 1.5)])
def test_a_camera_set_to_another_size_goes_on_with_its_tracks(
    kind: str, stretch: tuple[float, float]
) -> None:
    association = tracker_of(kind)
    path = Vehicle(CAR, (50, 100), 0.4, 3.0).drive(20)
    for index, box in enumerate(path[:10]):
        association.update(index, seen(box))
    association.rescale(*stretch)
    for index, box in enumerate(path[10:], start=10):
        tracks = association.update(index, seen(boxes.scaled(box, *stretch)))
        assert tracks.id.tolist() == [1]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [(np.zeros(3), r"angle needs shape \(1,\), got \(3,\)"), (np.array([np.nan]), "angle of detection 0")],
)
def test_impossible_angles_are_refused(wrong: np.ndarray, words: str) -> None:
    with pytest.raises(DetectionsError, match=words):
        replace(seen((100, 100, 30, 10, 0.5)), angle=wrong)


def test_traffic_from_above() -> None:
    """139 vehicles, some slanting and within inches of each other: rotated IoU keeps them apart."""
    clip = clip_of(junction(), 120)
    association, plain = make_association("byte"), make_association("byte")
    scores = clear_mot(clip, [association.update(k, found) for k, found in enumerate(clip.seen)])
    flat = clip._replace(
        truth=[(ids, boxes.turned(boxes.enclosing(rows), 0 * rows[:, 4])) for ids, rows in clip.truth]
    )
    without = clear_mot(flat, [plain.update(k, upright(found)) for k, found in enumerate(clip.seen)])
    assert scores["CLR_TP"] > 6000
    assert scores["MOTA"] >= 0.94
    assert scores["IDSW"] <= 3 < 10 < without["IDSW"]


def test_worker_processes_carry_angles() -> None:
    clip = clip_of(junction(), 6)
    frames = [
        [Frame(index=k, pts_seconds=k / 10, size=(520, 520), source=source) for source in range(2)]
        for k in range(6)
    ]
    duties = [
        Duty(name="any", associate=partial(make_association, "byte", names=("car",)), lines_of=(dota_rows,))
    ] * 2

    def outcomes(crew: LocalCrew | ProcessCrew) -> list[tuple[object, ...]]:
        done = [
            each
            for k, batch in enumerate(frames)
            for each in crew.associate(batch, [clip.seen[k], clip.seen[0 if k else 1]])
        ]
        done += crew.finish()
        return [(each.texts, each.tracks.id.tolist(), each.tracks.angle.tolist()) for each in done]  # type: ignore[union-attr]

    with ProcessCrew(duties, 2) as crew:
        there = outcomes(crew)
    assert there == outcomes(LocalCrew(duties))
    assert len(there) == 12 and there[-1][0][0].count(b"\n") > 50


# Results.

TURNED = replace(tracks_of((7, 90, 95, 110, 105, 0.5, 1)), angle=np.array([math.pi / 6]))
CORNERS = [(93.84, 90.67), (111.16, 100.67), (106.16, 109.33), (88.84, 99.33)]
FRAME = Frame(index=4, pts_seconds=0.4, size=(200, 200))


def test_json_lines_say_polygons() -> None:
    (track,) = json.loads(format_line(FRAME, TURNED))["tracks"]
    assert track["polygon"] == [list(corner) for corner in CORNERS]
    assert track["xyxy"] == [88.84, 90.67, 111.16, 109.33]
    assert (track["id"], track["score"], track["label"]) == (7, 0.5, "car")
    assert track["angle"] == pytest.approx(math.pi / 6, abs=1e-4)
    assert json.loads(format_line(FRAME, replace(tracks_of(), angle=np.empty(0))))["tracks"] == []


def test_mot_rows_are_the_upright_boxes_around() -> None:
    values = [float(value) for value in mot_rows(5, TURNED).split(",")]
    assert values == pytest.approx([5, 7, 88.8397, 90.6699, 22.3205, 18.6603, 0.5, -1, -1, -1], abs=1e-4)


def test_dota_rows_are_corners_and_a_class() -> None:
    corners = " ".join(f"{x:.2f} {y:.2f}" for x, y in CORNERS)
    assert dota_rows(FRAME, TURNED) == f"5 7 {corners} car 0.5000\n"
    plain = tracks_of((7, 1, 2, 3, 4, 0.5, 0), names=("small  vehicle",))
    assert dota_rows(FRAME, plain) == "5 7 1.00 2.00 3.00 2.00 3.00 4.00 1.00 4.00 small-vehicle 0.5000\n"
    assert dota_rows(FRAME, tracks_of()) == ""


def drawn(tracks: Tracks, frames: int = 1) -> np.ndarray:
    image = np.full((200, 200, 3), 128, np.uint8)
    painter = Painter(frame_rate=10)
    for _ in range(frames):
        image[:] = 128
        painter.draw(image, tracks)
    return image


def test_a_turned_box_is_drawn_as_it_lies() -> None:
    image = drawn(replace(tracks_of((9, 60, 90, 140, 130, 0.9, 0)), angle=np.array([math.pi / 6])))
    corners = boxes.polygons(np.array([100, 110, 80, 40, math.pi / 6]))
    shade = colours(np.array([9]))[0].astype(int)
    for first, second in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        for share in (0.25, 0.5, 0.75):
            x, y = np.round(first + share * (second - first)).astype(int)
            if y > 80:  # below the label
                assert np.abs(image[y - 1 : y + 2, x - 1 : x + 2].astype(int) - shade).max(axis=2).min() <= 40
    assert (image[100:120, 90:110] == 128).all()  # inside
    assert (image[88:93, 137:143] == 128).all()  # a corner of the box before its turn


@pytest.mark.parametrize("place", [(-900.0, 50.0), (50.0, 1e9), (-9e9, -9e9)])
def test_a_turned_box_outside_leaves_no_mark(place: tuple[float, float]) -> None:
    x, y = place
    tracks = replace(tracks_of((1, x, y, x + 40, y + 20, 0.9, 0)), angle=np.array([0.7]))
    assert (drawn(tracks) == 128).all()


# All of it.


def test_a_video_becomes_rotated_tracks(tmp_path: Path) -> None:
    """An engine that sees one large vehicle in every frame, at stride 32, turned by 30°."""
    answers = {
        "logits": np.full((1, 15, 126), -9.0, np.float32),
        "distances": np.full((1, 4, 126), 1.0, np.float32),
        "angle": np.full((1, 1, 126), math.pi / 6, np.float32),
    }
    place = 96 + 24 + 3  # column 1, row 1 of the 2×3 at stride 32: its point is (32, 32)
    answers["logits"][0, 5, place] = 3.0
    answers["distances"][0, :, place] = (0.5, 0.25, 1.0, 0.25)
    nodes = [helper.make_node("ReduceMean", ["images"], ["mean"], axes=[1, 2, 3], keepdims=0)]
    nodes.append(helper.make_node("Mul", ["mean", "zero"], ["nothing"]))
    nodes += [helper.make_node("Add", ["nothing", f"{name}.value"], [name]) for name in answers]
    weights = [numpy_helper.from_array(np.zeros(1, np.float32), "zero")]
    weights += [numpy_helper.from_array(value, f"{name}.value") for name, value in answers.items()]
    engine = save(
        tmp_path / "turned.onnx",
        nodes,
        {"images": (1, 3, 96, 64)},
        {name: value.shape for name, value in answers.items()},
        weights=weights,
    )
    clip = write_clip(tmp_path / "clip.mp4", frames=5, size=(128, 192))
    command = [clip, "--engine", engine, "--frontend", "rtmdet-r", "--save", "mot,jsonl,dota,video"]
    assert main([*map(str, command), "--quiet", "--out", str(tmp_path / "out")]) == 0

    # 48 × 16 around the point and 8 to its right, turned, and twice as large in the video.
    angle = math.pi / 6
    centre = (2 * (32 + 8 * math.cos(angle)), 2 * (32 + 8 * math.sin(angle)))
    expected = boxes.polygons(np.array([*centre, 96, 32, angle]))
    rows = [line.split() for line in (tmp_path / "out" / "clip.dota.txt").read_text().splitlines()]
    assert [(row[0], row[1], row[10]) for row in rows] == [
        (str(k), "1", "large-vehicle") for k in range(1, 6)
    ]
    np.testing.assert_allclose(np.array(rows[0][2:10], float).reshape(4, 2), expected, atol=0.02)
    lines = [json.loads(line) for line in (tmp_path / "out" / "clip.jsonl").read_text().splitlines()]
    np.testing.assert_allclose(lines[4]["tracks"][0]["polygon"], expected, atol=0.02)
