"""What quantising changes for tracking: detections and tracks of a changed network against the FP32 one's.

The judge holds a clip and what FP32 finds there. Everything that is judged goes through the same front end
and pipeline as in `track`; only the network differs. How detections and tracks are compared, `parity` and
`parity.tracks` know.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tracker.association import make_association
from tracker.boxes import iou
from tracker.deploy.parity.detections import (
    PAIRED,
    DetectionParity,
    Findings,
    MatchConfig,
    compare_detections,
    pair,
    watch,
)
from tracker.deploy.parity.tracks import follow, score, truth_of
from tracker.errors import ConfigError
from tracker.evaluation import Benchmark, Scores, trackeval_module
from tracker.frontends import FRONTENDS
from tracker.frontends.detector import Detector
from tracker.manifest import Manifest
from tracker.runtimes.onnx import OnnxRuntime
from tracker.sources import open_source
from tracker.types import Detections, Frame

SHOWN = ("HOTA", "DetA", "AssA", "MOTA", "IDF1", "IDSW", "FP", "FN")

Thresholds = Mapping[str, Mapping[str, float]]  # by tracker, fields of its config
Told = Callable[[int], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeConfig:
    """clip: anything `open_source` takes. truth: its MOT ground truth; without it FP32's own tracks are the
    truth, and its HOTA is 100. scale: multiplies boxes of results, for a ground truth in other pixels.
    classes: to track, empty for all. tracker: None is as for `track`. max_frames: of the clip, from its
    start. device: that the networks run on.
    """

    clip: str | Path
    truth: Path | None = None
    scale: float = 1.0
    benchmark: Benchmark = "auto"
    classes: tuple[str, ...] = ()
    tracker: str | None = None
    max_frames: int | None = None
    device: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One network judged. scores: of its tracks; refitted: with `thresholds`, which are None where they gain
    nothing. loss: HOTA that is lost, with the better of both.
    """

    scores: Scores
    refitted: Scores | None
    thresholds: Thresholds | None
    detections: DetectionParity
    loss: float

    @property
    def best(self) -> Scores:
        return self.refitted if self.refitted is not None else self.scores


@dataclass(slots=True)
class Judge:
    """reference: what FP32 finds. scores: of its tracks. tracker: that follows."""

    manifest: Manifest
    config: JudgeConfig
    reference: Findings
    tracker: str
    scores: Scores
    _truth: list[Detections] | None = field(repr=False)

    @classmethod
    def of(
        cls, model: onnx.ModelProto, manifest: Manifest, config: JudgeConfig, on_frames: Told | None = None
    ) -> Judge:
        """Watch the clip with the FP32 network. Raises as `watch` and `score` do, ConfigError for a clip with
        nothing to track and without TrackEval.
        """
        trackeval_module()
        with opened(model, manifest, config) as frontend:
            found = watch(frontend, config.clip, max_frames=config.max_frames, on_frames=on_frames)
        tracker = config.tracker or ("jde" if found.embeds else "byte")
        followed = follow(found, tracker=tracker)
        if not followed.rows:
            raise ConfigError(
                f"the network finds nothing to track in {config.clip} in fp32: evaluate on another clip"
            )
        scores = score(followed, config.truth or followed, benchmark=config.benchmark, scale=config.scale)
        truth = truth_of(config.truth, found.numbers, scale=config.scale) if config.truth else None
        assert scores is not None, "it has rows"
        return cls(manifest, config, found, tracker, scores, truth)

    def verdict(self, model: onnx.ModelProto, on_frames: Told | None = None) -> Verdict:
        """Raises EngineError for a network that answers NaN."""
        config = self.config
        with opened(model, self.manifest, config) as frontend:
            found = watch(frontend, config.clip, max_frames=config.max_frames, on_frames=on_frames)
        plain = self._scores(found, None)
        thresholds = refit(self.reference, found)
        refitted = self._scores(found, thresholds[self.tracker])
        better = refitted["HOTA"] > plain["HOTA"]
        return Verdict(
            scores=plain,
            refitted=refitted if better else None,
            thresholds=thresholds if better else None,
            detections=compare_detections(
                self.reference, found, MatchConfig(conf=_high(self.tracker)), truth=self._truth
            ),
            loss=self.scores["HOTA"] - max(plain["HOTA"], refitted["HOTA"]),
        )

    def _scores(self, found: Findings, settings: Mapping[str, float] | None) -> Scores:
        config = self.config
        followed = follow(found, tracker=self.tracker, settings=settings)
        truth = config.truth or follow(self.reference, tracker=self.tracker)
        scores = score(followed, truth, benchmark=config.benchmark, scale=config.scale)
        assert scores is not None, "the reference has rows"
        return scores


@contextmanager
def opened(model: onnx.ModelProto, manifest: Manifest, config: JudgeConfig) -> Iterator[Detector]:
    """The network as its front end. The manifest's hashes are not looked at."""
    kind = FRONTENDS[manifest.frontend]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        onnx.save(model, path)
        runtime = OnnxRuntime(path, device=config.device)
        frontend = kind(runtime, manifest, kind.config_type(classes=config.classes))
        try:
            yield frontend
        finally:
            frontend.close()


def refit(reference: Findings, candidate: Findings) -> dict[str, dict[str, float]]:
    """By tracker, the score thresholds above which the candidate has as many detections as the reference has
    above the tracker's own: quantising shifts and squeezes scores.

    `low` stays: what lies there only keeps tracks alive.
    """
    ours, theirs = (
        np.sort(np.concatenate([found.score for found in findings.detections]).astype(np.float64))[::-1]
        for findings in (reference, candidate)
    )
    trackers = ("jde", "byte") if reference.embeds else ("byte",)
    fitted = {}
    for tracker in trackers:
        settings: Any = make_association(tracker).config
        names = [name for name in ("high", "birth") if hasattr(settings, name)]
        fitted[tracker] = {
            name: _as_many(theirs, int((ours > getattr(settings, name)).sum()), getattr(settings, name))
            for name in names
        }
        if tracker == "byte":  # as published, tracks begin with confident detections only
            fitted[tracker]["birth"] = max(fitted[tracker].values())
    return fitted


def _as_many(falling: np.ndarray, count: int, default: float) -> float:
    """A threshold that `count` of the falling scores exceed; the default where there are too few."""
    if not 0 < count < len(falling):
        return default
    return round(float(falling[count - 1] + falling[count]) / 2, 4)


def _high(tracker: str) -> float:
    settings: Any = make_association(tracker).config
    return float(settings.high)


def samples(clip: str | Path, count: int, *, max_frames: int | None = None) -> list[Frame]:
    """`count` frames evenly spread over the clip, or all it has. Raises SourceError."""
    with open_source(clip) as source:
        total = sum(1 for _ in islice(source, max_frames))
    wanted = {round(k * (total - 1) / max(count - 1, 1)) for k in range(min(count, total))}
    with open_source(clip) as source:
        return [frame for place, frame in enumerate(islice(source, total)) if place in wanted]


def found_in(frontend: Detector, frames: Sequence[Frame]) -> list[Detections]:
    """Detections of single frames."""
    size = frontend.usual_batch
    work = [frontend.submit(frames[first : first + size]) for first in range(0, len(frames), size)]
    return [found for each in work for found in each.result()]


def disagreement(reference: Sequence[Detections], candidate: Sequence[Detections]) -> float:
    """How much detections differ, per detection of the reference, from 0.

    A detection that the other side lacks counts with its score. One that both have counts with the
    difference of scores, and in proportion to its score with 1 − IoU and 1 − cosine.
    """
    total = weight = 0.0
    for one, other in zip(reference, candidate, strict=True):
        weight += float(one.score.sum())
        row, column = pair(one, other, PAIRED)
        score = one.score[row].astype(np.float64)
        total += float(one.score.sum() - score.sum()) + float(other.score.sum() - other.score[column].sum())
        total += float(np.abs(score - other.score[column]).sum())
        a, b = one.xyxy[row].astype(np.float64), other.xyxy[column].astype(np.float64)
        total += float((score * (1 - iou(a, b))).sum())
        if one.embedding is not None and other.embedding is not None:
            a, b = one.embedding[row].astype(np.float64), other.embedding[column].astype(np.float64)
            norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
            total += float((score * (1 - (a * b).sum(axis=1) / np.maximum(norms, 1e-12))).sum())
    return total / weight if weight else 0.0


def check_clip(config: JudgeConfig) -> None:
    """Raise at once for what would only show after minutes of calibration."""
    with open_source(config.clip):
        pass
    if config.truth is not None and not config.truth.is_file():
        raise ConfigError(f"{config.truth} is missing: name the clip's ground truth with --gt")
