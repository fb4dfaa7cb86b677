"""What no input may do to a tracker: poison it, make it grow, change its mind, or pass unrefused."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scenes import PUBLISHED, TRACKERS, Thing, assert_same, crowd, id_at, play, seen, tracker_of

from tracker.association import Byte, ByteConfig, Jde, JdeConfig, make_association
from tracker.errors import ConfigError, DetectionsError, TrackerError

both = pytest.mark.parametrize("kind", TRACKERS)
every = pytest.mark.parametrize(("kind", "compat"), [("jde", None), ("byte", None), *PUBLISHED])

# What a frame leaves behind


@every
def test_results_are_repeatable_and_nobody_elses_arrays_change(kind: str, compat: str | None) -> None:
    frames = [seen(*things) for things in crowd(6, 60)]
    before = pickle.dumps(frames)
    first, second = tracker_of(kind, compat), tracker_of(kind, compat)
    results, copies = [], []
    for index, detections in enumerate(frames, start=1):
        results.append(first.update(index, detections))
        copies.append(pickle.loads(pickle.dumps(results[-1])))
        assert_same(results[-1], second.update(index, detections))
    for tracks, copy in zip(results, copies, strict=True):
        assert_same(tracks, copy)
    assert pickle.dumps(frames) == before


@pytest.mark.parametrize(("kind", "frames"), [("byte", 10_000), ("jde", 3_000)])
def test_memory_is_bounded_however_many_come_and_go(kind: str, frames: int) -> None:
    rng = np.random.default_rng(7)
    guests: list[Thing] = []
    day = []
    for index in range(500):
        guests = [guest for guest in guests if rng.uniform() < 0.6]
        guests.append(Thing(*rng.uniform(0, 4000, 2), who=index % 8))
        day.append(seen(*guests))
    association = tracker_of(kind)
    rows, sizes = [], []
    for index in range(frames):
        association.update(index, day[index % len(day)])
        rows.append(len(association.table))
        if index % 50 == 0:
            sizes.append(len(pickle.dumps(association)))  # sees anything that grows, wherever it hangs
    assert association.confirmed > frames / 2
    assert max(rows) < 50
    half = len(sizes) // 2
    assert max(sizes[half:]) < 1.1 * max(sizes[:half])
    for index in range(frames, frames + 32):
        association.update(index, seen())
    assert len(association.table) == 0


# Strange boxes

FLAT = {"no height": (20, 0), "no width": (0, 50), "a point": (0, 0), "a hair": (1e-9, 1e-9)}


@every
@pytest.mark.parametrize("size", FLAT.values(), ids=FLAT)
def test_boxes_without_area_poison_nothing(kind: str, compat: str | None, size: tuple[float, float]) -> None:
    person = Thing(100, 100)
    flat = [Thing(x, 100, who=who, w=size[0], h=size[1]) for who, x in ((1, 92), (2, 300))]
    association = tracker_of(kind, compat)
    mine = id_at(association.update(1, seen(*flat, person)), person)
    for index in range(2, 60):
        tracks = association.update(index, seen(person) if 20 < index < 30 else seen(*flat, person))
        assert id_at(tracks, person) == mine
        assert np.isfinite(association.table.state).all()


@every
def test_a_box_may_shrink_faster_than_it_can(kind: str, compat: str | None) -> None:
    """The prediction of the last frame is a box turned inside out, 70 pixels below nothing."""
    story = [Thing(100, 100, w=h, h=h) for h in (400, 300, 200, 100, 8)]
    association = tracker_of(kind, compat)
    play(association, [[thing] for thing in story])
    assert association.table.id.tolist() == [1]
    tracks = association.update(6, seen(Thing(100, 100, w=4, h=4)))
    assert np.isfinite(tracks.xyxy).all()


@both
@pytest.mark.parametrize("scale", [2.0**30, 2.0**60], ids=["gigapixels", "beyond any image"])
def test_huge_images_change_nothing(kind: str, scale: float) -> None:
    """From here on the extra pixel of an inclusive corner no longer matters: ids and boxes scale exactly."""
    one, other = tracker_of(kind), tracker_of(kind)
    for index, things in enumerate(crowd(8, 60), start=1):
        base, large = (
            association.update(index, replace(seen(*things), xyxy=seen(*things).xyxy * factor))
            for association, factor in ((one, 2.0**20), (other, scale))
        )
        assert_same(replace(base, xyxy=base.xyxy * (scale / 2.0**20)), large)


@both
def test_far_from_the_origin_is_like_near_it(kind: str) -> None:
    far = 1e7
    near_results = play(tracker_of(kind), crowd(9, 60))
    far_results = play(
        tracker_of(kind), [[t._replace(x=t.x + far, y=t.y - far) for t in things] for things in crowd(9, 60)]
    )
    for near, away in zip(near_results, far_results, strict=True):
        np.testing.assert_array_equal(near.id, away.id)
        np.testing.assert_allclose(away.xyxy - [far, -far, far, -far], near.xyxy, atol=1e-6)


# Refusals


@pytest.mark.parametrize(
    ("index", "words"),
    [(5, "frame 5 comes after frame 5"), (4, "frame 4 comes after frame 5"), (-1, "must be in order")],
)
@both
def test_frames_out_of_order_are_refused_and_do_no_harm(kind: str, index: int, words: str) -> None:
    association = tracker_of(kind)
    play(association, 5 * [[Thing(100, 100)]])
    with pytest.raises(ConfigError, match=words):
        association.update(index, seen(Thing(100, 100)))
    assert association.update(6, seen(Thing(100, 100))).id.tolist() == [1]


@pytest.mark.parametrize(
    ("embedding", "words"),
    [
        (None, "jde needs embeddings and the detections have none: use the byte tracker"),
        (np.ones((1, 9), np.float32), "embeddings have 9 numbers, earlier frames had 8"),
    ],
    ids=["none", "another width"],
)
def test_embeddings_that_do_not_fit_are_refused_and_do_no_harm(embedding: Any, words: str) -> None:
    association, good = Jde(), seen(Thing(100, 100))
    association.update(1, good)
    with pytest.raises(DetectionsError, match=words):
        association.update(2, replace(good, embedding=embedding))
    assert association.update(2, good).id.tolist() == [1]


def test_byte_does_not_look_at_embeddings() -> None:
    association, good = Byte(), seen(Thing(100, 100))
    for index, embedding in enumerate([None, good.embedding, np.zeros((1, 3))], start=1):
        assert association.update(index, replace(good, embedding=embedding)).id.tolist() == [1]


def test_an_embedding_without_length_is_survived_and_replaced() -> None:
    association, good = Jde(), seen(Thing(100, 100))
    for index in range(1, 6):
        assert association.update(index, replace(good, embedding=np.zeros((1, 8)))).id.tolist() == [1]
    assert association.table.feature is not None
    assert not association.table.feature.any()
    assert association.update(6, good).id.tolist() == [1]
    np.testing.assert_allclose(association.table.feature, good.embedding, rtol=1e-6)


def test_the_length_of_an_embedding_means_nothing() -> None:
    story = [seen(*things) for things in crowd(10, 60)]
    unit, scaled = Jde(), Jde()
    for index, good in enumerate(story, start=1):
        assert good.embedding is not None
        long = replace(good, embedding=good.embedding * np.float32(2.0 ** (index % 40 - 20)))
        assert_same(unit.update(index, good), scaled.update(index, long))


# Settings


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("high", 1.5, "high must lie in 0…1, got 1.5"),
        ("high", 2, "high must lie in 0…1, got 2"),
        ("high", -0.1, "high must lie in 0…1, got -0.1"),
        ("low", float("nan"), "low must lie in 0…1, got nan"),
        ("weak_limit", float("inf"), "weak_limit must lie in 0…1, got inf"),
        ("tentative_limit", "0.5", "tentative_limit must be of kind float, got '0.5'"),
        ("high", None, "high must be of kind float, got None"),
        ("high", True, "high must be of kind float, got True"),
        ("low", 0.95, "low must not exceed high, got low=0.95 and high=0.[46]"),
        ("track_buffer", -1, "track_buffer must not be negative, got -1"),
        ("track_buffer", 0.5, "track_buffer must be of kind int, got 0.5"),
        ("track_buffer", True, "track_buffer must be of kind int, got True"),
        ("official", "yes", "official must be of kind bool, got 'yes'"),
        ("official", 1, "official must be of kind bool, got 1"),
    ],
)
@pytest.mark.parametrize("config", [JdeConfig, ByteConfig])
def test_settings_out_of_bounds(
    config: type[JdeConfig | ByteConfig], field: str, value: Any, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        config(**{field: value})


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        ("jde", "appearance_limit"),
        ("jde", "motion_weight"),
        ("jde", "overlap_limit"),
        ("byte", "birth"),
        ("byte", "match_limit"),
    ],
)
def test_settings_of_one_tracker(kind: str, field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field} must lie in 0…1, got 7"):
        make_association(kind, settings={field: 7.0})


@pytest.mark.parametrize("settings", [{"high": 1, "low": 0}, {"high": 0.5, "low": 0.5}, {}, None], ids=str)
@both
def test_settings_at_the_bounds(kind: str, settings: dict[str, Any] | None) -> None:
    config = tracker_of(kind, settings=settings).config
    for name, value in (settings or {}).items():
        assert getattr(config, name) == value


@pytest.mark.parametrize("frame_rate", [0, -30, float("nan"), float("inf")])
@both
def test_frame_rates_that_cannot_be(kind: str, frame_rate: float) -> None:
    with pytest.raises(
        ConfigError, match=f"frame_rate must be a finite number greater than 0, got {frame_rate}"
    ):
        make_association(kind, frame_rate=frame_rate)


@pytest.mark.parametrize(
    ("tracker", "options", "words"),
    [
        ("sort", {}, "no tracker 'sort' with compat None: there is jde, jde with fairmot, byte, byte with"),
        ("JDE", {}, "no tracker 'JDE'"),
        ("jde", {"compat": "bytetrack"}, "no tracker 'jde' with compat 'bytetrack'"),
        ("byte", {"compat": "fairmot"}, "no tracker 'byte' with compat 'fairmot'"),
        (
            "byte",
            {"settings": {"appearance_limit": 0.3}},
            "byte has no setting 'appearance_limit': it has birth",
        ),
        ("jde", {"settings": {"hihg": 0.3}}, "jde has no setting 'hihg': it has appearance_limit, cost"),
        ("jde", {"settings": {"official": True}}, "jde has no setting 'official'"),
    ],
)
def test_trackers_that_do_not_exist(tracker: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        make_association(tracker, **options)
    assert isinstance(caught.value, TrackerError)


@pytest.mark.parametrize(
    ("kind", "compat", "config"),
    [
        ("jde", None, JdeConfig()),
        ("byte", None, ByteConfig()),
        ("jde", "fairmot", JdeConfig.fairmot()),
        ("byte", "bytetrack", ByteConfig.bytetrack()),
    ],
)
def test_a_tracker_by_name_has_that_preset(kind: str, compat: str | None, config: Any) -> None:
    assert tracker_of(kind, compat).config == config
    assert type(tracker_of(kind, compat)) is {"jde": Jde, "byte": Byte}[kind]


def test_settings_differ_from_the_preset_only_where_said() -> None:
    association = tracker_of("jde", "fairmot", settings={"high": 0.5})
    assert association.config == replace(JdeConfig.fairmot(), high=0.5)
