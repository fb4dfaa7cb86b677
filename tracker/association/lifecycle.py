"""The tracks of one source as a table, and the events of their lives.

A track is born tentative, becomes tracked at its second match (in the very first frame at once), is lost
when a frame passes without a match, and ends when it stays lost for longer than the buffer. Tentative
tracks end at the first frame without a match. One column per living track, nothing else is kept: memory
is bounded by the number of tracks alive, however long the stream.

Which detection goes to which track is decided elsewhere; see jde.py and byte.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tracker import boxes, kalman
from tracker.errors import ConfigError, DetectionsError
from tracker.matching import Indices, overlaps
from tracker.types import Detections, Tracks

if TYPE_CHECKING:
    from tracker.association.silhouettes import Silhouettes

Array = NDArray[Any]

TENTATIVE, TRACKED, LOST, ENDED = range(4)

# What a lost track keeps of its velocity from one frame to the next: a damped trend (Gardner and McKenzie,
# Management Science 1985). People who vanish behind something seldom come out on the straight line they
# went in by. Any value in 0.94…0.97 scores above 1.0 on all five sequences of docs/log.md, 2026-11-21.
LOST_DAMPING = 0.95

# Moving average of the appearance (JDE, Wang et al., ECCV 2020, §3.4; FairMOT, `STrack.alpha`).
FEATURE_MOMENTUM = np.float32(0.9)

# Two tracks on one object: 1 − IoU below this (FairMOT and ByteTrack, `remove_duplicate_stracks`).
DUPLICATE_DISTANCE = 0.15

# Results the official writers leave out: smaller than 100 square pixels, or wider than 1.6 heights.
OFFICIAL_MIN_AREA, OFFICIAL_MAX_ASPECT = 100.0, 1.6

_COLUMNS = (
    "id", "status", "label", "score", "born", "seen", "expired", "row", "detected", "feature",
    "silhouette", "place",
)  # fmt: skip


def measurements(xyxy: Array, angle: Array | None = None) -> NDArray[np.float64]:
    """(N, 4) corners → (4, N) float64 of cx, cy, a, h: the filter's coordinates. With angles (N,), (5, N)."""
    corners = xyxy.T.astype(np.float64)
    size = corners[2:] - corners[:2]
    xyah = np.empty((4 if angle is None else 5, len(xyxy)))
    np.add(corners[:2], size / 2, out=xyah[:2])
    # A box without height has no aspect; 0 keeps it harmless where x / 0 would poison the filter.
    flat = size[1] <= 0
    np.divide(size[0], size[1], out=xyah[2], where=~flat)
    xyah[2][flat] = 0.0
    xyah[3] = size[1]
    if angle is not None:
        xyah[kalman.ANGLE] = angle
    return xyah


def corners(mean: Array) -> NDArray[np.float64]:
    """(4, N) cx, cy, a, h → (N, 4) corners."""
    half_height = mean[3] / 2
    half_width = mean[2] * half_height
    xyxy = np.empty((mean.shape[1], 4))
    np.subtract(mean[0], half_width, out=xyxy[:, 0])
    np.subtract(mean[1], half_height, out=xyxy[:, 1])
    np.add(mean[0], half_width, out=xyxy[:, 2])
    np.add(mean[1], half_height, out=xyxy[:, 3])
    return xyxy


def turned_boxes(mean: Array) -> NDArray[np.float64]:
    """(5, N) cx, cy, a, h, angle → (N, 5) cxcywhr."""
    return np.stack((mean[0], mean[1], mean[2] * mean[3], mean[3], mean[4]), axis=1)


def normalised(vectors: Array) -> NDArray[np.float32]:
    """Rows scaled to length 1 in float32; a zero row stays zero and so resembles nothing."""
    rows = vectors.astype(np.float32, copy=False)
    length = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    length[length == 0.0] = 1.0
    scaled: NDArray[np.float32] = rows / length[:, None]
    return scaled


def _within(outer_xyxy: Array, xyxy: Array) -> NDArray[np.float64]:
    """(N, 4) corners as shares of the outer boxes' sides."""
    low, size = outer_xyxy[:, :2], np.maximum(outer_xyxy[:, 2:] - outer_xyxy[:, :2], 1e-6)
    share: NDArray[np.float64] = (xyxy - np.tile(low, 2)) / np.tile(size, 2)
    return share


def buffer_frames(frame_rate: float, track_buffer: int) -> int:
    """How many frames a track may stay lost: track_buffer is counted at 30 fps, as in the official code."""
    if not 0 < frame_rate < math.inf:
        raise ConfigError(f"frame_rate must be a finite number greater than 0, got {frame_rate}")
    return int(frame_rate / 30.0 * track_buffer)


class TrackTable:
    """Living tracks, column by column, in order of birth.

    buffer: frames a track may stay lost. outage: frames a source may be gone without ending its tracks.
    official: do exactly as FairMOT's and ByteTrack's published code does, where we differ on purpose.
    There, tentative tracks are not predicted; lost tracks keep their velocity; a track that expires stays
    matchable for one more frame, and if it is matched then its next loss ends it at once; of a seen and a
    lost track on one spot one ends, though it may be hidden exactly behind the other; the reported box is
    the filter's mean, which lags behind the detection, and small or wide boxes are not reported.
    silhouettes: where masks are compared, those of its tracks.
    """

    def __init__(
        self,
        *,
        buffer: int,
        official: bool,
        outage: int = 0,
        names: tuple[str, ...] = (),
        silhouettes: Silhouettes | None = None,
    ) -> None:
        self.buffer, self.outage, self.official, self.names = buffer, outage, official, names
        self.frame: float | None = None
        self.next_id = 1
        self.confirmed = 0  # tracks that have been seen twice, or in the first frame, so far
        self.id = np.empty(0, np.int64)
        self.status = np.empty(0, np.int8)
        self.label = np.empty(0, np.int64)
        self.score = np.empty(0, np.float64)
        self.born = np.empty(0)  # moments, in frames
        self.seen = np.empty(0)
        self.expired = np.empty(0, bool)  # official only: on the list of removed ids
        self.row = np.empty(0, np.int64)  # last matched detection, among those of its frame
        self.detected = np.empty((0, 4))  # and its box, xyxy; of rotated boxes (N, 5) cxcywhr
        self.state = np.empty((5, 4, 0))  # of rotated boxes (5, 5, N)
        self.turned = False  # whether its boxes are rotated
        self.feature: NDArray[np.float32] | None = None  # (N, D) unit rows, where the tracker wants them
        self.silhouettes = silhouettes
        # (N,) which one it will have: first come those the tracks have, then those of the frame's detections
        self.silhouette = np.empty(0, np.int64) if silhouettes is not None else None
        self._silhouettes_kept = 0
        # (N, 4) corners of the box its mask was found in, 0…1 across the filtered box of that moment: masks
        # are where they are, not where a smoothed box would have them.
        self.place = np.empty((0, 4)) if silhouettes is not None else None

    def __len__(self) -> int:
        return len(self.id)

    def expect(self, detections: Detections) -> None:
        """From here on boxes are rotated, or upright, as these are. Raises DetectionsError where the tracks
        are not, and where rotated boxes come to a published tracker.
        """
        turned = detections.angle is not None
        if turned == self.turned:
            return
        if len(self):
            if not len(detections):
                return
            raise DetectionsError(
                f"detections are {'rotated' if turned else 'upright'} boxes, earlier ones were not: "
                "give all of a source an angle, or none"
            )
        if self.official:
            raise DetectionsError("the published trackers know no rotated boxes: leave out compat")
        self.turned, size = turned, 5 if turned else 4
        self.detected, self.state = np.empty((0, size)), np.empty((5, size, 0))

    def advance(self, frame: float) -> bool:
        """Predict every track to this frame; True if it is the first one. Frames must come in order.

        frame: a moment, counted in frames; a live source's lie anywhere between whole ones. Frames left out
        are time, but nobody looked: they count towards the buffer and are no misses. A gap longer than the
        buffer ends everything, unless it is an outage: then it counts as no time for those who are lost.
        """
        first = self.frame is None
        if self.frame is not None:
            if frame <= self.frame:
                raise ConfigError(f"frame {frame} comes after frame {self.frame}: frames must be in order")
            gap = frame - self.frame
            if self.buffer < gap <= self.outage:
                self.seen += gap - 1  # as if the last frame had been just now
            if gap > 1:
                self.status[frame - 1 - self.seen > self.buffer] = ENDED
                self._forget_ended()
            # Beyond the buffers there is nobody left to predict for.
            gap = min(gap, max(self.buffer, self.outage) + 1)
            steps = max(1, round(gap))  # whole frames are predicted one by one, as published
            for _ in range(steps):
                self._predict(gap / steps)
        self.frame = frame
        return first

    def rescale(self, x: float, y: float) -> None:
        """The pictures are so many times as wide and as high from here on, and show the same."""
        if self.turned:
            self._rescale_turned(x, y)
            return
        scale = np.array([[x], [y], [x / y], [y]])  # of cx, cy, a, h
        self.state[[kalman.MEAN, kalman.VELOCITY]] *= scale
        self.state[[kalman.VARIANCE, kalman.COVARIANCE, kalman.VELOCITY_VARIANCE]] *= scale * scale
        self.detected *= (x, y, x, y)

    def _rescale_turned(self, x: float, y: float) -> None:
        before = turned_boxes(self.state[kalman.MEAN])
        after = boxes.scaled(before, x, y)
        width, height = np.maximum(after[:, 2:4], 1e-9).T / np.maximum(before[:, 2:4], 1e-9).T
        one = np.ones(len(self))
        scale = np.stack((x * one, y * one, width / height, height, one))  # of cx, cy, a, h, angle
        self.state[[kalman.MEAN, kalman.VELOCITY]] *= scale
        self.state[[kalman.VARIANCE, kalman.COVARIANCE, kalman.VELOCITY_VARIANCE]] *= scale * scale
        self.state[kalman.MEAN, kalman.ANGLE] = after[:, 4]
        self.detected = boxes.scaled(self.detected, x, y)

    def _predict(self, frames: float = 1.0) -> None:
        lost = self.status == LOST
        self.state[kalman.VELOCITY, kalman.HEIGHT][lost] = 0.0
        if not self.official:
            self.state[kalman.VELOCITY][:, lost] *= LOST_DAMPING**frames
        predicted = kalman.predict(self.state, frames)
        if self.official:
            still = self.status == TENTATIVE
            predicted[:, :, still] = self.state[:, :, still]
        self.state = predicted

    def boxes(self, rows: Indices | slice) -> NDArray[np.float64]:
        """(R, 4) corners of the filtered boxes; of rotated ones (R, 5) cxcywhr."""
        mean = self.state[kalman.MEAN][:, rows]
        return turned_boxes(mean) if self.turned else corners(mean)

    def mask_boxes(self, filtered: Array) -> NDArray[np.float64]:
        """(N, 4) boxes of the tracks' masks, moved and stretched as the filtered boxes (N, 4) since then."""
        assert self.place is not None
        low, size = filtered[:, :2], filtered[:, 2:] - filtered[:, :2]
        moved: NDArray[np.float64] = np.tile(low, 2) + self.place * np.tile(size, 2)
        return moved

    def correct(
        self, frame: float, rows: Indices, detections: Detections, chosen: Indices, found: Array, xyah: Array
    ) -> None:
        """Tracks `rows` were matched with detections `chosen`; of all the detections, found: their boxes as
        `boxes` gives the tracks', xyah: `measurements`.
        """
        state, measured = self.state.take(rows, axis=2), xyah.take(chosen, axis=1)
        if self.turned:
            measured = kalman.aligned(state[kalman.MEAN], measured)
        self.state[:, :, rows] = kalman.update(state, measured)
        self.confirmed += int(np.count_nonzero(self.status[rows] == TENTATIVE))
        self.status[rows] = TRACKED
        self.seen[rows] = frame
        self.score[rows] = detections.score[chosen]
        self.row[rows] = chosen
        self.detected[rows] = found.take(chosen, axis=0)
        if self.silhouette is not None and self.place is not None:
            self.silhouette[rows] = self._silhouettes_kept + chosen
            self.place[rows] = _within(self.boxes(rows), self.detected[rows])
        if self.feature is not None and detections.embedding is not None:
            blend = FEATURE_MOMENTUM * self.feature.take(rows, axis=0)
            blend += (1 - FEATURE_MOMENTUM) * detections.embedding.take(chosen, axis=0)
            self.feature[rows] = normalised(blend)

    def miss(self, rows: Indices) -> None:
        """Tracks `rows` went without a match: tentative ones end, the others are lost."""
        self.status[rows] = np.where(self.status[rows] == TENTATIVE, ENDED, LOST)

    def start(
        self,
        frame: float,
        detections: Detections,
        chosen: Indices,
        found: Array,
        xyah: Array,
        *,
        confirmed: bool,
    ) -> None:
        """Begin a track for each chosen detection, tentative unless confirmed. The rest as in `correct`."""
        count = len(chosen)
        if not count:
            return
        self.id = np.append(self.id, np.arange(self.next_id, self.next_id + count))
        self.next_id += count
        self.confirmed += count if confirmed else 0
        self.status = np.append(self.status, np.full(count, TRACKED if confirmed else TENTATIVE, np.int8))
        self.label = np.append(self.label, detections.label[chosen])
        self.score = np.append(self.score, detections.score[chosen])
        self.born = np.append(self.born, np.full(count, float(frame)))
        self.seen = np.append(self.seen, np.full(count, float(frame)))
        self.expired = np.append(self.expired, np.zeros(count, bool))
        self.row = np.append(self.row, chosen)
        self.detected = np.concatenate((self.detected, found[chosen]))
        if self.silhouette is not None and self.place is not None:
            self.silhouette = np.append(self.silhouette, self._silhouettes_kept + chosen)
            self.place = np.concatenate((self.place, np.tile((0.0, 0.0, 1.0, 1.0), (count, 1))))
        self.state = np.concatenate((self.state, kalman.initiate(xyah[:, chosen])), axis=2)
        if self.feature is not None and detections.embedding is not None:
            self.feature = np.concatenate((self.feature, detections.embedding[chosen]), dtype=np.float32)

    def end_overdue(self, frame: float) -> None:
        """End what has been lost for longer than the buffer."""
        lost = self.status == LOST
        overdue = lost & (frame - self.seen > self.buffer)
        if self.official:
            self.status[lost & self.expired] = ENDED
            self.expired |= overdue
        else:
            self.status[overdue] = ENDED

    def end_duplicates(self) -> None:
        """Of a seen and a lost track on one spot, the one with the shorter life ends (a tie: the seen)."""
        lost = (self.status == LOST).nonzero()[0]
        if not len(lost):
            return
        seen = (self.status <= TRACKED).nonzero()[0]
        pairs = overlaps(self.boxes(seen), self.boxes(lost))
        pairs = pairs.keep(pairs.cost < DUPLICATE_DISTANCE)
        seen, lost = seen[pairs.row], lost[pairs.column]
        same = self.label[seen] == self.label[lost]
        seen, lost = seen[same], lost[same]
        life = self.seen - self.born
        seen_wins = life[seen] > life[lost]
        self.status[lost[seen_wins]] = ENDED
        self.status[seen[~seen_wins]] = ENDED

    def _forget_ended(self) -> None:
        alive = self.status != ENDED
        if not alive.all():
            for column in _COLUMNS:
                values = getattr(self, column)
                setattr(self, column, None if values is None else values[alive])
            self.state = self.state[:, :, alive]

    def report(self, rows: Indices | None = None) -> Tracks:
        """Forget what has ended; the tracked ones are the frame's result. rows: see `Step.finish`."""
        self._forget_ended()
        if self.silhouettes is not None and self.silhouette is not None:
            self.silhouettes.settle(self.silhouette)
            self._silhouettes_kept = len(self)
            self.silhouette = np.arange(len(self))
        shown = (self.status == TRACKED).nonzero()[0]
        angle = None
        xyxy = self.boxes(shown) if self.official else self.detected.take(shown, axis=0)
        if self.official:
            size = xyxy[:, 2:] - xyxy[:, :2]
            wanted = (size.prod(axis=1) > OFFICIAL_MIN_AREA) & (
                size[:, 0] <= OFFICIAL_MAX_ASPECT * size[:, 1]
            )
            shown, xyxy = shown[wanted], xyxy[wanted]
        elif self.turned:
            xyxy, angle = boxes.unturned(xyxy), boxes.half_turned(xyxy[:, 4])
        return Tracks(
            id=self.id[shown],
            xyxy=xyxy,
            score=self.score[shown],
            label=self.label[shown],
            names=self.names,
            angle=angle,
            row=self.row[shown] if rows is None else rows[self.row[shown]],
        )
