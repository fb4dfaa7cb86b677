"""Candidate pairs are those of brute force, and the assignment costs what an exact solver's does."""

from __future__ import annotations

from collections.abc import Iterator

import lap
import numpy as np
import pytest
from cython_bbox import bbox_overlaps
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from tracker import kalman, matching
from tracker.matching import Pairs, assign, cosine_distance, gated, overlaps, sweep

Array = NDArray[np.float64]
LIMIT = 0.8


# Candidates


def boxes(rng: np.random.Generator, count: int, *, grid: float = 0.0, spread: float = 100) -> Array:
    """(count, 4) corners; on a grid many edges coincide and sizes can be 0."""
    low, size = rng.uniform(0, spread, (count, 2)), rng.exponential(10, (count, 2))
    if grid:
        low, size = np.round(low / grid) * grid, np.round(size / grid) * grid
    return np.concatenate((low, low + size), axis=1)


def as_matrix(pairs: Pairs, shape: tuple[int, int], empty: float) -> Array:
    matrix = np.full(shape, empty)
    matrix[pairs.row, pairs.column] = pairs.cost
    return matrix


def assert_tidy(pairs: Pairs) -> None:
    """Rows ascend, and no pair comes twice."""
    assert (np.diff(pairs.row) >= 0).all()
    assert len(set(zip(pairs.row.tolist(), pairs.column.tolist(), strict=True))) == len(pairs.row)


SIZES = [(0, 0), (0, 5), (5, 0), (1, 1), (7, 30), (30, 7), (60, 60)]


@pytest.mark.parametrize("grid", [0.0, 5.0], ids=["anywhere", "on a grid"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_sweep_misses_no_interval_that_touches(size: tuple[int, int], grid: float) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        a, b = (boxes(rng, count, grid=grid) for count in size)
        row, column = sweep(a[:, 0], a[:, 2], b[:, 0], b[:, 2])
        assert_tidy(Pairs(row, column, np.zeros(len(row))))
        touching = (a[:, None, 0] <= b[None, :, 2]) & (b[None, :, 0] <= a[:, None, 2])
        found = np.zeros(size, bool)
        found[row, column] = True
        assert not (touching & ~found).any()


def test_the_sweep_takes_intervals_turned_inside_out() -> None:
    low, high = np.array([50.0, 0.0]), np.array([-50.0, 9.0])
    row, column = sweep(low, high, np.array([5.0]), np.array([6.0]))
    assert (row.tolist(), column.tolist()) == ([1], [0])


@pytest.mark.parametrize("grid", [0.0, 5.0], ids=["anywhere", "on a grid"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_overlaps_are_those_of_cython_bbox(size: tuple[int, int], grid: float) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        a, b = (boxes(rng, count, grid=grid) for count in size)
        pairs = overlaps(a, b)
        assert_tidy(pairs)
        expected = 1.0 - bbox_overlaps(a, b) if all(size) else np.ones(size)
        assert len(pairs.row) == (expected < 1).sum()
        np.testing.assert_allclose(as_matrix(pairs, size, 1.0), expected, atol=1e-12)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_gate_keeps_what_a_full_matrix_would(size: tuple[int, int]) -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        tracks, count = size
        state = kalman.initiate(measurement(rng, tracks))
        for _ in range(int(rng.integers(1, 5))):
            state = kalman.predict(state)
        xyah = measurement(rng, count)
        pairs = gated(state, xyah)
        assert_tidy(pairs)
        mean, covariance = kalman.dense(state)
        noise = kalman.project(state)[1] - state[kalman.VARIANCE]  # (4, N)
        expected = np.empty(size)
        for i in range(tracks):
            inverse = np.linalg.inv(covariance[i, :4, :4] + np.diag(noise[:, i]))
            difference = xyah.T - mean[i, :4]
            expected[i] = np.einsum("mi,ij,mj->m", difference, inverse, difference)
        within = expected <= kalman.GATE
        assert len(pairs.row) == within.sum()
        np.testing.assert_allclose(
            as_matrix(pairs, size, -1.0), np.where(within, expected, -1.0), rtol=1e-9, atol=1e-12
        )


def measurement(rng: np.random.Generator, count: int) -> Array:
    """(4, count) centres close together, heights from 0 to 100."""
    height = np.where(rng.uniform(size=count) < 0.05, 0.0, rng.uniform(20, 100, count))
    place = rng.uniform(0, 150, (2, count))
    return np.array([*place, rng.uniform(0.3, 0.5, count), height])


def test_cosine_distance_is_scipys() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(count, 64)) for count in (20, 30))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))
    a[0], a[1] = b[0], -b[1]
    row, column = (index.ravel() for index in np.indices((20, 30)))
    pairs = Pairs(row, column, np.zeros(len(row)))
    expected = cdist(a, b, "cosine").ravel()
    np.testing.assert_allclose(cosine_distance(pairs, a, b), expected, atol=1e-12)
    single = cosine_distance(pairs, a.astype(np.float32), b.astype(np.float32))
    np.testing.assert_allclose(single, expected, atol=1e-6)
    assert single.dtype == np.float64
    assert (single >= 0).all()


def test_a_zero_vector_resembles_nothing() -> None:
    pairs = Pairs(np.array([0, 0]), np.array([0, 1]), np.zeros(2))
    distance = cosine_distance(pairs, np.zeros((1, 3), np.float32), np.eye(2, 3, dtype=np.float32))
    assert distance.tolist() == [1.0, 1.0]


# Assignment

KINDS = ["sparse", "dense", "tied", "all tied", "duplicate detections", "staircase"]


def problem(kind: str, rng: np.random.Generator, rows: int, columns: int) -> Array:
    """(rows, columns) costs, some above the limit; inf where there is no pair."""
    cost = rng.uniform(0, 1, (rows, columns))
    if kind == "sparse":
        cost[rng.uniform(size=cost.shape) < 0.7] = np.inf
    elif kind == "tied":
        cost = np.round(cost * 4) / 4
        cost[rng.uniform(size=cost.shape) < 0.3] = np.inf
    elif kind == "all tied":
        cost[:] = 0.5
    elif kind == "duplicate detections":
        cost = cost[:, rng.integers(0, columns, columns)] if columns else cost
    elif kind == "staircase":  # every choice pushes the next one: nothing is undisputed but the last
        i, j = np.indices(cost.shape)
        cost = np.where((i == j) | (i == j + 1), LIMIT - 0.01 * (i + j + 1), np.inf)
    return cost


def problems(kind: str, count: int, largest: int) -> Iterator[Array]:
    for seed in range(count):
        rng = np.random.default_rng(seed)
        rows, columns = rng.integers(0, largest + 1, 2)
        yield problem(kind, rng, rows, columns)


def as_pairs(cost: Array) -> Pairs:
    row, column = np.isfinite(cost).nonzero()
    return Pairs(row, column, cost[row, column])


def textbook(cost: Array, limit: float) -> list[tuple[int, int]]:
    """Solve the (n + m)² problem in which staying alone costs limit / 2 for each side."""
    rows, columns = cost.shape
    full = np.full((rows + columns, rows + columns), limit / 2)
    full[:rows, :columns] = cost
    full[rows:, columns:] = 0.0
    row, column = linear_sum_assignment(full)
    inside = (row < rows) & (column < columns)
    return list(zip(row[inside].tolist(), column[inside].tolist(), strict=True))


def total(cost: Array, limit: float, matched: list[tuple[int, int]]) -> float:
    """Matched costs, plus half the limit for each row and column left alone."""
    alone = sum(cost.shape) - 2 * len(matched)
    return sum(float(cost[i, j]) for i, j in matched) + alone * limit / 2


def assigned(cost: Array, limit: float) -> list[tuple[int, int]]:
    """What `assign` answers, after checking that it is a matching of pairs that exist."""
    row, column = assign(as_pairs(cost), limit, *cost.shape)
    assert (np.diff(row) > 0).all()
    assert len(set(column.tolist())) == len(column)
    assert (cost[row, column] < limit).all()
    return list(zip(row.tolist(), column.tolist(), strict=True))


@pytest.fixture(params=["lap for what is contested", "scipy for what is contested"])
def _either_solver(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param.startswith("scipy"):
        monkeypatch.setattr(matching, "DENSE_ROWS", 0)


@pytest.mark.usefixtures("_either_solver")
@pytest.mark.parametrize("kind", KINDS)
def test_the_assignment_is_optimal(kind: str) -> None:
    for cost in problems(kind, count=700, largest=12):
        ours, theirs = assigned(cost, LIMIT), textbook(cost, LIMIT)
        assert total(cost, LIMIT, ours) == pytest.approx(total(cost, LIMIT, theirs), abs=1e-9)
        if kind in ("sparse", "dense"):  # continuous costs: only one optimum
            assert ours == theirs


@pytest.mark.usefixtures("_either_solver")
@pytest.mark.parametrize("kind", KINDS)
def test_the_assignment_is_that_of_lapjv_with_a_cost_limit(kind: str) -> None:
    for cost in problems(kind, count=200, largest=25):
        if not cost.size:
            continue
        _, match, _ = lap.lapjv(np.where(np.isfinite(cost), cost, 1e3), extend_cost=True, cost_limit=LIMIT)
        theirs = [(i, j) for i, j in enumerate(match.tolist()) if j >= 0]
        ours = assigned(cost, LIMIT)
        assert total(cost, LIMIT, ours) == pytest.approx(total(cost, LIMIT, theirs), abs=1e-9)
        if kind in ("sparse", "dense"):
            assert ours == theirs


@pytest.mark.parametrize("kind", KINDS)
def test_large_problems_reach_the_sparse_solver_by_themselves(kind: str) -> None:
    cost = problem(kind, np.random.default_rng(9), 2 * matching.DENSE_ROWS, 2 * matching.DENSE_ROWS + 9)
    assert total(cost, LIMIT, assigned(cost, LIMIT)) == pytest.approx(
        total(cost, LIMIT, textbook(cost, LIMIT)), abs=1e-9
    )


@pytest.mark.parametrize(
    ("cost", "limit", "expected"),
    [
        ([[0.2, 0.6], [0.3, 0.9]], 0.8, [(0, 1), (1, 0)]),
        ([[0.2, 0.6], [0.3, 0.9]], 0.65, [(0, 0)]),
        ([[0.5]], 0.5, []),
        ([[0.0]], 0.0, []),
        ([[-0.5]], 0.0, [(0, 0)]),
        ([[0.9, 0.95]], 0.8, []),
        ([[np.inf, 0.1], [np.inf, 0.2]], 0.8, [(0, 1)]),
        (np.empty((0, 3)), 0.8, []),
        (np.empty((3, 0)), 0.8, []),
    ],
    ids=[
        "two matched rather than the cheapest one",
        "the cheapest one rather than two near the limit",
        "at the limit stays alone",
        "nothing is below 0",
        "a cost below 0",
        "all above the limit",
        "two tracks, one detection",
        "no tracks",
        "no detections",
    ],
)
def test_small_assignments(cost: list[list[float]], limit: float, expected: list[tuple[int, int]]) -> None:
    assert assigned(np.array(cost), limit) == expected


@pytest.mark.parametrize("jitter", [20.0, 0.0], ids=["a crowd", "one spot"])
def test_a_thousand_tracks_and_detections_in_one_heap(jitter: float) -> None:
    rng = np.random.default_rng(11)
    a, b = np.array([0, 0, 100, 100.0]) + rng.uniform(-jitter, jitter, (2, 1000, 4))
    pairs = overlaps(a, b)
    assert len(pairs.row) == 1_000_000
    row, column = assign(pairs, 0.9, 1000, 1000)
    cost = as_matrix(pairs, (1000, 1000), np.inf)
    assert row.tolist() == list(range(1000)) == sorted(column.tolist())
    best = linear_sum_assignment(cost)
    assert cost[row, column].sum() == pytest.approx(cost[best].sum(), abs=1e-9)


def test_the_same_pairs_give_the_same_assignment() -> None:
    cost = problem("tied", np.random.default_rng(12), 300, 300)
    assert assigned(cost, LIMIT) == assigned(cost, LIMIT)
