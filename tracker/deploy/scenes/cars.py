"""Cars: hatchbacks, saloons, estates, vans and pickups, and how they look from a camera.

A car is a body and a cabin, each drawn out from a side view, with glass, wheels, lamps and plates on it.
Knows nothing of routes or streets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tracker.deploy.scenes.camera import Camera
from tracker.deploy.scenes.sprite import Sprite
from tracker.deploy.scenes.street import Weather
from tracker.deploy.scenes.textures import Floats, Random

Array = NDArray[np.float64]
Face = tuple[Array, Floats, bool]  # corners (K, 3), BGR, whether it is glass

# Shares of the length from front (1) to back (0): base and roof of windscreen, roof and base of rear window;
# then metres: beltline and roof above ground, and of the whole car length and width.
KINDS = {
    "hatchback": (0.74, 0.60, 0.14, 0.02, 0.93, 1.48, 4.0, 1.72),
    "saloon": (0.72, 0.58, 0.30, 0.16, 0.92, 1.44, 4.6, 1.80),
    "estate": (0.73, 0.60, 0.08, 0.01, 1.00, 1.62, 4.6, 1.85),
    "van": (0.86, 0.74, 0.02, 0.01, 1.15, 2.25, 5.2, 1.95),
    "pickup": (0.72, 0.60, 0.44, 0.40, 1.05, 1.78, 5.1, 1.90),
}
SILL = 0.24  # metres of air below the body
GLASS, WHITE = np.array((58, 50, 44), np.float32), np.array((225, 230, 235), np.float32)
RED, YELLOW = np.array((35, 30, 150), np.float32), np.array((60, 210, 240), np.float32)
TURN = np.arange(14) / 14 * 2 * math.pi
CIRCLE = np.stack((np.cos(TURN), np.sin(TURN)), -1)


@dataclass(frozen=True, kw_only=True)
class Car:
    """kind: of KINDS. scale: of all its sizes. paint, roof, stripe: BGR (3,); stripe may equal paint."""

    kind: str
    scale: float
    paint: Floats
    roof: Floats
    stripe: Floats
    taxi: bool

    @classmethod
    def draw(cls, rng: Random) -> Car:
        if rng.random() < 0.5:
            paint = np.float32(rng.choice([35, 70, 120, 165, 225])) + rng.normal(scale=6, size=3)
        else:
            vivid = [
                (40, 40, 170),
                (150, 80, 30),
                (60, 110, 40),
                (40, 170, 215),
                (90, 45, 60),
                (30, 90, 190),
                (150, 130, 60),
            ]
            paint = np.array(vivid[rng.integers(len(vivid))]) * rng.uniform(0.7, 1.25)
        roof = paint if rng.random() < 0.8 else rng.choice([30, 215]) * np.ones(3)
        stripe = paint if rng.random() < 0.7 else rng.uniform(20, 235, 3)
        return cls(
            kind=str(rng.choice(list(KINDS))),
            scale=float(rng.uniform(0.94, 1.06)),
            paint=np.clip(paint, 12, 240).astype(np.float32),
            roof=roof.astype(np.float32),
            stripe=stripe.astype(np.float32),
            taxi=bool(rng.random() < 0.08),
        )

    @property
    def length(self) -> float:
        return KINDS[self.kind][6] * self.scale

    @cached_property
    def faces(self) -> list[Face]:
        """In the car's own metres: forward, up, left, from the ground below its middle. Body and cabin are
        convex, so what faces the viewer can be drawn in this order."""
        return [
            (self.scale * corners, paint, glass) for corners, paint, glass in (*_body(self), *_cabin(self))
        ]


def _body(car: Car) -> Iterator[Face]:
    """Everything below the windows. Later faces lie on earlier ones."""
    screen, _, _, rear, belt, _, length, width = KINDS[car.kind]
    x, w = Along(length), width / 2
    hood = belt - (0.05 if car.kind == "van" else 0.16)
    tail = belt - (0.0 if car.kind in ("van", "pickup") else 0.06)
    outline = np.array([
        (x(0.99), SILL), (x(1), 0.45), (x(0.985), hood - 0.12), (x(0.95), hood), (x(screen), belt),
        (x(rear), belt), (x(0.015), tail), (x(0), 0.5), (x(0.01), SILL),
    ])  # fmt: skip
    for k in range(8):
        yield _across(outline[[k, k + 1]], w, w), car.paint * (0.8 if k in (0, 7) else 1.0), False
    skirt = np.array([(x(0.97), SILL), (x(0.98), 0.4), (x(0.02), 0.42), (x(0.03), SILL)])
    stripe = np.array([(x(0.95), 0.62), (x(0.95), 0.7), (x(0.02), 0.74), (x(0.02), 0.66)])
    for side in (-w, w):
        yield _beside(outline, side), car.paint, False
        yield _beside(skirt, side), car.paint * 0.45, False
        yield _beside(stripe, side), car.stripe, False
        for door in (x((screen + rear) / 2), x(screen - 0.03)):
            gap = np.array([(door, 0.42), (door, belt), (door - 0.03, belt), (door - 0.03, 0.42)])
            yield _beside(gap, side), car.paint * 0.6, False
        for axle in (x(0.81), x(0.19)):
            for radius, out, grey in ((0.36, 1.005, 16), (0.315, 1.01, 26), (0.19, 1.015, 120)):
                wheel = (axle, 0.32) + radius * CIRCLE
                yield _beside(wheel, side * out), np.full(3, grey, np.float32), False
        lamp = np.array([(0.58, 0.62), (0.72, 0.62), (0.72, 0.95), (0.58, 0.95)]) * (1, side)
        yield np.insert(lamp, 0, x(0.997), axis=1), WHITE, False
        yield np.insert(lamp, 0, x(0.002), axis=1), RED, False
    for end in (x(1) + 0.01, x(0) - 0.01):
        plate = np.array([(0.42, -0.26), (0.53, -0.26), (0.53, 0.26), (0.42, 0.26)])
        yield np.insert(plate, 0, end, axis=1), WHITE, False


def _cabin(car: Car) -> Iterator[Face]:
    """Screens, roof and sides with their windows; a taxi's sign."""
    screen, roof_front, roof_back, rear, belt, top, length, width = KINDS[car.kind]
    x, van = Along(length), car.kind == "van"
    outline = np.array([(x(screen), belt), (x(roof_front), top), (x(roof_back), top), (x(rear), belt)])
    low, high = 0.485 * width, width * (0.465 if van else 0.4)
    halves = np.array([low, high, high, low])
    for k in range(3):
        strip = _across(outline[[k, k + 1]], halves[k], halves[k + 1])
        yield strip, car.roof if k == 1 else car.paint, False
        if k == 0 or (k == 2 and not van):
            middle = strip.mean(0)
            yield middle + (strip - middle) * (0.88, 0.88, 0.9), GLASS, True
    for side in (-1, 1):
        wall = np.column_stack((outline, side * halves))
        yield wall, car.paint, False
        for first, last in ((0.04, 0.33),) if van else ((0.04, 0.47), (0.53, 0.95)):
            sill = wall[0] + np.outer((first, last), wall[3] - wall[0])
            eaves = wall[1] + np.outer((first, last), wall[2] - wall[1])
            pane = np.concatenate((0.88 * sill + 0.12 * eaves, (0.14 * sill + 0.86 * eaves)[::-1]))
            yield pane * (1, 1, 1.004), GLASS, True
    if car.taxi:
        sign = np.array([(top, -0.25), (top + 0.16, -0.25), (top + 0.16, 0.25), (top, 0.25)])
        yield np.insert(sign, 0, 0.0, axis=1), YELLOW, False


class Along:
    """Shares of a car's length from back to front → metres ahead of its middle."""

    def __init__(self, length: float) -> None:
        self._length = length

    def __call__(self, share: float) -> float:
        return (share - 0.5) * self._length


def _across(profile: Array, low: float, high: float) -> Array:
    """Two points of a side view → the face between both sides of the car, (4, 3)."""
    (x0, y0), (x1, y1) = profile
    return np.array([(x0, y0, -low), (x0, y0, low), (x1, y1, high), (x1, y1, -high)])


def _beside(outline: Array, left: float) -> Array:
    """A side view put on one side of the car, (K, 3)."""
    face: Array = np.insert(outline, 2, left, axis=1)
    return face


def draw_car(
    car: Car, x: float, z: float, heading: float, camera: Camera, weather: Weather
) -> tuple[Sprite, Array]:
    """The sprite, and all corners in pixels (M, 2)."""
    cos, sin = math.cos(heading), math.sin(heading)
    eye = np.array([0, camera.height, 0])
    inside = np.array([x, 0.7, z])
    shown: list[tuple[Array, Floats]] = []
    corners = []
    for face, colour, glass in car.faces:
        world = np.stack(
            (x + face[:, 0] * cos - face[:, 2] * sin, face[:, 1], z + face[:, 0] * sin + face[:, 2] * cos), -1
        )
        pixels, _ = camera.project(world)
        corners.append(pixels)
        normal = np.cross(world[1] - world[0], world[2] - world[0])
        if np.dot(normal, world.mean(0) - inside) < 0:
            normal = -normal
        normal = normal / max(float(np.linalg.norm(normal)), 1e-9)
        if np.dot(normal, eye - world.mean(0)) <= 0:
            continue
        lit = max(float(np.dot(normal, weather.sun)), 0.0)
        shade = (1 - 0.55 * weather.direct) * (0.7 + 0.35 * normal[1]) + 0.75 * weather.direct * lit
        if glass:  # reflects the sky, the more the flatter it lies
            colour = colour + np.float32(75 * max(normal[1], 0.1))
        shown.append((pixels, (colour * np.float32(shade)).astype(np.float32)))
    every = np.concatenate(corners)
    sprite = Sprite(every.min(0), every.max(0))
    sprite.polygons(shown)
    return sprite, every
