"""What lies between the street and the file: shake, shutter, sensor, compression.

Knows nothing of what is in the picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from tracker.deploy.scenes.textures import Floats, Random

Pixels = NDArray[Any]  # uint8


@dataclass(frozen=True, kw_only=True)
class Motion:
    """How the camera moves: sums of sines. waves: (3, W, 3) for pan, tilt and roll: amplitude in radians,
    angular frequency in radians per second, phase."""

    waves: NDArray[np.float64]

    @classmethod
    def draw(cls, rng: Random, room: float) -> Motion:
        """room: radians by which the camera may pan."""
        waves = np.zeros((3, 4, 3))
        kind = rng.random()
        shake = 0.0 if kind < 0.4 else rng.uniform(0.0008, 0.004)
        waves[:, :3, 0] = shake * rng.uniform(0.3, 1, (3, 3)) * np.array([[1], [1], [0.6]])
        waves[:, :3, 1] = 2 * math.pi * np.array([0.7, 1.9, 4.1]) * rng.uniform(0.7, 1.4, (3, 3))
        if kind > 0.7:
            waves[0, 3, 0] = room * rng.uniform(0.3, 0.9)
            waves[0, 3, 1] = 2 * math.pi / rng.uniform(8, 25)
        waves[..., 2] = rng.uniform(0, 2 * math.pi, (3, 4))
        return cls(waves=waves)

    def at(self, seconds: float) -> tuple[float, float, float]:
        """Pan, tilt, roll in radians."""
        angles = (self.waves[..., 0] * np.sin(self.waves[..., 1] * seconds + self.waves[..., 2])).sum(1)
        return float(angles[0]), float(angles[1]), float(angles[2])


@dataclass(frozen=True, kw_only=True)
class Lens:
    """exposure: gain. gamma: of the tone curve. tint: (3,) BGR gain. grain: noise, grey levels.
    softness: pixels of blur. vignette: darkening in the corners. shutter: seconds. quality: JPEG, 0 none."""

    exposure: float
    gamma: float
    tint: Floats
    saturation: float
    grain: float
    softness: float
    vignette: float
    shutter: float
    quality: int

    @classmethod
    def draw(cls, rng: Random, tint: Floats) -> Lens:
        return cls(
            exposure=float(rng.uniform(0.72, 1.25)),
            gamma=float(rng.uniform(0.8, 1.25)),
            tint=tint * (1 + rng.normal(scale=0.03, size=3)).astype(np.float32),
            saturation=float(rng.uniform(0.55, 1.15)),
            grain=float(rng.choice([0.5, 2.0, 4.0, 8.0], p=[0.3, 0.4, 0.2, 0.1])),
            softness=float(rng.choice([0.0, 0.5, 0.9], p=[0.45, 0.35, 0.2])),
            vignette=float(rng.uniform(0, 0.3)),
            shutter=float(rng.uniform(0.004, 0.02)),
            quality=int(rng.integers(35, 96)),
        )

    def develop(self, light: Floats, drift: tuple[float, float], rng: Random, *, compress: bool) -> Pixels:
        """light: (H, W, 3) BGR, consumed. drift: pixels per second by which the picture moves. Returns uint8.

        compress: leave JPEG's traces; not wanted where a video codec will leave its own.
        """
        height, width = light.shape[:2]
        light = _smear(light, drift[0] * self.shutter, drift[1] * self.shutter)
        if self.softness:
            light = cv2.GaussianBlur(light, (0, 0), self.softness)
        x = np.linspace(-1, 1, width, dtype=np.float32) ** 2
        y = np.linspace(-1, 1, height, dtype=np.float32) ** 2
        light *= (1 - np.float32(self.vignette / 2) * (x + y[:, None]))[..., None]
        pixels = np.clip(light, 0, 255, out=light).astype(np.uint8)
        levels = np.linspace(0, 1, 256) ** self.gamma * 255 * self.exposure
        curve = np.clip(levels[:, None] * self.tint, 0, 255).astype(np.uint8)
        pixels = cv2.LUT(pixels, curve[None])
        grey = cv2.cvtColor(cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
        pixels = cv2.addWeighted(pixels, self.saturation, grey, 1 - self.saturation, 0)
        cv2.setRNGSeed(int(rng.integers(2**31)))
        # Grain is the same for the three colours but for a little, as after a camera's own noise filter.
        grain = cv2.randn(np.empty((height, width), np.int16), np.zeros(1), np.full(1, self.grain))
        pixels = cv2.add(pixels, cv2.merge((grain, grain, grain)), dtype=cv2.CV_8U)
        if compress and self.quality:
            coded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, self.quality])[1]
            decoded = cv2.imdecode(coded, cv2.IMREAD_COLOR)
            assert decoded is not None
            pixels = decoded
        return pixels


def _smear(light: Floats, x: float, y: float) -> Floats:
    """Blur along the way the picture moved while the shutter was open."""
    length = math.hypot(x, y)
    if length < 1:
        return light
    size = 2 * math.ceil(length / 2) + 1
    kernel = np.zeros((size, size), np.float32)
    middle = size // 2
    ends = [(round(middle - s * x / 2), round(middle - s * y / 2)) for s in (-1, 1)]
    cv2.line(kernel, ends[0], ends[1], 1.0, 1, cv2.LINE_AA)
    return cv2.filter2D(light, -1, kernel / kernel.sum())
