"""Synthetic streets: reproducible, exact in their truth, complete as files."""

from __future__ import annotations

import math
from pathlib import Path

import av
import numpy as np
import pytest

from tracker.deploy.scenes import CAR, PERSON, Scene, SceneConfig, write_sequence
from tracker.deploy.scenes.camera import Camera, apply_homography
from tracker.deploy.scenes.cars import Car, draw_car
from tracker.deploy.scenes.people import Person, Pose, draw_person
from tracker.deploy.scenes.routes import follow
from tracker.deploy.scenes.sprite import Light, Sprite
from tracker.deploy.scenes.street import Weather
from tracker.errors import ConfigError, SinkError
from tracker.motchallenge import read_rows, read_seqinfo

SMALL = SceneConfig(size=(192, 128), seconds=8, people=24, cars=6)
CAMERA = Camera(size=(640, 360), focal=500, height=3.0, tilt=0.2)
LIGHT = Light(source=(0.5, 0.7, 0.5), direct=0.6)


@pytest.fixture(scope="module")
def scene() -> Scene:
    return Scene(5, SMALL)


def test_a_seed_is_a_scene_and_moments_can_be_asked_for_in_any_order(scene: Scene) -> None:
    again, other = Scene(5, SMALL), Scene(6, SMALL)
    later, _ = again.frame(6.0)
    image, truth = again.frame(2.0)
    same, same_truth = scene.frame(2.0)
    assert np.array_equal(image, same)
    assert np.array_equal(truth.xyxy, same_truth.xyxy)
    assert not np.array_equal(image, later)
    assert not np.array_equal(image, other.frame(2.0)[0])


def test_truth_lists_what_overlaps_the_picture_once() -> None:
    seen = set()
    for seed in range(6):
        _, truth = Scene(seed, SMALL).frame(4.0)
        assert len(set(truth.identity)) == len(truth.identity)
        assert (truth.xyxy[:, 2:] > truth.xyxy[:, :2]).all()
        assert (truth.xyxy[:, 2:] > 0).all()
        assert (truth.xyxy[:, :2] < SMALL.size).all()
        assert ((truth.visibility >= 0) & (truth.visibility <= 1)).all()
        assert np.array_equal(truth.label == PERSON, truth.identity < SMALL.people)
        seen |= {int(label) for label in truth.label}
        hidden = truth.visibility < 0.2
        assert not truth.countable(SMALL.size)[hidden].any()
    assert seen == {PERSON, CAR}


def test_a_mirrored_view_mirrors_the_truth(scene: Scene) -> None:
    width, height = SMALL.size
    view = np.array([[-1.0, 0, width / 2], [0, 1, height / 2], [0, 0, 1]])
    _, plain = scene.frame(3.0)
    _, mirrored = scene.frame(3.0, view=view)
    assert np.array_equal(plain.identity, mirrored.identity)
    expected = plain.xyxy[:, [2, 1, 0, 3]] * (-1, 1, -1, 1) + (width, 0, width, 0)
    assert np.allclose(mirrored.xyxy, expected, atol=1e-6)
    assert np.allclose(mirrored.visibility, plain.visibility, atol=0.1)


@pytest.mark.parametrize("heading", [0.0, 1.0, math.pi / 2, 3.5])
@pytest.mark.parametrize("z", [6.0, 25.0])
def test_boxes_fit_what_is_drawn(heading: float, z: float) -> None:
    rng = np.random.default_rng(3)
    weather = Weather.draw(rng)
    pose = Pose(x=1.0, z=z, heading=heading, phase=1.0, speed=1.3)
    person, outline, _ = draw_person(Person.draw(rng), pose, CAMERA, LIGHT)
    car, corners = draw_car(Car.draw(rng), 1.0, z, heading, CAMERA, weather)
    for sprite, points in ((person, outline), (car, corners)):
        rows, columns = np.nonzero(sprite.cover > 0.5)
        drawn = np.array([columns.min() + sprite.left, rows.min() + sprite.top])
        drawn_end = np.array([columns.max() + sprite.left, rows.max() + sprite.top]) + 1
        assert np.abs(drawn - points.min(0)).max() < 1.6
        assert np.abs(drawn_end - points.max(0)).max() < 1.6


@pytest.mark.parametrize(
    ("story", "shift", "left_over"),
    [("hides all of it", 0, 0.0), ("hides half", 10, 0.5), ("stands beside", 20, 1.0)],
)
def test_what_is_nearer_hides(story: str, shift: int, left_over: float) -> None:
    image, owners = np.zeros((60, 80, 3), np.float32), np.full((60, 80), -1, np.int16)
    for owner, left in ((0, 30), (1, 30 + shift)):
        sprite = Sprite(np.array([left, 20.0]), np.array([left + 20.0, 50.0]))
        corners = np.array([(left, 20), (left + 20, 20), (left + 20, 50), (left, 50)], np.float64)
        sprite.polygons([(corners, np.full(3, 90 + owner, np.float32))])
        sprite.paste(image, owners, owner)
    assert (owners == 0).sum() / 600 == pytest.approx(left_over, abs=0.06), story
    assert image.max() == pytest.approx(91)


def test_turning_the_camera_is_a_homography() -> None:
    level = Camera(size=(640, 360), focal=500, height=3.0, tilt=0.0)
    points = np.array([(1.0, 0.5, 9.0), (-3.0, 2.0, 14.0), (0.0, 0.0, 30.0)])
    pan = 0.07
    view = np.array([[1.0, 0, 320], [0, 1, 180], [0, 0, 1]])
    turned = apply_homography(level.turned(pan, 0.0, 0.0, view), level.project(points)[0])
    cos, sin = math.cos(pan), math.sin(pan)
    moved = points @ np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
    assert np.allclose(turned, level.project(moved)[0])


def test_a_walker_keeps_the_pace_and_rests_where_told() -> None:
    points = np.array([(0.0, 10.0), (6.0, 10.0), (12.0, 10.0)])
    route = follow(points, np.array([0.0, 3.0, 0.0]), 1.5, 1.0, 15.0, 1.4)
    assert route.at(0.5) is None
    assert route.at(12.5) is None
    middle, resting = route.at(3.0), route.at(6.5)
    assert middle is not None
    assert resting is not None
    assert middle[0] == pytest.approx(3.0)
    assert middle[4] == pytest.approx(1.5)
    assert resting[:2] == pytest.approx((6.0, 10.0))
    assert resting[4] == pytest.approx(0.0, abs=1e-6)


def test_a_sequence_is_a_video_with_its_truth(tmp_path: Path) -> None:
    folder = tmp_path / "scene"
    write_sequence(8, folder, name="eight", size=(192, 128), seconds=0.8, frame_rate=10, people=24, cars=6)
    with av.open(folder / "video.mp4") as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.width, stream.height) == ("h264", 192, 128)
        assert sum(1 for _ in container.decode(video=0)) == 8
    info = read_seqinfo(folder / "seqinfo.ini")
    assert (info.name, info.frame_rate, info.length) == ("eight", 10, 8)
    rows = read_rows(folder / "gt.txt")
    assert rows.shape[1] == 9
    assert set(rows[:, 0]) == set(range(1, 9))
    assert len(np.unique(rows[:, :2], axis=0)) == len(rows)
    counted = rows[:, 6] == 1
    assert counted.any()
    assert set(rows[counted, 7]) <= {1, 3}
    assert set(rows[~counted, 7]) <= {8}
    assert (rows[counted, 8] >= 0.2).all()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"size": (512, 289)}, "even sides"),
        ({"size": (32, 32)}, "64 pixels"),
        ({"seconds": 0.0}, "0.0 s"),
        ({"people": -1}, "-1 people"),
        ({"frame_rate": 0.0}, "frame rate 0.0"),
        ({"quality": 99}, "quality 99"),
    ],
)
def test_impossible_scenes_are_refused(wrong: dict[str, float], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        write_sequence(0, tmp_path, **wrong)  # type: ignore[arg-type]


def test_an_unwritable_place_is_a_sink_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SinkError, match="cannot write the sequence"):
        write_sequence(0, tmp_path / "file", size=(64, 64), seconds=0.1, people=0, cars=0)
