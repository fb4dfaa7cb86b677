"""A Kalman filter for boxes, batched over tracks: predict, project, update, gate.

Constant velocity on (cx, cy, a, h): centre, aspect ratio width/height, height, as in SORT (Bewley et al.,
ICIP 2016) and DeepSORT (Wojke et al., ICIP 2017, section 2.1), with noise proportional to the height. Knows
nothing of ids, scores or association.

**Layout.** Process noise, measurement noise and the initial covariance are diagonal, and the motion couples
each coordinate only with its own velocity. So the 8×8 covariance keeps exactly this pattern for ever:
four independent 2×2 blocks. A state is therefore an array (5, 4, N) float64,

    state[MEAN], state[VELOCITY]                              (4, N): cx, cy, a, h and their rates per frame
    state[VARIANCE], state[COVARIANCE], state[VELOCITY_VARIANCE]  (4, N): P_xx, P_xv, P_vv of each block

and what would be a batch of Cholesky factorisations is elementwise arithmetic. `dense` writes the usual
(N, 8) and (N, 8, 8) out; tests hold the two against each other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MEAN, VELOCITY, VARIANCE, COVARIANCE, VELOCITY_VARIANCE = range(5)
HEIGHT = 3

# The 0.95 quantile of χ² with 4 degrees of freedom: a gate that loses one true match in twenty.
GATE = 9.4877

# A box without height would otherwise have no noise at all, and its first update would be 0 / 0. Too
# small to change a single bit for boxes higher than 0.01 pixels.
_LEAST_VARIANCE = 1e-30


def _variances(of_height: float, aspect_std: float) -> tuple[Array, Array]:
    """What to multiply h² by, and what to add: (of_height · h)² for cx, cy, h and aspect_std² for a."""
    scale = np.full((4, 1), of_height**2)
    absolute = np.full((4, 1), _LEAST_VARIANCE)
    scale[2], absolute[2] = 0.0, aspect_std**2
    return scale, absolute


# Standard deviations, as fractions of the height for cx, cy, h and absolute for the aspect ratio
# (DeepSORT's published parameters, kept by JDE, FairMOT and ByteTrack).
_POSITION, _VELOCITY = 1 / 20, 1 / 160
_NEW_POSITION, _NEW_VELOCITY = _variances(2 * _POSITION, 1e-2), _variances(10 * _VELOCITY, 1e-5)
_STEP_POSITION, _STEP_VELOCITY = _variances(_POSITION, 1e-2), _variances(_VELOCITY, 1e-5)
_MEASUREMENT = _variances(_POSITION, 1e-1)


def _noise(height: Array, variances: tuple[Array, Array]) -> Array:
    """(N,) heights → (4, N) variances."""
    scale, absolute = variances
    return scale * (height * height) + absolute


def initiate(xyah: Array) -> Array:
    """New states at rest from measurements (4, N); the unknown velocity gets a wide variance."""
    state = np.zeros((5, *xyah.shape))
    state[MEAN] = xyah
    state[VARIANCE] = _noise(xyah[HEIGHT], _NEW_POSITION)
    state[VELOCITY_VARIANCE] = _noise(xyah[HEIGHT], _NEW_VELOCITY)
    return state


def predict(state: Array) -> Array:
    """The states one frame later."""
    height = state[MEAN, HEIGHT]
    after = np.empty_like(state)
    np.add(state[MEAN], state[VELOCITY], out=after[MEAN])
    after[VELOCITY] = state[VELOCITY]
    np.add(state[COVARIANCE], state[VELOCITY_VARIANCE], out=after[COVARIANCE])
    np.add(state[VARIANCE], state[COVARIANCE], out=after[VARIANCE])
    after[VARIANCE] += after[COVARIANCE]
    after[VARIANCE] += _noise(height, _STEP_POSITION)
    np.add(state[VELOCITY_VARIANCE], _noise(height, _STEP_VELOCITY), out=after[VELOCITY_VARIANCE])
    return after


def project(state: Array) -> tuple[Array, Array]:
    """Where a measurement is expected: its mean (4, N) and the diagonal of its covariance (4, N)."""
    return state[MEAN], state[VARIANCE] + _noise(state[MEAN, HEIGHT], _MEASUREMENT)


def update(state: Array, xyah: Array) -> Array:
    """The states after seeing the measurements (4, N), column by column."""
    mean, variance = project(state)
    gain = state[VARIANCE] / variance
    velocity_gain = state[COVARIANCE] / variance
    innovation = xyah - mean
    after = np.empty_like(state)
    np.add(mean, gain * innovation, out=after[MEAN])
    np.add(state[VELOCITY], velocity_gain * innovation, out=after[VELOCITY])
    # P − K S Kᵀ, and S Kᵀ is (P_xx, P_xv).
    np.subtract(state[VARIANCE], gain * state[VARIANCE], out=after[VARIANCE])
    np.subtract(state[COVARIANCE], gain * state[COVARIANCE], out=after[COVARIANCE])
    np.subtract(state[VELOCITY_VARIANCE], velocity_gain * state[COVARIANCE], out=after[VELOCITY_VARIANCE])
    return after


def squared_mahalanobis(mean: Array, variance: Array, xyah: Array) -> Array:
    """Squared distance of measurements (4, P) from projections (4, P), in standard deviations → (P,)."""
    difference = xyah - mean
    difference *= difference
    difference /= variance
    total: Array = difference.sum(axis=0)
    return total


def dense(state: Array) -> tuple[Array, Array]:
    """The textbook form: means (N, 8) and covariances (N, 8, 8). For readers and tests."""
    count = state.shape[2]
    mean = np.concatenate((state[MEAN], state[VELOCITY])).T
    covariance = np.zeros((count, 8, 8))
    for k in range(4):
        covariance[:, k, k] = state[VARIANCE, k]
        covariance[:, k, k + 4] = covariance[:, k + 4, k] = state[COVARIANCE, k]
        covariance[:, k + 4, k + 4] = state[VELOCITY_VARIANCE, k]
    return mean, covariance
