"""ONNX files into TensorRT engines, each with its manifest.

What must go together: an ONNX file with its manifest, the precision asked for and the graph's own, half
precision and the answers in FP32. How a graph is cast is `precision`'s; how it is built, `plan`'s.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

from tracker import manifest as manifests
from tracker.deploy.feeds import Feeds
from tracker.deploy.islands import Half, HalfConfig, precision_of
from tracker.deploy.lower import lowered
from tracker.deploy.parts import compile_parts
from tracker.deploy.plan import BuildConfig, Progress, builder_held, compile_plan, partial_file
from tracker.deploy.plugin import compile_fused, require
from tracker.deploy.precision import dense_upsampling, relative_errors, to_half
from tracker.deploy.segments import DeformChoice, choose, compile_segments
from tracker.errors import ConfigError, EngineError
from tracker.frontends import FRONTENDS
from tracker.manifest import Manifest, Precision
from tracker.runtimes.onnx_parts import parts_of
from tracker.runtimes.trt import trt_module
from tracker.types import Frame

# Greatest |half − FP32| / |FP32| of an output. FairMOT's are below 0.005 in FP16 and 0.02 in bfloat16;
# YOLOX-nano's, whose first layers multiply what they are given, 0.024 and 0.10.
TOLERANCES: dict[Precision, float] = {"fp16": 0.05, "bf16": 0.2}
COMPARED = ("hm",)  # roles of outputs in which front ends look for peaks


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """What came of it. errors: by output, of half precision against FP32, empty where nothing was cast.
    deform: how its deformable convolutions run, None where it has none. notes: what is not as asked for.
    """

    manifest: Manifest
    deform: DeformChoice | None
    errors: dict[str, float]
    bytes: int
    seconds: float
    notes: tuple[str, ...] = ()


def build(
    source: Path,
    out: Path,
    config: BuildConfig,
    *,
    precision: Precision | None = None,
    half: HalfConfig | None = None,
    frames: Sequence[Frame] = (),
    deform: DeformChoice | None = None,
    progress: Progress | None = None,
) -> Built:
    """Build the ONNX file `source`, which has its manifest beside it, into `out` with a manifest beside it.

    precision: None leaves the graph as it is; "fp16" and "bf16" cast an FP32 graph, `half` says how
    (its kind follows precision); "int8" casts what calibration left in FP32 to FP16.
    frames: to check a cast graph with, on the CPU before anything is built; without any it is not checked.
    deform: see `segments.choose`; None takes TensorRT's own DeformConv where it has one.
    progress: called from this thread while it waits, with what goes on and how far it is, 0 to 1 or None.

    Raises ConfigError for what does not fit together, EngineError where TensorRT is missing or refuses or
    half precision answers otherwise than FP32, SinkError where nothing can be written. Then no engine is
    left and an old one stays.
    """
    if out.suffix not in (".engine", ".plan"):
        raise ConfigError(f"{out} is no name for an engine: end it in .engine")
    trt_module(config.builder)  # before minutes of work
    manifest = manifest_of(source)
    model = _sized(load(source), manifest)
    with partial_file(out) as file, builder_held(config):
        if progress is not None:
            progress("comparing with fp32" if frames else "casting", None)
        deform = choose(model, config, deform)
        if deform == "fused":
            require(trt_module(config.builder))
        model = lowered(model) if deform == "lower" else model
        model, errors = _in_precision(model, manifest, precision, half or HalfConfig(), frames)
        parts = parts_of(model)
        if len(parts) > 1:
            plan = compile_parts(parts, FRONTENDS[manifest.frontend].parts, config, progress)
        else:
            compiled = {"segments": compile_segments, "fused": compile_fused}.get(deform or "", compile_plan)
            plan = compiled(model, config, progress)
        with file.step():
            file.write(plan.content)
    described = dataclasses.replace(
        manifest,
        precision=precision_of(model),
        onnx_sha256=manifest.engine_sha256,
        engine_sha256=hashlib.sha256(plan.content).hexdigest(),
        tensorrt_version=plan.tensorrt_version,
        sm=plan.sm,
        builder=config.builder,
        batch=plan.batch,
    )
    manifests.write(described, manifests.beside(out))
    size = len(plan.content)
    return Built(
        manifest=described, errors=errors, deform=deform, bytes=size, seconds=plan.seconds, notes=plan.notes
    )


def load(source: Path) -> onnx.ModelProto:
    """An ONNX file with its weights. Raises EngineError."""
    try:
        return onnx.load(source)
    except OSError as error:
        raise EngineError(f"cannot read {source}: {error.strerror}") from error
    except Exception as error:  # protobuf's and onnx's own, derived from nothing narrower
        raise EngineError(f"{source} is no ONNX file or is cut short: export or copy it again") from error


def manifest_of(source: Path) -> Manifest:
    """The manifest beside an ONNX file, seen to belong to it. Raises EngineError, ConfigError."""
    beside = manifests.beside(source)
    if not beside.exists():
        raise EngineError(
            f"{source} has no manifest {beside.name} beside it: write one with `tools/manifest.py {source} "
            "--frontend …`"
        )
    manifest = manifests.read(beside)
    manifest.verify(source)
    return manifest


def _sized(model: onnx.ModelProto, manifest: Manifest) -> onnx.ModelProto:
    """The graph with the manifest's image size where it leaves that open."""
    width, height = manifest.input.size
    for value in model.graph.input:
        if value.name == manifest.input.name and len(value.type.tensor_type.shape.dim) == 4:
            for dimension, size in zip(value.type.tensor_type.shape.dim[1:], (3, height, width), strict=True):
                dimension.dim_value = dimension.dim_value or size
    return model


def _in_precision(
    model: onnx.ModelProto,
    manifest: Manifest,
    wanted: Precision | None,
    half: HalfConfig,
    frames: Sequence[Frame],
) -> tuple[onnx.ModelProto, dict[str, float]]:
    """The graph as it will be built, and what half precision changes in its answers."""
    given = precision_of(model)
    model = dense_upsampling(model)
    if wanted is None or (wanted == given != "int8"):
        return model, {}
    if wanted == "int8" != given:
        raise ConfigError(f"the graph is in {given}: quantise it first with tools/calibrate.py")
    if given not in ("fp32", wanted) or wanted == "fp32":
        raise ConfigError(
            f"the graph is in {given} already: leave out --precision {wanted}, or start from fp32"
        )
    assert wanted is not None
    compared = tuple(name for role, name in manifest.outputs.items() if role in COMPARED)
    kind: Half = "fp16" if wanted == "int8" else wanted
    half = dataclasses.replace(half, kind=kind, compared=(*half.compared, *compared))
    errors = {}
    if frames and given == "fp32":  # integers flip to the next at any change; calibration judges those
        with Feeds.of(model, manifest) as feeds:
            fed = {name: rows.numpy() for name, rows in feeds(frames).items()}
        errors = relative_errors(model, half, fed)
        for name, error in errors.items():
            if not error <= TOLERANCES[wanted]:
                raise EngineError(
                    f"in {wanted} the output {name} differs by {error:.2%} from fp32, more than "
                    f"{TOLERANCES[wanted]:.0%}: keep more nodes in fp32 with --keep, or build in fp32"
                )
    cast = to_half(model, half)
    if precision_of(cast) != wanted:
        raise ConfigError(f"nothing in the graph can be in {wanted}: leave out --precision")
    return cast, errors
