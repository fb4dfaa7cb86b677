"""Which track may take which detection, at what cost, and the best assignment.

Costs are lists of candidate pairs, never full matrices: a pair that no rule could accept is not made.
Tracks and detections lie in a plane, so candidates come from a sweep along x, and the assignment falls
apart into small independent pieces. Knows nothing of the life of a track.

(Rows are gathered with `take`, here and in association/: the same as indexing, several times as fast.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import lap
import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching

from tracker import kalman
from tracker.boxes import enclosing, iou, rotated_iou

Indices = NDArray[np.int64]
Array = NDArray[Any]

# Contested rows up to which a dense `lap.lapjv` is faster than SciPy's sparse one: measured, they meet
# near 130 rows (lap 0.35 ms against 0.57 at 100, 1.7 against 0.8 at 200).
DENSE_ROWS = 128

# Contested pairs up to which a solver, with its 15 µs however small the problem, beats another round of
# step 1 of `assign`.
FEW_PAIRS = 24

# What an inclusive corner adds to a box's width and height.
PIXEL = 1.0


class Pairs(NamedTuple):
    """P candidate pairs: row[p] may take column[p] at cost[p]; each pair occurs once, rows ascending."""

    row: Indices
    column: Indices
    cost: NDArray[np.float64]

    def keep(self, mask: Array) -> Pairs:
        return Pairs(self.row[mask], self.column[mask], self.cost[mask])


_NONE = np.empty(0, np.int64)
NO_PAIRS = Pairs(_NONE, _NONE, np.empty(0))


def sweep(a_low: Array, a_high: Array, b_low: Array, b_high: Array) -> tuple[Indices, Indices]:
    """All (i, j) whose intervals may touch, found by sorting; a superset, ascending in i.

    (N,) and (M,) interval ends. What is too much comes from using the widest b for every b. An interval
    that ends before it begins touches nothing (a prediction can shrink past nothing).
    """
    if not len(a_low) or not len(b_low):
        return _NONE, _NONE
    order = b_low.argsort()
    ordered = b_low[order]
    first = ordered.searchsorted(a_low - (b_high - b_low).max())
    count = np.maximum(ordered.searchsorted(a_high, "right") - first, 0)
    row = np.arange(len(a_low)).repeat(count)
    # Position within the row's own run, then into the sorted order.
    position = np.arange(len(row)) + (first - count.cumsum() + count)[row]
    return row, order[position]


def overlaps(a_xyxy: Array, b_xyxy: Array) -> Pairs:
    """Pairs of boxes that overlap, (N, 4) with (M, 4), with cost 1 − IoU.

    Corners are inclusive pixels, as in cython_bbox, which FairMOT and ByteTrack use: small boxes gain
    overlap. (The same numbers as cython_bbox, without the full matrix; tests hold the two together.)
    """
    row, column = sweep(a_xyxy[:, 0], a_xyxy[:, 2] + PIXEL, b_xyxy[:, 0], b_xyxy[:, 2] + PIXEL)
    # Most of what the sweep along x finds lies above or below: drop it before gathering whole boxes.
    bottom = np.minimum(a_xyxy[:, 3][row], b_xyxy[:, 3][column])
    near = (bottom - np.maximum(a_xyxy[:, 1][row], b_xyxy[:, 1][column]) > -PIXEL).nonzero()[0]
    row, column = row[near], column[near]
    shared = iou(a_xyxy.take(row, axis=0), b_xyxy.take(column, axis=0), pixel=PIXEL)
    return Pairs(row, column, 1.0 - shared).keep(shared > 0)


def turned_overlaps(a_cxcywhr: Array, b_cxcywhr: Array) -> Pairs:
    """Pairs of rotated boxes that overlap, (N, 5) with (M, 5), with cost 1 − IoU, corners being points."""
    a, b = enclosing(a_cxcywhr), enclosing(b_cxcywhr)
    row, column = sweep(a[:, 0], a[:, 2], b[:, 0], b[:, 2])
    near = np.minimum(a[row, 3], b[column, 3]) > np.maximum(a[row, 1], b[column, 1])
    row, column = row[near], column[near]
    shared = rotated_iou(a_cxcywhr.take(row, axis=0), b_cxcywhr.take(column, axis=0))
    return Pairs(row, column, 1.0 - shared).keep(shared > 0)


def gated(state: Array, xyah: Array) -> Pairs:
    """Pairs of a track state (5, 4, N) and a measurement (4, M) within the 95 % gate; with angles, 5 for 4.

    The cost is the squared Mahalanobis distance, at most `kalman.GATE`, with angles `kalman.TURNED_GATE`.
    """
    turned = len(xyah) > kalman.ANGLE
    gate = kalman.TURNED_GATE if turned else kalman.GATE
    mean, variance = kalman.project(state)
    reach = np.sqrt(gate * variance[:2])  # (2, N): no farther than this in x or y alone
    row, column = sweep(mean[0] - reach[0], mean[0] + reach[0], xyah[0], xyah[0])
    near = (np.abs(mean[1][row] - xyah[1][column]) <= reach[1][row]).nonzero()[0]
    row, column = row[near], column[near]
    mean, variance = mean.take(row, axis=1), variance.take(row, axis=1)  # (4, P)
    measured = xyah.take(column, axis=1)
    if turned:
        measured = kalman.aligned(mean, measured)
    distance = kalman.squared_mahalanobis(mean, variance, measured)
    return Pairs(row, column, distance).keep(distance <= gate)


def cosine_distance(pairs: Pairs, a: Array, b: Array) -> NDArray[np.float64]:
    """(P,) 1 − cos between unit vectors a (N, D) and b (M, D), for the given pairs only, not below 0."""
    similarity = np.einsum("pd,pd->p", a.take(pairs.row, axis=0), b.take(pairs.column, axis=0))
    distance: NDArray[np.float64] = np.maximum(1.0 - similarity.astype(np.float64), 0.0)
    return distance


def assign(pairs: Pairs, limit: float, rows: int, columns: int) -> tuple[Indices, Indices]:
    """The assignment of least total cost in which leaving a row and a column alone costs `limit`.

    Returns matched (row, column), ascending in row. This is what `lap.lapjv(cost, extend_cost=True,
    cost_limit=limit)` solves on a full matrix (an (n+m)² problem filled with limit/2), not Hungarian
    followed by a threshold. Put the other way: a matching of greatest total gain, gain = limit − cost,
    over the pairs with positive gain. Exact, in two steps:

    1. A pair whose gain is at least the best other gain in its row plus the best other gain in its
       column is part of an optimal matching: whatever the optimum does with that row and column can be
       exchanged for it without loss. Such pairs are taken, their rivals fall away, and again.
    2. What stays is truly contested, a few rows as a rule, and goes to a solver.
    """
    pairs = pairs.keep(pairs.cost < limit)
    gain = limit - pairs.cost
    row, column = pairs.row, pairs.column
    if len(row) and np.bincount(row).max() == 1 and np.bincount(column).max() == 1:
        return row, column  # nobody has a rival
    taken: list[tuple[Indices, Indices]] = []
    while len(row):
        if len(row) <= FEW_PAIRS:
            taken.append(_solve(row, column, gain))
            break
        safe = _undisputed(row, column, gain, rows, columns)
        if not len(safe):
            taken.append(_solve(row, column, gain))
            break
        taken.append((row[safe], column[safe]))
        if len(safe) == len(row):
            break
        row_done, column_done = np.zeros(rows, bool), np.zeros(columns, bool)
        row_done[row[safe]] = column_done[column[safe]] = True
        rest = ~(row_done[row] | column_done[column])
        row, column, gain = row[rest], column[rest], gain[rest]
    if not taken:
        return _NONE, _NONE
    matched_row, matched_column = (np.concatenate(part) for part in zip(*taken, strict=True))
    order = matched_row.argsort()
    return matched_row[order], matched_column[order]


def _undisputed(row: Indices, column: Indices, gain: Array, rows: int, columns: int) -> Indices:
    """Positions of pairs that some optimal matching must hold (step 1 of `assign`)."""
    best_of_row, best_of_column = np.zeros(rows), np.zeros(columns)
    np.maximum.at(best_of_row, row, gain)
    np.maximum.at(best_of_column, column, gain)
    mutual = ((gain == best_of_row[row]) & (gain == best_of_column[column])).nonzero()[0]
    # Second bests: without the mutual bests themselves. Where equal gains make a row or column hold two
    # of them, only the first counts as its best and the other as a rival.
    chosen = np.full(rows, -1)
    chosen[row[mutual[::-1]]] = mutual[::-1]
    mutual = mutual[chosen[row[mutual]] == mutual]
    chosen_column = np.full(columns, -1)
    chosen_column[column[mutual[::-1]]] = mutual[::-1]
    mutual = mutual[chosen_column[column[mutual]] == mutual]
    rival = gain.copy()
    rival[mutual] = 0.0
    best_of_row[:] = 0.0
    best_of_column[:] = 0.0
    np.maximum.at(best_of_row, row, rival)
    np.maximum.at(best_of_column, column, rival)
    safe: Indices = mutual[gain[mutual] >= best_of_row[row[mutual]] + best_of_column[column[mutual]]]
    return safe


def _solve(row: Indices, column: Indices, gain: Array) -> tuple[Indices, Indices]:
    """The best matching of the pairs that remain (step 2 of `assign`), by whichever solver suits the size."""
    rows, i = _compact(row)
    columns, j = _compact(column)
    top = gain.max()
    if len(rows) <= DENSE_ROWS:
        cost = np.full((len(rows), len(columns)), 2.0 * top)  # no pair here: above the limit
        cost[i, j] = top - gain
        _, match, _ = lap.lapjv(cost, extend_cost=True, cost_limit=top)
        hit = match >= 0
        return rows[hit], columns[match[hit]]
    # Every row also gets a column of its own that stands for staying alone, at the limit. SciPy wants
    # costs other than 0, which it reads as no entry: hence 2 · top instead of top as the origin.
    own = np.arange(len(rows))
    cost = np.concatenate((2.0 * top - gain, np.full(len(rows), 2.0 * top)))
    where = (np.concatenate((i, own)), np.concatenate((j, own + len(columns))))
    graph = csr_array((cost, where), shape=(len(rows), len(columns) + len(rows)))
    _, match = min_weight_full_bipartite_matching(graph)
    hit = match < len(columns)
    return rows[hit], columns[match[hit]]


def _compact(index: Indices) -> tuple[Indices, Indices]:
    """The distinct values, ascending, and each entry's place among them."""
    present = np.zeros(index.max() + 1, bool)
    present[index] = True
    return present.nonzero()[0], (present.cumsum() - 1)[index]
