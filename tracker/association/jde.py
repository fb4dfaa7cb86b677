"""JDE association: appearance and motion first, overlap second (FairMOT, Zhang et al., IJCV 2021, §3.4).

Each frame:
1. Tracked and lost tracks against detections, by cosine distance of the embeddings inside the Kalman gate.
2. Tracked tracks still without a match against the detections left, by IoU.
3. Tentative tracks against what is left, by IoU.
Detections that remain start new tracks. A detector's class is never crossed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tracker.association.lifecycle import TENTATIVE, TRACKED, TrackTable, buffer_frames, normalised
from tracker.association.step import Step
from tracker.errors import ConfigError, DetectionsError
from tracker.types import Detections, Floats, Tracks


@dataclass(frozen=True, kw_only=True, slots=True)
class JdeConfig:
    """Defaults are FairMOT's (`src/lib/opts.py`, `src/lib/tracker/multitracker.py`).

    score: detections must exceed this. appearance_limit: greatest cost of round 1, which is
    motion_weight · squared Mahalanobis distance + (1 − motion_weight) · cosine distance.
    overlap_limit, tentative_limit: greatest 1 − IoU of rounds 2 and 3. track_buffer: frames at 30 fps a
    track may stay lost. official: see `TrackTable`.
    """

    score: float = 0.4
    appearance_limit: float = 0.4
    motion_weight: float = 0.02
    overlap_limit: float = 0.5
    tentative_limit: float = 0.7
    track_buffer: int = 30
    official: bool = False

    def __post_init__(self) -> None:
        for name in ("score", "appearance_limit", "motion_weight", "overlap_limit", "tentative_limit"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} must lie in 0…1, got {getattr(self, name)}")
        if self.track_buffer < 0:
            raise ConfigError(f"track_buffer must not be negative, got {self.track_buffer}")


class Jde:
    """Implements `types.Association` for detections with embeddings."""

    def __init__(
        self, config: JdeConfig | None = None, *, frame_rate: float = 30.0, names: tuple[str, ...] = ()
    ) -> None:
        self.config = config or JdeConfig()
        buffer = buffer_frames(frame_rate, self.config.track_buffer)
        self.table = TrackTable(buffer=buffer, official=self.config.official, names=names)

    def update(self, frame_index: int, detections: Detections) -> Tracks:
        """The tracks seen in this frame. Frame indices must grow; gaps count as time passed."""
        config = self.config
        if detections.embedding is None:
            raise DetectionsError("jde needs embeddings and the detections have none: use the byte tracker")
        if self.table.feature is None:
            self.table.feature = np.empty((0, detections.embedding.shape[1]), np.float32)
        detections = self._confident(detections, detections.embedding)
        step = Step(self.table, detections)
        everyone = step.free_detection.copy()
        step.take(
            step.resembling(step.status != TENTATIVE, everyone, config.motion_weight), config.appearance_limit
        )
        step.take(step.overlapping(step.status == TRACKED, everyone), config.overlap_limit)
        step.take(step.overlapping(step.status == TENTATIVE, everyone), config.tentative_limit)
        return step.finish(frame_index, newborn=everyone)

    def _confident(self, detections: Detections, embedding: Floats) -> Detections:
        keep = detections.score > self.config.score
        return Detections(
            xyxy=detections.xyxy[keep],
            score=detections.score[keep],
            label=detections.label[keep],
            embedding=normalised(embedding[keep]),
        )
