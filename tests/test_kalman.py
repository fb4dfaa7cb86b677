"""The batched filter is the textbook's: held against dense 8×8 matrices, track by track."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import chdtri

from tracker import kalman

Array = NDArray[np.float64]

# x' = F x, z = H x; x is (cx, cy, a, h) and their velocities per frame.
F = np.eye(8) + np.eye(8, k=4)
H = np.eye(4, 8)


def variances(height: float, of_height: float, aspect: float) -> list[float]:
    return [(of_height * height) ** 2, (of_height * height) ** 2, aspect**2, (of_height * height) ** 2]


class Textbook:
    """One track, float64, in the matrices of the papers: DeepSORT's noise, section 2.1."""

    def __init__(self, z: Array) -> None:
        h = z[3]
        self.x = np.concatenate((z, np.zeros(4)))
        self.p = np.diag(variances(h, 2 / 20, 1e-2) + variances(h, 10 / 160, 1e-5))

    def predict(self) -> None:
        h = self.x[3]
        self.x = F @ self.x
        self.p = F @ self.p @ F.T + np.diag(variances(h, 1 / 20, 1e-2) + variances(h, 1 / 160, 1e-5))

    def project(self) -> tuple[Array, Array]:
        return H @ self.x, H @ self.p @ H.T + np.diag(variances(self.x[3], 1 / 20, 1e-1))

    def update(self, z: Array) -> None:
        expected, s = self.project()
        k = self.p @ H.T @ np.linalg.inv(s)
        self.x = self.x + k @ (z - expected)
        self.p = self.p - k @ s @ k.T

    def squared_mahalanobis(self, z: Array) -> float:
        expected, s = self.project()
        return float((z - expected) @ np.linalg.inv(s) @ (z - expected))


def walks(rng: np.random.Generator, frames: int, count: int) -> Array:
    """(frames, 4, count) noisy measurements of boxes on random walks, heights from 5 to 500 pixels."""
    height = np.exp(rng.uniform(np.log(5), np.log(500), count))
    steps = rng.normal(0, 0.03, (frames, 4, count)) * np.array([1, 1, 0, 0])[:, None] * height
    xyah = np.array([rng.uniform(0, 2000, count), rng.uniform(0, 1000, count), np.full(count, 0.4), height])
    noise = rng.normal(0, 0.02, (frames, 4, count)) * np.array([height, height, np.ones(count), height])
    return xyah + steps.cumsum(axis=0) + noise


def assert_same(state: Array, textbooks: list[Textbook]) -> None:
    mean, covariance = kalman.dense(state)
    for k, book in enumerate(textbooks):
        np.testing.assert_allclose(mean[k], book.x, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(covariance[k], book.p, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("seen", [1.0, 0.7, 0.05], ids=["always seen", "often seen", "seldom seen"])
def test_the_batch_is_the_textbook_over_long_sequences(seen: float) -> None:
    rng = np.random.default_rng(int(100 * seen))
    frames, count = 300, 6
    measured = walks(rng, frames, count)
    state, books = kalman.initiate(measured[0]), [Textbook(z) for z in measured[0].T]
    assert_same(state, books)
    for xyah in measured[1:]:
        state = kalman.predict(state)
        for book in books:
            book.predict()

        mean, variance = kalman.project(state)
        distance = kalman.squared_mahalanobis(mean, variance, xyah)
        for k, book in enumerate(books):
            expected, s = book.project()
            np.testing.assert_allclose(mean[:, k], expected, rtol=1e-9)
            np.testing.assert_allclose(np.diag(variance[:, k]), s, rtol=1e-9, atol=1e-15)
            np.testing.assert_allclose(distance[k], book.squared_mahalanobis(xyah[:, k]), rtol=1e-9)

        rows = (rng.uniform(size=count) < seen).nonzero()[0]
        state[:, :, rows] = kalman.update(state[:, :, rows], xyah[:, rows])
        for row in rows:
            books[row].update(xyah[:, row])
    assert_same(state, books)


@pytest.mark.parametrize("every", [1, 7, 10_001], ids=["always seen", "every 7th frame", "never seen again"])
def test_covariance_stays_symmetric_and_positive_definite(every: int) -> None:
    rng = np.random.default_rng(every)
    start = walks(rng, 1, 20)[0]
    state = kalman.initiate(start)
    for step in range(1, 10_001):
        state = kalman.predict(state)
        if step % every == 0:
            state = kalman.update(state, start + rng.normal(0, 0.5, start.shape))
        if step % 500 == 0:
            _, covariance = kalman.dense(state)
            np.testing.assert_array_equal(covariance, covariance.transpose(0, 2, 1))
            np.linalg.cholesky(covariance)  # raises unless positive definite
    assert np.isfinite(state).all()


def test_a_batch_is_its_tracks_one_by_one() -> None:
    rng = np.random.default_rng(5)
    first, second = walks(rng, 2, 33)

    def two_frames(a: Array, b: Array) -> Array:
        return kalman.update(kalman.predict(kalman.initiate(a)), b)

    together = two_frames(first, second)
    alone = [two_frames(first[:, k : k + 1], second[:, k : k + 1]) for k in range(33)]
    np.testing.assert_array_equal(together, np.concatenate(alone, axis=2))


def test_state_goes_in_and_comes_out_untouched() -> None:
    first, second = walks(np.random.default_rng(6), 2, 5)
    state = kalman.predict(kalman.initiate(first))
    before = state.copy()
    kalman.predict(state)
    kalman.project(state)
    kalman.update(state, second)
    np.testing.assert_array_equal(state, before)


def test_zero_tracks() -> None:
    none = np.empty((4, 0))
    state = kalman.predict(kalman.initiate(none))
    assert kalman.update(state, none).shape == (5, 4, 0)
    mean, variance = kalman.project(state)
    assert kalman.squared_mahalanobis(mean, variance, none).shape == (0,)
    assert [part.shape for part in kalman.dense(state)] == [(0, 8), (0, 8, 8)]


@pytest.mark.parametrize("later", [(10, 20, 0, 0), (30, 20, 0.5, 80)], ids=["stays flat", "grows"])
def test_a_box_without_height_has_a_filter_all_the_same(later: tuple[float, ...]) -> None:
    state = kalman.initiate(np.array([[10.0], [20.0], [0.0], [0.0]]))
    for _ in range(50):
        state = kalman.predict(state)
        mean, variance = kalman.project(state)
        assert (variance > 0).all()
        assert np.isfinite(kalman.squared_mahalanobis(mean, variance, np.array(later)[:, None])).all()
        state = kalman.update(state, np.array(later, np.float64)[:, None])
    np.testing.assert_allclose(state[kalman.MEAN, :, 0], later, rtol=2e-2, atol=1e-12)


def test_dense_writes_the_blocks_where_the_textbook_has_them() -> None:
    state = np.arange(40.0).reshape(5, 4, 2)
    mean, covariance = kalman.dense(state)
    np.testing.assert_array_equal(mean[1], np.concatenate((state[0, :, 1], state[1, :, 1])))
    expected = np.block(
        [
            [np.diag(state[2, :, 1]), np.diag(state[3, :, 1])],
            [np.diag(state[3, :, 1]), np.diag(state[4, :, 1])],
        ]
    )
    np.testing.assert_array_equal(covariance[1], expected)


def test_the_gate_is_the_quantile_it_says() -> None:
    assert pytest.approx(chdtri(4, 0.05), abs=5e-5) == kalman.GATE
