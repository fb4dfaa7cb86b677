"""What an engine file cannot say about itself, in `ENGINE.json` beside it.

Says what to feed an engine and what comes out; the front end it names knows what to do with that. Checks
its own words and the engine's hash; does not open engines and guesses nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from tracker.errors import ConfigError, EngineError, SinkError

FORMAT = 1

Colour = Literal["bgr", "rgb"]
Resize = Literal["corner", "corner_rounded", "center", "stretch"]
Interpolation = Literal["linear", "area", "cubic"]
Precision = Literal["fp32", "fp16", "bf16", "int8"]
Builder = Literal["tensorrt", "tensorrt_rtx"]
Batch = tuple[int, int, int]  # least, usual (what it is tuned for), greatest images per run
Triple = tuple[float, float, float]
T = TypeVar("T")

# Of red, green and blue in 0–255: torchvision's 0.485, 0.456, 0.406 and 0.229, 0.224, 0.225.
IMAGENET_MEAN: Triple = (123.675, 116.28, 103.53)
IMAGENET_STD: Triple = (58.395, 57.12, 57.375)


@dataclass(frozen=True, slots=True, kw_only=True)
class Input:
    """The one image tensor an engine takes.

    size: (width, height). layout: axes of the tensor. colour: order of its channels. mean, std: what is
    subtracted, then divided by, per channel in that order, in units of 0–255. resize: how the image is
    placed, `boxes.fit_<resize>`. pad: value around it, or one per channel, in units of 0–255, normalised like
    a pixel.
    interpolation: "linear" or "cubic" between pixels, or "area", the mean of what a pixel covers.
    """

    name: str
    size: tuple[int, int]
    layout: Literal["NCHW"]
    colour: Colour
    mean: Triple
    std: Triple
    resize: Resize
    pad: float | Triple
    interpolation: Interpolation = "linear"

    def __post_init__(self) -> None:
        _check("input.name", self.name, _is_text(self.name), "a tensor's name")
        sizes = isinstance(self.size, tuple) and len(self.size) == 2 and all(_is_count(n) for n in self.size)
        _check("input.size", self.size, sizes, "[width, height] in pixels, each at least 1")
        _check_choice("input.layout", self.layout, ("NCHW",))
        _check_choice("input.colour", self.colour, get_args(Colour))
        _check("input.mean", self.mean, _is_triple(self.mean), "three numbers in units of 0–255")
        positive = _is_triple(self.std) and min(self.std) > 0
        _check("input.std", self.std, positive, "three numbers above 0, in units of 0–255")
        _check_choice("input.resize", self.resize, get_args(Resize))
        padded = _is_number(self.pad) or _is_triple(self.pad)
        _check("input.pad", self.pad, padded, "a number in units of 0–255, or three")
        _check_choice("input.interpolation", self.interpolation, get_args(Interpolation))


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """How a network came to a lower precision than it was trained in (`deploy.calibrate`).

    method: of INT8's ranges, None for half precision. frames, seed: calibrated with. kept: layers that stay
    in higher precision beyond those that always do. thresholds: by tracker, fields of its config that were
    fitted anew to the network's scores.
    """

    method: str | None
    frames: int
    seed: int
    kept: tuple[str, ...] = ()
    thresholds: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        named = self.method is None or _is_text(self.method)
        _check("calibration.method", self.method, named, "text or null")
        for key in ("frames", "seed"):
            value = getattr(self, key)
            _check(f"calibration.{key}", value, type(value) is int and value >= 0, "a whole number from 0")
        listed = isinstance(self.kept, tuple) and all(map(_is_text, self.kept))
        _check("calibration.kept", self.kept, listed, "a list of layers' names")
        tables = self.thresholds.values() if isinstance(self.thresholds, Mapping) else [None]
        shares = all(
            isinstance(table, Mapping) and all(_is_number(n) and 0 <= n <= 1 for n in table.values())
            for table in tables
        )
        _check("calibration.thresholds", self.thresholds, shares, "an object of tracker: {setting: 0 to 1}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """One engine, described.

    outputs: role → tensor name; which roles there are, the front end says. names: class names by index.
    precision: of the engine's arithmetic, for people. onnx_sha256: the ONNX file the engine comes from;
    engine_sha256: the engine file itself, the same for an engine that is an ONNX file.
    Of TensorRT engines, else None: builder, the library that made it and runs it. tensorrt_version, sm: what
    it is bound to (sm 89 is compute capability 8.9; None for TensorRT-RTX's, which run on several).
    batch: images per run that it takes.
    calibration: how it came to its precision, None where it was not calibrated.
    Raises ConfigError naming the key, its value and what is allowed.
    """

    frontend: str
    input: Input
    outputs: Mapping[str, str]
    names: tuple[str, ...]
    precision: Precision
    onnx_sha256: str
    engine_sha256: str
    tensorrt_version: str | None = None
    sm: int | None = None
    builder: Builder | None = None
    batch: Batch | None = None
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        _check("frontend", self.frontend, _is_text(self.frontend), "a front end's name")
        _check("input", self.input, isinstance(self.input, Input), "an object")
        mapping = isinstance(self.outputs, Mapping) and bool(self.outputs)
        named = mapping and all(_is_text(text) for pair in self.outputs.items() for text in pair)
        _check("outputs", self.outputs, named, "an object of role: tensor name, at least one")
        listed = isinstance(self.names, tuple) and bool(self.names) and all(_is_text(n) for n in self.names)
        _check("names", self.names, listed, "a list of class names, at least one")
        twice = sorted({name for name in self.names if self.names.count(name) > 1})
        _check("names", twice, not twice, "each class name once")
        _check_choice("precision", self.precision, get_args(Precision))
        for key in ("onnx_sha256", "engine_sha256"):
            value = getattr(self, key)
            _check(key, value, _is_hash(value), "64 hexadecimal digits in lower case")
        version = self.tensorrt_version
        _check("tensorrt_version", version, version is None or _is_text(version), "a version or null")
        _check("sm", self.sm, self.sm is None or _is_count(self.sm), "a number such as 89, or null")
        _check_choice("builder", self.builder, (*get_args(Builder), None))
        allowed = "three numbers, least, usual and greatest, each at least 1, or null"
        _check("batch", self.batch, self.batch is None or _is_batch(self.batch), allowed)
        known = self.calibration is None or isinstance(self.calibration, Calibration)
        _check("calibration", self.calibration, known, "an object or null")

    def thresholds(self, tracker: str) -> Mapping[str, float]:
        """Settings of the tracker that were fitted to this engine's scores."""
        return self.calibration.thresholds.get(tracker, {}) if self.calibration is not None else {}

    def verify(self, engine: Path, content: bytes | None = None) -> None:
        """Raise EngineError unless this manifest belongs to the engine file as it is now.

        content: what was read from the file, for those who must know that it is what they go on with.
        """
        found = sha256(engine) if content is None else hashlib.sha256(content).hexdigest()
        if found != self.engine_sha256:
            again = "write the manifest again with tools/manifest.py"
            if self.tensorrt_version is not None:
                again = "build it again with tools/build.py"
            raise EngineError(
                f"{engine} is not the file its manifest {beside(engine).name} describes (SHA-256 "
                f"{found[:12]}…, manifest {self.engine_sha256[:12]}…): {again}, or put the right engine back"
            )


def beside(engine: Path) -> Path:
    """Where an engine's manifest lies: X.onnx → X.onnx.json."""
    return engine.with_name(engine.name + ".json")


def sha256(path: Path) -> str:
    """Hash of a file, 64 hexadecimal digits. Raises EngineError when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror}") from error


def read(path: Path) -> Manifest:
    """The manifest in a file. Raises ConfigError naming file, key, value and what is allowed."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read manifest {path}: {error.strerror}") from error
    except ValueError as error:  # not UTF-8, or not JSON
        raise ConfigError(
            f"manifest {path} is not JSON ({error}): write it with tools/manifest.py"
        ) from error
    try:
        _check("the manifest", raw, isinstance(raw, dict), "a JSON object")
        _check_choice("format", raw.pop("format", None), (FORMAT,))
        if isinstance(raw.get("input"), dict):
            raw["input"] = _build(Input, raw["input"], "input.")
        if isinstance(raw.get("calibration"), dict):
            raw["calibration"] = _build(Calibration, raw["calibration"], "calibration.")
        return _build(Manifest, raw, "")
    except ConfigError as error:
        raise ConfigError(f"manifest {path}: {error}") from error


def write(manifest: Manifest, path: Path) -> None:
    """Write the manifest; the file is either the old one or whole. Raises SinkError."""
    text = json.dumps({"format": FORMAT, **dataclasses.asdict(manifest)}, indent=2, ensure_ascii=False)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise SinkError(f"cannot write manifest {path}: {error.strerror}") from error


def _build(cls: type[T], raw: dict[str, Any], prefix: str) -> T:
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    known = [field.name for field in fields]
    required = [field.name for field in fields if field.default is dataclasses.MISSING]
    for key in raw:
        if key not in known:
            raise ConfigError(f"unknown key {prefix}{key}; known: {', '.join(known)}")
    for key in required:
        if key not in raw:
            raise ConfigError(f"missing key {prefix}{key}; needed: {', '.join(required)}")
    return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in raw.items()})


def _check(key: str, value: object, ok: bool, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{key} is {value!r}; it must be {allowed}")


def _check_choice(key: str, value: object, choices: tuple[object, ...]) -> None:
    _check(key, value, value in choices, " or ".join(map(str, choices)))


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _is_triple(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 3 and all(_is_number(number) for number in value)


def _is_batch(value: object) -> bool:
    counts = isinstance(value, tuple) and len(value) == 3 and all(map(_is_count, value))
    return counts and list(value) == sorted(value)  # type: ignore[call-overload]


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")
