"""One frame's association in progress: which tracks and detections are still free.

A tracker is then a short list of rounds, each offering some tracks to some detections:

    step = Step(table, frame_index, detections)
    step.take(step.overlapping(step.status == TRACKED, confident), limit=0.5)
    return step.finish(newborn=confident)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracker.association.lifecycle import TrackTable, measurements
from tracker.boxes import turned
from tracker.matching import (
    NO_PAIRS,
    Indices,
    Pairs,
    assign,
    cosine_distance,
    gated,
    overlaps,
    turned_overlaps,
)
from tracker.types import Detections, Tracks

Mask = NDArray[np.bool_]

_TINY = np.finfo(np.float64).tiny

# Boxes touch, so that masks are looked at, where 1 − IoU is less: no default limit lets more be matched.
_TOUCHING = 0.9


class Step:
    """Predicts the table's tracks to this frame, collects matches, and settles them all at once.

    Masks are (N,) over the table's tracks and (M,) over the frame's detections; whatever is already
    matched is left out by itself.
    """

    def __init__(self, table: TrackTable, frame: float, detections: Detections) -> None:
        self.table, self.frame, self.detections = table, frame, detections
        self.first = table.advance(frame)
        table.expect(detections)
        self.status = table.status
        self.predicted = table.boxes(slice(None))  # (N, 4), with angles (N, 5)
        self.found = detections.xyxy.astype(np.float64)  # (M, 4), with angles (M, 5)
        self.xyah = measurements(self.found, detections.angle)  # (4, M), with angles (5, M)
        self._overlaps = turned_overlaps if table.turned else overlaps
        self._compared: Pairs | None = None
        if table.silhouettes is not None:
            table.silhouettes.look(detections)
        if table.turned:
            angle = detections.angle if detections.angle is not None else np.empty(0)
            self.found = turned(self.found, angle.astype(np.float64))
        self.free_track = np.ones(len(table), bool)
        self.free_detection = np.ones(len(detections), bool)
        self._matches: list[tuple[Indices, Indices]] = []

    def overlapping(self, tracks: Mask, detections: Mask) -> Pairs:
        """Overlapping pairs of the free ones among these, at cost 1 − IoU.

        Where masks are compared, and a track or a detection has several such pairs, IoU counts in full for
        the one whose masks are most alike, and down to half for its rivals: IoU · (1 + r) / 2, r being
        the pair's `Silhouettes.likeness` as a share of its rivals' best. So limits mean what they mean for
        boxes. With mask IoU itself in their place, masks do worse than boxes: a thin one that is off by its
        width, or half hidden, shares next to nothing with itself.
        """
        if self.table.silhouettes is not None:
            return self._overlapping_masks(self.free_track & tracks, self.free_detection & detections)
        rows, columns = self._free(tracks, detections)
        if not (len(rows) and len(columns)):  # the later rounds often have nobody left, and calls cost
            return NO_PAIRS
        near = self._overlaps(self.predicted.take(rows, axis=0), self.found.take(columns, axis=0))
        return self._of_one_class(near, rows, columns)

    def resembling(
        self, tracks: Mask, detections: Mask, embedding: NDArray[Any], motion_weight: float
    ) -> Pairs:
        """Pairs inside the Kalman gate, at (1 − w) · cosine distance + w · squared Mahalanobis distance.

        embedding: (M, D) unit rows of the detections.
        """
        rows, columns = self._free(tracks, detections)
        feature = self.table.feature
        if feature is None or not (len(rows) and len(columns)):
            return NO_PAIRS
        near = gated(self.table.state.take(rows, axis=2), self.xyah.take(columns, axis=1))
        pairs = self._of_one_class(near, rows, columns)
        distance = cosine_distance(pairs, feature, embedding)
        return pairs._replace(cost=(1.0 - motion_weight) * distance + motion_weight * pairs.cost)

    def take(self, pairs: Pairs, limit: float) -> None:
        """Assign at the least total cost, no pair above the limit (see `matching.assign`)."""
        if not len(pairs.row):
            return
        row, column = assign(pairs, limit, len(self.free_track), len(self.free_detection))
        self.free_track[row] = False
        self.free_detection[column] = False
        self._matches.append((row, column))

    def finish(self, newborn: Mask, rows: Indices | None = None) -> Tracks:
        """Settle: matched tracks are corrected, the rest missed; free detections in `newborn` are born.

        rows: (M,) where the detections were among all of the frame, if some had been left out.
        """
        table, frame, detections = self.table, self.frame, self.detections
        if self._matches:
            matched, chosen = (np.concatenate(part) for part in zip(*self._matches, strict=True))
            table.correct(frame, matched, detections, chosen, self.found, self.xyah)
        table.miss(self.free_track.nonzero()[0])
        born = (self.free_detection & newborn).nonzero()[0]
        table.start(frame, detections, born, self.found, self.xyah, confirmed=self.first)
        table.end_overdue(frame)
        if table.official:
            table.end_duplicates()
        return table.report(rows)

    def _overlapping_masks(self, tracks: Mask, detections: Mask) -> Pairs:
        """Costs are found once in a frame, for all rounds: so a pair's do not depend on who else is free."""
        if self._compared is None:
            every = np.arange(len(self.predicted)), np.arange(len(self.found))
            near = self._of_one_class(overlaps(self.predicted, self.found), *every)
            self._compared = self._with_masks(near)
        pairs = self._compared
        return pairs.keep(tracks[pairs.row] & detections[pairs.column])

    def _with_masks(self, pairs: Pairs) -> Pairs:
        """Where a track or a detection has several pairs, masks help to say which; one alone needs none."""
        assert self.table.silhouettes is not None
        touching = (pairs.cost < _TOUCHING).nonzero()[0]
        row, column = pairs.row[touching], pairs.column[touching]
        of_row = np.bincount(row, minlength=len(self.predicted))
        of_column = np.bincount(column, minlength=len(self.found))
        contested = touching[(of_row[row] > 1) | (of_column[column] > 1)]
        row, column = pairs.row[contested], pairs.column[contested]
        moved = self.table.mask_boxes(self.predicted)
        alike = self.table.silhouettes.likeness(row, column, moved[row], self.found[column])
        best_of_row, best_of_column = np.full(len(self.predicted), _TINY), np.full(len(self.found), _TINY)
        np.maximum.at(best_of_row, row, alike)
        np.maximum.at(best_of_column, column, alike)
        alike = alike / np.maximum(best_of_row[row], best_of_column[column])
        cost = pairs.cost.copy()
        cost[contested] = 1.0 - (1.0 - cost[contested]) * (1.0 + alike) / 2
        return pairs._replace(cost=cost)

    def _free(self, tracks: Mask, detections: Mask) -> tuple[Indices, Indices]:
        return (self.free_track & tracks).nonzero()[0], (self.free_detection & detections).nonzero()[0]

    def _of_one_class(self, pairs: Pairs, rows: Indices, columns: Indices) -> Pairs:
        """Pairs counted within `rows` and `columns` → pairs of the whole table, across no two classes."""
        pairs = Pairs(rows[pairs.row], columns[pairs.column], pairs.cost)
        same = self.table.label[pairs.row] == self.detections.label[pairs.column]
        return pairs if same.all() else pairs.keep(same)
