"""Who goes where and when: routes over the ground as tables over time.

Walkers keep to their lane of the pavement, wander over squares, stop, turn back, meet; some of it happens
just where a lamp post or a parked van hides them from the camera. Knows nothing of looks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tracker.deploy.scenes.camera import Camera
from tracker.deploy.scenes.people import STRIDE
from tracker.deploy.scenes.street import Layout
from tracker.deploy.scenes.textures import Random

Array = NDArray[np.float64]

RATE = 10.0  # table rows per second
FAR, NEAR = 44.0, 2.2  # metres ahead of the camera: where routes end


@dataclass(frozen=True, kw_only=True)
class Route:
    """Rows every 1/RATE seconds from 0: x, z (metres), heading, phase (radians), speed (metres/second).
    begin, end: seconds during which there is somebody at all."""

    rows: Array  # (T, 5)
    begin: float
    end: float

    def at(self, seconds: float) -> tuple[float, ...] | None:
        """(x, z, heading, phase, speed), or None before and after."""
        if not self.begin <= seconds <= self.end:
            return None
        k = min(int(seconds * RATE), len(self.rows) - 2)
        share = seconds * RATE - k
        return tuple((self.rows[k] * (1 - share) + self.rows[k + 1] * share).tolist())


def follow(points: Array, pauses: Array, speed: float, begin: float, seconds: float, stride: float) -> Route:
    """Walk along points (K, 2) at `speed`, resting at each for its pause (K,) seconds; stride in metres."""
    legs = np.hypot(*np.diff(points, axis=0).T) / speed
    arrive = begin + np.concatenate(([0.0], np.cumsum(legs + pauses[:-1])))
    knots = np.stack((arrive, arrive + pauses + 1e-6), 1).reshape(-1)
    times = np.arange(int(seconds * RATE) + 2) / RATE
    # A second's mean rounds the corners, and gives everyone the time to start and stop.
    taps = times[:, None] + np.linspace(-0.45, 0.45, 7)
    place = np.stack([np.interp(taps, knots, np.repeat(points[:, axis], 2)).mean(1) for axis in (0, 1)], 1)
    velocity = np.gradient(place, 1 / RATE, axis=0)
    pace = np.hypot(*velocity.T)
    heading = np.where(pace > 0.05, np.arctan2(velocity[:, 1], velocity[:, 0]), np.nan)
    known = np.flatnonzero(np.isfinite(heading))
    if not len(known):
        first = points[1] - points[0]
        heading[:], known = math.atan2(first[1], first[0]), np.arange(len(heading))
    latest = known[np.clip(np.searchsorted(known, np.arange(len(heading)), "right") - 1, 0, None)]
    turns = np.unwrap(heading[latest])
    soft = np.convolve(np.pad(turns, 3, "edge"), np.ones(7) / 7, "valid")
    phase = np.cumsum(pace) / RATE / stride * 2 * math.pi
    return Route(rows=np.column_stack((place, soft, phase, pace)), begin=begin, end=float(knots[-1]))


class Planner:
    """Draws routes for one camera over one street.

    hiding: (H, 2) places of things that hide people. still_road: whether people may cross the road.
    """

    def __init__(
        self, rng: Random, camera: Camera, layout: Layout, hiding: Array, *, seconds: float, still_road: bool
    ) -> None:
        self._rng, self._camera, self._layout, self._hiding = rng, camera, layout, hiding
        self._seconds, self._still_road = seconds, still_road

    def crowd(self, heights: Array) -> list[Route]:
        """A route for each person, by height (N,); some in pairs and some meeting others."""
        rng, routes = self._rng, list[Route]()
        while len(routes) < len(heights):
            stride = STRIDE * heights[len(routes)]
            draw = rng.random()
            makers: Callable[..., list[tuple[Array, Array, float, float]]]
            makers = self._meeting if draw < 0.3 else self._wander if draw < 0.45 else self._lane
            for points, pauses, speed, begin in makers():
                routes.append(follow(points, pauses, speed, begin, self._seconds, stride))
                if rng.random() < 0.22:  # with company: beside, half a step behind
                    beside = points + rng.choice([-1, 1]) * rng.uniform(0.5, 0.7) * _normal(points)
                    routes.append(follow(beside, pauses, speed, begin + 0.15, self._seconds, stride * 1.03))
        return routes[: len(heights)]

    def _lane(self) -> list[tuple[Array, Array, float, float]]:
        """Along the pavement or across the square, perhaps halting or turning back where something hides."""
        rng = self._rng
        across, points = self._line()
        pauses = np.zeros(len(points))
        event = rng.random()
        if event < 0.55 and len(self._hiding) and len(points) > 3:
            hidden = self._hidden_point(across, points)
            if hidden is not None:
                if event < 0.25:  # turn back out of sight
                    points = np.concatenate((points[: hidden + 1], points[:hidden][::-1]))
                    pauses = np.zeros(len(points))
                    pauses[hidden] = rng.uniform(0.0, 0.6)
                else:
                    pauses[hidden] = rng.uniform(0.4, 2.5)
        elif event > 0.85:
            pauses[len(points) // 2] = rng.uniform(1, 6)
        elif event > 0.75 and self._still_road and not self._layout.square:
            other = self._spread(self._across())
            points = np.concatenate((points[: len(points) // 2], other[len(other) // 2 :]))
            pauses = np.zeros(len(points))
        speed = self._speed()
        return [(points, pauses, speed, self._begin(points, speed))]

    def _meeting(self) -> list[tuple[Array, Array, float, float]]:
        """Two who come towards each other; they pass, or stop and talk, or both turn back."""
        rng = self._rng
        across, points = self._line()
        near = self._spread(across + rng.uniform(0.3, 0.6) * rng.choice([-1, 1]))
        other = near[::-1] if np.dot(near[-1] - near[0], points[-1] - points[0]) > 0 else near
        if len(points) < 4 or len(other) < 4:
            return []
        middle = int(rng.integers(1, len(points) - 1))
        there = int(np.argmin(np.hypot(*(other - points[middle]).T)))
        if not 0 < there < len(other) - 1:
            return []
        kind, talk, when = rng.random(), 0.0, rng.uniform(1, max(self._seconds - 1, 1.5))
        if kind < 0.3:
            talk = rng.uniform(1, 4)
        met = []
        for path, at in ((points, middle), (other, there)):
            speed = self._speed()
            begin = when - np.hypot(*np.diff(path[: at + 1], axis=0).T).sum() / speed
            path = np.concatenate((path[: at + 1], path[:at][::-1])) if kind > 0.7 else path
            pauses = np.zeros(len(path))
            pauses[at] = talk
            met.append((path, pauses, speed, begin))
        return met

    def _wander(self) -> list[tuple[Array, Array, float, float]]:
        """From place to place with rests, coming from and leaving through the sides of the view."""
        rng = self._rng
        count = int(rng.integers(1, 4))
        inner = [self._anywhere() for _ in range(count)]
        sides = [self._beside(inner[k][1], rng.choice([-1, 1])) for k in (0, -1)]
        points = np.array([sides[0], *inner, sides[1]])
        pauses = np.concatenate(([0.0], rng.choice([0, 1], count) * rng.uniform(0.5, 8, count), [0.0]))
        speed = self._speed()
        return [(points, pauses, speed, self._begin(points, speed))]

    def _line(self) -> tuple[float, Array]:
        across = self._across()
        points = self._spread(across)
        return across, points[::-1] if self._rng.random() < 0.5 else points

    def _across(self) -> float:
        """A lane for walkers."""
        rng, layout = self._rng, self._layout
        if layout.square:
            return float(rng.uniform(2.5, layout.front - 0.8))
        if rng.random() < 0.6:
            return float(rng.uniform(max(layout.back, -2.5) + 0.5, layout.kerb - 0.5))
        return float(rng.uniform(layout.verge + 0.5, layout.front - 0.6))

    def _spread(self, across: float) -> Array:
        """Points along a lane through the view (K, 2), ends outside of it where that is possible."""
        along = np.arange(-48, 48, 0.5)
        points = np.stack(self._layout.world(along, np.full(len(along), across)), -1)
        seen = self._inside(points, 1.0)
        if not seen.any():
            place = self._anywhere()
            return np.array([self._beside(place[1], -1), place, self._beside(place[1], 1)])
        first, last = int(np.argmax(seen)), len(seen) - 1 - int(np.argmax(seen[::-1]))
        stops = np.linspace(first, last, max(3, int((last - first) * 0.5 / 4)))
        route = points[stops.astype(int)] + self._rng.normal(scale=0.12, size=(len(stops), 2))
        ends = [self._leave(route[k]) for k in (0, -1)]
        return np.concatenate(([ends[0]], route, [ends[1]]))

    def _leave(self, point: Array) -> Array:
        """A way out of the view from a route's end: on sideways, unless it is far away."""
        if point[1] > FAR - 3:
            return np.array([point[0], point[1] + 0.5])
        return self._beside(point[1], math.copysign(1, point[0]))

    def _beside(self, z: float, side: float) -> Array:
        half = self._camera.size[0] / 2 / self._camera.focal
        return np.array([side * (half * (z + 1) + 0.8), z])

    def _anywhere(self) -> Array:
        """A point of the pavements or the square, in view."""
        for _ in range(40):
            along = np.array(self._rng.uniform(-30, 30))
            point = np.stack(self._layout.world(along, np.array(self._across())), -1)
            if self._inside(point[None], 0.85)[0] and point[1] > 4:
                return point
        return np.array([0.0, 9.0])

    def _inside(self, points: Array, share: float) -> NDArray[np.bool_]:
        half = self._camera.size[0] / 2 / self._camera.focal
        x, z = points.T
        inside: NDArray[np.bool_] = (z > NEAR) & (z < FAR) & (np.abs(x) < share * half * z)
        return inside

    def _hidden_point(self, across: float, points: Array) -> int | None:
        """The index in a lane's points, one of them moved, where some thing hides the walker."""
        thing = self._hiding[self._rng.integers(len(self._hiding))]
        cos, sin = math.cos(self._layout.yaw), math.sin(self._layout.yaw)
        reach = -thing[0] * sin + thing[1] * cos  # the thing's own coordinate across the street
        if reach <= 0.5 or not 1.02 < across / reach < 4:
            return None
        place = thing * (across / reach)
        k = 1 + int(np.argmin(np.hypot(*(points[1:-1] - place).T)))
        if np.hypot(*(points[k] - place)) > 4:
            return None
        points[k] = place
        return k

    def _speed(self) -> float:
        rng = self._rng
        return float(
            rng.uniform(2.3, 3.4) if rng.random() < 0.06 else np.clip(rng.normal(1.32, 0.2), 0.7, 1.9)
        )

    def _begin(self, points: Array, speed: float) -> float:
        lasts = np.hypot(*np.diff(points, axis=0).T).sum() / speed
        return float(self._rng.uniform(-0.8 * lasts, self._seconds - 0.15 * lasts))


def _normal(points: Array) -> Array:
    """(2,) unit vector across a route's general direction."""
    way = points[-1] - points[0]
    if np.hypot(*way) < 1:
        way = points[len(points) // 2] - points[0]
    normal: Array = np.array([-way[1], way[0]]) / max(float(np.hypot(*way)), 1e-6)
    return normal


def drive(rng: Random, layout: Layout, lengths: Array, seconds: float) -> list[Route]:
    """A route for each car, by length (N,) metres: two lanes in opposite directions, each moving as one."""
    times = np.arange(int(seconds * RATE) + 2) / RATE
    centre, half = (layout.kerb + layout.verge) / 2, (layout.verge - layout.kerb) / 2
    routes = []
    pace = []
    for _ in range(2):
        knots = rng.uniform(3.5, 11) * np.clip(rng.normal(1, 0.5, max(int(seconds / 3), 2)), 0.0, 1.6)
        pace.append(np.interp(times, np.linspace(0, seconds, len(knots)), knots))
    gone = [np.cumsum(speed) / RATE for speed in pace]
    lane_of = np.arange(len(lengths)) % 2
    queue = [rng.uniform(-25, 30), rng.uniform(-25, 30)]
    for lane, length in zip(lane_of, lengths, strict=True):
        direction = 1 if lane else -1
        along = direction * (queue[lane] + gone[lane])
        queue[lane] -= length + rng.uniform(3, 22)
        x, z = layout.world(along, np.full(len(times), centre + direction * half * 0.48))
        heading = layout.yaw + (0 if direction > 0 else math.pi)
        rows = np.column_stack((x, z, np.full(len(times), heading), np.zeros(len(times)), pace[lane]))
        routes.append(Route(rows=rows, begin=0.0, end=seconds + 1))
    return routes
