"""BYTE association: overlap only, and low scores get a second chance (ByteTrack, Zhang et al., ECCV 2022).

Each frame:
1. Tracked and lost tracks against confident detections, by IoU weighted with the score.
2. Tracked tracks still without a match against weak detections, by IoU: an object half hidden scores low,
   but it is where its track says.
3. Tentative tracks against the confident detections left.
Confident detections that remain start new tracks. A detector's class is never crossed.
"""

from __future__ import annotations

from dataclasses import dataclass

from tracker.association.lifecycle import TENTATIVE, TRACKED
from tracker.association.settings import check_settings, table_for
from tracker.association.step import Step
from tracker.matching import Pairs
from tracker.types import Detections, Floats, Tracks


@dataclass(frozen=True, kw_only=True, slots=True)
class ByteConfig:
    """Defaults are ByteTrack's (`tools/track.py`, `yolox/tracker/byte_tracker.py`).

    high: detections above it are confident; low: weak ones lie between low and high. birth: a new track
    needs this score. match_limit, weak_limit, tentative_limit: greatest cost of rounds 1, 2 and 3.
    track_buffer: frames at 30 fps a track may stay lost. outage_buffer: frames at 30 fps that the source
    may be gone, with nobody to be seen, and tracks go on after it. cost: "box", or "mask": masks
    count too where boxes touch several others (`Step.overlapping`). official: see `TrackTable`.
    """

    high: float = 0.6
    low: float = 0.1
    birth: float = 0.7
    match_limit: float = 0.9
    weak_limit: float = 0.5
    tentative_limit: float = 0.7
    track_buffer: int = 30
    outage_buffer: int = 0
    cost: str = "box"
    official: bool = False

    def __post_init__(self) -> None:
        check_settings(self)

    @classmethod
    def bytetrack(cls) -> ByteConfig:
        """Reproduces the published ByteTrack, row for row."""
        return cls(official=True)


class Byte:
    """Implements `types.Association`; embeddings are not looked at."""

    def __init__(
        self, config: ByteConfig | None = None, *, frame_rate: float = 30.0, names: tuple[str, ...] = ()
    ) -> None:
        self.config = config or ByteConfig()
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
        config = self.config
        step = Step(self.table, frame_index, detections)
        score = detections.score
        confident = score > config.high
        # Strictly between, as published: a score of exactly `high` is neither confident nor weak.
        weak = (score > config.low) & (score < config.high)

        pairs = step.overlapping(step.status != TENTATIVE, confident)
        step.take(self._weighted(pairs, score), config.match_limit)
        step.take(step.overlapping(step.status == TRACKED, weak), config.weak_limit)
        pairs = step.overlapping(step.status == TENTATIVE, confident)
        step.take(self._weighted(pairs, score), config.tentative_limit)
        return step.finish(newborn=confident & (score >= config.birth))

    @staticmethod
    def _weighted(pairs: Pairs, score: Floats) -> Pairs:
        """1 − IoU · score (`yolox/tracker/matching.py:fuse_score`)."""
        return pairs._replace(cost=1.0 - (1.0 - pairs.cost) * score[pairs.column])
