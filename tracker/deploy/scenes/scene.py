"""One seeded street with everything on it: a picture and the exact truth for any moment.

The camera stands still and turns; so everything is drawn in the image of a wider camera that does not move,
then seen through the turned one by a homography. Any moment can be asked for, in any order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from tracker.deploy.scenes.camera import NEAREST, Camera, apply_homography
from tracker.deploy.scenes.cars import Car, draw_car
from tracker.deploy.scenes.lens import Lens, Motion, Pixels
from tracker.deploy.scenes.people import Person, Pose, draw_person
from tracker.deploy.scenes.props import KINDS, Prop, draw_prop
from tracker.deploy.scenes.routes import Planner, Route, drive
from tracker.deploy.scenes.sprite import Light, Sprite
from tracker.deploy.scenes.street import Layout, Weather, paint_street
from tracker.errors import ConfigError

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

PERSON, CAR = 0, 1
CLASSES = ("person", "car")
LEAST_VISIBLE = 0.2


@dataclass(frozen=True, kw_only=True)
class SceneConfig:
    """What all scenes of a set have in common; everything else follows from a scene's seed.

    size: (width, height) in pixels. seconds: how long people keep coming. people, cars: how many identities
    there are at most; a scene may leave some out.

    Raises ConfigError for values that no scene can have.
    """

    size: tuple[int, int] = (512, 288)
    seconds: float = 20.0
    people: int = 40
    cars: int = 8

    def __post_init__(self) -> None:
        if min(self.size) < 64 or any(side % 2 for side in self.size):
            raise ConfigError(f"scene size {self.size}: H.264 needs even sides, and people 64 pixels or more")
        if not 0 < self.seconds < math.inf or min(self.people, self.cars) < 0:
            raise ConfigError(
                f"{self.seconds} s, {self.people} people, {self.cars} cars: none can be negative"
            )

    @property
    def identities(self) -> int:
        return self.people + self.cars


@dataclass(frozen=True, kw_only=True)
class Truth:
    """Everything whose whole box overlaps the picture.

    identity: (N,) index of the scene's cast, people first. label: (N,) of CLASSES. xyxy: (N, 4) pixels, whole
    boxes: of hidden parts and of parts outside of the picture too. visibility: (N,) share of the thing's
    pixels to be seen.
    """

    identity: Ints
    label: Ints
    xyxy: Array
    visibility: Array

    def countable(self, size: tuple[int, int]) -> NDArray[np.bool_]:
        """(N,) what a detector can be asked to find in a picture of a size: a fifth of it is visible, and its
        longer side is at least a fourteenth of the picture's height (20 pixels of 288)."""
        longer = (self.xyxy[:, 2:] - self.xyxy[:, :2]).max(-1, initial=0)
        countable: NDArray[np.bool_] = (self.visibility >= LEAST_VISIBLE) & (longer >= size[1] / 14)
        return countable


class Scene:
    """A street from `seed`; two of the same seed and config are the same."""

    def __init__(self, seed: int, config: SceneConfig = SceneConfig()) -> None:
        self.seed, self.config = seed, config
        rng = np.random.default_rng((seed, 0))
        width, height = config.size
        focal = width * rng.uniform(0.75, 1.15)
        mast = float(rng.choice([rng.uniform(1.7, 3.0), rng.uniform(3.0, 7.0)], p=[0.4, 0.6]))
        # Aimed so that the middle of the picture meets the ground 11 to 18 metres ahead.
        aim = math.atan2(mast - 0.9, rng.uniform(11, 18))
        self.camera = Camera(
            size=(width + 2 * round(0.14 * width), height + 2 * round(0.08 * height)),
            focal=focal,
            height=mast,
            tilt=aim,
        )
        self.layout, self.weather = Layout.draw(rng), Weather.draw(rng)
        self.lens = Lens.draw(rng, self.weather.tint)
        self.motion = Motion.draw(rng, room=0.12 * width / focal)
        self._light = _seen_light(self.weather, aim)
        self._street, self._ground = paint_street(
            np.random.default_rng((seed, 1)), self.camera, self.layout, self.weather
        )
        self._props = self._furnish(np.random.default_rng((seed, 2)))
        self._cast(np.random.default_rng((seed, 3)))

    def frame(
        self, seconds: float, *, view: Array | None = None, lens: Lens | None = None, compress: bool = True
    ) -> tuple[Pixels, Truth]:
        """The picture (H, W, 3) BGR uint8 and what is in it, at a time in 0…config.seconds.

        view: (3, 3) from pixels about the optical axis to pixels of the picture; by default the axis is in
        the middle. lens: instead of the scene's own. compress: see `Lens.develop`.
        """
        width, height = self.config.size
        if view is None:
            view = np.array([[1.0, 0, width / 2], [0, 1, height / 2], [0, 0, 1]])
        homography = self.camera.turned(*self.motion.at(seconds), view)
        canvas = self._street.copy()
        owners = np.full(canvas.shape[:2], -1, np.int16)
        things = self._things(seconds, homography, (width, height))
        self._cast_shadows(canvas, things)
        for thing in sorted(things, key=lambda each: -each.depth):
            thing.sprite.paste(canvas, owners, thing.identity)
        light = cv2.warpPerspective(
            canvas, _centres(homography), (width, height), borderMode=cv2.BORDER_REPLICATE
        )
        truth = self._truth(things, owners, homography, (width, height))
        centre = np.array(self.camera.size) / 2
        later = self.camera.turned(*self.motion.at(seconds + 0.02), view)
        drift = (apply_homography(later, centre) - apply_homography(homography, centre)) / 0.02
        rng = np.random.default_rng((self.seed, 4, round(seconds * 1000)))
        moved = float(drift[0]), float(drift[1])
        return (lens or self.lens).develop(light, moved, rng, compress=compress), truth

    def _cast(self, rng: np.random.Generator) -> None:
        """Who takes part, and where they go."""
        config = self.config
        self._people = [Person.draw(rng) for _ in range(round(config.people * rng.uniform(0.35, 1.0)))]
        cars = 0 if self.layout.square else round(config.cars * rng.uniform(0, 1.0))
        parked = round(cars * rng.uniform(0, 0.7))
        self._cars = [Car.draw(rng) for _ in range(cars)]
        lengths = np.array([car.length for car in self._cars])
        routes = [
            self._park(rng, lengths[:parked]),
            drive(rng, self.layout, lengths[parked:], config.seconds),
        ]
        self._car_routes = [route for group in routes for route in group]
        vans = [
            route.rows[0, :2] for route, car in zip(routes[0], self._cars, strict=False) if car.kind == "van"
        ]
        hiding = np.array([prop.place for prop in self._props if prop.opaque] + vans).reshape(-1, 2)
        planner = Planner(
            rng, self.camera, self.layout, hiding, seconds=config.seconds, still_road=cars == parked
        )
        self._routes = planner.crowd(np.array([person.height for person in self._people]))

    def _park(self, rng: np.random.Generator, lengths: Array) -> list[Route]:
        """Cars at the kerbs, in a row on either side."""
        routes = []
        queue = {1: rng.uniform(-18, -4), -1: rng.uniform(-18, -4)}
        for length in lengths:
            side = int(rng.choice([-1, 1]))
            queue[side] += length + rng.uniform(0.6, 9)
            across = self.layout.kerb - 1.0 if side < 0 else self.layout.verge + 1.0
            x, z = self.layout.world(np.array(queue[side] - length / 2), np.array(across))
            heading = self.layout.yaw + rng.choice([0, math.pi]) + rng.normal(scale=0.03)
            rows = np.tile([float(x), float(z), heading, 0, 0], (2, 1))
            routes.append(Route(rows=rows, begin=0.0, end=self.config.seconds + 1))
        return routes

    def _furnish(self, rng: np.random.Generator) -> list[Prop]:
        """Lamps and trees along the kerbs, bigger things on the pavements and squares."""
        props = []
        for _ in range(int(rng.integers(1, 9))):
            kind = str(rng.choice(KINDS, p=[0.3, 0.2, 0.13, 0.11, 0.07, 0.09, 0.1]))
            along = rng.uniform(-20, 25)
            layout = self.layout
            if layout.square:
                across = rng.uniform(3.5, layout.front - 2)
            else:
                across = rng.choice([layout.kerb - 0.5, layout.verge + 0.6, rng.uniform(2, layout.kerb)])
            place = np.stack(layout.world(np.array(along), np.array(across)), -1)
            half = self.camera.size[0] / 2 / self.camera.focal
            if place[1] > 4.5 and abs(place[0]) < half * place[1] * 1.1:
                props.append(draw_prop(rng, kind, place, layout.yaw, self.camera, self.weather, self._light))
        return props

    def _things(self, seconds: float, homography: Array, size: tuple[int, int]) -> list[_Thing]:
        """All that stands on the ground now and may be seen through the homography."""
        things = [_Thing(-1, prop.sprite, float(prop.place[1]), None, None) for prop in self._props]
        for identity, (person, route) in enumerate(zip(self._people, self._routes, strict=True)):
            state = route.at(seconds)
            if state is None or state[1] < 1.2 or not self._near_view(state[0], state[1], homography, size):
                continue
            x, z, heading, phase, speed = state
            pose = Pose(x=x, z=z, heading=heading, phase=phase, speed=speed)
            sprite, outline, body = draw_person(person, pose, self.camera, self._light)
            sprite.veil(1 - math.exp(-z / self.weather.fog), self.weather.haze)
            things.append(_Thing(identity, sprite, z, outline, body))
        for k, (car, route) in enumerate(zip(self._cars, self._car_routes, strict=True)):
            x, z, heading, _, speed = route.at(min(seconds, route.end)) or (0, -1, 0, 0, 0)
            if (
                z < car.length / 2 + NEAREST
                or z > 70
                or not self._near_view(x, z, homography, size, car.length)
            ):
                continue
            sprite, outline = draw_car(car, x, z, heading, self.camera, self.weather)
            sprite.veil(1 - math.exp(-z / self.weather.fog), self.weather.haze)
            across = abs(speed * math.cos(heading)) * self.camera.focal / z
            sprite.smear(across * self.lens.shutter)
            ground = _car_footprint(car, x, z, heading)
            things.append(_Thing(self.config.people + k, sprite, z, outline, ground))
        return things

    def _near_view(
        self, x: float, z: float, homography: Array, size: tuple[int, int], wide: float = 1.2
    ) -> bool:
        pixels, depth = self.camera.project(np.array([x, 0.9, z]))
        margin = wide * self.camera.focal / depth * abs(homography[0, 0] / homography[2, 2])
        return bool(-margin < apply_homography(homography, pixels)[0] < size[0] + margin)

    def _cast_shadows(self, canvas: NDArray[np.float32], things: list[_Thing]) -> None:
        """Darken the ground under and beside everything that moves."""
        mask = np.zeros(canvas.shape[:2], np.uint8)
        soft = np.zeros(canvas.shape[:2], np.uint8)
        slope = self.weather.sun[[0, 2]] / self.weather.sun[1]
        for thing in things:
            if thing.solid is None:
                continue
            world, radii = thing.solid
            foot = world.reshape(-1, 3)[:, [0, 2]].mean(0)
            around = np.array([(math.cos(k * math.pi / 6), math.sin(k * math.pi / 6)) for k in range(12)])
            if thing.identity < self.config.people:
                blob = np.insert(foot + 0.32 * around, 1, 0.0, axis=1)
                _fill(soft, self.camera.project(blob)[0], 120)
                if self.weather.direct > 0.15:
                    flat = world - np.insert(slope, 1, 1.0) * world[..., 1:2]
                    ends, depth = self.camera.project(flat)
                    thick = 2 * radii.mean(1) * self.camera.focal / depth.mean(1)
                    for pair, width in zip(np.round(ends * 16).astype(int), thick, strict=True):
                        cv2.line(
                            mask,
                            pair[0].tolist(),
                            pair[1].tolist(),
                            255,
                            max(1, round(width)),
                            cv2.LINE_AA,
                            4,
                        )
            else:
                _fill(soft, self.camera.project(world)[0], 170)
                if self.weather.direct > 0.15:
                    moved = world - np.insert(slope * 1.25, 1, 0.0)
                    hull = cv2.convexHull(np.concatenate((world, moved))[:, [0, 2]].astype(np.float32))[:, 0]
                    _fill(
                        mask, self.camera.project(np.insert(hull.astype(np.float64), 1, 0.0, axis=1))[0], 255
                    )
        dark = cv2.addWeighted(
            cv2.blur(soft, (5, 3)), 0.5, cv2.blur(mask, (3, 3)), 0.55 * self.weather.direct, 0
        )
        dark = cv2.bitwise_and(dark, self._ground)
        canvas *= (1 - dark.astype(np.float32) / 255)[..., None]

    def _truth(
        self, things: list[_Thing], owners: NDArray[np.int16], homography: Array, size: tuple[int, int]
    ) -> Truth:
        """Boxes of all that can be in the picture, and how much of each is to be seen in it."""
        seen = cv2.warpPerspective(
            owners,
            _centres(homography),
            size,
            flags=cv2.INTER_NEAREST,
            borderMode=cv2.BORDER_CONSTANT,
            borderValue=-1,
        )
        count = np.bincount(seen[seen >= 0].astype(np.int64), minlength=self.config.identities)
        rows = []
        for thing in things:
            if thing.outline is None:
                continue
            outline = apply_homography(homography, thing.outline)
            low, high = outline.min(0), outline.max(0)
            if (high <= 0).any() or (low >= size).any():
                continue
            # The homography's change of area where the thing stands.
            corners = apply_homography(homography, thing.outline.mean(0) + np.array([(0, 0), (1, 0), (0, 1)]))
            stretch = abs(float(np.linalg.det(corners[1:] - corners[0])))
            whole = float((thing.sprite.cover > 0.5).sum()) * stretch
            share = min(count[thing.identity] / whole, 1.0) if whole > 0 else 0.0
            rows.append((thing.identity, *low, *high, share))
        table = np.array(rows, np.float64).reshape(-1, 6)
        table = table[np.argsort(table[:, 0])]
        identity = table[:, 0].astype(np.int64)
        label = np.where(identity < self.config.people, PERSON, CAR)
        return Truth(identity=identity, label=label, xyxy=table[:, 1:5], visibility=table[:, 5])


@dataclass(frozen=True)
class _Thing:
    """identity: −1 for props. outline: points (M, 2) of the wide image. solid: a person's parts, or the
    corners of a car on the ground, in world coordinates, for shadows."""

    identity: int
    sprite: Sprite
    depth: float
    outline: Array | None
    solid: tuple[Array, Array] | None


def _seen_light(weather: Weather, tilt: float) -> Light:
    """The sun in the camera's axes: right, up, towards the viewer."""
    x, y, z = weather.sun
    up = y * math.cos(tilt) + z * math.sin(tilt)
    ahead = z * math.cos(tilt) - y * math.sin(tilt)
    return Light(source=(float(x), up, -ahead), direct=weather.direct)


def _car_footprint(car: Car, x: float, z: float, heading: float) -> tuple[Array, Array]:
    """The four corners on the ground (4, 3); radii are not needed."""
    corners = np.array([(1, 1), (1, -1), (-1, -1), (-1, 1)]) * (0.47 * car.length, 0.85)
    cos, sin = math.cos(heading), math.sin(heading)
    place = np.stack(
        (x + corners[:, 0] * cos - corners[:, 1] * sin, z + corners[:, 0] * sin + corners[:, 1] * cos), -1
    )
    return np.insert(place, 1, 0.0, axis=1), np.zeros((4, 2))


def _fill(mask: NDArray[np.uint8], corners: Array, value: int) -> None:
    cv2.fillConvexPoly(mask, np.round(corners * 16).astype(np.int32), value, cv2.LINE_AA, 4)


def _centres(homography: Array) -> Array:
    """A homography of the plane as OpenCV wants it, which puts pixel centres at whole numbers."""
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    shifted: Array = np.linalg.inv(half) @ homography @ half
    return shifted
