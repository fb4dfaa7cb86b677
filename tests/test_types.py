"""Detections refuse what would spoil a tracker; tracks read as a list and as arrays."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
import torch

from tracker.errors import DetectionsError, TrackerError
from tracker.masks import MaskBits
from tracker.types import Detections, FrameCounts, Track, Tracks

FIELDS: dict[str, Any] = {
    "xyxy": np.array([[0, 0, 10, 20], [5, 5, 9, 9]], np.float32),
    "score": np.array([0.9, 0.4], np.float32),
    "label": np.array([0, 1]),
    "embedding": np.eye(2, 3, dtype=np.float32),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("embedded", [True, False])
def test_detections_of_any_number(count: int, dtype: type, embedded: bool) -> None:
    detections = Detections(
        xyxy=FIELDS["xyxy"][:count].astype(dtype),
        score=FIELDS["score"][:count].astype(dtype),
        label=FIELDS["label"][:count],
        embedding=FIELDS["embedding"][:count].astype(dtype) if embedded else None,
    )
    assert len(detections) == count


@pytest.mark.parametrize(
    ("field", "shape"),
    [
        ("xyxy", (2, 5)),
        ("xyxy", (2,)),
        ("xyxy", (0,)),
        ("xyxy", (2, 4, 1)),
        ("xyxy", (3, 4)),
        ("score", (3,)),
        ("score", (2, 1)),
        ("score", (0,)),
        ("label", (1,)),
        ("label", (2, 2)),
        ("embedding", (3, 3)),
        ("embedding", (2,)),
        ("embedding", (2, 3, 1)),
        ("embedding", (0, 3)),
    ],
)
def test_wrong_shapes_are_named(field: str, shape: tuple[int, ...]) -> None:
    wrong = np.zeros(shape, FIELDS[field].dtype)
    with pytest.raises(
        DetectionsError, match="embedding needs" if field == "embedding" else "detections need"
    ) as caught:
        Detections(**(FIELDS | {field: wrong}))
    assert str(shape) in str(caught.value)
    assert isinstance(caught.value, TrackerError)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("field", ["xyxy", "score", "embedding"])
def test_numbers_that_are_none_are_refused_with_their_row(field: str, row: int, value: float) -> None:
    wrong = FIELDS[field].copy()
    wrong[row] = value
    with pytest.raises(DetectionsError, match=f"{field} of detection {row} is not a finite number"):
        Detections(**(FIELDS | {field: wrong}))


def test_shapes_are_judged_before_numbers() -> None:
    with pytest.raises(DetectionsError, match="embedding needs shape"):
        Detections(**(FIELDS | {"embedding": np.full((3, 5), np.nan)}))


def tracks_of(count: int) -> Tracks:
    return Tracks(
        id=np.arange(1, count + 1),
        xyxy=np.arange(4.0 * count).reshape(count, 4),
        score=np.linspace(0.5, 1, count),
        label=np.arange(count),
        names=("person", "car"),
    )


@pytest.mark.parametrize("count", [0, 1, 4])
def test_tracks_are_a_sequence(count: int) -> None:
    tracks = tracks_of(count)
    assert len(tracks) == count
    assert [track.id for track in tracks] == [tracks[k].id for k in range(count)] == tracks.id.tolist()
    assert [track.id for track in tracks[1:3]] == tracks.id.tolist()[1:3]
    assert [track.id for track in reversed(tracks)] == tracks.id.tolist()[::-1]
    with pytest.raises(IndexError):
        tracks[count]


def test_a_track_has_plain_numbers_and_a_name() -> None:
    by_iteration, by_index, from_behind = list(tracks_of(2))[1], tracks_of(2)[1], tracks_of(2)[-1]
    for track in (by_iteration, by_index, from_behind):
        assert (type(track), type(track.id), type(track.score)) == (Track, int, float)
        assert (track.id, track.score, track.label, track.xyxy.tolist()) == (2, 1.0, "car", [4, 5, 6, 7])


def test_a_class_without_a_name_shows_its_number() -> None:
    assert [track.label for track in tracks_of(4)] == ["person", "car", "2", "3"]
    assert tracks_of(4).name_of(-1) == "-1"


def test_what_was_detected_and_tracked_stays_so() -> None:
    for frozen, name in ((Detections(**FIELDS), "score"), (tracks_of(2), "id"), (tracks_of(2)[0], "id")):
        with pytest.raises(FrozenInstanceError):
            setattr(frozen, name, None)


def test_lost_frames_are_those_the_user_expected() -> None:
    assert FrameCounts(declared=10, decoded=5, corrupt=2, dropped=1, missing=2).lost == 4
    assert FrameCounts().lost == 0


# Masks


def test_there_is_a_mask_for_each_detection() -> None:
    masks = MaskBits(torch.zeros((3, 40, 6), dtype=torch.uint8), (48, 40))
    with pytest.raises(DetectionsError, match="there must be 2 masks, one of each detection; got 3"):
        Detections(**FIELDS, mask=masks)
    assert Detections(**FIELDS, mask=masks[:2]).mask is not None


def test_a_track_has_the_mask_of_the_detection_it_was_given() -> None:
    pixels = torch.zeros((2, 40, 48), dtype=torch.bool)
    pixels[0, 3, 4] = pixels[1, 30, 20] = True
    found = Detections(**FIELDS, mask=MaskBits.pack(pixels, (48, 40)))
    bare = Tracks(
        id=np.array([7, 8, 9]),
        xyxy=np.zeros((3, 4)),
        score=np.ones(3),
        label=np.zeros(3, int),
        row=np.array([1, -1, 0]),
    )
    assert bare.mask is None and bare[0].mask is None and [track.mask for track in bare] == [None] * 3
    tracks = bare.with_masks(found)
    for shown in (list(tracks), [tracks[0], tracks[1], tracks[-1]], tracks[:]):
        first, unseen, last = (track.mask for track in shown)
        assert first is not None and unseen is not None and last is not None
        assert first.crop(0)[:2] == (20, 30) and last.crop(0)[:2] == (4, 3)
        assert unseen.area.tolist() == [0]


def test_without_masks_tracks_stay_as_they_are() -> None:
    tracks = Tracks(id=np.array([7]), xyxy=np.zeros((1, 4)), score=np.ones(1), label=np.zeros(1, int))
    assert tracks.with_masks(Detections(**FIELDS)) is tracks
