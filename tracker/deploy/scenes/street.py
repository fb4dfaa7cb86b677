"""The empty street: ground, buildings, sky, and how they look from one camera.

A street runs straight at some angle to the view. Across it, at coordinate w, lie a house front behind the
camera, a pavement, a road, another pavement and another house front; or there is one wide square, or a park.
Knows nothing of who walks there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from tracker.deploy.scenes import textures
from tracker.deploy.scenes.camera import Camera
from tracker.deploy.scenes.textures import TILE, Floats, Random

Array = NDArray[np.float64]

END = 75.0  # metres along the street to what closes the view


@dataclass(frozen=True, kw_only=True)
class Weather:
    """sun: unit vector towards it. direct: how much of the light comes from there, 0 overcast … 1.
    fog: metres until the mist swallows two thirds. haze: (3,) its BGR. tint: (3,) gain of BGR."""

    sun: Array
    direct: float
    fog: float
    haze: Floats
    tint: Floats

    @classmethod
    def draw(cls, rng: Random) -> Weather:
        direct = float(np.clip(rng.uniform(-0.3, 1.1), 0, 1))
        height, bearing = rng.uniform(0.45, 1.2), rng.uniform(0, 2 * math.pi)
        sun = np.array(
            [math.cos(height) * math.cos(bearing), math.sin(height), math.cos(height) * math.sin(bearing)]
        )
        warm = rng.normal(scale=0.08)
        return cls(
            sun=sun,
            direct=direct,
            fog=float(rng.choice([35.0, 70.0, 150.0, 500.0], p=[0.05, 0.12, 0.23, 0.6])),
            haze=np.array([225, 215, 205], np.float32) * np.float32(rng.uniform(0.7, 1)),
            tint=np.array([1 - warm, 1 + rng.normal(scale=0.02), 1 + warm], np.float32),
        )


@dataclass(frozen=True, kw_only=True)
class Layout:
    """yaw: the street's angle to the image plane, radians. back, kerb, verge, front: coordinates w in
    metres, ascending: house front behind, edge of near pavement and road, road and far pavement, house
    front ahead. A square or park has kerb == verge."""

    yaw: float
    back: float
    kerb: float
    verge: float
    front: float

    @classmethod
    def draw(cls, rng: Random) -> Layout:
        yaw = float(rng.choice([-1, 1]) * rng.choice([rng.uniform(0, 0.35), rng.uniform(0.35, 1.25)]))
        back, kerb = rng.uniform(-7, -3), rng.uniform(6, 11) * (1 - 0.35 * abs(yaw))
        open_place = rng.random() < 0.35
        verge = kerb if open_place else kerb + rng.uniform(5.5, 9)
        return cls(
            yaw=yaw,
            back=float(back),
            kerb=float(kerb),
            verge=float(verge),
            front=float(verge + (rng.uniform(14, 25) if open_place else rng.uniform(3.5, 7))),
        )

    @property
    def square(self) -> bool:
        return self.kerb == self.verge

    def world(self, along: Array, across: Array) -> tuple[Array, Array]:
        """Street coordinates (a, w) → world x, z."""
        cos, sin = math.cos(self.yaw), math.sin(self.yaw)
        return along * cos - across * sin, along * sin + across * cos


class Surface:
    """A tile at several sizes, read with the blur that distance asks for."""

    def __init__(self, tile: Floats, metres: float) -> None:
        self._metres = metres
        self._levels: list[Floats] = [np.ascontiguousarray(tile, np.float32)]
        while len(self._levels[-1]) > 4:
            self._levels.append(
                cv2.resize(self._levels[-1], None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
            )

    def read(self, u: Floats, v: Floats, footprint: Floats) -> Floats:
        """Colours (H, W, 3) at u, v in metres; footprint: metres that a pixel covers there."""
        level = np.log2(np.maximum(footprint * TILE / self._metres, 1))
        level = np.clip(level - 0.5, 0, len(self._levels) - 1.001)  # half a level sharper: video sharpens too
        result = np.zeros((*u.shape, 3), np.float32)
        for k in range(int(level.min()), int(level.max()) + 2):
            weight = np.clip(1 - np.abs(level - k), 0, 1)
            if not weight.any():
                continue
            size = TILE / 2**k
            x, y = (u / self._metres % 1) * size, (v / self._metres % 1) * size
            found = cv2.remap(self._levels[k], x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
            result += weight[..., None] * found
        return result


def paint_street(
    rng: Random, camera: Camera, layout: Layout, weather: Weather
) -> tuple[Floats, NDArray[np.uint8]]:
    """The empty street (H, W, 3) BGR float32, and where it is ground (H, W) uint8, 0 or 255."""
    rays = camera.rays()
    cos, sin = np.float32(math.cos(layout.yaw)), np.float32(math.sin(layout.yaw))
    along = rays[..., 0] * cos + rays[..., 2] * sin  # street coordinates per unit of depth
    across = -rays[..., 0] * sin + rays[..., 2] * cos
    down = rays[..., 1]

    reach = np.where(down < -1e-4, camera.height / np.maximum(-down, 1e-4), np.float32(1e4))
    front = np.where(across > 1e-4, layout.front / np.maximum(across, 1e-4), np.float32(1e4))
    back = np.where(across < -1e-4, layout.back / np.minimum(across, -1e-4), np.float32(1e4))
    end = np.where(np.abs(along) > 1e-4, END / np.maximum(np.abs(along), 1e-4), np.float32(1e4))
    depth = np.minimum.reduce([reach, front, back, end]).astype(np.float32)
    a, w, y = along * depth, across * depth, camera.height + down * depth
    ground = reach <= depth

    image = _paint_ground(rng, layout, a, w, _footprint(camera, depth, reach, ground))
    for wall, u in ((front <= depth, a), (back <= depth, a), (end <= depth, w)):
        here, park = wall & ~ground, rng.random() < 0.25
        if not here.any():
            continue
        box = cv2.boundingRect(here.view(np.uint8))
        cut = np.s_[box[1] : box[1] + box[3], box[0] : box[0] + box[2]]
        painted, solid = _paint_wall(rng, u[cut], y[cut], depth[cut] / camera.focal, park)
        image[cut][here[cut] & solid] = painted[here[cut] & solid]
        depth[cut][here[cut] & ~solid] = 1e4
    sky = (depth > 5e3) & ~ground
    image[sky] = _paint_sky(rng, rays, weather)[sky]
    image = _shade(rng, image, ground, a, w, weather)
    veil = np.exp(-np.minimum(depth, 300) / weather.fog)[..., None]
    image = image * veil + weather.haze * (1 - veil)
    return image, np.where(ground, np.uint8(255), np.uint8(0))


def _footprint(camera: Camera, depth: Floats, reach: Floats, ground: NDArray[np.bool_]) -> Floats:
    """Metres of ground under a pixel: the geometric mean of its width and its foreshortened length."""
    stretch = np.sqrt(np.maximum(reach / camera.height, 1))
    return np.where(ground, depth / camera.focal * stretch, depth / camera.focal).astype(np.float32)


def _paint_ground(rng: Random, layout: Layout, a: Floats, w: Floats, footprint: Floats) -> Floats:
    """Road with its lines, pavements with a kerb, or a square that may be a lawn with a path."""
    soft = np.maximum(footprint, 0.02)
    walk = Surface(textures.paving(rng) if rng.random() < 0.7 else textures.asphalt(rng), rng.uniform(3, 6))
    image = walk.read(a, w, footprint)
    if layout.square:
        if rng.random() < 0.6:
            lawn = Surface(textures.grass(rng), 6.0).read(a, w, footprint)
            middle, width = rng.uniform(4, layout.front - 4), rng.uniform(1.5, 5)
            bend = rng.uniform(0, 2.5) * np.sin(a * rng.uniform(0.05, 0.2))
            off_path = np.clip((np.abs(w + bend - middle) - width) / soft, 0, 1)[..., None]
            image = image * (1 - off_path) + lawn * off_path
        return image
    road = Surface(textures.asphalt(rng), rng.uniform(5, 9)).read(a, w, footprint)
    centre, half = (layout.kerb + layout.verge) / 2, (layout.verge - layout.kerb) / 2
    line = np.clip(1 - (np.abs(w - centre) - 0.06) / soft, 0, 1) * (a % 5 < 2.2)
    for edge in (-1, 1):
        line = np.maximum(
            line, 0.8 * np.clip(1 - (np.abs(w - centre - edge * (half - 0.35)) - 0.05) / soft, 0, 1)
        )
    if rng.random() < 0.5:  # a zebra crossing
        where = rng.uniform(-9, 9)
        bars = np.clip(0.5 + (0.25 - np.abs((w - centre) % 1 - 0.5)) / soft, 0, 1)
        line = np.maximum(line, bars * (np.abs(a - where) < 1.8) * (np.abs(w - centre) < half - 0.4))
    road += (0.75 * line * (205 - road.mean()))[..., None]
    on_road = np.clip((half - np.abs(w - centre)) / soft + 0.5, 0, 1)[..., None]
    image = image * (1 - on_road) + road * on_road
    kerb = np.clip(1 - (np.abs(np.abs(w - centre) - half - 0.09) - 0.09) / soft, 0, 1)[..., None]
    return image * (1 - kerb) + np.float32(rng.uniform(135, 195)) * kerb


def _paint_wall(
    rng: Random, u: Floats, y: Floats, footprint: Floats, park: bool
) -> tuple[Floats, NDArray[np.bool_]]:
    """House fronts side by side, or a row of trees; and where there is wall at all, (H, W) bool."""
    if park:
        ragged = textures.noise(rng, coarsest=8)[0]
        top = rng.uniform(4, 9) + 1.2 * ragged[(u * 8).astype(np.int64) % TILE]
        return Surface(textures.leaves(rng), 7.0).read(u, y, footprint), y < top
    width = rng.uniform(7, 14)
    house = np.floor(u / width).astype(np.int64) % 16
    soft = np.maximum(footprint, 0.02)
    walls = [
        Surface((textures.brick if rng.random() < 0.6 else textures.plaster)(rng), 3.0) for _ in range(2)
    ]
    first, second = (wall.read(u, y, footprint) for wall in walls)
    image: Floats = np.where((house % 2 == 0)[..., None], first, second)
    image = image * rng.uniform(0.75, 1.2, 16).astype(np.float32)[house][..., None]
    storey = np.float32(rng.uniform(2.7, 3.6))
    bay: Floats = width / np.round(width / rng.uniform(1.6, 3.4, 16).astype(np.float32)[house])
    across, up = (u % width) / bay % 1, y / storey
    glass_wide, glass_high = rng.uniform(0.2, 0.36, 16).astype(np.float32)[house], rng.uniform(0.25, 0.38)
    shop = rng.random(16)[house] < 0.4
    ground_floor = up < 1
    high = np.where(ground_floor & shop, 0.40, glass_high)
    wide = np.where(ground_floor & shop, 0.45, glass_wide)

    def pane(grow: float) -> Floats:
        x = (wide - np.abs(across - 0.5)) * bay + grow
        z = (high - np.abs(up % 1 - 0.52)) * storey + grow
        inside: Floats = np.clip(np.minimum(x, z) / soft + 0.5, 0, 1).astype(np.float32)[..., None]
        return inside

    frame, glass = pane(0.09), pane(0.0)
    cell = (np.floor((u % width) / bay) * 7 + np.floor(up) * 13 + house * 3).astype(np.int64) % 64
    lights = rng.uniform(25, 100, (64, 1)) + np.array((12, 6, 0)) + rng.normal(scale=6, size=(64, 3))
    paints = np.clip(rng.uniform(40, 230, (16, 1)) + rng.normal(scale=25, size=(16, 3)), 20, 235)
    trim = paints.astype(np.float32)[house]
    image = image * (1 - frame) + trim * frame
    gleam = (np.float32(0.8) + np.float32(0.5) * (up % 1))[..., None]
    image = image * (1 - glass) + lights.astype(np.float32)[cell] * gleam * glass
    sign = shop & (np.abs(up - 1.02) < 0.11)
    image[sign] = trim[sign] * 0.8
    heights = rng.integers(2, 6, 16)[house] * storey + 0.8
    return image, y < heights


def _paint_sky(rng: Random, rays: Floats, weather: Weather) -> Floats:
    """Blue with clouds when the sun shines, grey otherwise."""
    height, width = rays.shape[:2]
    blue, grey = np.array((215, 165, 110), np.float32), np.array((210, 205, 200), np.float32)
    cloud = cv2.resize(textures.noise(rng), (max(width, TILE), max(height, TILE)))[:height, :width]
    cover = np.clip(1.2 - weather.direct * 1.4 + 0.35 * cloud, 0, 1)[..., None]
    sky: Floats = blue * (1 - cover) + grey * cover * (1 + 0.05 * cloud[..., None])
    return sky


def _shade(
    rng: Random, image: Floats, ground: NDArray[np.bool_], a: Floats, w: Floats, weather: Weather
) -> Floats:
    """Worn patches everywhere, and where the sun shines the soft-edged shadow of a row of houses or trees."""
    wear = textures.noise(rng, coarsest=4, octaves=4)
    index = ((a * 6).astype(np.int64) % TILE, (w * 6).astype(np.int64) % TILE)
    image = np.where(ground[..., None], image * (1 + 0.05 * wear[index][..., None]), image)
    if weather.direct > 0.3 and rng.random() < 0.6:
        edge = rng.uniform(2, 14) + 0.5 * wear[index] * rng.choice([0.05, 1.5])
        side = rng.choice([-1, 1])
        dark = 1 - 0.45 * weather.direct * np.clip((w - edge) * side / 0.2, 0, 1)
        image = np.where(ground[..., None], image * dark[..., None], image)
    return image.astype(np.float32)
