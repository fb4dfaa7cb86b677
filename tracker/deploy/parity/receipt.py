"""What a comparison of two engines found out, as data. How it is shown, `report` knows."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from tracker.deploy.parity.detections import DetectionParity
from tracker.deploy.parity.locate import Search
from tracker.deploy.parity.tensors import TensorParity
from tracker.deploy.parity.tracks import TrackParity
from tracker.evaluation import Scores
from tracker.manifest import Precision


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """One side, for people."""

    path: str
    sha256: str
    precision: Precision
    runs: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pixels:
    """What the sides' manifests make of frames. differs: the manifests' keys, with both values, in words.

    parity: None where the tensors differ in size. why: what would explain it.
    """

    differs: tuple[str, ...]
    parity: TensorParity | None
    why: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackScores:
    """Scores of `evaluation`, None where nobody has a row. The first two take the other's tracks as truth."""

    b_against_a: Scores | None
    a_against_b: Scores | None
    a: Scores | None = None
    b: Scores | None = None


@dataclass(slots=True, kw_only=True)
class Receipt:
    """What came of it; None for what was not compared, and `notes` say why.

    outputs: by role. tolerance: theirs. first: where the difference begins, in words.
    """

    a: About
    b: About
    clip: str
    tolerance: float
    pixels: Pixels | None = None
    outputs: dict[str, TensorParity] = field(default_factory=dict)
    detections: DetectionParity | None = None
    tracks: TrackParity | None = None
    scores: TrackScores | None = None
    search: Search | None = None
    first: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def measures(self) -> dict[str, float]:
        """How different the two are, each 0 for no difference; inf for what could not be compared.

        error: greatest relative error of an output. pixels: greatest difference of what the networks are fed.
        detections, tracks: shares without the same on the other side. hota: what B loses against A by the
        ground truth; without one, what it lacks to 100 with A's tracks for the truth.
        """
        errors = [parity.relative for parity in self.outputs.values()]
        pixels = self.pixels.parity if self.pixels else None
        return {
            "error": max(errors) if errors else np.inf,
            "pixels": pixels.max if pixels else np.inf,
            "detections": 1 - self.detections.same if self.detections else np.inf,
            "tracks": 1 - self.tracks.row_share if self.tracks else np.inf,
            "hota": self._hota_loss(),
        }

    def _hota_loss(self) -> float:
        scores = self.scores
        if scores is None:
            return np.inf
        if scores.a is not None and scores.b is not None:
            return scores.a["HOTA"] - scores.b["HOTA"]
        return 0.0 if scores.b_against_a is None else 100.0 - scores.b_against_a["HOTA"]

    def beyond(self) -> list[str]:
        """Roles of outputs beyond tolerance."""
        return [role for role, parity in self.outputs.items() if not parity.relative <= self.tolerance]
