"""Things cut out of their background: small images with an outline, drawn part by part and laid into a frame.

Parts are round: a stretch between two circles, shaded as the cylinder or cone it stands for, with cloth or
bark wrapped around it. Or they are flat polygons. Knows nothing of what the parts make up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]  # float32
Array = NDArray[np.float64]
FINER = 2  # flat parts are drawn at this many times the resolution


@dataclass(frozen=True, kw_only=True)
class Light:
    """Light as seen by the camera. source: (right, up, towards the viewer) unit vector. direct: 0…1."""

    source: tuple[float, float, float]
    direct: float


class Sprite:
    """A float image at whole-pixel position (left, top) of a larger one: colour (H, W, 3) BGR, already
    multiplied by cover (H, W), which is 0…1."""

    def __init__(self, low: Array, high: Array) -> None:
        """Room for everything between two pixel corners (2,), which need not lie in any frame."""
        self.left, self.top = (int(v) for v in np.floor(low - 1))
        width, height = (int(v) for v in np.ceil(high + 1) - np.floor(low - 1))
        self.colour: Floats = np.zeros((height, width, 3), np.float32)
        self.cover: Floats = np.zeros((height, width), np.float32)

    def round_part(self, ends: Array, radii: Array, cloth: Floats, facing: float, light: Light) -> None:
        """From circle to circle: ends (2, 2) pixels, radii (2,). cloth: (V, U, 3) from first end to second
        and once around; facing: the share of the turn that the viewer sees in the middle."""
        (x0, y0), (x1, y1) = ends - (self.left, self.top)
        r0, r1 = radii
        left, right = max(int(min(x0 - r0, x1 - r1)) - 1, 0), int(max(x0 + r0, x1 + r1)) + 2
        top, bottom = max(int(min(y0 - r0, y1 - r1)) - 1, 0), int(max(y0 + r0, y1 + r1)) + 2
        colour, cover = self.colour[top:bottom, left:right], self.cover[top:bottom, left:right]
        if not cover.size:
            return
        dx = np.arange(left, left + cover.shape[1], dtype=np.float32) + np.float32(0.5 - x0)  # (W,)
        dy = (np.arange(top, top + cover.shape[0], dtype=np.float32) + np.float32(0.5 - y0))[
            :, None
        ]  # (H, 1)
        ax, ay = np.float32(x1 - x0), np.float32(y1 - y0)
        square = max(float(ax * ax + ay * ay), 1e-3)
        length = square**0.5
        t = dx * (ax / np.float32(square)) + dy * (ay / np.float32(square))  # (H, W)
        np.maximum(t, 0, out=t)
        np.minimum(t, 1, out=t)
        radius = t * np.float32(r1 - r0) + np.float32(r0)
        px, py = dx - t * ax, dy - t * ay
        inside = radius - np.sqrt(px * px + py * py)
        inside += np.float32(0.5)
        np.maximum(inside, 0, out=inside)
        np.minimum(inside, 1, out=inside)
        # The offset across the axis, −1…1, tells which way the round surface looks. Seen end on, across is
        # left to right.
        ux, uy = (1.0, 0.0) if length < r0 else (-ay / length, ax / length)
        s = px * np.float32(ux) + py * np.float32(uy)
        s /= np.maximum(radius, np.float32(0.3), out=radius)
        np.maximum(s, -1, out=s)
        np.minimum(s, 1, out=s)
        out = np.sqrt(1 - s * s)
        lx, ly, lz = light.source
        lit = s * np.float32(ux * lx - uy * ly)
        lit += out * np.float32(lz) + np.float32(0.25)
        np.maximum(lit, 0, out=lit)
        lit *= np.float32(0.85 * light.direct)
        soft = np.float32(1 - 0.6 * light.direct)
        shade = out * (soft * np.float32(0.38)) + lit
        shade += soft * np.float32(0.62)
        rows, columns = cloth.shape[:2]
        v = (t * np.float32(rows - 0.01)).astype(np.intp)
        u = ((np.float32(facing) + s * np.float32(0.25)) * np.float32(columns)).astype(np.intp) % columns
        painted = cloth[v, u]
        painted *= shade[..., None]
        painted -= colour
        painted *= inside[..., None]
        colour += painted
        cover += inside * (1 - cover)

    def polygons(self, faces: list[tuple[Array, Floats]]) -> None:
        """Flat parts, the later over the earlier: each (K, 2) pixels and its BGR colour (3,)."""
        height, width = self.cover.shape
        fine = np.zeros((height * FINER, width * FINER, 4), np.uint8)
        for corners, colour in faces:
            points = np.round((corners - (self.left, self.top)) * FINER * 16 - 8).astype(np.int32)
            shade = [*np.clip(colour, 0, 255).tolist(), 255.0]
            cv2.fillPoly(fine, [points], shade, cv2.LINE_8, shift=4)
        small = cv2.resize(fine, (width, height), interpolation=cv2.INTER_AREA).astype(np.float32)
        # Empty texels are black, so the mean is already multiplied by the coverage.
        self.lay(small[..., :3], small[..., 3] / 255)

    def lay(self, colour: Floats, cover: Floats) -> None:
        """Something flat over all of it, its colour already multiplied by its cover."""
        self.colour = colour + self.colour * (1 - cover)[..., None]
        self.cover = cover + self.cover * (1 - cover)

    def veil(self, amount: float, haze: Floats) -> None:
        """Mist between the thing and the viewer, 0 none … 1 nothing else to be seen."""
        self.colour += np.float32(amount) * (self.cover[..., None] * haze - self.colour)

    def smear(self, pixels: float) -> None:
        """Blur sideways, as what moves by so many pixels while the shutter is open."""
        size = round(pixels)
        if size > 1 and self.cover.shape[1] > size:
            self.colour, self.cover = cv2.blur(self.colour, (size, 1)), cv2.blur(self.cover, (size, 1))

    def paste(self, image: Floats, owners: NDArray[np.int16], owner: int) -> None:
        """Lay it over image (H, W, 3) and note in owners (H, W) whose each pixel now is."""
        height, width = image.shape[:2]
        x0, y0 = max(self.left, 0), max(self.top, 0)
        x1, y1 = min(self.left + self.cover.shape[1], width), min(self.top + self.cover.shape[0], height)
        if x0 >= x1 or y0 >= y1:
            return
        cut = np.s_[y0 - self.top : y1 - self.top, x0 - self.left : x1 - self.left]
        under, cover = image[y0:y1, x0:x1], self.cover[cut]
        under *= (1 - cover)[..., None]
        under += self.colour[cut]
        owners[y0:y1, x0:x1][cover > 0.5] = owner
