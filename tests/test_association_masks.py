"""Association by masks: what boxes cannot tell apart, in a batch on the masks' device, if asked for."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from statistics import fmean
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from tracker.association import make_association
from tracker.association.silhouettes import SIDE, Silhouettes, _iou
from tracker.deploy.mask_contest import contest, table
from tracker.deploy.scenes.tangles import Tangle, TangleConfig
from tracker.errors import ConfigError, DetectionsError
from tracker.masks import MaskBits
from tracker.matching import overlaps
from tracker.types import Association, Detections, Tracks

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (640, 360)
TRACKERS = ["byte", "jde"]


def association(kind: str = "byte", cost: str = "mask", **settings: Any) -> Association:
    return make_association(kind, settings={"cost": cost, **settings})


def bar(x: float, y: float, *, rising: bool, side: int = 100) -> np.ndarray:
    """(H, W) bool: a bar along a diagonal of the box around x, y."""
    picture = np.zeros(SIZE[::-1], np.uint8)
    half = side / 2 - 5
    sign = -1 if rising else 1
    ends = [(round(x - half), round(y - sign * half)), (round(x + half), round(y + sign * half))]
    cv2.line(picture, *ends, 1, 12)
    return picture.astype(bool)


def found(*pictures: np.ndarray, score: float = 0.9, embeddings: int | None = None) -> Detections:
    """A frame's detections: the masks, in boxes around their pixels."""
    masks = MaskBits.pack(torch.from_numpy(np.array(pictures, bool).reshape(-1, *SIZE[::-1])), SIZE)
    count = len(pictures)
    return Detections(
        xyxy=masks.bounds().numpy().astype(np.float32),
        score=np.full(count, score, np.float32),
        label=np.zeros(count, np.int64),
        embedding=None
        if embeddings is None
        else np.tile(np.eye(1, embeddings, dtype=np.float32), (count, 1)),
        mask=masks,
    )


def meeting(frame: int) -> tuple[np.ndarray, np.ndarray]:
    """Two bars come towards each other, stand in the same box for a while, and go back from there."""
    away = 9 * max(abs(frame - 20) - 4, 0)
    return bar(320 - away, 180, rising=True), bar(320 + away, 180, rising=False)


def ids_of_meeting(cost: str) -> list[list[int]]:
    """Ids of the rising bar and of the other, frame by frame; the detector finds them in turning order."""
    tracker, ids = association(cost=cost), []
    for frame in range(40):
        order = (0, 1) if frame % 2 else (1, 0)
        pictures = meeting(frame)
        tracks = tracker.update(frame, found(*(pictures[k] for k in order)))
        assert len(tracks) == 2 and tracks.row is not None
        by_bar = dict(zip((order[row] for row in tracks.row), tracks.id.tolist(), strict=True))
        ids.append([by_bar[0], by_bar[1]])
    return ids


# What masks know


def test_two_that_turn_back_in_the_same_box_keep_their_ids_by_their_masks() -> None:
    assert len({tuple(ids) for ids in ids_of_meeting("mask")}) == 1
    # ... which boxes cannot know
    assert len({tuple(ids) for ids in ids_of_meeting("box")}) > 1


def test_masks_beat_boxes_where_things_touch() -> None:
    """Over scenes of thirty bars, hooks, bows and people that cross, seen by a detector with faults."""
    scores = [each for seed in (1, 6) for each in contest(seed, TangleConfig(frames=75))]
    print(f"\n{table(scores)}")
    mean = {
        (cost, name): fmean(each.scores[name] for each in scores if each.cost == cost)
        for cost in ("box", "mask")
        for name in ("IDF1", "IDSW", "HOTA")
    }
    assert mean["mask", "IDF1"] > mean["box", "IDF1"]
    assert mean["mask", "IDSW"] < mean["box", "IDSW"]
    assert mean["mask", "HOTA"] > mean["box", "HOTA"]


def test_boxes_that_touch_no_other_are_all_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Far apart, nothing is compared on the device, and tracks are those of boxes."""
    asked: list[int] = []
    real = Silhouettes.likeness

    def likeness(self: Silhouettes, rows: Any, *rest: Any) -> Any:
        asked.append(len(rows))
        return real(self, rows, *rest)

    monkeypatch.setattr(Silhouettes, "likeness", likeness)
    by_mask, by_box = association(), association(cost="box")
    for frame in range(12):
        seen = found(bar(100 + 5 * frame, 100, rising=True), bar(500 - 5 * frame, 260, rising=True))
        assert_same(by_mask.update(frame, seen), by_box.update(frame, seen))
    assert sum(asked) == 0


def assert_same(a: Tracks, b: Tracks) -> None:
    for name in ("id", "xyxy", "score", "row"):
        assert np.array_equal(getattr(a, name), getattr(b, name))


def test_a_mask_moves_with_its_track_while_it_is_lost() -> None:
    """Unseen for eight frames while another, with the other diagonal, stands where it comes out."""
    tracker = association(high=0.5)
    for frame in range(12):
        tracks = tracker.update(frame, found(bar(100 + 10 * frame, 180, rising=True)))
    assert tracks.id.tolist() == [1]
    other = bar(310, 182, rising=False)
    for frame in range(12, 20):
        tracks = tracker.update(frame, found(other))
    assert tracks.id.tolist() == [2]
    tracks = tracker.update(20, found(other, bar(300, 180, rising=True)))
    assert tracks.row is not None
    assert dict(zip(tracks.row.tolist(), tracks.id.tolist(), strict=True)) == {0: 2, 1: 1}


# How exact, how small


def test_silhouettes_share_what_masks_share() -> None:
    tangle, errors = Tangle(3), []
    for index in range(0, 30, 6):
        before, now = tangle.detections(index), tangle.detections(index + 1)
        assert before.mask is not None and now.mask is not None
        pairs = overlaps(before.xyxy, now.xyxy)
        compared = Silhouettes()
        compared.look(before)
        compared.settle(np.arange(len(before)))
        compared.look(now)
        boxes = before.xyxy[pairs.row], now.xyxy[pairs.column]
        assert compared._tracks is not None and compared._found is not None
        row, column, a, b = (torch.from_numpy(each) for each in (pairs.row, pairs.column, *boxes))
        shared = _iou(compared._tracks, compared._found, row, column, a, b)
        errors.append(shared - before.mask.iou(now.mask, (pairs.row, pairs.column)))
    error = torch.cat(errors).abs().numpy()
    assert len(error) > 300
    assert error.mean() < 0.015 and np.quantile(error, 0.99) < 0.1


def test_any_number_of_pairs_at_once() -> None:
    one = found(bar(100, 100, rising=True))
    compared = Silhouettes()
    compared.look(one)
    compared.settle(np.zeros(1, np.int64))
    compared.look(one)
    for count in (0, 1, 31, 32, 33, 512, 513, 1100):
        rows = np.zeros(count, np.int64)
        shared = compared.likeness(rows, rows, np.tile(one.xyxy, (count, 1)), np.tile(one.xyxy, (count, 1)))
        assert shared.shape == (count,) and (shared > 0.99).all()


def test_what_a_track_keeps_of_its_mask_does_not_grow() -> None:
    tracker: Any = association()
    tangle = Tangle(0, TangleConfig(frames=30))
    for index in range(30):
        tracker.update(index, tangle.detections(index))
        kept = tracker.table.silhouettes._tracks
        assert (
            kept.shape == (len(tracker.table), SIDE, SIDE) and kept.untyped_storage().nbytes() == kept.nbytes
        )
    # ... and nothing is left of tracks that have ended
    nobody = found()
    for index in range(30, 80):
        tracks = tracker.update(index, nobody)
    assert len(tracks) == 0 and tracker.table.silhouettes._tracks is None


# Which detection a track was given


@pytest.mark.parametrize("kind", TRACKERS)
@pytest.mark.parametrize("cost", ["box", "mask"])
def test_every_track_says_which_detection_it_was_given(kind: str, cost: str) -> None:
    tracker = association(kind, cost)
    random = np.random.default_rng(4)
    shown = 0
    for frame in range(15):
        places = [(60 + 8 * frame, 90), (60 + 8 * frame, 250), (560 - 8 * frame, 100), (300, 300)]
        seen = found(*(bar(x, y, rising=x > 200) for x, y in places), embeddings=4)
        order = random.permutation(4)
        score = np.where(order == 3, 0.05, 0.9).astype(np.float32)  # one is too weak for any tracker
        seen = replace(seen, xyxy=seen.xyxy[order], score=score, mask=seen.mask[order])  # type: ignore[index]
        tracks = tracker.update(frame, seen).with_masks(seen)
        assert tracks.row is not None and tracks.mask is not None and seen.mask is not None
        assert np.array_equal(tracks.xyxy, seen.xyxy[tracks.row])
        for track, row in zip(tracks, tracks.row, strict=True):
            assert track.mask is not None
            assert track.mask.rle(0) == seen.mask.rle(int(row))
        shown += len(tracks)
    assert shown == 3 * 15


# What is refused, and what costs nothing


@pytest.mark.parametrize("kind", TRACKERS)
def test_detections_without_masks_are_refused(kind: str) -> None:
    bare = replace(found(bar(100, 100, rising=True), embeddings=4), mask=None)
    with pytest.raises(DetectionsError, match="cost mask needs masks and the detections have none: take an"):
        association(kind).update(0, bare)
    assert len(association(kind).update(0, replace(found(embeddings=4), mask=None))) == 0  # nobody to compare


def test_rotated_boxes_are_refused() -> None:
    turned = replace(found(bar(100, 100, rising=True)), angle=np.array([0.3], np.float32))
    with pytest.raises(
        DetectionsError, match="cost mask compares masks in upright boxes, and these are rotated"
    ):
        association().update(0, turned)


@pytest.mark.parametrize(
    ("kind", "compat", "cost", "words"),
    [
        ("byte", "bytetrack", "mask", "the published trackers compare boxes, not masks: leave out compat"),
        ("jde", "fairmot", "mask", "the published trackers compare boxes"),
        ("byte", None, "pixels", "cost must be one of box, mask, got 'pixels'"),
        ("jde", None, 1, "cost must be of kind str, got 1"),
    ],
)
def test_costs_that_do_not_exist(kind: str, compat: str | None, cost: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make_association(kind, compat=compat, settings={"cost": cost})


def test_who_compares_boxes_does_without_torch() -> None:
    code = "import sys; from tracker.association import make_association as make; make('byte'); make('jde')"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert done.stdout.strip() == "False", done.stderr


def test_a_camera_set_to_another_size_changes_nothing() -> None:
    """The picture doubles; the tracks' masks are where they were in it."""
    tracker: Any = association()
    for frame in range(4):
        tracker.update(frame, found(bar(300, 180, rising=True), bar(304, 180, rising=False)))
    before = tracker.table.mask_boxes(tracker.table.boxes(slice(None)))
    tracker.rescale(2.0, 2.0)
    after = tracker.table.mask_boxes(tracker.table.boxes(slice(None)))
    assert np.allclose(after, 2 * before) and math.isclose(before[0, 2] - before[0, 0], 100, abs_tol=12)
