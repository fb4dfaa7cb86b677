"""JDE association: appearance and motion first, overlap second (FairMOT, Zhang et al., IJCV 2021, §3.4).

Each frame:
1. Tracked and lost tracks against confident detections, by cosine distance of the embeddings inside the
   Kalman gate.
2. Tracked tracks still without a match against the confident detections left, by IoU.
3. Tracked tracks still without a match against weak detections, by IoU: BYTE's second chance, which its
   paper (ECCV 2022, table 5) shows to help FairMOT too.
4. Tentative tracks against the confident detections left, by IoU.
Confident detections that remain start new tracks. A detector's class is never crossed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tracker.association.lifecycle import TENTATIVE, TRACKED, normalised
from tracker.association.settings import check_settings, table_for
from tracker.association.step import Step
from tracker.errors import DetectionsError
from tracker.matching import Indices
from tracker.types import Detections, Tracks


@dataclass(frozen=True, kw_only=True, slots=True)
class JdeConfig:
    """Defaults are FairMOT's (`src/lib/opts.py`, `src/lib/tracker/multitracker.py`), but for two.

    high: detections above it are confident; low: weak ones lie between low and high (FairMOT has none).
    appearance_limit: greatest cost of round 1, which is motion_weight · squared Mahalanobis distance +
    (1 − motion_weight) · cosine distance (FairMOT: 0.4; 0.35 keeps identities apart better wherever
    round 2 can pick up what is refused, see docs/log.md). overlap_limit, weak_limit, tentative_limit:
    greatest 1 − IoU of rounds 2 to 4. track_buffer: frames at 30 fps a track may stay lost.
    outage_buffer: frames at 30 fps that the source may be gone, with nobody to be seen, and tracks go on
    after it. cost: "box", or "mask": masks count too where boxes touch several others
    (`Step.overlapping`). official: see `TrackTable`.
    """

    high: float = 0.4
    low: float = 0.1
    appearance_limit: float = 0.35
    motion_weight: float = 0.02
    overlap_limit: float = 0.5
    weak_limit: float = 0.5
    tentative_limit: float = 0.7
    track_buffer: int = 30
    outage_buffer: int = 0
    cost: str = "box"
    official: bool = False

    def __post_init__(self) -> None:
        check_settings(self)

    @classmethod
    def fairmot(cls) -> JdeConfig:
        """Reproduces the published FairMOT, row for row."""
        return cls(low=0.4, appearance_limit=0.4, official=True)


class Jde:
    """Implements `types.Association` for detections with embeddings."""

    def __init__(
        self, config: JdeConfig | None = None, *, frame_rate: float = 30.0, names: tuple[str, ...] = ()
    ) -> None:
        self.config = config or JdeConfig()
        self.table = table_for(self.config, frame_rate=frame_rate, names=names)

    @property
    def confirmed(self) -> int:
        """How many tracks were ever reported."""
        return self.table.confirmed

    def rescale(self, x: float, y: float) -> None:
        """From the next frame on the same picture is so many times as wide and as high."""
        self.table.rescale(x, y)

    def update(self, frame_index: float, detections: Detections) -> Tracks:
        """The tracks seen in this frame. Frame indices must grow; a gap counts as time passed.

        A live source's moments are no whole numbers: time is counted in frames.
        """
        config, table = self.config, self.table
        relevant = (detections.score > config.low).nonzero()[0]
        detections = self._relevant(detections, relevant)
        embedding = detections.embedding
        assert embedding is not None
        if table.feature is None:
            table.feature = np.empty((0, embedding.shape[1]), np.float32)
        step = Step(table, frame_index, detections)
        confident = detections.score > config.high
        seen, tracked = step.status != TENTATIVE, step.status == TRACKED

        alike = step.resembling(seen, confident, embedding, config.motion_weight)
        step.take(alike, config.appearance_limit)
        step.take(step.overlapping(tracked, confident), config.overlap_limit)
        step.take(step.overlapping(tracked, ~confident), config.weak_limit)
        step.take(step.overlapping(~seen, confident), config.tentative_limit)
        return step.finish(newborn=confident, rows=relevant)

    def _relevant(self, detections: Detections, keep: Indices) -> Detections:
        """Those to keep, with embeddings of length 1."""
        embedding = detections.embedding
        if embedding is None:
            raise DetectionsError("jde needs embeddings and the detections have none: use the byte tracker")
        known = self.table.feature
        if known is not None and embedding.shape[1] != known.shape[1]:
            raise DetectionsError(
                f"embeddings have {embedding.shape[1]} numbers, earlier frames had {known.shape[1]}"
            )
        return Detections(
            xyxy=detections.xyxy[keep],
            score=detections.score[keep],
            label=detections.label[keep],
            embedding=normalised(embedding[keep]),
            angle=None if detections.angle is None else detections.angle[keep],
            mask=None if detections.mask is None else detections.mask[keep],
        )
