"""A pinhole camera on a mast: where points of the street appear, and how far away they are.

World: x right, y up, z ahead, metres, the ground at y = 0 and the camera above its origin. Images are in
pixels with y down. Knows nothing of what is looked at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]  # float32
Array = NDArray[np.float64]

NEAREST = 0.5  # metres ahead of the camera; anything closer is treated as being there


@dataclass(frozen=True, kw_only=True)
class Camera:
    """size: (width, height) of its image in pixels. focal: pixels. height: metres above ground.
    tilt: radians below the horizon."""

    size: tuple[int, int]
    focal: float
    height: float
    tilt: float

    def project(self, points: Array) -> tuple[Array, Array]:
        """(..., 3) world points → (..., 2) pixels and (...) depth along the optical axis, metres."""
        x, y, z = points[..., 0], points[..., 1] - self.height, points[..., 2]
        depth = np.maximum(z * math.cos(self.tilt) - y * math.sin(self.tilt), NEAREST)
        rise = y * math.cos(self.tilt) + z * math.sin(self.tilt)
        scale = self.focal / depth
        return np.stack((self.size[0] / 2 + scale * x, self.size[1] / 2 - scale * rise), -1), depth

    def rays(self) -> Floats:
        """(H, W, 3) directions through the pixels' centres, with depth 1 per unit of length."""
        width, height = self.size
        u = (np.arange(width, dtype=np.float32) + 0.5 - width / 2) / self.focal
        v = -(np.arange(height, dtype=np.float32) + 0.5 - height / 2) / self.focal
        cos, sin = math.cos(self.tilt), math.sin(self.tilt)
        rays = np.empty((height, width, 3), np.float32)
        rays[..., 0] = u
        rays[..., 1] = (v * cos - sin)[:, None]
        rays[..., 2] = (v * sin + cos)[:, None]
        return rays

    def turned(self, pan: float, tilt: float, roll: float, view: Array) -> Array:
        """(3, 3) homography from this camera's image to that of a camera turned by small angles (radians),
        followed by `view`: (3, 3) from pixels about this image's centre to pixels of the final image."""
        cp, sp, ct, st, cr, sr = (f(a) for a in (pan, tilt, roll) for f in (math.cos, math.sin))
        about_y = np.array([[cp, 0, -sp], [0, 1, 0], [sp, 0, cp]])
        about_x = np.array([[1, 0, 0], [0, ct, -st], [0, st, ct]])
        about_z = np.array([[cr, -sr, 0], [sr, cr, 0], [0, 0, 1]])
        lens = np.diag([self.focal, self.focal, 1.0])
        centre = np.array([[1, 0, -self.size[0] / 2], [0, 1, -self.size[1] / 2], [0, 0, 1]])
        turned: Array = view @ lens @ about_z @ about_x @ about_y @ np.linalg.inv(lens) @ centre
        return turned


def apply_homography(homography: Array, points: Array) -> Array:
    """(..., 2) points through a (3, 3) homography."""
    homogeneous = np.concatenate((points, np.ones((*points.shape[:-1], 1))), -1) @ homography.T
    mapped: Array = homogeneous[..., :2] / homogeneous[..., 2:]
    return mapped
