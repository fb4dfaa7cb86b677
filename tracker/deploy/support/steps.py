"""What is done with one system, step by step; each leaves files for the next and says what it measured.

    export              a network with random weights → NAME.onnx, checked against torch
    onnx                ONNX Runtime on the CPU, one image and two; its answers are the reference
    int8                NAME.onnx calibrated on a few frames → NAME_int8.onnx, run by ONNX Runtime
    BUILDER PRECISION   an engine; by TensorRT-RTX on any machine, by TensorRT on a GPU
    run PRECISION       that engine of TensorRT on its GPU: answers against the reference, time at batch 1, 4
    track               the clip through `tracker.track`: on a GPU by the FP16 engine, else by ONNX Runtime

Knows nothing of processes, of other systems, or of what has been done before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any, get_args

import cv2
import numpy as np
import torch
from torch import Tensor

from tracker import engine_times
from tracker import manifest as manifests
from tracker.api import track
from tracker.deploy.build import build
from tracker.deploy.calibration.calibrate import Calibrated, CalibrationConfig, calibrate
from tracker.deploy.export import frames_of, generated_frames, inputs_of
from tracker.deploy.feeds import Feeds
from tracker.deploy.plan import BuildConfig, builder_held
from tracker.deploy.refusals import NoKernelError
from tracker.deploy.support.schedule import Found, Plan
from tracker.deploy.support.systems import system_of
from tracker.engine import open_runtime
from tracker.errors import EngineError
from tracker.manifest import Batch, Builder, Precision
from tracker.pixels import to_bgr
from tracker.runtimes.onnx import OnnxRuntime
from tracker.sources import open_source
from tracker.types import Frame, Runtime

PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16", "int8")
BATCHES = (1, 4)
CONF = 0.05  # of tracking: scores of random weights are what they are, of 92 classes hardly a tenth
FED = "fed to "  # what names of inputs begin with among arrays that are kept
EVERY = 10  # frame of the clip is calibrated with: neighbours are too alike
SAME = 1e-3  # greatest |TensorRT − ONNX Runtime| / |ONNX Runtime| of an output in FP32
TRIES = 4  # of INT8, each without the layers that the one before was refused for
ALIKE = 0.9  # least cosine of an output in FP16

_HELD = ExitStack()  # builders, until the process ends: other systems' engines follow


@dataclass(frozen=True, slots=True, kw_only=True)
class StepsConfig:
    """folder: of all files. data: a clip; its first frames are calibrated with, tracked and compared on.
    device: for engines, "cpu" where there is none. builders, precisions: of engines. frames: to calibrate
    with. track_frames: of the clip. repeat: runs in each of the timer's rounds. batch: least, usual and
    greatest of TensorRT's engines. level, tactics, timing_cache, verify: as for tools/build.py. threads: of
    torch, None for its own choice.
    """

    folder: Path
    data: str
    device: str = "cpu"
    builders: tuple[Builder, ...] = get_args(Builder)
    precisions: tuple[Precision, ...] = PRECISIONS
    frames: int = 8
    track_frames: int = 10
    repeat: int = 10
    batch: Batch = (1, 1, 4)
    level: int | None = None
    tactics: tuple[str, ...] | None = None
    timing_cache: Path | None = None
    verify: bool = False
    threads: int | None = None


def plan_of(config: StepsConfig) -> Plan:
    return Plan(
        needs=steps_of(config),
        alone=(*(f"run {precision}" for precision in PRECISIONS), "track"),
        in_turn=tuple(f"tensorrt {precision}" for precision in PRECISIONS),
        product=partial(product, config=config),
        do=partial(run_step, config=config),
        folder=config.folder / "results",
    )


def steps_of(config: StepsConfig) -> dict[str, tuple[str, ...]]:
    """The steps there are for this machine, and those that each needs to have been done."""
    steps: dict[str, tuple[str, ...]] = {"export": (), "onnx": ("export",)}
    if "int8" in config.precisions:
        steps["int8"] = ("export", "onnx")
    gpu = config.device != "cpu"
    for builder in config.builders:
        if builder == "tensorrt" and not gpu:
            continue  # it needs the GPU it builds for
        for precision in config.precisions:
            steps[f"{builder} {precision}"] = ("int8",) if precision == "int8" else ("export",)
    if gpu and "tensorrt" in config.builders:
        for precision in config.precisions:
            steps[f"run {precision}"] = ("onnx", f"tensorrt {precision}")
    steps["track"] = (_tracked_by(config) or "export",)
    return steps


def product(name: str, step: str, config: StepsConfig) -> Path | None:
    """The file that a step leaves for others, None where it leaves none."""
    builder, _, precision = step.partition(" ")
    if builder in get_args(Builder):
        return config.folder / f"{name}_{precision}.{'engine' if builder == 'tensorrt' else 'rtx.engine'}"
    ends = {"export": ".onnx", "onnx": ".reference.npz", "int8": "_int8.onnx"}
    return config.folder / f"{name}{ends[step]}" if step in ends else None


def run_step(name: str, step: str, config: StepsConfig) -> Found:
    """What was measured. Raises whatever goes wrong."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    head, _, precision = step.partition(" ")
    if precision and head != "run":
        return _build(name, head, precision, config)  # type: ignore[arg-type]
    if precision:
        return _run(name, precision, config)
    steps: Mapping[str, Callable[[str, StepsConfig], Found]]
    steps = {"export": _export, "onnx": _onnx, "int8": _int8, "track": _track}
    return steps[head](name, config)


def _export(name: str, config: StepsConfig) -> Found:
    system = system_of(name)
    file = _file(name, "export", config)
    done = system.export(system, file, generated_frames(system.size, 2))
    return {
        "size": list(system.size),
        "mb": round(done.bytes / 1e6, 2),
        "errors": {role: _short(error) for role, error in done.errors.items()},
    }


def _onnx(name: str, config: StepsConfig) -> Found:
    """One image and two, and that the first of two answers as one alone."""
    file = _file(name, "export", config)
    manifest = manifests.read(manifests.beside(file))
    runtime = OnnxRuntime(file, device="cpu", lanes=1)
    feeds = Feeds(runtime, manifest)
    try:
        fed = feeds(_frames(config, 1))
    finally:
        feeds.close()
    begun = perf_counter()
    alone = _answers(runtime, fed)
    ms = 1000 * (perf_counter() - begun)
    _check_finite(alone)
    both = runtime.run({manifest.input.name: inputs_of(manifest, 2, _frames(config, 2))})
    apart = {role: _apart(alone[role], value[:1]) for role, value in both.items()}
    if max(apart.values()) > SAME:
        raise EngineError(f"an image answers otherwise in a batch of two: relative {apart}")
    arrays: dict[str, Any] = {f"{FED}{role}": value.numpy() for role, value in fed.items()}
    arrays |= {role: value.numpy() for role, value in alone.items()}
    with _file(name, "onnx", config).open("wb") as reference:
        np.savez(reference, **arrays)
    return {"outputs": {role: list(value.shape) for role, value in alone.items()}, "cpu_ms": round(ms, 1)}


def _int8(name: str, config: StepsConfig) -> Found:
    done = _calibrated(name, config, _file(name, "int8", config))
    fed, expected = _reference(name, config)
    answers = _answers(OnnxRuntime(_file(name, "int8", config), device="cpu", lanes=1), fed)
    _check_finite(answers)
    return {
        "frames": config.frames,
        "layers": len(done.layers),
        "not quantised": len(done.high),
        "mb": round(done.bytes[1] / 1e6, 2),
        **_compared(answers, expected),
    }


def _calibrated(name: str, config: StepsConfig, out: Path, keep: tuple[str, ...] = ()) -> Calibrated:
    settings = CalibrationConfig(frames=config.frames, keep=keep)
    return calibrate(_file(name, "export", config), out, [_pictures(config)], settings)


def _build(name: str, builder: Builder, precision: Precision, config: StepsConfig) -> Found:
    """In INT8 without the layers that TensorRT has no kernel for, as it names them; see `TRIES`."""
    source = _file(name, "int8" if precision == "int8" else "export", config)
    out = _file(name, f"{builder} {precision}", config)
    settings: Found = {"batch": config.batch, "level": config.level, "timing_cache": config.timing_cache}
    if builder == "tensorrt":
        index = int(config.device.partition(":")[2] or 0)
        settings |= {"tactics": config.tactics, "device": index, "tf32": precision != "fp32"}
    wanted = BuildConfig(builder=builder, **settings)
    _HELD.enter_context(builder_held(wanted))
    frames = _frames(config, 1) if config.verify and precision == "fp16" else ()
    keep: tuple[str, ...] = ()
    for left in reversed(range(TRIES)):
        try:
            done = build(
                source, out, wanted, precision=None if precision == "fp32" else precision, frames=frames
            )
            break
        except NoKernelError as refusal:
            if not left or not set(refusal.keep) - set(keep):
                raise
            keep += refusal.keep
            source = out.with_suffix(".kept.onnx")
            _calibrated(name, config, source, keep)
    found: Found = {
        "version": done.manifest.tensorrt_version,
        "build_seconds": round(done.seconds, 1),
        "mb": round(done.bytes / 1e6, 2),
    }
    if done.deform is not None:
        found["deform"] = done.deform
    if keep:
        found["left out"] = list(keep)
    if builder != "tensorrt":  # nothing comes after it
        out.unlink()
        manifests.beside(out).unlink()
    return found


def _run(name: str, precision: str, config: StepsConfig) -> Found:
    engine = _file(name, f"tensorrt {precision}", config)
    manifest = manifests.read(manifests.beside(engine))
    fed, expected = _reference(name, config)
    runtime = open_runtime(engine, manifest, device=config.device, lanes=1)
    answers = _answers(runtime, fed)
    del runtime
    _check_finite(answers)
    found = _compared(answers, expected)
    if precision == "fp32" and max(found["relative"].values()) > SAME:
        raise EngineError(f"answers otherwise than ONNX Runtime, relative {found['relative']}")
    if precision == "fp16" and min(found["cosine"].values()) < ALIKE:
        raise EngineError(f"answers otherwise than ONNX Runtime, cosine {found['cosine']}")
    batches = [batch for batch in BATCHES if batch <= config.batch[2]]
    rows = engine_times.measure(
        engine, batches=batches, device=config.device, source_size=(1920, 1080), repeats=config.repeat
    )
    found["ms"] = {
        str(row.batch): {stage: round(ms, 4) for stage, ms in row.stages.items()}
        | {"latency": round(row.latency_ms, 4)}
        for row in rows
    }
    if problem := next((row.problem for row in rows if row.problem), None):
        found["problem"] = problem
    return found


def _track(name: str, config: StepsConfig) -> Found:
    """Every frame comes out again, in order, and something is followed, whatever that may be."""
    by = _tracked_by(config)
    engine = _file(name, by or "export", config)
    seen, ids, boxes = 0, set(), 0
    for frame, tracks in track(
        config.data,
        engine=engine,
        device=config.device if by else "cpu",
        conf=CONF,
        max_frames=config.track_frames,
    ):
        if frame.index != seen:
            raise EngineError(f"frame {frame.index} came where {seen} was due")
        seen += 1
        boxes += len(tracks)
        ids |= {each.id for each in tracks}
    if not seen:
        raise EngineError(f"no frame of {config.data} came out")
    if not boxes:
        raise EngineError(f"nothing was followed in {seen} frames of {config.data}")
    return {"by": by or "onnx", "frames": seen, "tracks": len(ids), "boxes": boxes}


def _tracked_by(config: StepsConfig) -> str | None:
    """The step whose engine tracks; None for ONNX Runtime."""
    if config.device == "cpu" or "tensorrt" not in config.builders:
        return None
    return f"tensorrt {'fp16' if 'fp16' in config.precisions else config.precisions[0]}"


def _file(name: str, step: str, config: StepsConfig) -> Path:
    file = product(name, step, config)
    assert file is not None
    return file


def _frames(config: StepsConfig, count: int) -> list[Frame]:
    return frames_of(str(_pictures(config)), count)


def _pictures(config: StepsConfig) -> Path:
    return config.folder / "frames"


def write_pictures(config: StepsConfig) -> None:
    """Frames of the clip as images: to calibrate with and to compare on, for every system the same."""
    folder = _pictures(config)
    folder.mkdir(parents=True, exist_ok=True)
    with open_source(config.data) as source:
        for frame in islice(source, 0, config.frames * EVERY, EVERY):
            assert frame.image is not None
            cv2.imwrite(str(folder / f"{frame.index:04}.png"), to_bgr(frame.image))


def _reference(name: str, config: StepsConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Inputs by name, of one image, and ONNX Runtime's FP32 answers to them by output."""
    with np.load(_file(name, "onnx", config)) as kept:
        arrays = {role: torch.from_numpy(kept[role]) for role in kept.files}
    fed = {role.removeprefix(FED): value for role, value in arrays.items() if role.startswith(FED)}
    return fed, {role: value for role, value in arrays.items() if not role.startswith(FED)}


def _answers(runtime: Runtime, fed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All outputs in FP32 on the host; each input's part of a network is a runtime of its own."""
    parts: Mapping[str, Runtime] = getattr(runtime, "parts", {})
    answers: dict[str, Tensor] = {}
    for name, tensor in fed.items():
        answers |= parts.get(name, runtime).run({name: tensor.to(runtime.device)})
    return {role: value.float().cpu() for role, value in answers.items()}


def _compared(answers: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Found:
    """relative: greatest difference over the greatest value, by output. cosine: of the angle between."""
    cosine = torch.nn.functional.cosine_similarity
    return {
        "relative": {role: _short(_apart(answers[role], value)) for role, value in expected.items()},
        "cosine": {
            role: round(float(cosine(answers[role].double().flatten(), value.double().flatten(), dim=0)), 5)
            for role, value in expected.items()
        },
    }


def _apart(answer: Tensor, expected: Tensor) -> float:
    return float((answer - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


def _check_finite(answers: Mapping[str, Tensor]) -> None:
    for role, value in answers.items():
        if not value.isfinite().all():
            raise EngineError(f"output {role} has NaN or inf")


def _short(value: float) -> float:
    return float(f"{value:.2e}")
