"""FP32 ONNX files into INT8 or half precision ones that track as well, each with its manifest and a report.

    observe     ranges of every tensor over frames of the user's own footage   (INT8)
    judge       tracking on a clip, against the FP32 network's
    search      which layers must stay as they are, where the judge is not content

What can be reduced and how, `quantise` (INT8) and `precision` (half) know.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, get_args

import onnx

from tracker import manifest as manifests
from tracker.deploy.build import COMPARED, load, manifest_of
from tracker.deploy.calibration.frames import Choice, find
from tracker.deploy.calibration.judge import Judge, JudgeConfig, Verdict, check_clip, samples
from tracker.deploy.calibration.observe import Observed, Progress, observe
from tracker.deploy.calibration.ranges import METHODS, Method
from tracker.deploy.calibration.search import Found, Try, fewest, rank
from tracker.deploy.islands import MOVEMENT, Half, HalfConfig, Islands, precision_of
from tracker.deploy.plan import partial_file
from tracker.deploy.precision import rounded, to_half
from tracker.deploy.quantise import Quantiser
from tracker.errors import ConfigError, EngineError
from tracker.evaluation import Scores
from tracker.frontends import FRONTENDS
from tracker.manifest import Calibration, Manifest

Reduced = Literal["int8", "fp16", "bf16"]
FRAMES = 256  # NVIDIA's guide finds about 500 images enough for ImageNet classifiers; video has more alike


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationConfig:
    """precision: what to reduce to. frames, seed: to calibrate with, INT8 alone. method: of ranges; "best"
    takes the one with which the judge loses least. keep: regular expressions of layers that stay in any case.
    max_hota_loss: in points of 100. rank_frames: of the judge's clip, to rank layers on; 0 ranks them only
    where that is needed.
    """

    precision: Reduced = "int8"
    frames: int = FRAMES
    seed: int = 0
    method: Method | Literal["best"] = "mse"
    keep: tuple[str, ...] = ()
    max_hota_loss: float = 0.5
    rank_frames: int = 16

    def __post_init__(self) -> None:
        if self.precision not in get_args(Reduced):
            raise ConfigError(f"precision is {self.precision!r}; it must be {', '.join(get_args(Reduced))}")
        if self.method not in (*METHODS, "best"):
            raise ConfigError(f"method is {self.method!r}; it must be {', '.join(METHODS)} or best")
        for key, least in (("frames", 1), ("seed", 0), ("rank_frames", 0)):
            if getattr(self, key) < least:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must be at least {least}")
        if not 0 <= self.max_hota_loss <= 100:
            raise ConfigError(f"max_hota_loss is {self.max_hota_loss}; it must be 0 to 100")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What the judge says. reference: FP32's scores. verdict: of what was written. methods: loss by method
    where they were compared. ranking: by layer, see `rank`; empty where there was none. tries: of the search.
    """

    reference: Scores
    verdict: Verdict
    methods: dict[str, float]
    ranking: dict[str, float]
    tries: tuple[Try[Verdict | None], ...]
    truth: bool
    tracker: str
    frames: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """What came of it. layers: all that could be reduced. high: those that by rule are not, and why. kept:
    those that were left out of it. bytes: of the files before and after. choice: frames of INT8's ranges.
    """

    manifest: Manifest
    layers: tuple[str, ...]
    high: dict[str, str]
    kept: tuple[str, ...]
    bytes: tuple[int, int]
    choice: Choice | None
    resumed: int
    judged: Judged | None


class Reduction(Protocol):
    """A graph whose layers can be reduced. high: those that are not, and why."""

    layers: tuple[str, ...]
    high: dict[str, str]

    def written(self, keep: Sequence[str]) -> onnx.ModelProto:
        """The graph to write."""
        ...

    def judged(self, keep: Sequence[str]) -> onnx.ModelProto:
        """One that answers as it will, for machines that compute in FP32."""
        ...

    def alone(self, layer: str) -> onnx.ModelProto:
        """The same with one layer reduced."""
        ...


class Integers:
    """INT8, with ranges of one method."""

    def __init__(self, quantiser: Quantiser, observed: Observed, method: Method) -> None:
        self._quantiser = quantiser
        self._ranges = {name: each.limit(method) for name, each in observed.histograms.items()}
        self.layers, self.high = tuple(quantiser.layers), quantiser.high

    def written(self, keep: Sequence[str]) -> onnx.ModelProto:
        return self._quantiser.write(self._ranges, keep)

    judged = written

    def alone(self, layer: str) -> onnx.ModelProto:
        return self._quantiser.write(self._ranges, only=layer)


class Halves:
    """FP16 or bfloat16 around the islands that stay in FP32 anyway."""

    def __init__(self, model: onnx.ModelProto, manifest: Manifest, kind: Half) -> None:
        compared = tuple(name for role, name in manifest.outputs.items() if role in COMPARED)
        self._config = HalfConfig(kind=kind, compared=compared)
        islands = Islands(model, self._config)
        self._model = islands.model
        nodes = [node for node in self._model.graph.node if node.op_type not in MOVEMENT]
        self.layers = tuple(node.name for node in nodes if any(islands.halves(node)))
        self.high = {node.name: "an island" for node in nodes if node.name in islands.wide}

    def written(self, keep: Sequence[str]) -> onnx.ModelProto:
        return to_half(self._model, self._keeping(keep))

    def judged(self, keep: Sequence[str]) -> onnx.ModelProto:
        return rounded(self._model, self._keeping(keep))

    def alone(self, layer: str) -> onnx.ModelProto:
        return self.judged([name for name in self.layers if name != layer])

    def _keeping(self, names: Sequence[str]) -> HalfConfig:
        return dataclasses.replace(self._config, keep=tuple(map(re.escape, names)))


def calibrate(
    source: Path,
    out: Path,
    data: Sequence[str | Path],
    config: CalibrationConfig,
    judging: JudgeConfig | None = None,
    progress: Progress | None = None,
) -> Calibrated:
    """Write the ONNX file `source`, which has its manifest beside it, to `out` in lower precision.

    data: to calibrate INT8 with, see `frames.find`. judging: without it no layer is searched for.
    What was observed is kept beside `out`, so that an interrupted run goes on.

    Raises ConfigError for what does not fit together, SourceError for footage that cannot be read,
    EngineError for networks that cannot be reduced within bounds, SinkError where nothing can be written.
    Then no file is left and an old one stays.
    """
    told = progress or (lambda what, done, total: None)
    _check_names(source, out)
    manifest = manifest_of(source)
    model = load(source)
    if precision_of(model) != "fp32":
        raise ConfigError(
            f"{source} is in {precision_of(model)} already: start from the one in fp32 it was made of"
        )
    _check_input(model, manifest, source)
    if judging is None and (config.precision != "int8" or config.method == "best"):
        needs = f"--precision {config.precision}" if config.precision != "int8" else "--method best"
        raise ConfigError(f"{needs} needs a clip to judge by: name one with --evaluate")
    if judging is not None:
        check_clip(judging)
    observed: Observed | None = None
    reductions: dict[str, Reduction]
    if config.precision == "int8":
        quantiser = Quantiser(model)
        model = quantiser.model
        forced = _called(list(quantiser.layers), config.keep)
        observed = observe(
            model,
            manifest,
            quantiser.tensors,
            find(data),
            count=config.frames,
            seed=config.seed,
            state=out.with_name(f"{out.stem}.calibration.npz"),
            progress=told,
        )
        methods = METHODS if config.method == "best" else (config.method,)
        reductions = {method: Integers(quantiser, observed, method) for method in methods}
    else:
        halves = Halves(model, manifest, config.precision)
        forced = _called(halves.layers, config.keep)
        reductions = {config.precision: halves}
    first = next(iter(reductions.values()))
    method, kept, judged = next(iter(reductions)), tuple(forced), None
    if judging is not None:
        method, kept, judged = _search(model, manifest, reductions, forced, config, judging, told)
    if not set(first.layers) - set(kept):
        raise EngineError(
            f"not one layer can be in {config.precision} within the bounds: raise --max-hota-loss, calibrate "
            "with frames more like the clip's, or try --precision bf16"
        )
    written = reductions[method].written(kept).SerializeToString()
    with partial_file(out) as file, file.step():
        file.write(written)
    about = Calibration(
        method=method if config.precision == "int8" else None,
        frames=0 if observed is None else len(observed.choice.places),
        seed=config.seed,
        kept=kept,
        thresholds=(judged.verdict.thresholds or {}) if judged else {},
    )
    digest = manifests.sha256(out)
    described = dataclasses.replace(
        manifest, precision=config.precision, onnx_sha256=digest, engine_sha256=digest, calibration=about
    )
    manifests.write(described, manifests.beside(out))
    return Calibrated(
        manifest=described,
        layers=first.layers,
        high=first.high,
        kept=kept,
        bytes=(source.stat().st_size, len(written)),
        choice=observed.choice if observed else None,
        resumed=observed.resumed if observed else 0,
        judged=judged,
    )


def _search(
    model: onnx.ModelProto,
    manifest: Manifest,
    reductions: dict[str, Reduction],
    forced: Sequence[str],
    config: CalibrationConfig,
    judging: JudgeConfig,
    told: Progress,
) -> tuple[str, tuple[str, ...], Judged]:
    """Method, layers to keep, and what the judge says of both."""
    judge = Judge.of(model, manifest, judging, _counting(told, "tracking in fp32"))
    total = len(judge.reference.numbers)

    refused: list[EngineError] = []

    def look(reduction: Reduction, keep: Sequence[str]) -> Verdict | None:
        """None for a network that overflows."""
        kept = len(keep) - len(forced)
        counted = _counting(told, f"tracking, {kept} layers kept" if kept else "tracking", total)
        try:
            return judge.verdict(reduction.judged(keep), counted)
        except EngineError as error:
            if config.precision == "int8":
                raise
            refused.append(error)
            return None

    verdicts = {method: look(reduction, forced) for method, reduction in reductions.items()}
    method = min(verdicts, key=lambda name: _loss(verdicts[name]))
    reduction = reductions[method]
    free = [name for name in reduction.layers if name not in forced]
    good = _loss(verdicts[method]) <= config.max_hota_loss
    ranking: dict[str, float] = {}
    if free and (config.rank_frames or not good):
        frames = samples(judging.clip, config.rank_frames or 16, max_frames=judging.max_frames)
        ranking = rank(model, manifest, free, reduction.alone, frames, judging,
                       lambda done: told("ranking layers", done, len(free)))  # fmt: skip

    def judged(keep: Sequence[str]) -> tuple[Verdict | None, bool]:
        verdict = look(reduction, [*forced, *keep]) if keep else verdicts[method]
        return verdict, _loss(verdict) <= config.max_hota_loss

    found: Found[Verdict | None] | None = fewest(list(ranking) or free, judged)
    if found is None or found.verdict is None:
        why = f"answers wrongly ({refused[-1]})" if refused else "loses too much: raise --max-hota-loss"
        raise EngineError(f"even with every layer kept, {config.precision} {why}")
    wanted = {*forced, *found.kept}
    return (
        method,
        tuple(name for name in reduction.layers if name in wanted),
        Judged(
            reference=judge.scores,
            verdict=found.verdict,
            methods={name: _loss(v) for name, v in verdicts.items()} if len(verdicts) > 1 else {},
            ranking=ranking,
            tries=found.tries,
            truth=judging.truth is not None,
            tracker=judge.tracker,
            frames=total,
        ),
    )


def _loss(verdict: Verdict | None) -> float:
    return float("inf") if verdict is None else verdict.loss


def _counting(told: Progress, what: str, total: int | None = None) -> Callable[[int], None]:
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        told(what, done, total)

    return count


def _called(layers: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Layers whose names the patterns match in full. Raises ConfigError for one that matches none."""
    wanted: set[str] = set()
    for pattern in patterns:
        try:
            matching = {name for name in layers if re.fullmatch(pattern, name)}
        except re.error as error:
            raise ConfigError(f"{pattern!r} is no regular expression of layers' names: {error}") from error
        if not matching:
            some = ", ".join(layers[:3])
            raise ConfigError(f"no layer is called {pattern!r}: layers are called {some}, …, {layers[-1]}")
        wanted |= matching
    return [name for name in layers if name in wanted]


def _check_names(source: Path, out: Path) -> None:
    if out.suffix != ".onnx":
        raise ConfigError(f"{out} is no name for an ONNX file: end it in .onnx")
    if out.resolve() == source.resolve():
        raise ConfigError(f"{out} is the FP32 network: write to another file")


def _check_input(model: onnx.ModelProto, manifest: Manifest, source: Path) -> None:
    """ConfigError for a graph that does not take the manifest's images, EngineError for open sizes."""
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = {value.name: value for value in model.graph.input if value.name not in stored}
    spec = manifest.input
    kind = FRONTENDS.get(manifest.frontend)
    if list(inputs) != [spec.name, *(kind.parts if kind else ())]:
        raise ConfigError(
            f"{source} takes {', '.join(inputs)}, its manifest feeds {spec.name}: correct the manifest"
        )
    sizes = [
        each.dim_value if each.HasField("dim_value") else (each.dim_param or "?")
        for each in inputs[spec.name].type.tensor_type.shape.dim
    ]
    shown = "×".join(map(str, sizes))
    if len(sizes) != 4 or not all(isinstance(size, int) and size > 0 for size in sizes[1:]):
        raise EngineError(
            f"{source} takes {shown} images, of open size: only the batch may be open; export it with a "
            "fixed size"
        )
    if sizes[1:] != [3, spec.size[1], spec.size[0]]:
        raise ConfigError(
            f"{source} takes {shown} images, its manifest says {spec.size[0]}×{spec.size[1]}: it is of "
            "another model; write it again with tools/manifest.py"
        )
