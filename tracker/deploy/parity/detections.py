"""How alike the answers of two detectors to one clip are, as sets of detections.

    watch                a front end over a clip → Findings
    compare_detections   two Findings → DetectionParity

Findings can be kept, and followed again with other settings (`tracks`); only `watch` runs a network.
Knows no engine file and nothing of how its answers come about.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tracker.boxes import iou, rotated_iou, turned
from tracker.errors import ConfigError, SourceError
from tracker.matching import Indices, Pairs, assign, overlaps, turned_overlaps
from tracker.pipeline import Feed, batches
from tracker.sources import open_source
from tracker.types import Detections, Frame, Frontend, Pending, Tracks

PAIRED = 0.5  # IoU from which two boxes are taken for one object, as in PASCAL VOC and MOTChallenge
TIE = 1e-3  # of IoU: rounding moves a box of 20 pixels by less
BINS = 20  # of a score histogram, from 0 to 1
SELF_PRECISION = 0.99  # where the reference itself stands for the truth, none but itself is right throughout

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What a front end found in a clip.

    numbers: 0-based index of each frame; damaged frames are not among them. detections: of each, down to the
    front end's own `conf`. frame_rate: frames per second. names: of the classes.
    """

    numbers: tuple[int, ...]
    detections: tuple[Detections, ...]
    frame_rate: float
    names: tuple[str, ...]

    @property
    def embeds(self) -> bool:
        return any(found.embedding is not None for found in self.detections)


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchConfig:
    """When two detections count as the same.

    conf: least score of a detection that the other side must have too; the default is where `jde` takes a
        detection for a confident one (`JdeConfig.high`).
    score: greatest difference of their scores. A detection that close to `conf` may be above it on one side
        and below on the other: so the front ends must report down to `floor`.
    iou: least overlap. Peaks or boxes that tie may change places by a cell, which is less.
    """

    conf: float = 0.4
    score: float = 0.02
    iou: float = 0.9

    def __post_init__(self) -> None:
        if not 0 < self.conf < 1:
            raise ConfigError(f"conf is {self.conf}; it must lie between 0 and 1")
        if not 0 <= self.score < self.conf:
            raise ConfigError(
                f"score tolerance is {self.score}; it must be at least 0 and below conf ({self.conf})"
            )
        if not PAIRED <= self.iou <= 1:
            raise ConfigError(f"least IoU is {self.iou}; it must be {PAIRED} to 1")

    @property
    def floor(self) -> float:
        """What the `conf` of both front ends may be at most."""
        return self.conf - self.score


@dataclass(frozen=True, slots=True)
class Spread:
    """How a number is distributed: mean, median, 95th percentile and greatest; all 0 where there is none."""

    mean: float = 0.0
    median: float = 0.0
    p95: float = 0.0
    max: float = 0.0

    @classmethod
    def of(cls, values: Floats) -> Spread:
        if not len(values):
            return cls()
        median, p95 = np.percentile(values, (50, 95))
        return cls(float(values.mean()), float(median), float(p95), float(values.max()))


@dataclass(frozen=True, slots=True, kw_only=True)
class EqualPrecision:
    """Recall of both where the candidate is as precise as the reference.

    precision: of the reference above `conf` (SELF_PRECISION where the reference is the truth), which the
    candidate reaches at `threshold` and above; None where it reaches it nowhere, its recall is then 0.
    """

    precision: float
    reference_recall: float
    recall: float
    threshold: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectionParity:
    """Two detectors' answers to the same frames; what is said of detections is said of those above `conf`.

    reference, candidate: how many. missing, extra: of the reference and of the candidate, those without the
    same one on the other side. first_difference: 0-based index of the first frame with either, else None.
    score, box: |difference| of what is paired by IoU (PAIRED): score, and corners in pixels of the source.
    cosine: 1 − cos between their embeddings, None without any. equal: see there.
    histogram: detections by score of reference and candidate, BINS bins from 0 to 1, all that were reported.
    """

    frames: int
    reference: int
    candidate: int
    missing: int
    extra: int
    first_difference: int | None
    score: Spread
    box: Spread
    cosine: Spread | None
    equal: EqualPrecision
    histogram: tuple[tuple[int, ...], tuple[int, ...]]

    @property
    def same(self) -> float:
        """Share of all detections of both that the other has too; 1 where there are none."""
        both = self.reference + self.candidate
        return 1.0 - (self.missing + self.extra) / both if both else 1.0


def watch(
    frontend: Frontend,
    clip: str | Path,
    *,
    max_frames: int | None = None,
    on_frames: Callable[[int], object] | None = None,
) -> Findings:
    """What a front end finds in a clip (anything `open_source` takes), through its own pipeline.

    on_frames: told how many frames have just been done. The front end stays open.
    Raises SourceError for a clip that cannot be read, breaks half-way or has no frame.
    """
    place = frontend.frames_on
    numbers: list[int] = []
    found: list[Detections] = []
    pending: deque[tuple[list[Frame], Pending]] = deque()

    def settle() -> None:
        frames, work = pending.popleft()
        found.extend(replace(each, mask=None) for each in work.result())  # a clip's would fill the device
        numbers.extend(frame.index for frame in frames)
        if on_frames is not None:
            on_frames(len(frames))

    with open_source(clip, gpu=place if place.type == "cuda" else None) as source:
        with Feed(source, max_frames=max_frames) as feed:
            for batch in batches([feed], frontend.usual_batch):
                pending.append((batch, frontend.submit(batch)))
                if len(pending) > frontend.lanes:
                    settle()
            while pending:
                settle()
        if feed.error is not None:
            raise feed.error
        if not numbers:
            raise SourceError(f"{clip} has no frame to compare on: name another clip with --data")
        return Findings(
            numbers=tuple(numbers),
            detections=tuple(found),
            frame_rate=source.frame_rate,
            names=frontend.names,
        )


def compare_detections(
    reference: Findings,
    candidate: Findings,
    config: MatchConfig | None = None,
    *,
    truth: Sequence[Detections] | None = None,
) -> DetectionParity:
    """How the candidate's detections differ from the reference's on the same frames.

    truth: objects of each frame (`truth_of`), for precision and recall; without it the reference's detections
    above `conf` are the truth. Raises ConfigError where the frames are not the same.
    """
    config = config or MatchConfig()
    check_frames(reference.numbers, candidate.numbers)
    missing = extra = 0
    first: int | None = None
    scores, boxes, cosines = [], [], []
    pairs = zip(reference.numbers, reference.detections, candidate.detections, strict=True)
    for number, one, other in pairs:
        lost = _without_same(one, other, config)
        new = _without_same(other, one, config)
        missing, extra = missing + lost, extra + new
        if first is None and lost + new:
            first = number
        row, column = pair(_above(one, config.conf), other, PAIRED)
        a, b = _take(_above(one, config.conf), row), _take(other, column)
        scores.append(np.abs(a.score - b.score))
        boxes.append(np.abs(a.xyxy - b.xyxy).max(axis=1, initial=0.0))
        if a.embedding is not None and b.embedding is not None:
            cosines.append(1.0 - _cosine(a.embedding, b.embedding))
    return DetectionParity(
        frames=len(reference.numbers),
        reference=_count(reference, config.conf),
        candidate=_count(candidate, config.conf),
        missing=missing,
        extra=extra,
        first_difference=first,
        score=Spread.of(np.concatenate(scores, dtype=np.float64)),
        box=Spread.of(np.concatenate(boxes, dtype=np.float64)),
        cosine=Spread.of(np.concatenate(cosines, dtype=np.float64)) if cosines else None,
        equal=equal_precision(reference, candidate, conf=config.conf, truth=truth),
        histogram=(_histogram(reference), _histogram(candidate)),
    )


def equal_precision(
    reference: Findings,
    candidate: Findings,
    *,
    conf: float,
    truth: Sequence[Detections] | None = None,
) -> EqualPrecision:
    """Recall of both at the precision that the reference has above `conf`; see `EqualPrecision`.

    truth: objects of each frame, of whatever class; None takes the reference's own detections above `conf`,
    which the candidate must then find with the same label.
    """
    if truth is None:
        objects = [_above(found, conf) for found in reference.detections]
        precision, recall = SELF_PRECISION, 1.0
    else:
        objects = list(truth)
        _, precisions, recalls = _curve(
            [_above(found, conf) for found in reference.detections], objects, by_label=False
        )
        precision, recall = (
            (float(precisions[-1]), float(recalls[-1])) if len(precisions) else (SELF_PRECISION, 0.0)
        )
    thresholds, precisions, recalls = _curve(candidate.detections, objects, by_label=truth is None)
    enough = np.flatnonzero(precisions >= precision)
    best = int(enough[-1]) if len(enough) else None  # recall rises along the curve
    return EqualPrecision(
        precision=precision,
        reference_recall=recall,
        recall=0.0 if best is None else float(recalls[best]),
        threshold=None if best is None else float(thresholds[best]),
    )


def check_frames(one: Sequence[int], other: Sequence[int]) -> None:
    if tuple(one) != tuple(other):
        raise ConfigError(
            f"the same frames are needed on both sides: one has {len(one)}, the other {len(other)}, and they "
            "differ; watch the same clip as far with both"
        )


def pair(
    one: Detections | Tracks,
    other: Detections | Tracks,
    least: float,
    *,
    score: float = 1.0,
    strange: Callable[[Indices, Indices], NDArray[np.bool_]] | None = None,
) -> tuple[Indices, Indices]:
    """Rows of one label that overlap by at least `least`, one to one, for the greatest sum of overlaps.

    score: greatest difference of scores. Overlaps that differ by less than TIE are alike, as those of equal
    boxes are: then pairs that `strange` says nothing against win, and those of like scores.
    """
    if one.angle is not None and other.angle is not None:
        near = turned_overlaps(_turned(one), _turned(other))
        shared = 1.0 - near.cost
    else:
        near = overlaps(one.xyxy, other.xyxy)
        shared = iou(one.xyxy[near.row].astype(np.float64), other.xyxy[near.column].astype(np.float64))
    apart = np.abs(one.score[near.row].astype(np.float64) - other.score[near.column])
    alike = one.label[near.row] == other.label[near.column]
    alike &= (shared >= least) & (shared > 0) & (apart <= score)
    order = apart if strange is None else (apart + strange(near.row, near.column)) / 2
    pairs = Pairs(near.row, near.column, 1.0 - shared + TIE * order).keep(alike)
    return assign(pairs, 1.0 + TIE, len(one), len(other))


def _without_same(one: Detections, other: Detections, config: MatchConfig) -> int:
    """How many confident detections of `one` have no same one among all of `other`."""
    confident = _above(one, config.conf)
    other = _above(other, config.floor)
    row, _ = pair(confident, other, config.iou, score=config.score)
    return len(confident) - len(row)


def _above(found: Detections, conf: float) -> Detections:
    return _take(found, np.flatnonzero(found.score >= conf))


def _take(found: Detections, rows: Indices) -> Detections:
    return replace(
        found,
        xyxy=found.xyxy[rows],
        score=found.score[rows],
        label=found.label[rows],
        embedding=None if found.embedding is None else found.embedding[rows],
        angle=None if found.angle is None else found.angle[rows],
        mask=None if found.mask is None else found.mask[rows],
    )


def _turned(found: Detections | Tracks) -> Floats:
    """(N, 5) cxcywhr of rotated boxes."""
    assert found.angle is not None
    return turned(found.xyxy.astype(np.float64), found.angle.astype(np.float64))


def _count(findings: Findings, conf: float) -> int:
    return sum(int((found.score >= conf).sum()) for found in findings.detections)


def _cosine(a: NDArray[Any], b: NDArray[Any]) -> Floats:
    """(N,) between the rows of two (N, D); 1 where both are zero."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    dots = np.einsum("nd,nd->n", a, b)
    cosine: Floats = np.where(norms > 0, dots / np.maximum(norms, np.finfo(np.float64).tiny), 1.0)
    return cosine


def _histogram(findings: Findings) -> tuple[int, ...]:
    scores = np.concatenate([found.score for found in findings.detections])
    return tuple(np.histogram(scores, BINS, (0.0, 1.0))[0].tolist())


def _curve(
    found: Sequence[Detections], truth: Sequence[Detections], *, by_label: bool
) -> tuple[Floats, Floats, Floats]:
    """Thresholds, falling, with precision and recall of what is at or above each.

    In a frame the higher score chooses first, the object it overlaps most that nobody has yet (PASCAL VOC's
    rule, but for the object: VOC counts a detection as wrong whose best object is taken).
    """
    scores, right = [], []
    for here, objects in zip(found, truth, strict=True):
        order = np.argsort(-here.score, kind="stable")
        if here.angle is not None and objects.angle is not None:
            shared = rotated_iou(_turned(here)[order][:, None], _turned(objects)[None])
        else:
            shared = iou(here.xyxy[order][:, None].astype(np.float64), objects.xyxy[None].astype(np.float64))
        if by_label:
            shared = np.where(here.label[order][:, None] == objects.label[None], shared, 0.0)
        hits = np.zeros(len(order), bool)
        for place in np.flatnonzero(shared.max(axis=1, initial=0.0) >= PAIRED):
            best = int(shared[place].argmax())
            hits[place] = shared[place, best] >= PAIRED
            if hits[place]:
                shared[:, best] = 0.0
        scores.append(here.score[order])
        right.append(hits)
    score = np.concatenate(scores).astype(np.float64)
    order = np.argsort(-score, kind="stable")
    score = score[order]
    hit = np.cumsum(np.concatenate(right)[order])
    total = sum(map(len, truth))
    last = np.append(np.flatnonzero(np.diff(score)), len(score) - 1) if len(score) else np.empty(0, np.int64)
    return score[last], hit[last] / (last + 1), hit[last] / max(total, 1)
