"""Tracks drawn onto a picture: boxes, masks, labels, fading trails, one stable colour per id.

Knows pixels and tracks; not where a picture comes from, nor what becomes of it.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import cv2
import numpy as np
from numpy.typing import NDArray

from tracker.boxes import enclosing, polygons, turned
from tracker.types import Track, Tracks

if TYPE_CHECKING:
    from tracker.masks import Crop

Pixels = NDArray[np.uint8]
Points = NDArray[np.float64]

TRAIL_SECONDS = 2.0
MAX_TRAIL_FRAMES = 120
FADE_STEPS = 8  # shades of one trail
TINT = 0.45  # how much of a mask's pixels is its colour

_GOLDEN_ANGLE = np.pi * (3 - np.sqrt(5))  # radians
_LIGHTNESS, _CHROMA = 0.78, 0.15  # in OKLab: light enough for dark ink; what sRGB lacks is clipped
_INK = (24, 24, 24)
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_CAPITAL = 21  # pixels: the height of that font's capital letters at scale 1
_FRACTION_BITS = 3  # of the fixed-point coordinates given to OpenCV


def colours(ids: NDArray[np.int64]) -> Pixels:
    """(N,) ids → (N, 3) BGR: the same for an id in every run, and light enough for dark ink on it.

    Hues step by the golden angle, which keeps any run of consecutive ids apart, around a circle of OKLab
    (B. Ottosson, "A perceptual color space for image processing", 2020; the numbers below are his): equal
    steps there look equal, while HSV has many greens alike and blues too dark to write on.
    """
    hue = ids * _GOLDEN_ANGLE
    a, b = _CHROMA * np.cos(hue), _CHROMA * np.sin(hue)
    long = _LIGHTNESS + 0.3963377774 * a + 0.2158037573 * b
    medium = _LIGHTNESS - 0.1055613458 * a - 0.0638541728 * b
    short = _LIGHTNESS - 0.0894841775 * a - 1.2914855480 * b
    to_bgr = np.array([
        [-0.0041960863, -0.7034186147, 1.7076147010],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [4.0767416621, -3.3077115913, 0.2309699292],
    ])  # fmt: skip
    linear = np.clip(np.stack((long, medium, short), axis=-1) ** 3 @ to_bgr.T, 0, 1)  # (N, 3)
    srgb = np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear)  # IEC 61966-2-1
    bgr: Pixels = np.round(srgb * 255).astype(np.uint8)
    return bgr


class Trails:
    """Where every id stood during the last `frames` frames. What is older is forgotten, ids included."""

    def __init__(self, *, frames: int) -> None:
        self.frames = frames
        self._steps: deque[tuple[NDArray[np.int64], Points]] = deque(maxlen=frames)

    def __len__(self) -> int:
        """Points remembered."""
        return sum(len(ids) for ids, _ in self._steps)

    def add(self, ids: NDArray[np.int64], points: Points) -> None:
        """One frame: (N,) ids and where they stand, (N, 2). Empty frames count too: trails fade."""
        self._steps.append((ids, points))

    def clear(self) -> None:
        self._steps.clear()

    def shorten(self, frames: int) -> None:
        """Forget all but the newest so many."""
        while len(self._steps) > frames:
            self._steps.popleft()

    def strokes(self) -> tuple[Points, NDArray[np.intp], NDArray[np.int64], NDArray[np.float64]]:
        """All points (P, 2), by id and from old to new, and how they fall into S pieces, each of one id and
        about one age: where the pieces start (S,), their ids (S,), and freshness (S,), 1 for now down to 0.
        """
        ids = np.concatenate([np.empty(0, np.int64), *(ids for ids, _ in self._steps)])
        points = np.concatenate([np.empty((0, 2)), *(points for _, points in self._steps)])
        age = np.repeat(np.arange(len(self._steps))[::-1], [len(ids) for ids, _ in self._steps])
        order = np.lexsort((-age, ids))
        ids, fade = ids[order], (age * FADE_STEPS // self.frames)[order]
        starts = np.flatnonzero(np.diff(ids, prepend=-1) | np.diff(fade, prepend=-1))
        return points[order], starts, ids[starts], 1 - fade[starts] / FADE_STEPS


class Painter:
    """Draws the tracks of one video, frame after frame, because trails need memory."""

    def __init__(self, *, frame_rate: float) -> None:
        frames = min(max(FADE_STEPS, round(frame_rate * TRAIL_SECONDS)), MAX_TRAIL_FRAMES)
        self.trails = Trails(frames=frames)
        self._shape: tuple[int, ...] = ()

    def draw(self, image: Pixels, tracks: Tracks) -> None:
        """Draw onto image, (H, W, 3) BGR, in place. Boxes may reach beyond it."""
        height, width = image.shape[:2]
        if self._shape != image.shape:
            self.trails.clear()  # their points are pixels of another size
            self._shape = image.shape
        edge = np.array([width, height, width, height])
        xyxy, rotated = np.asarray(tracks.xyxy, np.float64), None
        if tracks.angle is not None:
            rotated = turned(xyxy, tracks.angle)
            xyxy = enclosing(rotated)
        xyxy = np.clip(xyxy, -edge, 2 * edge)  # OpenCV's numbers are 32 bits
        # What has angles is seen from above, where nothing stands on its lower edge.
        foot = xyxy[:, 3] if rotated is None else xyxy[:, [1, 3]].mean(axis=1)
        self.trails.add(tracks.id, np.column_stack((xyxy[:, [0, 2]].mean(axis=1), foot)))
        line = max(2, round(height / 300))
        if tracks.mask is not None:
            order = np.argsort(xyxy[:, 3], kind="stable")
            for row, shade in zip(order.tolist(), colours(tracks.id[order]), strict=True):
                _tint(image, tracks.mask.crop(row), shade)
        _draw_trails(image, self.trails, line)
        inside = np.flatnonzero((xyxy[:, :2] < edge[:2]).all(axis=1) & (xyxy[:, 2:] > 0).all(axis=1))
        nearest_last = inside[np.argsort(xyxy[inside, 3], kind="stable")]  # the lowest foot looks nearest
        shades = colours(tracks.id[nearest_last]).tolist()
        outlines, draw = (xyxy, _draw_box) if rotated is None else (rotated, _draw_turned)
        for box, shade in zip(outlines[nearest_last], shades, strict=True):
            draw(image, box, shade, line)
        corners = xyxy[nearest_last, :2] - line / 2
        _draw_labels(image, [tracks[i] for i in nearest_last], corners, shades)


def _fixed_point(points: Points) -> NDArray[np.int32]:
    return np.round(points * (1 << _FRACTION_BITS)).astype(np.int32)


def _draw_trails(image: Pixels, trails: Trails, line: int) -> None:
    """A thin line in a mix of its colour and what lies beneath looks see-through, without blending copies."""
    points, starts, ids, freshness = trails.strokes()
    stops = np.append(starts[1:], len(points))
    height, width = image.shape[:2]
    columns, rows = np.clip(points, 0, (width - 1, height - 1)).astype(int).T
    sums = np.add.reduceat(image[rows, columns].astype(np.float64), starts, axis=0)
    beneath = sums / (stops - starts)[:, None]  # (S, 3)
    mixes = (beneath + 0.9 * freshness[:, None] * (colours(ids) - beneath)).tolist()
    joined = np.append(ids[1:] == ids[:-1], [False] * (len(ids) > 0))  # on to where the next piece starts
    fixed = _fixed_point(points)
    for start, stop, mix in zip(starts, stops + joined, mixes, strict=True):
        cv2.polylines(image, [fixed[start:stop]], False, mix, line + 1, cv2.LINE_AA, _FRACTION_BITS)


def _tint(image: Pixels, crop: Crop, shade: Pixels) -> None:
    """Colour the pixels of a mask, and look at no others than those around it."""
    height, width = crop.pixels.shape
    if not height * width:
        return
    below = image[crop.y : crop.y + height, crop.x : crop.x + width]
    # Of OpenCV's ways to mix a picture with one colour the fastest: a seventh of addWeighted's time.
    tinted = cv2.transform(below, np.column_stack(((1 - TINT) * np.eye(3), TINT * shade)))
    cv2.copyTo(tinted, crop.pixels.view(np.uint8), below)


def _draw_box(image: Pixels, xyxy: Points, shade: list[int], line: int) -> None:
    """A light line in a dark rim: one of the two stands out from any background."""
    rim = (line / 2 + 1) * np.array([-1, -1, 1, 1])
    for corners, colour, width in ((xyxy + rim, _INK, max(1, line // 3)), (xyxy, shade, line)):
        low, high = _fixed_point(corners).reshape(2, 2).tolist()
        cv2.rectangle(image, low, high, colour, width, cv2.LINE_AA, _FRACTION_BITS)


def _draw_turned(image: Pixels, cxcywhr: Points, shade: list[int], line: int) -> None:
    """As `_draw_box`, of a rotated one."""
    rim = np.array([0, 0, line + 2, line + 2, 0])
    far = 8 * max(image.shape)
    for box, colour, width in ((cxcywhr + rim, _INK, max(1, line // 3)), (cxcywhr, shade, line)):
        points = _fixed_point(np.clip(polygons(box), -far, far))
        cv2.polylines(image, [points], True, colour, width, cv2.LINE_AA, _FRACTION_BITS)


class _Lettering:
    """How labels are set in images of one size."""

    def __init__(self, image: Pixels) -> None:
        self.height, self.width = image.shape[:2]
        capital = max(9.0, self.height / 54)  # pixels
        self.scale = capital / _CAPITAL
        self.weight = max(1, round(1.6 * self.scale))
        self.pad = round(capital * 0.45)  # room for descenders
        self.line_height = round(capital) + 2 * self.pad

    def place(self, text: str, at: Points) -> NDArray[np.int_]:
        """(4,) xyxy of a chip with that text, standing on the point (2,), moved inside the image."""
        (width, _), _ = cv2.getTextSize(text, _FONT, self.scale, self.weight)
        width += 2 * self.pad
        left = max(0, min(round(at[0]), self.width - width))
        top = max(0, min(round(at[1]) - self.line_height, self.height - self.line_height))
        return np.array((left, top, left + width, top + self.line_height))

    def draw(self, image: Pixels, text: str, chip: NDArray[np.int_], shade: list[int]) -> None:
        left, top, right, bottom = chip.tolist()
        cv2.rectangle(image, (left, top), (right - 1, bottom - 1), shade, cv2.FILLED)
        at = (left + self.pad, bottom - self.pad - 1)
        cv2.putText(image, text, at, _FONT, self.scale, _INK, self.weight, cv2.LINE_AA)


def _draw_labels(image: Pixels, tracks: list[Track], corners: Points, shades: list[list[int]]) -> None:
    """Every box gets its id; class and score too where they hide no other label. The last are the nearest:
    first to get words, drawn on top. corners: (N, 2) top-left of the boxes.
    """
    lettering = _Lettering(image)
    texts = [str(track.id) for track in tracks]
    chips = np.array([lettering.place(*at) for at in zip(texts, corners, strict=True)]).reshape(-1, 4)
    for index, track in reversed(list(enumerate(tracks))):
        for text in (f"{track.id} {track.label} {track.score:.2f}", f"{track.id} {track.label}"):
            chip = lettering.place(text, corners[index])
            hidden = np.flatnonzero(((chips[:, :2] < chip[2:]) & (chip[:2] < chips[:, 2:])).all(axis=1))
            if set(hidden.tolist()) <= {index}:  # its own, shorter one does not count
                texts[index], chips[index] = text, chip
                break
    for text, chip, shade in zip(texts, chips, shades, strict=True):
        lettering.draw(image, text, chip, shade)
