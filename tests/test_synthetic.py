"""The street is the same however it is asked, and its truth is true."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from tracker.boxes import iou, xywh_to_xyxy
from tracker.errors import ConfigError, SinkError
from tracker.motchallenge import read_rows
from tracker.synthetic import CLEAR, HIDDEN, Scene, write_truth, write_video

SMALL = {"size": (320, 180), "frames": 120, "objects": 12}


def answers(scene: Scene, index: int) -> list[np.ndarray]:
    detections = scene.detections(index)
    return [
        scene.render(index),
        *scene.truth(index),
        detections.xyxy,
        detections.score,
        detections.embedding,
    ]


def test_the_same_seed_is_the_same_street_in_any_order() -> None:
    one, other = Scene(seed=3, **SMALL), Scene(seed=3, **SMALL)
    forward = {index: answers(one, index) for index in (0, 40, 80)}
    for index in (80, 0, 40):
        for expected, got in zip(forward[index], answers(other, index), strict=True):
            np.testing.assert_array_equal(expected, got)


def test_another_seed_is_another_street() -> None:
    one, other = answers(Scene(seed=3, **SMALL), 40), answers(Scene(seed=4, **SMALL), 40)
    assert not any(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("size", [(320, 180), (180, 320), (64, 64)])
def test_truth_lies_in_the_image(size: tuple[int, int]) -> None:
    scene = Scene(seed=1, size=size, frames=100)
    for index in range(0, 100, 7):
        ids, xyxy, visibility = scene.truth(index)
        assert ids.shape == visibility.shape == (len(xyxy),)
        assert (np.diff(ids) > 0).all()
        assert set(ids) <= set(range(1, scene.objects + 1))
        assert (xyxy >= 0).all()
        assert (xyxy <= np.tile(size, 2)).all()
        assert (xyxy[:, 2:] - xyxy[:, :2] >= 1).all()
        assert ((visibility >= 0) & (visibility <= 1)).all()


def test_people_come_and_go_meet_and_hide() -> None:
    scene = Scene(seed=0, **{**SMALL, "frames": 300})
    seen: dict[int, list[float]] = {}
    xs: dict[int, list[float]] = {}
    for index in range(scene.frames):
        for identity, xyxy, visibility in zip(*scene.truth(index), strict=True):
            seen.setdefault(identity, []).append(visibility)
            xs.setdefault(identity, []).append((xyxy[0] + xyxy[2]) / 2)
    assert len(seen) == scene.objects
    assert any(min(v[10:-10], default=1) == 0 and max(v) == 1 for v in seen.values())  # hidden in mid-way
    assert any(len(v) < scene.frames / 2 for v in seen.values())  # here for a part of the clip
    ways = {np.sign(x[-1] - x[0]) for x in xs.values()}
    assert ways == {-1, 1}
    for x in xs.values():
        assert np.abs(np.diff(x)).max() < 0.02 * scene.size[0]  # nobody jumps


def test_one_alone_in_view_is_wholly_visible_and_a_pair_in_line_is_not() -> None:
    scene = Scene(seed=0, **SMALL)
    whole = partly = 0
    for index in range(scene.frames):
        _, xyxy, visibility = scene.truth(index)
        nearer = xyxy[:, None, 3] < xyxy[None, :, 3]  # (N, N): who stands in front of whom
        overlap = (iou(xyxy[:, None], xyxy[None]) > 0.05) & nearer
        assert (visibility[overlap.any(axis=1)] < 1).all()
        whole += (visibility == 1).sum()
        partly += overlap.any()
    assert whole > 100
    assert partly > 10


def test_a_figure_is_drawn_where_truth_says() -> None:
    """The street with people differs from the empty one inside their boxes, and nowhere else."""
    scene, empty = Scene(seed=2, **SMALL), Scene(seed=2, **{**SMALL, "objects": 0})
    for index in (10, 60, 110):
        changed = (scene.render(index) != empty.render(index)).any(axis=2)
        _, xyxy, visibility = scene.truth(index)
        inside = np.zeros_like(changed)
        for (x1, y1, x2, y2), seen in zip(xyxy.round().astype(int), visibility, strict=True):
            inside[max(0, y1 - 2) : y2 + 2, max(0, x1 - 2) : x2 + 2] = True
            if seen == 1:
                rows, columns = np.nonzero(changed[y1:y2, x1:x2])
                assert np.ptp(rows) > 0.9 * (y2 - y1 - 1)  # from head to foot
                assert np.ptp(columns) > 0.4 * (x2 - x1)
        assert not changed[~inside].any()


def test_detections_are_fair() -> None:
    scene = Scene(seed=5, **SMALL)
    found = missed = false = 0
    scores: dict[str, list[float]] = {"clear": [], "hidden": []}
    for index in range(scene.frames):
        detections = scene.detections(index)
        ids, xyxy, visibility = scene.truth(index)
        assert (np.diff(detections.score) <= 0).all()
        assert ((detections.score > 0) & (detections.score < 1)).all()
        assert (detections.label == 0).all()
        np.testing.assert_allclose(np.linalg.norm(detections.embedding, axis=1), 1, atol=1e-6)

        likeness = detections.embedding @ scene.identities.T  # (D, M)
        who = np.where(likeness.max(axis=1) > 0.5, likeness.argmax(axis=1) + 1, 0)
        assert len(set(who[who > 0])) == (who > 0).sum()  # nobody twice
        assert set(who) - {0} <= set(ids)
        hidden = set(ids[visibility <= HIDDEN])
        assert not hidden & set(who)  # no detector sees through a wall
        false += (who == 0).sum()
        for identity, box, seen in zip(ids, xyxy, visibility, strict=True):
            mine = np.flatnonzero(who == identity)
            found += len(mine)
            missed += not len(mine)
            if len(mine):
                assert seen < CLEAR or iou(detections.xyxy[mine[0]].astype(float), box) > 0.7
                scores["clear" if seen == 1 else "hidden"].append(detections.score[mine[0]])
    assert found > 3 * missed > 0
    assert 0 < false < 0.1 * found
    assert np.mean(scores["clear"]) > 0.9 > 0.8 > np.mean(scores["hidden"])


def test_without_embeddings_and_without_people() -> None:
    scene = Scene(**{**SMALL, "objects": 0}, embedding_dim=0)
    ids, xyxy, visibility = scene.truth(0)
    assert (ids.shape, xyxy.shape, visibility.shape) == ((0,), (0, 4), (0,))
    assert scene.detections(0).embedding is None
    assert scene.render(0).shape == (180, 320, 3)


def test_the_video_decodes_to_the_frames(tmp_path: Path) -> None:
    scene = Scene(seed=0, size=(320, 180), frames=12, frame_rate=12.5)
    write_video(scene, tmp_path / "street.mp4")
    with av.open(tmp_path / "street.mp4") as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        assert (stream.codec_context.name, float(stream.average_rate)) == ("h264", 12.5)
    assert [round(frame.time * 12.5) for frame in frames] == list(range(12))
    for index, frame in enumerate(frames):
        difference = np.abs(frame.to_ndarray(format="bgr24").astype(int) - scene.render(index))
        assert difference.mean() < 8


def test_the_truth_file_says_what_truth_says(tmp_path: Path) -> None:
    scene = Scene(seed=0, **{**SMALL, "frames": 20})
    write_truth(scene, tmp_path / "gt.txt")
    rows = read_rows(tmp_path / "gt.txt")
    assert rows.shape[1] == 9
    assert (rows[:, 6:8] == 1).all()
    for index in range(scene.frames):
        mine = rows[rows[:, 0] == index + 1]
        ids, xyxy, visibility = scene.truth(index)
        np.testing.assert_array_equal(mine[:, 1], ids)
        np.testing.assert_allclose(xywh_to_xyxy(mine[:, 2:6]), xyxy, atol=2e-3)
        np.testing.assert_allclose(mine[:, 8], visibility, atol=1e-3)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"size": (321, 180)}, "even sides"),
        ({"size": (32, 180)}, "64 pixels"),
        ({"frames": 0}, "0 frames at 25.0 per second"),
        ({"frame_rate": 0.0}, "at 0.0 per second"),
        ({"frame_rate": float("nan")}, "at nan per second"),
        ({"objects": -1}, "negative"),
    ],
)
def test_impossible_scenes(wrong: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Scene(**wrong)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    scene = Scene(**{**SMALL, "frames": 2})
    for path in (tmp_path / "absent" / "a.mp4", tmp_path / "a.unknown"):
        with pytest.raises(SinkError, match="cannot write the video"):
            write_video(scene, path)
    with pytest.raises(SinkError, match="cannot write the ground truth"):
        write_truth(scene, tmp_path / "absent" / "gt.txt")
    for index in (-1, 2):
        with pytest.raises(IndexError):
            scene.truth(index)
