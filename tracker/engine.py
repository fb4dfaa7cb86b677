"""An engine file becomes a front end: runtime by suffix, manifest beside it, front end by name.

The one place that knows which runtimes and front ends exist. Builds nothing and guesses nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tracker import manifest as manifests
from tracker.errors import ConfigError, EngineError
from tracker.frontends import FRONTENDS
from tracker.frontends.detector import Detector
from tracker.frontends.fairmot import Fairmot
from tracker.frontends.yolox import Yolox
from tracker.manifest import Manifest, Precision
from tracker.runtimes.lanes import LaneRuntime
from tracker.runtimes.onnx import OnnxRuntime
from tracker.runtimes.parts import PartsRuntime, in_parts
from tracker.runtimes.segments import SegmentsRuntime, in_segments
from tracker.runtimes.tensorrt import TensorRTRuntime
from tracker.runtimes.torch_export import TorchExportRuntime
from tracker.types import Runtime

ONNX, TENSORRT, TORCH = ".onnx", (".engine", ".plan"), ".pt2"


def open_engine(
    path: Path,
    *,
    device: str = "auto",
    frontend: str | None = None,
    classes: Sequence[str] = (),
    conf: float | None = None,
    compat: str | None = None,
    lanes: int | None = None,
    threads: int | None = None,
) -> tuple[Detector, Manifest]:
    """The engine's front end, ready to take frames, and its manifest. Close the front end after use.

    device: "cpu", "cuda", "cuda:N" or "auto". lanes, threads: see `OnnxRuntime`; threads are its alone.
    frontend: what to take the engine for when no manifest lies beside it, with that front end's own defaults;
    a .pt2 file needs its manifest. classes, conf: see the front end's config; None is its default.
    compat: "fairmot" also takes FairMOT's boxes back to source pixels as the official code does.
    Raises EngineError or ConfigError before any frame is read.
    """
    _check_engine(path)
    manifest = _manifest_of(path, frontend)
    runtime = open_runtime(path, manifest, device=device, lanes=lanes, threads=threads)
    if manifest is None:
        manifest = _frontend(frontend).describe(runtime, onnx_sha256=manifests.sha256(path))
    kind = _frontend(manifest.frontend)
    settings: dict[str, Any] = {"classes": tuple(classes)}
    if conf is not None:
        settings["conf"] = conf
    if isinstance(runtime, LaneRuntime):
        settings["max_batch"] = runtime.max_batch
    if kind is Fairmot and compat == "fairmot":
        settings["official_transform"] = True
    return kind(runtime, manifest, kind.config_type(**settings)), manifest


def describe(
    path: Path,
    *,
    frontend: str,
    names: tuple[str, ...] | None = None,
    size: tuple[int, int] | None = None,
    precision: Precision = "fp32",
    layout: str | None = None,
    legacy: bool = False,
) -> Manifest:
    """The manifest of an .onnx or .pt2 file, after running it once: see the front end's own `describe`.

    A .pt2 file is code and is run: describe only what you trust; its hash then stands for that. TensorRT
    engines get their manifest from what builds them.
    names, layout: None is the front end's default. legacy: of YOLOX alone.
    Raises EngineError when what comes out does not fit the front end, ConfigError for a layout it has not.
    """
    kind = _frontend(frontend)
    options: dict[str, Any] = {"size": size, "precision": precision}
    if names is not None:
        options["names"] = names
    if layout is not None:
        if layout not in kind.layouts:
            known = f"there is {', '.join(kind.layouts)}" if kind.layouts else "it has but one: leave it out"
            raise ConfigError(f"layout is {layout!r}; for {frontend} {known}")
        options["layout"] = layout
    if kind is Yolox:
        options["legacy"] = legacy
    elif legacy:
        raise ConfigError(f"--legacy is for yolox: leave it out with {frontend}")
    _check_engine(path)
    if path.suffix in TENSORRT:
        raise EngineError(
            f"{path} is a TensorRT engine: tools/build.py describes those that it builds; for another, name "
            "the front end with --frontend when it is run"
        )
    runtime: Runtime = (
        TorchExportRuntime(path, lanes=1, trusted=True)
        if path.suffix == TORCH
        else OnnxRuntime(path, device="cpu", lanes=1)
    )
    manifest = kind.describe(runtime, onnx_sha256=manifests.sha256(path), **options)
    kind(runtime, manifest, kind.config_type()).close()
    return manifest


def open_runtime(
    path: Path,
    manifest: Manifest | None,
    *,
    device: str = "auto",
    lanes: int | None = None,
    threads: int | None = None,
) -> Runtime:
    """The engine without its front end; it must be the manifest's file where there is one."""
    if path.suffix == ONNX:
        if manifest is not None:
            manifest.verify(path)
        return OnnxRuntime(path, device=device, lanes=lanes, threads=threads)
    if threads is not None:
        raise ConfigError(f"threads is {threads}; it is for .onnx files alone: leave it out with {path}")
    if path.suffix == TORCH:
        return TorchExportRuntime(path, device=device, manifest=manifest, lanes=lanes)
    kind = SegmentsRuntime if in_segments(path) else PartsRuntime if in_parts(path) else TensorRTRuntime
    return kind(path, device=device, manifest=manifest, lanes=lanes)


def _check_engine(path: Path) -> None:
    """EngineError for what no runtime takes."""
    if path.suffix not in (ONNX, *TENSORRT, TORCH):
        raise EngineError(
            f"{path} is no engine this version can run: name an .onnx, .engine (TensorRT) or .pt2 file"
        )
    if not path.is_file():
        raise EngineError(f"{path} is {'a directory' if path.is_dir() else 'missing'}: name an engine file")


def _manifest_of(path: Path, frontend: str | None) -> Manifest | None:
    """The manifest beside the engine; None if there is none and `frontend` stands in."""
    beside = manifests.beside(path)
    if beside.exists():
        manifest = manifests.read(beside)
        if frontend not in (None, manifest.frontend):
            raise ConfigError(
                f"--frontend {frontend} contradicts {beside}, which says {manifest.frontend}: leave out the "
                "option, or write the manifest again with tools/manifest.py"
            )
        return manifest
    if frontend is None:
        write = f"write one with `tools/manifest.py {path} --frontend {'|'.join(FRONTENDS)}`"
        if path.suffix in TENSORRT:
            write = "put the one there that tools/build.py wrote with it"
        raise EngineError(
            f"{path} has no manifest {beside.name} beside it: {write}, or name the front end for this run "
            "with --frontend"
        )
    return None


def _frontend(name: str | None) -> type[Detector]:
    if name not in FRONTENDS:
        raise ConfigError(f"front end is {name!r}; there is {', '.join(FRONTENDS)}")
    return FRONTENDS[name]
