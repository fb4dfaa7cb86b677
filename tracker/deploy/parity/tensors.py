"""Two tensors that should be alike: how far apart they are, and what simple fault would explain it.

Knows arrays; knows no engine, no layer and no file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Floats = NDArray[np.float64]

SHOWN = 6  # channels in a message
FITS = 0.2  # an explanation leaves at most this share of the difference


@dataclass(frozen=True, slots=True)
class TensorParity:
    """How far a candidate's tensor is from the reference's, over all that was added.

    max, mean: |difference|. relative: its Euclidean norm over the reference's; inf for NaN or inf. cosine: of
    the angle between both, flattened; 1 where both are zero.
    """

    max: float
    mean: float
    relative: float
    cosine: float


class Comparison:
    """Collects one tensor's values, image after image.

    peaks: values are 0 but where a map peaks. Of two neighbours that tie either may be the peak, so a peak of
    one side is compared with the strongest the other has in its 3×3 neighbourhood.
    """

    def __init__(self, *, peaks: bool = False) -> None:
        self._peaks = peaks
        self._count = 0
        self._max = self._sum = self._squares = 0.0
        self._reference = self._candidate = self._product = 0.0

    def add(self, reference: Array, candidate: Array) -> None:
        """Shapes must be equal; peaks are (B, C, H, W)."""
        a, b = reference.astype(np.float64), candidate.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            difference = _untied(a, b) if self._peaks else np.abs(a - b)
            self._count += difference.size
            # Python's max() drops a NaN or keeps it by the order of its arguments; NumPy's keeps it.
            self._max = float(np.maximum(self._max, difference.max(initial=0.0)))
            self._sum += float(difference.sum())
            self._squares += float((difference**2).sum())
            self._reference += float((a**2).sum())
            self._candidate += float((b**2).sum())
            self._product += float((a * b).sum())

    def result(self) -> TensorParity:
        if not np.isfinite((self._squares, self._reference, self._candidate)).all():
            return TensorParity(max=np.inf, mean=np.inf, relative=np.inf, cosine=0.0)
        norms = (self._reference * self._candidate) ** 0.5
        same = self._reference == self._candidate == 0
        return TensorParity(
            max=self._max,
            mean=self._sum / max(self._count, 1),
            relative=_ratio(self._squares**0.5, self._reference**0.5),
            cosine=self._product / norms if norms else float(same),
        )


def compare(reference: Array, candidate: Array) -> TensorParity:
    """Two tensors of one shape."""
    comparison = Comparison()
    comparison.add(reference, candidate)
    return comparison.result()


def explain(reference: Array, candidate: Array, *, axis: int = 1) -> str | None:
    """The fault that makes the candidate of the reference, in words; None where no simple one does.

    axis: of the channels. Both need one shape, and are taken to differ.
    """
    if not np.isfinite(candidate).all():
        return "it holds NaN or inf"
    a, b = _channels(reference, axis), _channels(candidate, axis)
    error = float(np.linalg.norm(a - b))
    if error == 0:
        return None
    if not b.any():
        return "it is all zeros"

    def fits(expected: Floats) -> bool:
        return float(np.linalg.norm(b - expected)) <= FITS * error

    order = _closest(a, b)
    moved = len(order) > 1 and sorted(order) == list(range(len(order))) and order != sorted(order)
    if moved and fits(a[order]):
        return f"its channels are those of A in the order {_some(order)}"
    factor = float((a * b).sum() / (a * a).sum()) if a.any() else 0.0
    if fits(factor * a):
        return f"it is {factor:.3g} times A's"
    shift = (b - a).mean(axis=1, keepdims=True)
    if fits(a + shift):
        return f"it is A's and a constant for each channel, {float(np.abs(shift).max()):.3g} at most"
    middle, centred = a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    spread = float(((a - middle) ** 2).sum())
    factor = float(((a - middle) * centred).sum()) / spread if spread else 0.0
    if fits(b.mean(axis=1, keepdims=True) + factor * (a - middle)):
        return f"it varies {factor:.3g} times as much as A's, and is shifted"
    each = np.linalg.norm(a - b, axis=1)
    few = np.flatnonzero(each > FITS * each.max())
    if len(few) <= len(each) / 4:
        return f"of its {len(each)} channels only {_some(few.tolist())} differ much"
    return None


def _untied(a: Floats, b: Floats) -> Floats:
    """|a − b|, but where one side alone peaks: then what its peak differs from the other's near it."""
    difference = np.abs(a - b)
    only_a, only_b = (a != 0) & (b == 0), (a == 0) & (b != 0)
    if only_a.any():
        difference = np.where(only_a, np.abs(a - _strongest_near(b)), difference)
    if only_b.any():
        difference = np.where(only_b, np.abs(b - _strongest_near(a)), difference)
    return difference


def _strongest_near(peaks: Floats) -> Floats:
    """(B, C, H, W) greatest of each 3×3 neighbourhood."""
    height, width = peaks.shape[2:]
    padded = np.pad(peaks, ((0, 0), (0, 0), (1, 1), (1, 1)))
    shifted = [padded[:, :, y : y + height, x : x + width] for y in range(3) for x in range(3)]
    strongest: Floats = np.maximum.reduce(shifted)
    return strongest


def _channels(values: Array, axis: int) -> Floats:
    """(C, everything else)."""
    values = values.astype(np.float64)
    if values.ndim <= axis:
        return values.reshape(1, -1)
    return np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)


def _closest(a: Floats, b: Floats) -> list[int]:
    """For each channel of b the channel of a that is nearest."""
    distances = (a * a).sum(axis=1)[None] - 2 * b @ a.T  # plus what is the same for all of a
    return [int(best) for best in distances.argmin(axis=1)]


def _some(numbers: list[int]) -> str:
    text = ", ".join(map(str, numbers[:SHOWN]))
    return f"{text}, …" if len(numbers) > SHOWN else text


def _ratio(part: float, whole: float) -> float:
    if whole:
        return part / whole
    return np.inf if part else 0.0
