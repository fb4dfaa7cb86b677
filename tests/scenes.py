"""Small scenes for the trackers: things seen in frames, and what a tracker makes of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tracker.association import Byte, Jde, make_association
from tracker.types import Detections, Tracks

TRACKERS = ["jde", "byte"]
PUBLISHED = [("jde", "fairmot"), ("byte", "bytetrack")]


class Thing(NamedTuple):
    """One detection: centre in pixels, what it looks like, size, score, class."""

    x: float
    y: float
    who: int = 0
    w: float = 20
    h: float = 50
    score: float = 0.9
    label: int = 0


def seen(*things: Thing) -> Detections:
    """A frame's detections. What it looks like: one of 8 embeddings at right angles to each other."""
    rows = np.array([(t.x, t.y, t.w, t.h, t.score) for t in things], np.float64).reshape(-1, 5)
    half = rows[:, 2:4] / 2
    return Detections(
        xyxy=np.concatenate((rows[:, :2] - half, rows[:, :2] + half), axis=1),
        score=rows[:, 4],
        label=np.array([t.label for t in things], np.int64),
        embedding=np.eye(8, dtype=np.float32)[[t.who for t in things]].reshape(-1, 8),
    )


def crowd(seed: int, frames: int, count: int = 12) -> list[list[Thing]]:
    """People of two classes walking at random, seen three times out of four, some weakly."""
    rng = np.random.default_rng(seed)
    place, speed = rng.uniform(0, 300, (count, 2)), rng.normal(0, 3, (count, 2))
    story = []
    for _ in range(frames):
        place = place + speed + rng.normal(0, 0.5, place.shape)
        visible = (rng.uniform(size=count) < 0.75).nonzero()[0].tolist()
        story.append([Thing(*place[k], who=k % 8, score=rng.uniform(0.2, 1), label=k % 2) for k in visible])
    return story


def tracker_of(kind: str, compat: str | None = None, **options: Any) -> Jde | Byte:
    association = make_association(kind, compat=compat, **options)
    assert isinstance(association, Jde | Byte)
    return association


def play(association: Jde | Byte, frames: Iterable[Sequence[Thing]]) -> list[Tracks]:
    """The tracks of each frame, frames counted from 1."""
    return [association.update(index, seen(*things)) for index, things in enumerate(frames, start=1)]


def id_at(tracks: Tracks, thing: Thing) -> int | None:
    """The id of the track whose centre is nearest to a thing, if any is within 5 pixels."""
    centre = (tracks.xyxy[:, :2] + tracks.xyxy[:, 2:]) / 2
    distance = np.hypot(*(centre - thing[:2]).T)
    return int(tracks.id[distance.argmin()]) if len(tracks) and distance.min() < 5 else None


def assert_same(one: Tracks, other: Tracks) -> None:
    for name in ("id", "xyxy", "score", "label"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
