"""A small street with people walking through: seeded, drawn, and exactly known.

For the demo and for tests: pixels, the truth about them, and what a fair detector might say of them. Every
answer depends on the scene's parameters and the frame's index alone, never on what was asked before.
Knows nothing of tracking, and is no training data: the figures are cartoons.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from tracker.boxes import xyxy_to_xywh
from tracker.errors import ConfigError, SinkError
from tracker.types import Detections

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Pixels = NDArray[np.uint8]

# As shares of the image's height: the horizon, the feet of the farthest and the nearest people, how tall
# they are per distance of their feet from the horizon; and their box's width per height.
HORIZON, FAR, NEAR, TALL, SLIM = 0.28, 0.48, 0.97, 0.62, 0.36
WALK = 0.75  # heights per second: 1.3 m/s for someone of 1.75 m
# A poster column and a lamp post, xyxy as shares of the image; people pass behind them or before.
THINGS = np.array([[0.62, 0.28, 0.70, 0.78], [0.243, 0.04, 0.257, 0.90]])
HIDDEN, CLEAR = 0.15, 0.5  # visibility below which nobody is detected, above which nearly everybody


@dataclass(frozen=True, kw_only=True)
class Scene:
    """People crossing a street both ways, passing behind each other, a poster column and a lamp post.

    objects: people in the whole clip; each enters, walks through and leaves, unless the clip ends first.
    embedding_dim: length of the simulated appearance vectors; 0 for detections without.

    Raises ConfigError for parameters that no video can have.
    """

    seed: int = 0
    size: tuple[int, int] = (640, 360)  # width, height
    frame_rate: float = 25.0
    objects: int = 14
    frames: int = 300
    embedding_dim: int = 64

    def __post_init__(self) -> None:
        if min(self.size) < 64 or any(side % 2 for side in self.size):
            raise ConfigError(f"scene size {self.size}: H.264 needs even sides, and people 64 pixels or more")
        if not 0 < self.frame_rate < math.inf or self.frames < 1:
            raise ConfigError(f"{self.frames} frames at {self.frame_rate} per second: both must be above 0")
        if min(self.seed, self.objects, self.embedding_dim) < 0:
            raise ConfigError("seed, objects and embedding_dim cannot be negative")

    def truth(self, index: int) -> tuple[Ints, Array, Array]:
        """Everyone in the image: ids (N,) from 1, boxes xyxy (N, 4) clipped to it, visibility (N,).

        Visibility is the share of the whole box inside the image and behind nothing nearer, by 8 × 16
        sample points. People entirely hidden are listed too, with 0, as MOTChallenge does.
        """
        whole = self._people(index)  # (M, 4)
        grid = np.stack(np.meshgrid((np.arange(8) + 0.5) / 8, (np.arange(16) + 0.5) / 16), -1).reshape(-1, 2)
        points = whole[:, None, :2] + grid * (whole[:, None, 2:] - whole[:, None, :2])  # (M, P, 2)
        seen = ((points >= 0) & (points < self.size)).all(-1)  # (M, P)
        for thing in np.concatenate((whole, THINGS * np.tile(self.size, 2))):
            inside = ((points >= thing[:2]) & (points < thing[2:])).all(-1)
            seen &= ~(inside & (thing[3] > whole[:, None, 3]))  # who stands lower in the image is nearer
        clipped = np.clip(whole, 0, np.tile(self.size, 2))
        present = np.flatnonzero((clipped[:, 2:] - clipped[:, :2] >= 1).all(-1))
        return present + 1, clipped[present], seen.mean(-1)[present]

    def detections(self, index: int) -> Detections:
        """What a fair detector says: a little off, unsure of the half hidden, blind to the hidden, and now
        and then seeing people where there are none. By falling score, label 0."""
        rng = np.random.default_rng((self.seed, 1, index))
        # Drawn for everybody, in the image or not, so that nobody's luck depends on who else is there.
        jitter, luck = rng.normal(size=(self.objects, 5)), rng.random(self.objects)
        looks = _unit(rng.normal(size=(self.objects, self.embedding_dim)))
        ids, xyxy, visibility = self.truth(index)
        found = luck[ids - 1] < 0.98 * np.clip((visibility - HIDDEN) / (CLEAR - HIDDEN), 0, 1)
        who, xyxy, visibility = ids[found] - 1, xyxy[found], visibility[found]
        sides = np.tile(xyxy[:, 2:] - xyxy[:, :2], 2)  # (N, 4)
        xyxy = xyxy + 0.03 * (2 - visibility)[:, None] * sides * jitter[who, :4]
        score = 0.25 + 0.68 * visibility + 0.03 * jitter[who, 4]
        embedding = self.identities[who] + (1.4 - visibility)[:, None] * looks[who]

        false = int(rng.poisson(0.15))
        x, foot = rng.uniform(0.05, 0.95, false) * self.size[0], rng.uniform(FAR, NEAR, false) * self.size[1]
        xyxy = np.clip(np.concatenate((xyxy, self._boxes(x, foot))), 0, np.tile(self.size, 2))
        score = np.clip(np.concatenate((score, rng.uniform(0.1, 0.5, false))), 0.05, 0.99)
        embedding = _unit(np.concatenate((embedding, rng.normal(size=(false, self.embedding_dim)))))
        order = np.argsort(-score)
        return Detections(
            xyxy=xyxy[order].astype(np.float32),
            score=score[order].astype(np.float32),
            label=np.zeros(len(order), np.int64),
            embedding=embedding[order].astype(np.float32) if self.embedding_dim else None,
        )

    def render(self, index: int) -> Pixels:
        """The frame, (H, W, 3) BGR."""
        image = self._street.copy()
        boxes = np.concatenate((self._people(index), THINGS * np.tile(self.size, 2)))
        for each in np.argsort(boxes[:, 3]):  # the far ones first
            if each < self.objects:
                _paint_person(image, boxes[each], self._colours[each])
            else:
                _paint_thing(image, boxes[each])
        return image

    @cached_property
    def identities(self) -> Array:
        """(objects, D) unit vectors: everyone's embedding without the noise."""
        return _unit(np.random.default_rng((self.seed, 2)).normal(size=(self.objects, self.embedding_dim)))

    def _people(self, index: int) -> Array:
        """(objects, 4) whole boxes xyxy, outside of the image for those who have yet to come or have left."""
        if not 0 <= index < self.frames:
            raise IndexError(f"frame {index} of a scene of {self.frames}")
        start, duration, foot_from, foot_to, sway = self._walks
        way = (index / self.frame_rate - start) / duration  # 0 entering, 1 leaving
        foot = foot_from + (foot_to - foot_from) * np.clip(way, 0, 1)
        way = way + 0.02 * np.sin(2 * math.pi * (3 * way + sway))  # nobody walks like a clock
        way[1::2] = 1 - way[1::2]  # every other one comes from the right
        margin = 0.1 * self.size[1]  # more than half the widest box
        return self._boxes(way * (self.size[0] + 2 * margin) - margin, foot * self.size[1])

    def _boxes(self, x: Array, foot: Array) -> Array:
        """Centres and feet in pixels, (N,) each → person-shaped boxes xyxy (N, 4)."""
        height = TALL * (foot - HORIZON * self.size[1])
        return np.stack((x - SLIM * height / 2, foot - height, x + SLIM * height / 2, foot), -1)

    @cached_property
    def _walks(self) -> Array:
        """(5, objects): start and duration in seconds, feet at entering and leaving, phase of the sway."""
        rng = np.random.default_rng((self.seed, 0))
        foot = rng.uniform(FAR, NEAR, (2, self.objects))
        speed = WALK * rng.uniform(0.7, 1.3, self.objects) * TALL * (foot.mean(0) - HORIZON) * self.size[1]
        duration = (self.size[0] + 0.2 * self.size[1]) / speed
        start = rng.uniform(-0.7 * duration, 0.85 * self.frames / self.frame_rate)
        return np.stack((start, duration, *foot, rng.random(self.objects)))

    @cached_property
    def _colours(self) -> Ints:
        """(objects, 4, 3) BGR of everyone's coat, trousers, skin and hair."""
        rng = np.random.default_rng((self.seed, 3))
        dark = rng.uniform(0.1, 1, (2, self.objects, 1))
        coat, trousers = rng.uniform(20, 230, (self.objects, 3)), rng.uniform(30, 110, (self.objects, 3))
        skin, hair = np.array([150, 180, 225]) * (0.4 + 0.6 * dark[0]), np.array([60, 90, 130]) * dark[1]
        return np.stack((coat, trousers, skin, hair), 1).astype(np.int64)

    @cached_property
    def _street(self) -> Pixels:
        """Empty: a brick wall with windows, paving stones towards the horizon, everything a little worn."""
        (width, height), rng = self.size, np.random.default_rng((self.seed, 4))
        y, x = np.mgrid[:height, :width]
        kerb, distance = (HORIZON + 0.12) * height, np.maximum(y - HORIZON * height, 1)
        bricks = (y % 8 < 1) | ((x + y // 8 % 2 * 9) % 18 < 1)
        window = (np.abs(x / width * 9 % 1 - 0.55) < 0.2) & (np.abs(y / kerb - 0.45) < 0.25)
        joints = (np.log(distance) * 6 % 1 < 0.06) | ((x - width / 2) / distance * 3 % 1 < 0.03)
        layers = ([y < kerb, window], [y < kerb, bricks], [y < kerb], [joints], [y >= 0])
        colours = ((92, 80, 66), (128, 138, 146), (98, 116, 148), (112, 120, 124), (146, 152, 156))
        top_layer = np.argmax([np.logical_and.reduce(layer) for layer in layers], axis=0)  # (H, W)
        image = np.array(colours, np.float64)[top_layer]
        for cell, strength in ((1, 4), (4, 4), (32, 10)):
            noise = rng.normal(scale=strength, size=(height // cell + 1, width // cell + 1))
            image += cv2.resize(noise, self.size, interpolation=cv2.INTER_CUBIC)[..., None]
        street: Pixels = np.clip(image, 0, 255).astype(np.uint8)
        return street


def write_video(scene: Scene, path: Path) -> None:
    """H.264, in the container the suffix names. Raises SinkError when it cannot be written."""
    try:
        with av.open(path, "w") as container:
            rate = Fraction(scene.frame_rate).limit_denominator(1001)
            # Half the time of the default preset, and on this still background no larger a file.
            stream = container.add_stream("libx264", rate=rate, options={"preset": "veryfast"})
            stream.width, stream.height = scene.size
            for index in range(scene.frames):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(scene.render(index), format="bgr24")))
            container.mux(stream.encode())
    except (OSError, ValueError) as error:  # FFmpeg's errors are both kinds
        raise SinkError(f"cannot write the video {path}: {error}") from error


def write_truth(scene: Scene, path: Path) -> None:
    """MOTChallenge ground truth: frame,id,x,y,w,h,1,1,visibility, frames from 1, everyone a pedestrian."""
    lines = []
    for index in range(scene.frames):
        ids, xyxy, visibility = scene.truth(index)
        for identity, (x, y, w, h), seen in zip(ids, xyxy_to_xywh(xyxy), visibility, strict=True):
            lines.append(f"{index + 1},{identity},{x:.3f},{y:.3f},{w:.3f},{h:.3f},1,1,{seen:.3f}\n")
    try:
        path.write_text("".join(lines), encoding="ascii")
    except OSError as error:
        raise SinkError(f"cannot write the ground truth {path}: {error.strerror}") from error


def _paint_person(image: Pixels, xyxy: Array, colours: Ints) -> None:
    """Shadow, legs in mid-stride, arms, coat and head, filling the box; parts in shares of it."""
    height = xyxy[3] - xyxy[1]
    step = math.sin(math.pi * (xyxy[0] + xyxy[2]) / (0.84 * height))  # 0.42 heights from foot to foot
    coat, trousers, skin, hair = colours.tolist()
    sleeve = [0.8 * value for value in coat]
    for points, thickness, colour in (
        (((0.15, 0.97), (0.85, 0.97)), 0.03, [80, 86, 90]),
        (((0.5, 0.5), (0.5 - 0.36 * step, 0.95)), 0.075, trousers),
        (((0.5, 0.5), (0.5 + 0.36 * step, 0.95)), 0.075, trousers),
        (((0.5, 0.26), (0.5 - 0.32 * step, 0.5)), 0.055, sleeve),
        (((0.5, 0.27), (0.5, 0.47)), 0.17, coat),
        (((0.5, 0.26), (0.5 + 0.32 * step, 0.5)), 0.055, sleeve),
        (((0.5, 0.05), (0.5, 0.07)), 0.1, hair),
        (((0.5, 0.09), (0.5, 0.11)), 0.09, skin),
    ):
        # Placed to a sixteenth of a pixel, so that slow people do not jerk.
        fixed = np.round((np.array(points) * (xyxy[2:] - xyxy[:2]) + xyxy[:2]) * 16).astype(np.int32)
        cv2.polylines(image, [fixed], False, colour, max(1, round(thickness * height)), cv2.LINE_AA, shift=4)


def _paint_thing(image: Pixels, xyxy: Array) -> None:
    """A dark post with a paler middle: on the column a poster, on the lamp post a gleam."""
    x1, y1, x2, y2 = (round(value) for value in xyxy.tolist())
    edge = (x2 - x1) // 5
    cv2.rectangle(image, (x1, y1), (x2, y2), (58, 70, 52), -1)
    cv2.rectangle(image, (x1 + edge, y1 + edge), (x2 - edge, (y1 + 2 * y2) // 3), (110, 165, 190), -1)


def _unit(vectors: Array) -> Array:
    """(N, D) → the same directions with length 1."""
    length: Array = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / length
