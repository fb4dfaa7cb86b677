"""What becomes of objects: stories of births, crossings, occlusions and deaths, told to both trackers."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from scenes import PUBLISHED, TRACKERS, Thing, assert_same, crowd, id_at, play, seen, tracker_of

both = pytest.mark.parametrize("kind", TRACKERS)
every = pytest.mark.parametrize(("kind", "compat"), [("jde", None), ("byte", None), *PUBLISHED])
PEOPLE_AND_CARS = ("person", "car")


# One object that stands still


class Life(NamedTuple):
    """Frame by frame: what the detector says, and the id that is shown.

    x: seen. w: seen weakly. m: with a middling score. b, j: at what byte and jde call confident, exactly.
    dot: not seen, or nothing shown. underscore: nobody looked, the frame index is skipped.
    """

    detector: str
    shown: str
    kinds: list[str] = TRACKERS


SCORES = {"x": 0.9, "m": 0.65, "w": 0.3, "b": 0.6, "j": 0.4}

LIVES = {
    "nothing ever": Life("......", "......"),
    "the first frame shows at once": Life("x", "1"),
    "later births need two matches": Life(".xx", "..1"),
    "tentative ends at its first miss": Life(".x.x.x", "......"),
    "the discarded keep their id": Life(".x.xx", "....2"),
    "a first frame without objects is one too": Life("..xx", "...1"),
    "a miss is not shown": Life("xx.xx", "11.11"),
    "hidden 5 frames": Life("xx.....xx", "11.....11"),
    "hidden 30 frames, the buffer": Life("xx" + 30 * "." + "xx", "11" + 30 * "." + "11"),
    "hidden 31 frames": Life("xx" + 31 * "." + "xx", "11" + 31 * "." + ".2"),
    "hidden 35 frames": Life("xx" + 35 * "." + "xx", "11" + 35 * "." + ".2"),
    "hidden twice": Life("xx" + 20 * "." + "x" + 20 * "." + "x", "11" + 20 * "." + "1" + 20 * "." + "1"),
    "a weak detection keeps a track": Life("xxwwwwxx", "11111111"),
    "for as long as it lasts": Life("xx" + 50 * "w" + "x", "11" + 50 * "1" + "1"),
    "but never starts one": Life("wwwwww", "......"),
    "nor one that has begun": Life(".xwxwx", "......"),
    "nor one that was lost": Life("xx.w.wx", "11....1"),
    "a middling score starts a track for jde": Life("mm.mm", "11.11", ["jde"]),
    "a middling score starts none for byte": Life("mmmmmm", "......", ["byte"]),
    "but confirms it": Life(".xmm", "..11"),
    "and finds a lost one": Life("xx..mm", "11..11"),
    "what is exactly at the limit is weak for jde": Life(".jjxxjj", "....111", ["jde"]),
    "and nothing at all for byte, as published": Life(".bbxxbx", "....1.1", ["byte"]),
    "skipped frames are no misses": Life("x__x_xx", "1__1_11"),
    "not even for the tentative": Life(".x_x", ".._1"),
    "skipped frames are time: within the buffer": Life("xx" + 30 * "_" + "xx", "11" + 30 * "_" + "11"),
    "skipped frames are time: beyond it": Life("xx" + 31 * "_" + "xx", "11" + 31 * "_" + ".2"),
    "far beyond it": Life("xx" + 5000 * "_" + "xx", "11" + 5000 * "_" + ".2"),
    "hidden and skipped add up": Life("xx" + 11 * "." + 20 * "_" + "xx", "11" + 11 * "." + 20 * "_" + ".2"),
    "and fit together": Life("xx" + 10 * "." + 20 * "_" + "xx", "11" + 10 * "." + 20 * "_" + "11"),
}


@pytest.mark.parametrize(
    ("kind", "life"),
    [pytest.param(kind, life, id=f"{kind}: {name}") for name, life in LIVES.items() for kind in life.kinds],
)
def test_one_object_standing_still(kind: str, life: Life) -> None:
    association = tracker_of(kind)
    shown = ""
    for index, sign in enumerate(life.detector, start=1):
        if sign == "_":
            shown += "_"
            continue
        things = [Thing(100, 100, score=SCORES[sign])] if sign in SCORES else []
        tracks = association.update(index, seen(*things))
        assert len(tracks) <= 1
        shown += str(tracks.id[0]) if len(tracks) else "."
        if len(tracks):
            np.testing.assert_array_equal(tracks.xyxy, [[90, 75, 110, 125]])
            assert tracks.score.tolist() == [SCORES[sign]]
    assert shown == life.shown
    assert association.confirmed == len(set(life.shown) - set("._"))


@pytest.mark.parametrize(
    ("options", "frames"),
    [
        ({"frame_rate": 30.0}, 30),
        ({"frame_rate": 10.0}, 10),
        ({"frame_rate": 59.94}, 59),
        ({"frame_rate": 0.5}, 0),
        ({"settings": {"track_buffer": 5}}, 5),
        ({"settings": {"track_buffer": 0}}, 0),
        ({"settings": {"track_buffer": 60}, "frame_rate": 15}, 30),
    ],
    ids=str,
)
@both
def test_the_buffer_is_counted_in_seconds(kind: str, options: dict[str, Any], frames: int) -> None:
    for hidden, identity in ((frames, 1), (frames + 1, 2)):
        here = [Thing(100, 100)]
        *_, last = play(tracker_of(kind, **options), [here, *hidden * [[]], here, here])
        assert last.id.tolist() == [identity]


# Several objects


class Meeting(NamedTuple):
    """Two objects: where each starts, its step per frame, and the frames in which the second is hidden."""

    first: tuple[float, float]
    first_step: tuple[float, float]
    second: tuple[float, float]
    second_step: tuple[float, float]
    hidden: range = range(0)
    frames: int = 45


MEETINGS = {
    "head on": Meeting((50, 100), (5, 0), (247, 100), (-5, 0)),
    "head on, one hidden for 5 frames": Meeting((50, 100), (5, 0), (247, 100), (-5, 0), range(18, 23)),
    "crossing at right angles": Meeting((50, 100), (5, 0), (150, 3), (0, 5)),
    "crossing, one hidden for 5 frames": Meeting((50, 100), (5, 0), (150, -12), (0, 5), range(18, 23)),
    "overtaking": Meeting((50, 100), (6, 0), (120, 108), (3, 0), frames=60),
    "never meeting, one hidden for 5 frames": Meeting((50, 100), (5, 0), (50, 300), (4, 4), range(20, 25)),
}


@pytest.mark.parametrize("meeting", MEETINGS.values(), ids=MEETINGS)
@both
def test_two_objects_meet_and_keep_their_ids(kind: str, meeting: Meeting) -> None:
    story = []
    for t in range(meeting.frames):
        first = Thing(*np.add(meeting.first, np.multiply(t, meeting.first_step)), who=0)
        second = Thing(*np.add(meeting.second, np.multiply(t, meeting.second_step)), who=1)
        story.append([first] if t in meeting.hidden else [first, second])
    results = play(tracker_of(kind), story)
    for things, tracks in zip(story, results, strict=True):
        assert [id_at(tracks, thing) for thing in things] == [1, 2][: len(things)]
        assert len(tracks) == len(things)


def test_looks_decide_where_places_mislead() -> None:
    left, right = Thing(100, 100, who=0), Thing(112, 100, who=1)
    swapped = [left._replace(who=1), right._replace(who=0)]
    results = play(tracker_of("jde"), [*5 * [[left, right]], *5 * [[]], *3 * [swapped]])
    assert [id_at(results[4], left), id_at(results[4], right)] == [1, 2]
    assert [id_at(results[-1], left), id_at(results[-1], right)] == [2, 1]


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    ("kind", "better", "worse"),
    [
        ("jde", Thing(101, 100), Thing(92, 100, score=0.99)),
        ("byte", Thing(104, 100), Thing(96, 100, score=0.75)),
    ],
    ids=["jde: the nearer of two that look the same", "byte: the surer of two equally near"],
)
def test_of_two_claims_the_better_wins(kind: str, better: Thing, worse: Thing, first: int) -> None:
    claims = [better, worse] if first == 0 else [worse, better]
    *_, last = play(tracker_of(kind), [*5 * [[Thing(100, 100)]], claims])
    assert [(track.id, track.score) for track in last] == [(1, better.score)]


@both
def test_what_is_hidden_keeps_its_size(kind: str) -> None:
    association = tracker_of(kind)
    play(association, [[Thing(100, 100, h=50 + 3 * t)] for t in range(20)])
    height = association.table.state[0, 3, 0]
    assert association.table.state[1, 3, 0] > 1  # pixels per frame, and it would go on growing
    association.update(21, seen())  # predicted before anyone knows that it is hidden
    grown = association.table.state[0, 3, 0]
    assert grown > height + 1
    for index in range(22, 40):
        association.update(index, seen())
        assert association.table.state[0, 3, 0] == grown


def test_looks_change_slowly() -> None:
    association = tracker_of("jde")
    play(association, [[Thing(100, 100, who=0)], [Thing(100, 100, who=1)]])
    expected = np.array([[0.9, 0.1, 0, 0, 0, 0, 0, 0]]) / np.hypot(0.9, 0.1)
    assert association.table.feature is not None
    np.testing.assert_allclose(association.table.feature, expected, rtol=1e-6)


def test_looks_alone_do_not_jump_across_the_image() -> None:
    here, there = Thing(100, 100), Thing(600, 400)
    *_, last = play(tracker_of("jde"), [*5 * [[here]], *3 * [[there]]])
    assert last.id.tolist() == [2]


@both
def test_a_frame_with_1000_objects_and_then_a_steady_crowd(kind: str) -> None:
    rng = np.random.default_rng(1)
    things = [Thing(30 * (k % 40), 60 * (k // 40), who=k % 8) for k in range(1000)]
    association = tracker_of(kind)
    for index in range(1, 8):
        order = rng.permutation(1000)
        tracks = association.update(index, seen(*(things[k] for k in order)))
        if index == 1:
            names = dict(zip(order.tolist(), range(1, 1001), strict=True))
        assert sorted(tracks.id.tolist()) == list(range(1, 1001))
        assert [id_at(tracks, things[k]) for k in range(0, 1000, 37)] == [
            names[k] for k in range(0, 1000, 37)
        ]
    assert len(association.table) == 1000
    gone = association.update(8, seen())
    assert len(gone) == 0


@pytest.mark.parametrize("older", ["staying", "leaving"])
@pytest.mark.parametrize(("kind", "compat"), PUBLISHED)
def test_of_two_tracks_on_one_spot_the_younger_ends(kind: str, compat: str | None, older: str) -> None:
    """Two objects walk into one another, and then only the staying one is detected."""
    things = {"staying": Thing(100, 100, who=0), "leaving": Thing(160, 100, who=1)}
    meet = [[things["staying"], things["leaving"]._replace(x=160 - 2 * min(step, 30))] for step in range(40)]
    association = tracker_of(kind, compat)
    play(association, [*5 * [[things[older]]], *meet])
    assert association.table.id.tolist() == [1, 2]
    association.update(len(meet) + 6, seen(things["staying"]))
    assert association.table.id.tolist() == [1]


@both
def test_two_classes_may_share_a_spot(kind: str) -> None:
    person, car = Thing(100, 100, label=0), Thing(100, 100, label=1)
    association = tracker_of(kind, names=PEOPLE_AND_CARS)
    for index in range(1, 20):
        things = [person, car] if index % 2 else [car, person]
        tracks = association.update(index, seen(*things))
        assert [(track.id, track.label) for track in tracks] == [(1, "person"), (2, "car")]
    for index in range(20, 30):
        tracks = association.update(index, seen(car))
        assert [(track.id, track.label) for track in tracks] == [(2, "car")]
    assert association.table.id.tolist() == [1, 2]  # the lost person is no duplicate of the car


@pytest.mark.parametrize("score", [0.9, 0.3], ids=["a confident car", "a weak car"])
@both
def test_a_track_never_takes_a_detection_of_another_class(kind: str, score: float) -> None:
    person, car = Thing(100, 100, label=0), Thing(100, 100, label=1, score=score)
    *_, last, after, later = play(
        tracker_of(kind, names=PEOPLE_AND_CARS), [*5 * [[person]], [car], [car], [car]]
    )
    assert list(last) == []
    shown = [(2, "car")] if score > 0.7 else []
    assert [(t.id, t.label) for t in after] == [(t.id, t.label) for t in later] == shown


def test_class_numbers_beyond_the_names_are_shown_as_numbers() -> None:
    (track,) = play(tracker_of("byte", names=PEOPLE_AND_CARS), [[Thing(100, 100, label=7)]])[0]
    assert track.label == "7"


# Ids


@both
def test_ids_are_unique_rising_and_never_given_twice(kind: str) -> None:
    association = tracker_of(kind)
    parties = [set[int](), set[int]()]
    for index, things in enumerate([*crowd(3, 80), *31 * [[]], *crowd(4, 80)], start=1):
        tracks = association.update(index, seen(*things))
        ids = tracks.id.tolist()
        assert len(set(ids)) == len(ids)
        assert len(np.unique(tracks.xyxy, axis=0)) == len(ids)  # no detection serves two tracks
        parties[index > 80 + 31] |= set(ids)
    before, after = parties
    assert min(before) == 1
    assert max(before) < min(after)
    assert max(after) < association.table.next_id


@both
def test_instances_do_not_know_of_each_other(kind: str) -> None:
    stories = crowd(4, 60), crowd(5, 60)
    alone = [play(tracker_of(kind), story) for story in stories]
    pair = tracker_of(kind), tracker_of(kind)
    for index in range(60):
        for association, story, expected in zip(pair, stories, alone, strict=True):
            tracks = association.update(index + 1, seen(*story[index]))
            assert_same(tracks, expected[index])
    assert alone[0][0].id.min() == alone[1][0].id.min() == 1


# The published trackers report otherwise


@every
def test_the_published_trackers_show_the_filters_box_and_ours_the_detection(
    kind: str, compat: str | None
) -> None:
    story = [[Thing(100 + 3 * t + (t % 3), 100, w=20 + t % 2)] for t in range(10)]
    for things, tracks in list(zip(story, play(tracker_of(kind, compat=compat), story), strict=True))[1:]:
        error = np.abs(tracks.xyxy - seen(*things).xyxy).max()
        assert (error == 0) == (compat is None)
        assert error < 5


@pytest.mark.parametrize(
    ("w", "h", "published"),
    [(20, 50, 1), (5, 20, 0), (5, 21, 1), (1, 1, 0), (32, 20, 1), (33, 20, 0), (300, 100, 0)],
)
@pytest.mark.parametrize(("kind", "compat"), PUBLISHED)
def test_the_published_trackers_hide_small_and_wide_boxes(
    kind: str, compat: str, w: float, h: float, published: int
) -> None:
    thing = Thing(100, 100, w=w, h=h)
    assert len(play(tracker_of(kind), [[thing]])[0]) == 1
    assert len(play(tracker_of(kind, compat=compat), [[thing]])[0]) == published
