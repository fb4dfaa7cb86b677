"""Street furniture that stands in the way: lamp posts, trees, bushes, columns, kiosks, hoardings.

Each is cut out once per scene, as seen from its camera. Knows nothing of people.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from tracker.deploy.scenes import textures
from tracker.deploy.scenes.camera import Camera
from tracker.deploy.scenes.sprite import Light, Sprite
from tracker.deploy.scenes.street import Weather
from tracker.deploy.scenes.textures import Floats, Random

Array = NDArray[np.float64]

KINDS = ("lamp", "tree", "bush", "column", "kiosk", "hoarding", "hedge")


@dataclass(frozen=True, kw_only=True)
class Prop:
    """A sprite at a place on the ground: x, z in metres."""

    place: Array
    sprite: Sprite
    opaque: bool  # whether somebody could hide behind it


def draw_prop(
    rng: Random, kind: str, place: Array, yaw: float, camera: Camera, weather: Weather, light: Light
) -> Prop:
    """place: (2,) x, z. yaw: how it is turned, radians."""
    if kind == "lamp":
        sprite = _lamp(rng, place, camera, light)
    elif kind in ("tree", "bush"):
        sprite = _plant(rng, place, camera, light, tree=kind == "tree")
    else:
        size = {
            "column": (1.1, 1.1, rng.uniform(2.2, 3.0)),
            "kiosk": (2.2, 2.0, 2.5),
            "hoarding": (rng.uniform(2, 4), 0.15, 2.1),
            "hedge": (rng.uniform(2, 6), 0.8, 1.1),
        }[kind]
        sprite = _box(rng, kind, place, yaw, size, camera, weather)
    sprite.veil(1 - math.exp(-float(place[1]) / weather.fog), weather.haze)
    return Prop(place=np.asarray(place), sprite=sprite, opaque=kind != "lamp")


def _lamp(rng: Random, place: Array, camera: Camera, light: Light) -> Sprite:
    """A post, thinner towards the top."""
    colour = rng.uniform(25, 120) + rng.normal(scale=8, size=3)
    metal = np.broadcast_to(colour, (32, 64, 3)).astype(np.float32)
    x, z = place
    ends, depth = camera.project(np.array([(x, 0.0, z), (x, rng.uniform(3.5, 6), z)]))
    radii = np.array((0.09, 0.05)) * camera.focal / depth
    sprite = Sprite((ends - radii[:, None]).min(0), (ends + radii[:, None]).max(0))
    sprite.round_part(ends, radii, metal, 0.5, light)
    return sprite


def _plant(rng: Random, place: Array, camera: Camera, light: Light, tree: bool) -> Sprite:
    """A ragged ball of leaves, on a trunk if it is a tree."""
    x, z = place
    base, radius = (rng.uniform(2.0, 3.2), rng.uniform(1.2, 2.4)) if tree else (0.0, rng.uniform(0.5, 1.0))
    points = np.array([(x, 0.0, z), (x, base + radius, z)])
    pixels, depth = camera.project(points)
    scale = camera.focal / depth[1]
    reach = radius * scale * 1.25
    crown = pixels[1]
    sprite = Sprite(np.minimum(pixels[0] - 3, crown - reach), np.maximum(pixels[0] + 3, crown + reach))
    if tree:
        ridges = 1 + 0.2 * textures.noise(rng, size=64)[:32, :, None]
        bark = ridges * rng.uniform(40, 85) * np.array((0.8, 0.95, 1.0), np.float32)
        sprite.round_part(pixels, np.array((0.17, 0.1)) * scale, bark.astype(np.float32), 0.3, light)
    height, width = sprite.cover.shape
    v, u = np.mgrid[:height, :width].astype(np.float32)
    from_crown = np.hypot(u + 0.5 + sprite.left - crown[0], (v + 0.5 + sprite.top - crown[1]) * 1.1) / (
        radius * scale
    )
    zoom = np.float32(textures.TILE / (4.0 * scale))
    ragged = cv2.remap(
        textures.noise(rng, coarsest=16), u * zoom, v * zoom, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP
    )
    leaf = cv2.remap(
        textures.leaves(rng), u * zoom * 0.7, v * zoom * 0.7, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP
    )
    cover = np.clip((1 - from_crown + 0.13 * ragged) * radius * scale * 0.6, 0, 1).astype(np.float32)
    lit = np.clip(1.05 - 0.45 * (v + sprite.top - crown[1]) / (radius * scale), 0.5, 1.5)
    colour = leaf * lit[..., None].astype(np.float32)
    sprite.lay(colour * cover[..., None], cover)
    return sprite


def _box(
    rng: Random,
    kind: str,
    place: Array,
    yaw: float,
    size: tuple[float, float, float],
    camera: Camera,
    weather: Weather,
) -> Sprite:
    """Four walls and a top, each covered with a texture."""
    wide, deep, high = size
    cos, sin = math.cos(yaw), math.sin(yaw)
    foot = np.array([(-wide, -deep), (wide, -deep), (wide, deep), (-wide, deep)]) / 2
    foot = np.stack((foot[:, 0] * cos - foot[:, 1] * sin, foot[:, 0] * sin + foot[:, 1] * cos), -1) + place
    low, top = np.insert(foot, 1, 0.0, axis=1), np.insert(foot, 1, high, axis=1)
    pixels, _ = camera.project(np.concatenate((low, top)))
    sprite = Sprite(pixels.min(0), pixels.max(0))
    tile = (
        textures.leaves(rng)
        if kind == "hedge"
        else (_advert(rng) if kind in ("hoarding", "column") else textures.plaster(rng))
    )
    faces = [(np.array([top[k], top[k - 1], low[k - 1], low[k]]), tile) for k in range(4)] + [
        (top, tile * 0.9)
    ]
    eye, middle = np.array([0, camera.height, 0]), np.array([place[0], high / 2, place[1]])
    for corners, cover in faces:
        normal = np.cross(corners[1] - corners[0], corners[2] - corners[0])
        normal /= np.linalg.norm(normal) * np.sign(np.dot(normal, corners.mean(0) - middle))
        if np.dot(normal, eye - corners.mean(0)) > 0:
            lit = (
                0.75
                + 0.2 * normal[1]
                + 0.5 * weather.direct * (max(float(np.dot(normal, weather.sun)), 0) - 0.4)
            )
            _lay(sprite, camera.project(corners)[0], cover * np.float32(lit))
    return sprite


def _lay(sprite: Sprite, corners: Array, tile: Floats) -> None:
    """A tile stretched over four corners in pixels: top left, top right, bottom right, bottom left."""
    side = tile.shape[0]
    height, width = sprite.cover.shape
    goal = (corners - (sprite.left, sprite.top)).astype(np.float32)
    longest = float(np.ptp(goal, axis=0).max())
    if longest < side:  # shrink first: the warp alone would alias
        side = max(int(longest), 4)
        tile = cv2.resize(tile, (side, side), interpolation=cv2.INTER_AREA)
    square = np.array([(0, 0), (side, 0), (side, side), (0, side)], np.float32)
    homography = cv2.getPerspectiveTransform(square, goal)
    colour = cv2.warpPerspective(tile, homography, (width, height), borderMode=cv2.BORDER_REPLICATE)
    cover = np.zeros((height, width), np.uint8)
    cv2.fillPoly(cover, [np.round(goal * 16).astype(np.int32)], 255, cv2.LINE_AA, shift=4)
    weight = cover.astype(np.float32)[..., None] / 255
    sprite.lay(colour * weight, weight[..., 0])


def _advert(rng: Random) -> Floats:
    """A board with blocks of colour on it."""
    tile = (
        np.broadcast_to(rng.uniform(30, 230, 3), (textures.TILE, textures.TILE, 3)).astype(np.float32).copy()
    )
    for _ in range(int(rng.integers(2, 6))):
        x, y = rng.integers(0, 200, 2)
        wide, high = rng.integers(20, 120, 2)
        tile[y : y + high, x : x + wide] = rng.uniform(20, 235, 3)
    tile[:8], tile[-8:], tile[:, :4], tile[:, -4:] = 60, 60, 60, 60
    return tile
