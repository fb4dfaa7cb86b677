"""Traffic seen from above, with exact rotated boxes: what is there, and what a detector might say of it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import NamedTuple

import numpy as np

from tracker.boxes import enclosing, long_side_first, rotated_iou, turned, unturned
from tracker.types import Detections, Tracks

CAR, TRUCK = (32.0, 14.0), (64.0, 18.0)  # length, width in pixels


class Vehicle(NamedTuple):
    """size: length, width. start: x, y. heading: radians. speed: pixels per frame. bends: (frame at which one
    begins, frames it takes, radians it turns by).
    """

    size: tuple[float, float]
    start: tuple[float, float]
    heading: float
    speed: float = 0.0
    bends: tuple[tuple[int, int, float], ...] = ()

    def drive(self, frames: int) -> np.ndarray:
        """(F, 5) cxcywhr of every frame; the angle is the heading, whatever it grows to."""
        rate = np.zeros(frames)
        for begin, length, angle in self.bends:
            rate[begin : begin + length] += angle / length
        heading = self.heading + rate.cumsum()
        step = self.speed * np.column_stack((np.cos(heading), np.sin(heading)))
        place = np.array(self.start) + step.cumsum(axis=0)
        return np.column_stack((place, np.tile(self.size, (frames, 1)), heading))


def junction() -> list[Vehicle]:
    """A crossroads with a slanting avenue and a car park of slanting rows: traffic both ways, vehicles that
    turn off to either side, one that turns round; and cars so close, standing and meeting each other, that
    their upright boxes overlap.
    """
    parked = [Vehicle(CAR, (40 + 23 * k, 60), np.pi / 4) for k in range(12)]
    parked += [Vehicle(CAR, (40 + 23 * k, 100), -np.pi / 4) for k in range(12)]
    east = [Vehicle(CAR, (-40 - 55 * k, 300), 0.0, 4.0) for k in range(3)]
    west = [Vehicle(TRUCK if k == 1 else CAR, (560 + 90 * k, 280), np.pi, 4.0) for k in range(3)]
    quarter = np.pi / 2
    for lane in range(4):  # two each way, 17 pixels apart, from corner to corner of the lower right
        heading, way = (-quarter / 2, 1) if lane < 2 else (-quarter / 2 + np.pi, -1)
        first = np.array((420, 420)) + 17 * (lane - 1.5) * np.array((0.707, 0.707))
        along = np.array((0.707, -0.707))
        starts = [first + along * way * (38 * k - 800) for k in range(26)]
        east += [Vehicle(CAR, (x, y), heading, 8.0) for x, y in starts]
    turning = [
        Vehicle(CAR, (20, 322), 0.0, 4.0, ((45, 20, quarter),)),  # to the right: down the picture
        Vehicle(CAR, (250, 560), -quarter, 4.0, ((52, 20, quarter),)),
        Vehicle(TRUCK, (230, 20), quarter, 3.0, ((60, 30, quarter),)),  # on through 90° to 180°
        Vehicle(CAR, (280, 590), -quarter, 4.5, ((35, 14, -quarter), (80, 14, -quarter))),
        Vehicle(CAR, (400, 420), np.pi * 0.3, 2.0, ((10, 100, 4 * np.pi),)),  # round and round
    ]
    return parked + east + west + turning


class Clip(NamedTuple):
    """truth: by frame, (N,) ids and (N, 5) cxcywhr. seen: by frame."""

    truth: list[tuple[np.ndarray, np.ndarray]]
    seen: list[Detections]


def clip_of(
    vehicles: Sequence[Vehicle],
    frames: int,
    *,
    size: tuple[int, int] = (520, 520),
    shake: float = 0.0,
    seed: int = 0,
) -> Clip:
    """shake: of the camera from frame to frame, in pixels.

    Detections with errors of a good detector: places off by 3 % of the width, sizes by 3 %, angles by 2°,
    3 % missed, two false ones in three frames; in le90, as detectors say it.
    """
    rng = np.random.default_rng(seed)
    paths = np.array([vehicle.drive(frames) for vehicle in vehicles])  # (N, F, 5)
    paths[:, :, :2] += rng.normal(0, shake, (frames, 2))
    truth, seen = [], []
    for index in range(frames):
        now = paths[:, index]
        inside = ((now[:, :2] > 0) & (now[:, :2] < size)).all(axis=1)
        ids, boxes = inside.nonzero()[0], now[inside]
        truth.append((ids, boxes))
        found = boxes[rng.random(len(boxes)) > 0.03]
        noise = rng.normal(0, 1, found.shape) * (0.03, 0.03, 0.03, 0.03, np.radians(2))
        width = found[:, 3:4]
        found = found + noise * np.hstack((width, width, found[:, 2:4], np.ones_like(width)))
        score = rng.uniform(0.75, 0.95, len(found))
        if index % 3:
            false = np.array([[*rng.uniform(0, size[0], 2), 30, 14, rng.uniform(-1.5, 1.5)]])
            found, score = np.concatenate((found, false)), np.append(score, rng.uniform(0.2, 0.65))
        found = long_side_first(found)
        seen.append(
            Detections(
                xyxy=unturned(found).astype(np.float32),
                score=score.astype(np.float32),
                label=np.zeros(len(found), np.int64),
                angle=found[:, 4].astype(np.float32),
            )
        )
    return Clip(truth, seen)


def upright(detections: Detections) -> Detections:
    """The same without angles: the boxes around."""
    assert detections.angle is not None
    around = enclosing(turned(detections.xyxy, detections.angle))
    return Detections(xyxy=around, score=detections.score, label=detections.label)


def clear_mot(clip: Clip, tracks: Sequence[Tracks]) -> dict[str, float]:
    """TrackEval's CLEAR scores, the overlap being that of the rotated boxes."""
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        import trackeval

    known: dict[int, int] = {}
    truth_ids, track_ids, overlap = [], [], []
    for (ids, boxes), found in zip(clip.truth, tracks, strict=True):
        angle = np.zeros(len(found)) if found.angle is None else found.angle
        truth_ids.append(ids)
        track_ids.append(np.array([known.setdefault(id, len(known)) for id in found.id.tolist()], int))
        overlap.append(rotated_iou(boxes[:, None], turned(found.xyxy, angle)[None]))
    data = {
        "num_tracker_dets": sum(map(len, track_ids)),
        "num_gt_dets": sum(map(len, truth_ids)),
        "num_tracker_ids": len(known),
        "num_gt_ids": int(max(ids.max() for ids in truth_ids if len(ids))) + 1,
        "num_timesteps": len(overlap),
        "gt_ids": truth_ids,
        "tracker_ids": track_ids,
        "similarity_scores": overlap,
    }
    scores: dict[str, float] = trackeval.metrics.CLEAR({"PRINT_CONFIG": False}).eval_sequence(data)
    return scores
