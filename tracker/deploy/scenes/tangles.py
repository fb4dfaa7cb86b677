"""Things whose boxes say little: bars, hooks and waving people that cross, all alike, with exact masks.

    tangle = Tangle(seed)
    for index in range(tangle.frames): truth = tangle.truth(index); found = tangle.detections(index)

Two bars across each other have the same box for as long as they cross; two hooks lie one inside the other.
The truth is drawn from far to near, so that a mask is what can be seen. The detector is an oracle with
faults: boxes are off, masks are coarse and cut off by them, some objects are missed, and scores fall with
what is hidden. Every number is seeded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from tracker.masks import MaskCrops
from tracker.types import Detections

# Outlines in −1…1, y down. A bar lies across its box's diagonal.
_BAR = [(-1, -0.8), (-0.8, -1), (1, 0.8), (0.8, 1)]
_HOOK = [(-1, -1), (-0.7, -1), (-0.7, 0.7), (1, 0.7), (1, 1), (-1, 1)]
_BOW = [(-1, -1), (1, -1), (1, -0.75), (-0.7, -0.75), (-0.7, 0.75), (1, 0.75), (1, 1), (-1, 1)]
_PERSON = [
    (-0.12, -1), (0.12, -1), (0.14, -0.55), (0.9, -1), (1, -0.88), (0.25, -0.3), (0.22, 0.2),
    (0.5, 1), (0.25, 1), (0, 0.3), (-0.25, 1), (-0.5, 1), (-0.22, 0.2), (-0.25, -0.3), (-1, 0.1),
    (-0.95, -0.1), (-0.14, -0.55),
]  # fmt: skip
_OUTLINES = [np.array(outline, float) for outline in (_BAR, _HOOK, _BOW, _PERSON)]

_CELLS = 28  # along a mask, as Mask R-CNN gives them


@dataclass(frozen=True, kw_only=True, slots=True)
class TangleConfig:
    """size: (width, height) in pixels. objects, frames: how many. speed: pixels per frame, on the mean. turn:
    standard deviation of its change from frame to frame. sides: least and greatest side of a box, in pixels.

    The detector's faults. jitter: of a box's corners, in its sides, standard deviation. blur: the same of a
    mask's logits. miss: how many of those to be seen it does not find. least_seen: of an object, so that it
    is in the truth and may be found.
    """

    size: tuple[int, int] = (960, 540)
    objects: int = 30
    frames: int = 150
    speed: float = 8.0
    turn: float = 0.6
    sides: tuple[int, int] = (110, 150)
    jitter: float = 0.03
    blur: float = 1.0
    miss: float = 0.08
    least_seen: float = 0.25


class Seen(NamedTuple):
    """What can be seen in a frame. id: (K,) from 1. xyxy: (K, 4) int64 windows around the masks. pixels: K
    masks, each within its window. share: (K,) of each object that is not hidden.
    """

    id: NDArray[np.int64]
    xyxy: NDArray[np.int64]
    pixels: list[NDArray[np.bool_]]
    share: NDArray[np.float64]


class Tangle:
    """One scene. All of its frames can be asked for, in any order and any number of times."""

    def __init__(self, seed: int, config: TangleConfig | None = None) -> None:
        self.config = config = config or TangleConfig()
        self._seed = seed
        random = np.random.default_rng(seed)
        count, extent = config.objects, np.array(config.size, float)
        self._side = random.uniform(*config.sides, (count, 2))
        self._outline = random.integers(len(_OUTLINES), size=count)
        self._flip = random.choice((-1.0, 1.0), (count, 2))
        place = random.uniform(0, 1, (count, 2)) * (extent - self._side) + self._side / 2
        heading = random.uniform(0, 2 * np.pi, count)
        speed = config.speed * random.uniform(0.5, 1.5, count)
        velocity = np.stack((np.cos(heading), np.sin(heading)), axis=1) * speed[:, None]
        self._places = []
        for _ in range(config.frames):
            self._places.append(place)
            velocity = velocity + random.normal(0, config.turn, velocity.shape)
            place = place + velocity
            outside = (place < self._side / 2) | (place > extent - self._side / 2)
            place = np.clip(place, self._side / 2, extent - self._side / 2)
            velocity = np.where(outside, -velocity, velocity)

    @property
    def frames(self) -> int:
        return self.config.frames

    def truth(self, index: int) -> Seen:
        """Objects of which enough is seen in frame index, by id; those nearer have greater ids."""
        width, height = self.config.size
        owner = np.zeros((height, width), np.uint8)
        windows, whole = [], []
        for number, place in enumerate(self._places[index]):
            points = _OUTLINES[self._outline[number]] * self._flip[number] * self._side[number] / 2 + place
            outline = np.round(points).astype(np.int32)
            (x1, y1), (x2, y2) = np.maximum(outline.min(axis=0), 0), outline.max(axis=0) + 1
            cv2.fillPoly(owner, [outline], number + 1)
            windows.append((x1, y1, x2, y2))
            whole.append(np.count_nonzero(owner[y1:y2, x1:x2] == number + 1))
        ids, boxes, pixels, shares = [], [], [], []
        for number, ((x1, y1, x2, y2), full) in enumerate(zip(windows, whole, strict=True), 1):
            mask = owner[y1:y2, x1:x2] == number
            seen = np.count_nonzero(mask) / full
            if seen < self.config.least_seen:
                continue
            rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
            left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
            ids.append(number)
            boxes.append((x1 + left, y1 + top, x1 + right, y1 + bottom))
            pixels.append(mask[top:bottom, left:right])
            shares.append(seen)
        return Seen(np.array(ids), np.array(boxes).reshape(-1, 4), pixels, np.array(shares))

    def detections(self, index: int, *, device: str = "cpu") -> Detections:
        """What the detector makes of frame index: class 0, masks as Mask R-CNN gives them, on that device."""
        config, seen = self.config, self.truth(index)
        random = np.random.default_rng((self._seed, index))
        found = random.random(len(seen.id)) >= config.miss
        order = random.permutation(found.nonzero()[0])
        xyxy = seen.xyxy[order].astype(np.float64)
        side = np.tile(xyxy[:, 2:] - xyxy[:, :2], 2)
        box = xyxy + random.normal(0, config.jitter, xyxy.shape) * side
        logits = [_logits(seen.pixels[k], seen.xyxy[k], where) for k, where in zip(order, box, strict=True)]
        crops = np.array(logits, np.float32).reshape(-1, _CELLS, _CELLS)
        crops += random.normal(0, config.blur, crops.shape)
        score = 0.55 + 0.4 * seen.share[order] + random.normal(0, 0.03, len(order))
        return Detections(
            xyxy=box.astype(np.float32),
            score=np.clip(score, 0.05, 0.99).astype(np.float32),
            label=np.zeros(len(order), np.int64),
            mask=MaskCrops(
                torch.from_numpy(crops.astype(np.float32)).to(device),
                torch.from_numpy(box.astype(np.float32)),
                config.size,
            ),
        )


def _logits(pixels: NDArray[np.bool_], window: NDArray[np.int64], box: NDArray[Any]) -> NDArray[np.float32]:
    """A mask seen through the cells of a box: ±4 for a cell within the mask or outside of it."""
    fine = 4 * _CELLS  # points along a side, of which each cell takes the mean of 4 × 4
    points = box[:2] + (box[2:] - box[:2]) * ((np.arange(fine) + 0.5) / fine)[:, None] - window[:2]
    x, y = np.floor(points).astype(np.int64).T
    height, width = pixels.shape
    inside = ((y >= 0) & (y < height))[:, None] & ((x >= 0) & (x < width))
    sampled = pixels[np.clip(y, 0, height - 1)[:, None], np.clip(x, 0, width - 1)] & inside
    share = sampled.reshape(_CELLS, 4, _CELLS, 4).mean(axis=(1, 3))
    logits: NDArray[np.float32] = (8 * share - 4).astype(np.float32)
    return logits
