"""One frame's association in progress: which tracks and detections are still free.

A tracker is then a short list of rounds, each offering some tracks to some detections:

    step = Step(table, detections)
    step.take(step.overlapping(tracked, everyone), limit=0.5)
    return step.finish(frame_index, newborn=everyone)
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tracker.association.lifecycle import TrackTable, measurements
from tracker.matching import Indices, Pairs, assign, cosine_distance, gated, overlaps
from tracker.types import Detections, Tracks

Mask = NDArray[np.bool_]


class Step:
    """Predicts the table's tracks to this frame, collects matches, and settles them all at once.

    Masks are (N,) over the table's tracks and (M,) over the frame's detections; whatever is already
    matched is left out by itself.
    """

    def __init__(self, table: TrackTable, detections: Detections) -> None:
        self.table, self.detections = table, detections
        table.predict()
        self.status = table.status
        self.predicted = table.boxes(slice(None))  # (N, 4)
        self.xyxy = detections.xyxy.astype(np.float64)  # (M, 4)
        self.xyah = measurements(self.xyxy)  # (4, M)
        self.free_track = np.ones(len(table), bool)
        self.free_detection = np.ones(len(detections), bool)
        self._matches: list[tuple[Indices, Indices]] = []

    def overlapping(self, tracks: Mask, detections: Mask) -> Pairs:
        """Overlapping pairs of the free ones among these, at cost 1 − IoU."""
        rows, columns = self._free(tracks, detections)
        pairs = overlaps(self.predicted[rows], self.xyxy[columns], pixel=self.table.pixel)
        return self._of_one_class(Pairs(rows[pairs.row], columns[pairs.column], pairs.cost))

    def resembling(self, tracks: Mask, detections: Mask, motion_weight: float) -> Pairs:
        """Pairs inside the Kalman gate, at (1 − w) · cosine distance + w · squared Mahalanobis distance."""
        rows, columns = self._free(tracks, detections)
        pairs = gated(self.table.state[:, :, rows], self.xyah[:, columns])
        pairs = self._of_one_class(Pairs(rows[pairs.row], columns[pairs.column], pairs.cost))
        distance = cosine_distance(pairs, self.table.feature, self.detections.embedding)
        return pairs._replace(cost=(1.0 - motion_weight) * distance + motion_weight * pairs.cost)

    def take(self, pairs: Pairs, limit: float) -> None:
        """Assign at the least total cost, no pair above the limit (see `matching.assign`)."""
        row, column = assign(pairs, limit, len(self.free_track), len(self.free_detection))
        self.free_track[row] = False
        self.free_detection[column] = False
        self._matches.append((row, column))

    def finish(self, frame: int, newborn: Mask) -> Tracks:
        """Settle: matched tracks are corrected, the rest missed; free detections in `newborn` are born."""
        table = self.table
        rows, chosen = (np.concatenate(part) for part in zip(*self._matches, strict=True))
        table.correct(frame, rows, self.detections, chosen, self.xyah)
        table.miss(self.free_track.nonzero()[0])
        table.start(frame, self.detections, (self.free_detection & newborn).nonzero()[0], self.xyah)
        table.end_overdue(frame)
        table.end_duplicates()
        return table.report()

    def _free(self, tracks: Mask, detections: Mask) -> tuple[Indices, Indices]:
        return (self.free_track & tracks).nonzero()[0], (self.free_detection & detections).nonzero()[0]

    def _of_one_class(self, pairs: Pairs) -> Pairs:
        same = self.table.label[pairs.row] == self.detections.label[pairs.column]
        return pairs if same.all() else pairs.keep(same)
