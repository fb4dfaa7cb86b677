"""Lines and zones in a picture, and who crosses them: the geometry of counting.

A track is where its foot stands: the middle of its box's lower edge. Points are shares of the picture, x to
the right and y down, so that a camera may change its resolution. Knows shapes, feet and ids; nobody's files.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tracker.boxes import enclosing, turned
from tracker.errors import ConfigError
from tracker.types import Frame, Tracks

Points = NDArray[np.float64]

MAX_CORNERS = 32
MAX_NAME = 40
_LEAST_EXTENT = 0.005  # of the picture: less is a slip of the mouse

# Boxes tremble, and bob with every step. Only beyond this share of their height, but at least a pixel, has a
# foot changed sides; so who walks along a line is not counted again and again. At 40 random lines through the
# demo scene, counts by tracks then differ from those by its ground truth by 12 of 158; at 0.03 by 39 of 207.
TREMBLE = 0.1
# Longer than any tracker remembers one that is hidden.
_FORGET_SECONDS = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What to count at. points: (x, y) as shares of the picture, 0 to 1.

    A line has two. Who crosses it towards the right hand of one who walks from the first to the second comes
    in: a line drawn from left to right is entered downwards. A zone has three to MAX_CORNERS, its corners.

    Raises ConfigError for what is neither.
    """

    kind: Literal["line", "zone"]
    points: tuple[tuple[float, float], ...]
    name: str

    def __post_init__(self) -> None:
        least, most = {"line": (2, 2), "zone": (3, MAX_CORNERS)}.get(self.kind, (0, -1))
        if not least <= len(self.points) <= most:
            raise ConfigError(
                f"a {str(self.kind)[:MAX_NAME]!r} of {len(self.points)} points: a line has 2, a zone 3 to "
                f"{MAX_CORNERS}"
            )
        if not 1 <= len(self.name) <= MAX_NAME or not self.name.isprintable() or not self.name.strip():
            raise ConfigError(f"a counter's name has 1 to {MAX_NAME} printable characters")
        if any(len(point) != 2 for point in self.points):
            raise ConfigError("a point is two numbers, x and y")
        corners = np.array(self.points, np.float64)
        if not ((corners >= 0) & (corners <= 1)).all():  # not so for NaN either
            raise ConfigError("points are shares of the picture: x and y lie between 0 and 1")
        extent = np.ptp(corners, axis=0)
        if (extent.max() if self.kind == "line" else extent.min()) < _LEAST_EXTENT:
            raise ConfigError(
                f"this {self.kind} is too small to be crossed: {100 * _LEAST_EXTENT} % at least"
            )

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "name": self.name, "points": [list(point) for point in self.points]}


def feet(tracks: Tracks, size: tuple[int, int]) -> Points:
    """(N, 2): where they stand, in pixels of a picture (width, height); at its edge where that is beyond.

    The middle of the lower edge; of a box that is turned, as seen from above, its centre.
    """
    xyxy = np.asarray(tracks.xyxy, np.float64)
    down = xyxy[:, 3] if tracks.angle is None else (xyxy[:, 1] + xyxy[:, 3]) / 2
    standing = np.column_stack(((xyxy[:, 0] + xyxy[:, 2]) / 2, down))
    return np.clip(standing, 0, np.array(size) - 1.0)


def distance_to_line(points: Points, line: Points) -> NDArray[np.float64]:
    """(N,) from points (N, 2) to the endless line through (2, 2); positive to the right of its direction."""
    along = line[1] - line[0]
    away = points - line[0]
    return np.asarray((along[0] * away[:, 1] - along[1] * away[:, 0]) / np.hypot(*along))


def distance_to_zone(points: Points, corners: Points) -> NDArray[np.float64]:
    """(N,) from points (N, 2) to the edge of a polygon (K, 2); positive inside, by the even-odd rule."""
    start, end = corners, np.roll(corners, -1, axis=0)
    edge = end - start  # (K, 2)
    away = points[:, None] - start  # (N, K, 2)
    share = np.clip((away * edge).sum(axis=2) / np.maximum((edge**2).sum(axis=1), 1e-12), 0, 1)
    nearest = np.hypot(*np.moveaxis(away - share[..., None] * edge, 2, 0)).min(axis=1)
    x, y = points[:, :1], points[:, 1:]
    spans = (start[:, 1] > y) != (end[:, 1] > y)  # (N, K): level with the edge
    rise = np.where(edge[:, 1] == 0, 1.0, edge[:, 1])
    beyond = x < start[:, 0] + (y - start[:, 1]) * edge[:, 0] / rise
    inside = (spans & beyond).sum(axis=1) % 2 == 1
    return np.asarray(np.where(inside, nearest, -nearest))


def passes(start: Points, end: Points, line: Points) -> NDArray[np.bool_]:
    """(N,): whether ways from (N, 2) to (N, 2) that change sides do so between the ends of a line (2, 2)."""
    before, after = distance_to_line(start, line), distance_to_line(end, line)
    change = np.where(before == after, 1.0, before - after)
    place = start + (before / change)[:, None] * (end - start)
    along = line[1] - line[0]
    share = (place - line[0]) @ along / (along @ along)
    return np.asarray((share >= 0) & (share <= 1))


class Count:
    """Who crossed one shape so far, by class.

    A line counts ways across it, a zone ways across its border; who appears or vanishes inside crossed
    nothing. shape: may get another name, not other points. inside: tracks in a zone in the newest frame.
    Memory is bounded: ids not seen for half a minute are forgotten.
    """

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.into: Counter[str] = Counter()
        self.out: Counter[str] = Counter()
        self.inside = 0
        self._corners = np.array(shape.points, np.float64)
        self._ids = np.empty(0, np.int64)  # (M,)
        self._sides = np.empty(0, np.int8)  # (M,): 1 right of the line or inside, -1 not, 0 not known yet
        self._places = np.empty((0, 2))  # (M, 2): where they stood when that was last sure
        self._seen = np.empty(0)  # (M,): seconds

    def update(self, frame: Frame, tracks: Tracks) -> None:
        """Every frame of one source, in order."""
        size = np.array(frame.size, np.float64)
        standing = feet(tracks, frame.size)
        upright = tracks.xyxy if tracks.angle is None else enclosing(turned(tracks.xyxy, tracks.angle))
        height = np.asarray(upright[:, 3] - upright[:, 1], np.float64)
        here, there = _matches(tracks.id, self._ids)
        before = np.zeros(len(tracks), np.int8)
        before[here] = self._sides[there]
        places = standing / size
        origins = places.copy()
        origins[here] = self._places[there]

        sides = self._sides_of(standing, self._corners * size, np.maximum(1.0, TREMBLE * height), before)
        crossed = (sides * before) < 0
        if self.shape.kind == "line":
            crossed &= passes(origins, places, self._corners)
        for index in np.flatnonzero(crossed).tolist():  # rare, and few
            count = self.into if sides[index] > 0 else self.out
            count[tracks.name_of(int(tracks.label[index]))] += 1

        sure = sides != 0
        sides = np.where(sure, sides, before)
        self.inside = int((sides > 0).sum())
        self._remember(tracks.id, sides, np.where(sure[:, None], places, origins), there, frame.pts_seconds)

    def _sides_of(
        self, standing: Points, corners: Points, tremble: NDArray[np.float64], before: NDArray[np.int8]
    ) -> NDArray[np.int8]:
        """(N,): 1, -1, or 0 where it is too close to say. Zones may be narrow, so only leaving takes care."""
        if self.shape.kind == "line":
            distance = distance_to_line(standing, corners)
            return np.asarray(np.sign(distance) * (np.abs(distance) > tremble), np.int8)
        distance = distance_to_zone(standing, corners)
        left = (distance < -tremble) | (before <= 0)
        return np.where(distance > 0, 1, np.where(left, -1, 0)).astype(np.int8)

    def _remember(
        self,
        ids: NDArray[np.int64],
        sides: NDArray[np.int8],
        places: Points,
        replaced: NDArray[np.intp],
        now: float,
    ) -> None:
        kept = self._seen >= now - _FORGET_SECONDS
        kept[replaced] = False
        self._ids = np.concatenate((ids, self._ids[kept]))
        self._sides = np.concatenate((sides, self._sides[kept]))
        self._places = np.concatenate((places, self._places[kept]))
        self._seen = np.concatenate((np.full(len(ids), now), self._seen[kept]))

    def totals(self) -> dict[str, Any]:
        """For a line of results: name, in, out, and of a zone who is inside."""
        totals: dict[str, Any] = {
            "name": self.shape.name,
            "in": self.into.total(),
            "out": self.out.total(),
        }
        return totals if self.shape.kind == "line" else {**totals, "inside": self.inside}


def _matches(ids: NDArray[np.int64], known: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Where the same id stands in both."""
    _, here, there = np.intersect1d(ids, known, assume_unique=True, return_indices=True)
    return here, there
