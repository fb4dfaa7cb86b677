"""The parity receipt of two engines: what they make of the same pixels, and of the same clip.

    pixels       what each side's manifest makes of a frame
    outputs      tensors, both networks fed what the first side's manifest says
    detections   each side through its own front end, matched as sets
    tracks       made from them, against each other and against ground truth
    search       where a difference begins, if asked for

Knows the order of things; how each is measured, the modules it calls know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch

from tracker.association import make_association
from tracker.deploy.build import TOLERANCES
from tracker.deploy.islands import Array
from tracker.deploy.parity.detections import MatchConfig, compare_detections, watch
from tracker.deploy.parity.locate import Output, locate
from tracker.deploy.parity.receipt import About, Pixels, Receipt, TrackScores
from tracker.deploy.parity.sides import Side
from tracker.deploy.parity.tensors import Comparison, compare, explain
from tracker.deploy.parity.tracks import compare_tracks, follow, score, truth_of
from tracker.deploy.plan import BuildConfig
from tracker.errors import ConfigError, SourceError, TrackerError
from tracker.evaluation import Benchmark, trackeval_module
from tracker.frontends import FRONTENDS
from tracker.frontends.fairmot import peak_scores
from tracker.frontends.preprocess import Preprocessor
from tracker.manifest import Manifest
from tracker.sources import open_source
from tracker.types import Frame

# Greatest |b − a| / |a| of an output that is no fault: FP32 summed in another order, FP32 that TensorRT
# rounds to TF32, and INT8 (the shipped model's worst output has 0.1, YOLOX-nano's 0.19). Half precision as
# for building.
EXACT, TF32, INT8 = 1e-3, 1e-2, 0.3

Step = Callable[[str, float | None], object]  # what goes on, and how far it is, 0 to 1


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareConfig:
    """How to compare.

    frames: of the clip, evenly spread, whose tensors are compared; 0 compares none. max_frames: of the clip.
    tolerance: greatest relative error of an output (`TensorParity.relative`); None goes by the precision.
    match: see `MatchConfig`. track_iou: least overlap of the same row of the same track.
    tracker, classes, device: as for `track`. locate: look for where a difference begins.
    build: how pieces of a TensorRT engine are built for that.
    truth, benchmark, scale: ground truth, and how `evaluate` takes it.
    """

    frames: int = 8
    max_frames: int | None = None
    tolerance: float | None = None
    match: MatchConfig = field(default_factory=MatchConfig)
    track_iou: float = 0.9
    tracker: str | None = None
    classes: tuple[str, ...] = ()
    device: str = "auto"
    locate: bool = False
    build: BuildConfig = field(default_factory=BuildConfig)
    truth: Path | None = None
    benchmark: Benchmark = "auto"
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.frames < 0:
            raise ConfigError(f"frames is {self.frames}; it must be at least 0")
        if self.max_frames is not None and self.max_frames < 1:
            raise ConfigError(f"max_frames is {self.max_frames}; it must be at least 1")
        if self.tolerance is not None and not self.tolerance > 0:
            raise ConfigError(f"tolerance is {self.tolerance}; it must be above 0")
        if not 0 < self.track_iou <= 1:
            raise ConfigError(f"track_iou is {self.track_iou}; it must be above 0 and at most 1")
        if self.locate and not self.frames:
            raise ConfigError("--locate needs tensors to look at: give it at least one frame")


def compare_sides(
    a: Side, b: Side, clip: str, config: CompareConfig | None = None, on_step: Step | None = None
) -> Receipt:
    """The receipt of two sides on one clip (anything `open_source` takes).

    Where one side cannot be run to the end, what is known so far is kept and a note says why.
    Raises ConfigError for sides that have nothing in common and where TrackEval is missing, SourceError for a
    clip that cannot be read.
    """
    config, tell = config or CompareConfig(), on_step or (lambda what, share: None)
    trackeval_module()
    if a.manifest.names != b.manifest.names:
        raise ConfigError(
            f"the classes differ: {_some(a.manifest.names)} and {_some(b.manifest.names)}; correct a manifest"
        )
    receipt = Receipt(
        a=_about(a),
        b=_about(b),
        clip=clip,
        tolerance=config.tolerance or tolerance_of(a.manifest, b.manifest),
    )
    if config.frames:
        tell("reading frames", None)
        frames = sample(clip, config.frames, max_frames=config.max_frames)
        images, others = (_prepared(side.manifest, frames) for side in (a, b))
        receipt.pixels = _pixels(a.manifest, b.manifest, images, others)
        worst = _compare_outputs(a, b, images, receipt, tell)
        if config.locate:
            _locate(a, b, images[worst], receipt, config, tell)
    _compare_clip(a, b, receipt, config, tell)
    return receipt


def tolerance_of(a: Manifest, b: Manifest) -> float:
    """What the coarser precision of the two excuses."""

    def of(manifest: Manifest) -> float:
        exact = TF32 if manifest.builder is not None else EXACT
        return {"fp32": exact, "int8": INT8, **TOLERANCES}[manifest.precision]

    return max(of(a), of(b))


def sample(clip: str, count: int, *, max_frames: int | None = None) -> list[Frame]:
    """Up to `count` frames, the first among them, at equal distances, of however long a clip.

    Raises SourceError for a clip that cannot be read or has no frame.
    """
    kept: list[Frame] = []
    stride = 1
    with open_source(clip) as source:
        for place, frame in enumerate(source):
            if place == max_frames:
                break
            if place % stride == 0:
                kept.append(frame)
            if len(kept) == 2 * count:
                kept, stride = kept[::2], 2 * stride
    if not kept:
        raise SourceError(f"{clip} has no frame to compare on: name another clip with --data")
    places = np.linspace(0, len(kept) - 1, min(count, len(kept))).round().astype(int)
    return [kept[place] for place in places]


def _prepared(manifest: Manifest, frames: Sequence[Frame]) -> list[Array]:
    """Each frame as (1, 3, H, W), as the manifest wants it."""
    prepare = Preprocessor(manifest.input, 1)
    return [prepare([frame])[0].numpy().copy() for frame in frames]


def _pixels(a: Manifest, b: Manifest, images: Sequence[Array], others: Sequence[Array]) -> Pixels:
    differs = [
        f"{each.name}: {getattr(a.input, each.name)} and {getattr(b.input, each.name)}"
        for each in fields(a.input)
        if each.name != "name" and getattr(a.input, each.name) != getattr(b.input, each.name)
    ]
    if a.input.size != b.input.size:
        return Pixels(differs=tuple(differs), parity=None, why=None)
    one, other = np.concatenate(images), np.concatenate(others)
    parity = compare(one, other)
    return Pixels(differs=tuple(differs), parity=parity, why=explain(one, other) if parity.max else None)


def _compare_outputs(a: Side, b: Side, images: Sequence[Array], receipt: Receipt, tell: Step) -> int:
    """Fills in the receipt; returns which image the two differ most on."""
    outputs = outputs_of(a.manifest, b.manifest)
    sizes = [f"{side.manifest.input.size[0]}×{side.manifest.input.size[1]}" for side in (a, b)]
    if sizes[0] != sizes[1]:
        receipt.notes.append(f"tensors: not compared, the inputs are {sizes[0]} and {sizes[1]}")
        return 0
    if not outputs:
        roles = [", ".join(side.manifest.outputs) for side in (a, b)]
        receipt.notes.append(f"tensors: not compared, the outputs are {roles[0]} and {roles[1]}")
        return 0
    comparisons = {output.role: Comparison(peaks=output.peaks) for output in outputs}
    errors = []
    for place, image in enumerate(images):
        tell("comparing tensors", place / len(images))
        one, other, error = _by_name(a, image), _by_name(b, image), 0.0
        for output in outputs:
            reference = _as_peaks(one[output.a]) if output.a_logits else one[output.a]
            candidate = _as_peaks(other[output.b]) if output.b_logits else other[output.b]
            if reference.shape != candidate.shape:
                raise ConfigError(
                    f"the output {output.role} has shapes {reference.shape} and {candidate.shape}: these are "
                    "not the same network"
                )
            alone = Comparison(peaks=output.peaks)
            for comparison in (alone, comparisons[output.role]):
                comparison.add(reference, candidate)
            error = max(error, alone.result().relative)
        errors.append(error)
    receipt.outputs = {role: comparison.result() for role, comparison in comparisons.items()}
    return int(np.argmax(errors))


def outputs_of(a: Manifest, b: Manifest) -> list[Output]:
    """Outputs of one role, in A's order. A heat map's logits and its peaks are compared as peaks."""
    outputs = []
    for role, name in a.outputs.items():
        other = {"hm": "peaks", "peaks": "hm"}.get(role, "")
        if role in b.outputs:
            outputs.append(Output(role=role, a=name, b=b.outputs[role], peaks=role == "peaks"))
        elif other in b.outputs:
            logits = {"a_logits": role == "hm", "b_logits": role == "peaks"}
            outputs.append(Output(role="peaks", a=name, b=b.outputs[other], peaks=True, **logits))
    return outputs


def _by_name(side: Side, image: Array) -> Mapping[str, Array]:
    heads = side.heads(image)
    return {side.manifest.outputs[role]: head for role, head in heads.items()}


def _as_peaks(logits: Array) -> Array:
    peaks: Array = peak_scores(torch.from_numpy(logits)).numpy()
    return peaks


def _locate(a: Side, b: Side, image: Array, receipt: Receipt, config: CompareConfig, tell: Step) -> None:
    pixels = receipt.pixels
    if pixels is not None and (pixels.parity is None or pixels.parity.max > 0):
        told = "; ".join(pixels.differs)
        receipt.first.append(
            f"before the network, in its pixels ({told})" + (f": {pixels.why}" if pixels.why else "")
        )
    beyond = receipt.beyond()
    if not beyond:
        return
    probes = [side.probe([image], config.build, config.device) for side in (a, b)]
    for refusal in probes:
        if isinstance(refusal, str):
            receipt.notes.append(f"layers: not located, {refusal}")
            return
    one, other = (probe for probe in probes if not isinstance(probe, str))
    wanted = [output for output in outputs_of(a.manifest, b.manifest) if output.role in beyond]

    def count(layers: int) -> None:
        tell(f"{layers} layers compared", None)

    search = locate(one, other, wanted, receipt.tolerance, count)
    receipt.search = search
    receipt.first += [location.words() for location in search.locations]
    if not search.locations:
        receipt.notes.append(
            "layers: not located, the difference is not there in the frame with the greatest, run again as "
            f"{one.about} and {other.about}"
        )


def _compare_clip(a: Side, b: Side, receipt: Receipt, config: CompareConfig, tell: Step) -> None:
    """Detections and tracks of the whole clip, each side through its own pipeline."""
    found = []
    for letter, side in (("A", a), ("B", b)):
        done = 0

        def count(more: int, letter: str = letter) -> None:
            nonlocal done
            done += more
            tell(f"{letter}: {done} frames", None)

        try:
            detector = side.detector(conf=min(config.match.floor, _low(config, side)), classes=config.classes)
            try:
                found.append(watch(detector, receipt.clip, max_frames=config.max_frames, on_frames=count))
            finally:
                detector.close()
        except (SourceError, ConfigError):
            raise
        except TrackerError as error:
            receipt.notes.append(f"detections and tracks: not compared, {letter} does not run: {error}")
            return
    tell("comparing detections and tracks", None)
    one, other = found
    truth = config.truth
    objects = truth_of(truth, one.numbers, scale=config.scale) if truth is not None else None
    receipt.detections = compare_detections(one, other, config.match, truth=objects)
    tracked = [
        follow(findings, tracker=_tracker(config, side), settings=_settings(config, side))
        for findings, side in zip(found, (a, b), strict=True)
    ]
    receipt.tracks = compare_tracks(tracked[0], tracked[1], least_iou=config.track_iou)
    scores = TrackScores(b_against_a=score(tracked[1], tracked[0]), a_against_b=score(tracked[0], tracked[1]))
    if truth is not None:
        against = [score(each, truth, benchmark=config.benchmark, scale=config.scale) for each in tracked]
        scores = TrackScores(
            b_against_a=scores.b_against_a, a_against_b=scores.a_against_b, a=against[0], b=against[1]
        )
    receipt.scores = scores


def _tracker(config: CompareConfig, side: Side) -> str:
    return config.tracker or ("jde" if FRONTENDS[side.manifest.frontend].embeds else "byte")


def _settings(config: CompareConfig, side: Side) -> Mapping[str, float]:
    """What was fitted to this engine's scores."""
    return side.manifest.thresholds(_tracker(config, side))


def _low(config: CompareConfig, side: Side) -> float:
    """Down to where the tracker uses detections."""
    association = make_association(_tracker(config, side), settings=_settings(config, side))
    low: float = association.config.low
    return low


def _about(side: Side) -> About:
    manifest = side.manifest
    return About(
        path=str(side.path),
        sha256=manifest.engine_sha256,
        precision=manifest.precision,
        runs=side.runtime.description,
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
