"""A Kalman filter for boxes, batched over tracks: predict, project, update, gate.

Constant velocity on (cx, cy, a, h): centre, aspect ratio width/height, height, as in SORT (Bewley et al.,
ICIP 2016) and DeepSORT (Wojke et al., ICIP 2017, section 2.1), with noise proportional to the height. Rotated
boxes have a fifth coordinate, the angle in radians. Knows nothing of ids, scores or association.

**Layout.** Process noise, measurement noise and the initial covariance are diagonal, and the motion couples
each coordinate only with its own velocity. So the 8×8 covariance keeps exactly this pattern for ever:
four independent 2×2 blocks. A state is therefore an array (5, 4, N) float64,

    state[MEAN], state[VELOCITY]                              (4, N): cx, cy, a, h and their rates per frame
    state[VARIANCE], state[COVARIANCE], state[VELOCITY_VARIANCE]  (4, N): P_xx, P_xv, P_vv of each block

and what would be a batch of Cholesky factorisations is elementwise arithmetic. `dense` writes the usual
(N, 8) and (N, 8, 8) out; tests hold the two against each other. With angles 4 is 5 throughout.

**Angles.** A box turned by half a turn is the same box, and so is one turned by a quarter whose sides change
places. `aligned` words a measurement as the state does; then angles are numbers like the others, and a
state's angle goes on growing with a box that goes on turning.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

MEAN, VELOCITY, VARIANCE, COVARIANCE, VELOCITY_VARIANCE = range(5)
ASPECT, HEIGHT, ANGLE = 2, 3, 4

# The 0.95 quantile of χ² with 4 degrees of freedom: a gate that loses one true match in twenty. With 5, where
# there are angles.
GATE = 9.4877
TURNED_GATE = 11.0705

# A box without height would otherwise have no noise at all, and its first update would be 0 / 0. Too
# small to change a single bit for boxes higher than 0.01 pixels.
_LEAST_VARIANCE = 1e-30


Variances = dict[int, tuple[Array, Array]]  # by number of coordinates


def _variances(of_height: float, aspect_std: float) -> Variances:
    """What to multiply h² by, and what to add: (of_height · h)² for cx, cy, h and aspect_std² for a.

    of_height² for the angle: in radians, what moves a point a height away as far as the centre may move.
    """
    scale = np.full((5, 1), of_height**2)
    absolute = np.full((5, 1), _LEAST_VARIANCE)
    scale[ASPECT], absolute[ASPECT] = 0.0, aspect_std**2
    scale[ANGLE], absolute[ANGLE] = 0.0, of_height**2
    return {count: (scale[:count], absolute[:count]) for count in (4, 5)}


# Of boxes without width or height, whose ratio has no logarithm.
_LEAST_ASPECT = 1e-3

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
    size, height = len(xyah), xyah[HEIGHT]
    state[VARIANCE] = _noise(height, _NEW_POSITION[size])
    state[VELOCITY_VARIANCE] = _noise(height, _NEW_VELOCITY[size])
    return state


def predict(state: Array, frames: float = 1.0) -> Array:
    """The states so many frames later; noise grows with the time that passes.

    The noise depends on the height, so that long gaps are better predicted frame by frame.
    """
    size, height = state.shape[1], state[MEAN, HEIGHT]
    position, velocity = _noise(height, _STEP_POSITION[size]), _noise(height, _STEP_VELOCITY[size])
    moved, loosened, coupled = state[VELOCITY], state[VELOCITY_VARIANCE], state[COVARIANCE]
    if frames != 1.0:  # a file's frames never need it, and every call costs
        position, velocity = frames * position, frames * velocity
        moved, loosened, coupled = frames * moved, frames * loosened, frames * coupled
    after = np.empty_like(state)
    np.add(state[MEAN], moved, out=after[MEAN])
    after[VELOCITY] = state[VELOCITY]
    np.add(state[COVARIANCE], loosened, out=after[COVARIANCE])
    # P_xx + t P_xv + t (P_xv + t P_vv)
    np.add(state[VARIANCE], coupled, out=after[VARIANCE])
    after[VARIANCE] += after[COVARIANCE] if frames == 1.0 else frames * after[COVARIANCE]
    after[VARIANCE] += position
    np.add(state[VELOCITY_VARIANCE], velocity, out=after[VELOCITY_VARIANCE])
    return after


def project(state: Array) -> tuple[Array, Array]:
    """Where a measurement is expected: its mean (4, N) and the diagonal of its covariance (4, N)."""
    return state[MEAN], state[VARIANCE] + _noise(state[MEAN, HEIGHT], _MEASUREMENT[state.shape[1]])


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


def aligned(mean: Array, xyahr: Array) -> Array:
    """Measurements of rotated boxes (5, P) worded as means (5, P) word theirs, column by column.

    Of the ways to say the same box, the one nearest in angle and aspect ratio: half turns cost nothing, a
    quarter of a turn exchanges width and height. So a box that is nearly square keeps its direction from
    frame to frame, whichever of its sides is just measured to be the longer one.
    """
    difference = xyahr[ANGLE] - mean[ANGLE]
    half = np.round(difference / np.pi)
    quarter = np.round(difference / np.pi - 0.5) + 0.5  # the nearest turn by a quarter
    aspect, known = (np.maximum(rows[ASPECT], _LEAST_ASPECT) for rows in (xyahr, mean))
    as_said = np.abs(difference - np.pi * half) + np.abs(np.log(aspect / known))
    exchanged = np.abs(difference - np.pi * quarter) + np.abs(np.log(aspect * known))
    swap = exchanged < as_said
    after = xyahr.copy()
    after[ANGLE] -= np.pi * np.where(swap, quarter, half)
    after[HEIGHT, swap] *= aspect[swap]
    after[ASPECT, swap] = 1 / aspect[swap]
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
    _, size, count = state.shape
    mean = np.concatenate((state[MEAN], state[VELOCITY])).T
    covariance = np.zeros((count, 2 * size, 2 * size))
    for k in range(size):
        covariance[:, k, k] = state[VARIANCE, k]
        covariance[:, k, k + size] = covariance[:, k + size, k] = state[COVARIANCE, k]
        covariance[:, k + size, k + size] = state[VELOCITY_VARIANCE, k]
    return mean, covariance
