"""How far INT8 should reach for each tensor, from histograms of what a network computes.

    max          the greatest |value| seen
    percentile   what 99.99 % of the values do not exceed
    entropy      the range whose 128 levels tell the distribution best (Migacz, "8-bit Inference with
                 TensorRT", GTC 2017; Kullback–Leibler divergence, as TensorRT's IInt8EntropyCalibrator)
    mse          the range with the least mean squared error of rounding and clipping together

Knows numbers; not where they come from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tracker.errors import ConfigError, EngineError

Method = Literal["max", "percentile", "entropy", "mse"]
METHODS: tuple[Method, ...] = get_args(Method)

BINS = 4096  # an even number: they are merged in pairs when values outgrow them
LEVELS = 128  # of |value|: 0 to 127
PERCENTILE = 99.99

Counts = NDArray[np.float64]


class Histogram:
    """How often |values| occur, in BINS bins from 0 to `bound`, which doubles as needed; `amax` is exact.

    Zeros are not counted: after a ReLU they are most, and every range represents them exactly.
    """

    def __init__(self, counts: Counts | None = None, bound: float = 0.0, amax: float = 0.0) -> None:
        self.counts = np.zeros(BINS) if counts is None else counts
        self.bound, self.amax = bound, amax

    def add(self, values: Tensor) -> None:
        """Raises EngineError for NaN and inf."""
        sizes = values.detach().abs().flatten().float()
        greatest = float(sizes.max()) if len(sizes) else 0.0
        if not np.isfinite(greatest):
            raise EngineError(
                "the network computes NaN or inf: its weights are broken, or its manifest describes another "
                "input than it was trained on"
            )
        self.amax = max(self.amax, greatest)
        if greatest == 0:
            return
        if self.bound == 0:
            self.bound = greatest
        while self.bound < greatest:
            pairs = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.concatenate((pairs, np.zeros(BINS // 2)))
            self.bound *= 2
        counts = torch.histc(sizes, BINS, 0.0, self.bound).double().numpy()
        counts[0] -= len(sizes) - int(torch.count_nonzero(sizes))
        self.counts += np.maximum(counts, 0.0)

    def limit(self, method: Method) -> float:
        """The greatest |value| to represent; 0 where there was none but 0."""
        if method not in _LIMITS:
            raise ConfigError(f"method is {method!r}; it must be {', '.join(METHODS)}")
        return min(_LIMITS[method](self), self.amax) if self.amax else 0.0


def _percentile(histogram: Histogram) -> float:
    share = np.cumsum(histogram.counts) / histogram.counts.sum()
    reached = int(np.searchsorted(share, PERCENTILE / 100))
    return (min(reached, BINS - 1) + 1) / BINS * histogram.bound


def _mse(histogram: Histogram) -> float:
    """Tried: 128 ranges, even steps up to the greatest value."""
    centres = (np.arange(BINS) + 0.5) * histogram.bound / BINS
    limits = np.arange(1, 129) / 128 * histogram.amax
    errors = []
    for limit in limits:
        scale = limit / (LEVELS - 1)
        levels = np.minimum(np.rint(centres / scale), LEVELS - 1)
        errors.append(float(histogram.counts @ ((centres - levels * scale) ** 2)))
    return float(limits[int(np.argmin(errors))])


def _entropy(histogram: Histogram) -> float:
    """Tried: every 16th bin from LEVELS on. What lies beyond counts as the last bin of the range."""
    counts = histogram.counts
    total = np.cumsum(counts)
    stops = np.arange(LEVELS, BINS + 1, 16)
    divergences = [_divergence(counts[:stop], float(total[-1] - total[stop - 1])) for stop in stops]
    return float(stops[int(np.argmin(divergences))]) / BINS * histogram.bound


def _divergence(inside: Counts, beyond: float) -> float:
    """KL(P‖Q) in nats: P the clipped distribution, Q what LEVELS levels over the same bins tell of it."""
    if not inside.any():
        return float("inf")
    reference = inside.copy()
    reference[-1] += beyond
    level = np.minimum(np.arange(len(inside)) * LEVELS // len(inside), LEVELS - 1)
    filled = inside > 0
    sums = np.bincount(level, inside, LEVELS)
    places = np.bincount(level, filled, LEVELS)
    told = np.where(filled, (sums / np.maximum(places, 1))[level], 0.0)
    p, q = reference / reference.sum(), told / told.sum()
    known = p > 0
    # A bin of P that Q does not know has no finite divergence; Migacz smooths, by this much.
    return float(np.sum(p[known] * np.log(p[known] / np.maximum(q[known], 1e-9))))


_LIMITS: dict[Method, Callable[[Histogram], float]] = {
    "max": lambda histogram: histogram.amax,
    "percentile": _percentile,
    "entropy": _entropy,
    "mse": _mse,
}
