"""Surfaces made from numbers: noise, brick, asphalt, paving, grass, leaves, cloth.

Every texture is a tile that repeats, float32 BGR around 0…255, from the generator handed in. Knows nothing
of cameras or scenes.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[Any]  # float32
Random = np.random.Generator

TILE = 256  # texels along each side of a surface tile


def noise(rng: Random, size: int = TILE, coarsest: int = 4, octaves: int = 6, fall: float = 0.6) -> Floats:
    """(size, size) repeating noise of several octaves, mean 0, standard deviation 1.

    coarsest: cells of the first octave along a side; each further octave doubles them and weighs `fall` as
    much.
    """
    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        cells = coarsest << octave
        if cells > size:
            break
        grid = rng.standard_normal((cells, cells)).astype(np.float32)
        step = size // cells
        # Two cells of wrap on each side let the cubic filter see what lies across the seam.
        wide = cv2.resize(np.pad(grid, 2, "wrap"), None, fx=step, fy=step, interpolation=cv2.INTER_CUBIC)
        total += fall**octave * wide[2 * step : 2 * step + size, 2 * step : 2 * step + size]
    normal: Floats = (total - total.mean()) / (total.std() + 1e-6)
    return normal


def asphalt(rng: Random) -> Floats:
    """Dark grey with grain, oil stains and a few cracks."""
    grey = rng.uniform(70, 125) + 5 * noise(rng) + 9 * noise(rng, coarsest=64, octaves=3, fall=0.9)
    for _ in range(int(rng.integers(0, 4))):
        walk = np.cumsum(rng.normal(scale=(5, 5), size=(30, 2)) + rng.normal(scale=3, size=2), axis=0)
        points = np.round(walk + rng.uniform(0, TILE, 2)).astype(np.int32)
        cv2.polylines(grey, [points], False, float(grey.mean()) - 35, 1, cv2.LINE_AA)
    return _tint(grey, rng, 4)


def paving(rng: Random) -> Floats:
    """Slabs in rows, each a little different, with darker joints; 8 × 8 or so to the tile."""
    rows, columns = int(rng.choice([4, 8, 16])), int(rng.choice([4, 8, 16]))
    slabs = rng.normal(scale=rng.uniform(3, 12), size=(rows, columns)).astype(np.float32)
    return _masonry(rng, slabs, rng.uniform(110, 185), joint=-rng.uniform(15, 45), tint=8)


def brick(rng: Random) -> Floats:
    """Courses of brick with mortar, red, brown, yellow or painted."""
    bricks = rng.normal(scale=rng.uniform(6, 14), size=(32, 12)).astype(np.float32)
    base = _masonry(rng, bricks, 120, joint=rng.uniform(20, 60), tint=0)
    colour = np.array([(60, 80, 140), (70, 90, 120), (110, 150, 175), (150, 160, 165)], np.float32)
    base *= colour[rng.integers(len(colour))] * np.float32(rng.uniform(0.75, 1.25) / 120)
    return base


def plaster(rng: Random) -> Floats:
    """Painted render: one colour, blotches and streaks that run down."""
    streaks = cv2.resize(rng.standard_normal((1, 64)).astype(np.float32), (TILE, TILE))
    shade: Floats = 1 + 0.03 * noise(rng, fall=0.75) + 0.02 * streaks
    colour = rng.uniform(90, 215) + rng.normal(scale=16, size=3) + np.array((-14, 0, 8))
    painted: Floats = shade[..., None] * colour.astype(np.float32)
    return painted


def grass(rng: Random) -> Floats:
    """Blades and patches, from fresh to dry."""
    fresh, dry = np.array((38, 105, 62), np.float32), np.array((70, 130, 128), np.float32)
    blend = np.clip(rng.uniform(0, 0.7) + 0.14 * noise(rng, octaves=4), 0, 1)[..., None]
    blades = 1 + 0.16 * noise(rng, coarsest=32, octaves=4, fall=0.9)[..., None]
    lawn: Floats = (fresh * (1 - blend) + dry * blend) * blades * np.float32(rng.uniform(0.6, 1.15))
    return lawn


def leaves(rng: Random) -> Floats:
    """Clusters of leaves, lit from above."""
    hue = np.array([(35, 85, 55), (30, 75, 80), (45, 100, 95), (50, 70, 60)], np.float32)
    depth = noise(rng, coarsest=8, octaves=5, fall=0.95)[..., None]
    green: Floats = np.clip(hue[rng.integers(len(hue))] * (1 + 0.42 * depth), 4, 255)
    return green


def cloth(rng: Random, pattern: str, colours: Floats) -> Floats:
    """(32, 64, 3): a garment part unrolled, u around the body (0.5 is the front), v from top to bottom.

    colours: (3, 3) BGR of ground, figure and trim.
    """
    ground, figure, trim = colours
    tile = np.broadcast_to(ground, (32, 64, 3)).copy()
    v, u = np.mgrid[:32, :64]
    period = int(rng.integers(4, 11))
    if pattern == "hoops":
        tile[v % period < period // 2] = figure
    elif pattern == "stripes":
        tile[u % period < period // 2] = figure
    elif pattern == "checks":
        tile[v % period < period // 2] = 0.6 * tile[v % period < period // 2] + 0.4 * figure
        tile[u % period < period // 2] = 0.6 * tile[u % period < period // 2] + 0.4 * trim
    elif pattern == "blocks":
        tile[v > rng.integers(8, 24)] = figure
    elif pattern == "panel":
        tile[np.abs(u - 32) < rng.integers(3, 9)] = figure
    elif pattern == "logo":
        top, left, wide = (int(rng.integers(low, high)) for low, high in ((4, 12), (24, 30), (5, 12)))
        tile[top : top + wide, left : left + wide] = figure
        tile[top : top + wide + 4, :8] = trim
    elif pattern == "band":
        top = int(rng.integers(4, 16))
        tile[top : top + int(rng.integers(4, 9))] = figure
    elif pattern == "camouflage":
        blotch = noise(rng, size=64, coarsest=8, octaves=2)[:32]
        tile[blotch > 0.4] = figure
        tile[blotch < -0.8] = trim
    folds = cv2.resize(
        rng.standard_normal((6, 10)).astype(np.float32), (64, 32), interpolation=cv2.INTER_CUBIC
    )
    worn: Floats = np.clip(tile * (1 + 0.05 * folds[..., None]), 0, 255).astype(np.float32)
    return worn


def _masonry(rng: Random, cells: Floats, level: float, joint: float, tint: float) -> Floats:
    """Rows of cells, every other one shifted by half, with joints in between."""
    rows, columns = cells.shape
    v, u = np.mgrid[:TILE, :TILE]
    row = v * rows // TILE
    across = (u / TILE * columns + 0.5 * (row % 2)) % columns
    down = v / TILE * rows % 1
    edge = np.minimum(across % 1, 1 - across % 1) * (TILE / columns)
    edge = np.minimum(edge, np.minimum(down, 1 - down) * (TILE / rows))
    grey = (
        level + cells[row, across.astype(np.int64)] + 5 * noise(rng) + 4 * noise(rng, coarsest=64, octaves=2)
    )
    grey += joint * np.clip(1.6 - edge, 0, 1)
    return _tint(grey.astype(np.float32), rng, tint)


def _tint(grey: Floats, rng: Random, strength: float) -> Floats:
    """(H, W) → (H, W, 3) with a faint cast."""
    tinted: Floats = grey[..., None] + rng.normal(scale=strength, size=3).astype(np.float32)
    return tinted
