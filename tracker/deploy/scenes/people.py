"""People: what they wear, how they walk, and how they look from a camera.

A person is a skeleton of round parts in world coordinates, posed by where they are, which way they go and
how far into their stride. Knows nothing of routes or streets.
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
from tracker.deploy.scenes.textures import Floats, Random

Array = NDArray[np.float64]

PARTS = (
    "thigh_l", "shin_l", "foot_l", "thigh_r", "shin_r", "foot_r", "hips", "chest", "upper_arm_l", "forearm_l",
    "upper_arm_r", "forearm_r", "neck", "head", "skirt", "pack", "bag",
)  # fmt: skip
# Lengths and radii as shares of the body's height, after the segment tables of Drillis and Contini (1966).
THIGH, SHIN, UPPER_ARM, FOREARM, HIP, SHOULDER, TRUNK = 0.245, 0.246, 0.172, 0.19, 0.05, 0.1, 0.285
RADII = np.array([
    (0.052, 0.036), (0.036, 0.024), (0.022, 0.016), (0.052, 0.036), (0.036, 0.024), (0.022, 0.016),
    (0.078, 0.078), (0.074, 0.084), (0.030, 0.025), (0.025, 0.018), (0.030, 0.025), (0.025, 0.018),
    (0.030, 0.030), (0.050, 0.056), (0.078, 0.100), (0.050, 0.055), (0.030, 0.045),
])  # fmt: skip
STRIDE = 0.83  # of the height: two steps at a comfortable pace
PATTERNS = ("plain", "hoops", "stripes", "checks", "blocks", "panel", "logo", "band", "camouflage")
SKIN = np.array([(150, 180, 225), (125, 160, 210), (95, 130, 180), (65, 90, 135), (45, 60, 90)], np.float32)
HAIR = np.array([(25, 25, 28), (30, 45, 70), (60, 95, 140), (110, 160, 200), (160, 160, 165), (40, 50, 120)])


@dataclass(frozen=True, kw_only=True)
class Person:
    """Somebody's looks. height: metres. girth: of the radii. cloth: by part, unrolled textures at three
    sizes. absent: parts not there (no skirt, no bag). swing: how far the arms go."""

    height: float
    girth: float
    swing: float
    lean: float
    absent: frozenset[int]
    cloth: tuple[tuple[Floats, ...], ...]

    @classmethod
    def draw(cls, rng: Random) -> Person:
        top = _colours(rng)
        legs = _colours(rng) * np.float32(rng.uniform(0.45, 0.9))
        skin, hair = SKIN[rng.integers(len(SKIN))], HAIR[rng.integers(len(HAIR))].astype(np.float32)
        pattern = str(rng.choice(PATTERNS, p=[0.34, *[0.0825] * 8]))
        coat = textures.cloth(rng, pattern, top)
        trousers = textures.cloth(
            rng, str(rng.choice(["plain", "stripes", "camouflage"], p=[0.86, 0.07, 0.07])), legs
        )
        sleeve = coat if rng.random() < 0.5 else textures.cloth(rng, "plain", top[[int(rng.integers(3))] * 3])
        bare = np.broadcast_to(skin, (32, 64, 3)).astype(np.float32)
        forearm = (bare if rng.random() < 0.3 else sleeve).copy()
        forearm[25:] = skin
        shoes = textures.cloth(rng, "plain", _colours(rng) * np.float32(0.6))
        shin = bare if rng.random() < 0.12 else trousers
        pack = textures.cloth(rng, "plain", _colours(rng))
        skirt_kind = rng.random()  # a dress continues the top, a long coat too, a skirt has its own cloth
        skirt = coat if skirt_kind < 0.16 else textures.cloth(rng, "plain", _colours(rng))
        absent = {PARTS.index("skirt")} if skirt_kind > 0.24 else set()
        absent |= {PARTS.index("pack")} if rng.random() > 0.18 else set()
        absent |= {PARTS.index("bag")} if rng.random() > 0.2 else set()
        by_part = [trousers, shin, shoes] * 2 + [trousers, coat, sleeve, forearm, sleeve, forearm, bare]
        by_part += [_head(rng, skin, hair), skirt, pack, pack]
        return cls(
            height=float(np.clip(rng.normal(1.71, 0.09), 1.45, 1.98)),
            girth=float(np.clip(rng.normal(1.08, 0.12), 0.88, 1.4)),
            swing=float(rng.uniform(0.3, 1.1)),
            lean=float(rng.normal(0.03, 0.03)),
            absent=frozenset(absent),
            cloth=tuple(_smaller(cloth) for cloth in by_part),
        )


def _colours(rng: Random) -> Floats:
    """(3, 3) BGR: vivid or sober, with a darker or lighter figure and a third colour."""
    kind = rng.random()
    if kind < 0.45:
        hsv = np.stack((rng.uniform(0, 180, 3), rng.uniform(60, 190, 3), rng.uniform(70, 225, 3)), -1)
    elif kind < 0.8:
        hsv = np.stack((rng.uniform(0, 180, 3), rng.uniform(0, 70, 3), rng.uniform(25, 120, 3)), -1)
    else:
        hsv = np.stack((rng.uniform(0, 180, 3), rng.uniform(0, 45, 3), rng.uniform(150, 240, 3)), -1)
    if kind < 0.8:
        hsv[1] = rng.uniform((0, 0, 120), (180, 120, 240))
    colours: Floats = cv2.cvtColor(hsv[None].astype(np.uint8), cv2.COLOR_HSV2BGR)[0].astype(np.float32)
    return colours


def _head(rng: Random, skin: Floats, hair: Floats) -> Floats:
    """(32, 64, 3) from chin to crown and around: face in front, hair behind and on top, or a hat, or bald."""
    tile = np.broadcast_to(skin, (32, 64, 3)).astype(np.float32)
    v, u = np.mgrid[:32, :64]
    behind, kind = np.abs(u - 32), rng.random()
    line = rng.uniform(4, 14)  # how far down the hair reaches
    if kind > 0.08:
        tile[((behind > rng.uniform(9, 15)) & (v > line)) | (v > rng.uniform(18, 23))] = hair
    if kind > 0.8:
        tile[v > rng.uniform(15, 20)] = _colours(rng)[0]
    tile[(behind < 8) & (np.abs(v - 13) < 2) & (behind > 2)] *= 0.6  # eyes, no more than a shade
    return tile


def _smaller(cloth: Floats) -> tuple[Floats, ...]:
    """A cloth at full size and for limbs a few pixels wide."""
    return cloth, *(cv2.resize(cloth, size, interpolation=cv2.INTER_AREA) for size in ((24, 12), (10, 6)))


@dataclass(frozen=True, kw_only=True)
class Pose:
    """x, z: metres. heading: radians, 0 towards +x, π/2 away along +z. phase: radians of the stride.
    speed: metres per second."""

    x: float
    z: float
    heading: float
    phase: float
    speed: float


def skeleton(person: Person, pose: Pose) -> tuple[Array, Array]:
    """World coordinates of the parts' ends (P, 2, 3), y up from the ground, and their radii (P, 2)."""
    stride = math.sin(pose.phase)
    vigour = min(pose.speed / 1.3, 1.6)
    hip_swing, arm_swing = 0.42 * vigour**0.7, 0.55 * person.swing * vigour
    ends = np.zeros((len(PARTS), 2, 3))  # forward, up, left; turned into the world below
    lowest = 0.0
    for side, sign in (("l", 1), ("r", -1)):
        lift = math.cos(pose.phase) * sign
        thigh_angle = sign * stride * hip_swing + 0.12 * vigour * max(lift, 0)
        knee = 0.08 + 1.0 * min(vigour, 1.2) * max(lift, 0) ** 2
        hip = np.array([0, 0, sign * HIP])
        knee_at = hip + THIGH * _direction(thigh_angle)
        ankle = knee_at + SHIN * _direction(thigh_angle - knee)
        toe = ankle + np.array([0.085, -0.02 - 0.3 * max(-thigh_angle, 0) * 0.05, 0])
        first = PARTS.index(f"thigh_{side}")
        ends[first : first + 3] = (hip, knee_at), (knee_at, ankle), (ankle, toe)
        lowest = min(lowest, ankle[1] - 0.035, toe[1] - 0.016)
    chest = np.array([TRUNK * math.sin(person.lean), TRUNK * math.cos(person.lean), 0])
    for side, sign in (("l", 1), ("r", -1)):
        shoulder = chest + np.array((0, 0.005, sign * SHOULDER))
        angle = -sign * stride * arm_swing
        elbow = shoulder + UPPER_ARM * _direction(angle) + np.array((0, 0, sign * 0.02))
        hand = elbow + FOREARM * _direction(angle + 0.25 + 0.35 * max(angle, 0))
        first = PARTS.index(f"upper_arm_{side}")
        ends[first : first + 2] = (shoulder, elbow), (elbow, hand)
        if side == "r":
            ends[PARTS.index("bag")] = hand - np.array((0, 0.02, 0)), hand - np.array((0, 0.1, 0))
    up = chest / TRUNK
    ends[PARTS.index("hips")] = (0, 0.005, 0), 0.35 * chest
    ends[PARTS.index("chest")] = 0.3 * chest, 0.92 * chest
    ends[PARTS.index("neck")] = chest, chest + 0.05 * up
    ends[PARTS.index("head")] = chest + 0.075 * up + (0.012, 0, 0), chest + 0.12 * up + (0.006, 0, 0)
    ends[PARTS.index("skirt")] = (0, 0.06, 0), (0.02 * stride, -0.23, 0)
    ends[PARTS.index("pack")] = 0.45 * chest - (0.095, 0, 0), 0.85 * chest - (0.09, 0, 0)
    ends[..., 1] -= lowest

    ends *= person.height
    cos, sin = math.cos(pose.heading), math.sin(pose.heading)
    world = np.stack(
        (
            pose.x + ends[..., 0] * cos - ends[..., 2] * sin,
            ends[..., 1],
            pose.z + ends[..., 0] * sin + ends[..., 2] * cos,
        ),
        -1,
    )
    return world, RADII * person.height * np.where(np.arange(len(PARTS)) == 13, 1, person.girth)[:, None]


def _direction(angle: float) -> Array:
    """Downwards, swung forward by an angle."""
    return np.array([math.sin(angle), -math.cos(angle), 0])


def draw_person(
    person: Person, pose: Pose, camera: Camera, light: Light
) -> tuple[Sprite, Array, tuple[Array, Array]]:
    """The sprite, points around the whole body's outline (M, 2) in pixels, and the skeleton."""
    world, radii = body = skeleton(person, pose)
    pixels, depth = camera.project(world)
    radii = radii * camera.focal / depth
    bearing = math.atan2(pose.z, pose.x)
    # 0 seen from behind, π from the front, π/2 … from the sides.
    turn = pose.heading - bearing
    broad = math.sqrt(math.cos(turn) ** 2 + (0.66 * math.sin(turn)) ** 2)
    radii[[6, 7, 14]] *= (0.35 + 1.05 * broad) * 0.95
    there = [k for k in range(len(PARTS)) if k not in person.absent]
    pixels, radii, depth = pixels[there], radii[there], depth[there].mean(1)
    depth[[i for i, k in enumerate(there) if k == 7]] -= 0.02  # the chest hides the shoulder behind it
    sprite = Sprite((pixels - radii[..., None]).min((0, 1)), (pixels + radii[..., None]).max((0, 1)))
    facing = (0.5 + (math.pi - turn) / (2 * math.pi)) % 1
    for i in np.argsort(-depth):
        part = there[i]
        widest = radii[i].max()
        cloth = person.cloth[part][0 if widest > 9 else 1 if widest > 3.5 else 2]
        sprite.round_part(pixels[i], radii[i], cloth, facing, light)
    reach = radii[..., None, None] * np.array([(1, 0), (-1, 0), (0, 1), (0, -1)])
    return sprite, (pixels[..., None, :] + reach).reshape(-1, 2), body
