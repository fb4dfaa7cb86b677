"""Networks into ONNX files that have been seen to answer as torch does, each with its manifest.

Knows what each network's outputs mean and how it wants its pixels; how layers are written is `graph`'s.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from time import perf_counter
from typing import Literal

import onnx
import torch
import torch.nn.functional as F  # noqa: N812 (everybody's name for it)
from torch import Tensor, nn

from tracker import manifest as manifests
from tracker.deploy.graph import Lowering, to_onnx
from tracker.deploy.scenes import Scene, SceneConfig
from tracker.errors import ConfigError, EngineError, SinkError
from tracker.frontends.fairmot import Fairmot, peak_scores
from tracker.frontends.preprocess import Preprocessor
from tracker.manifest import Manifest
from tracker.models.fairmot import MULTIPLE, FairMOT
from tracker.runtimes.onnx import OnnxRuntime
from tracker.sources import open_source
from tracker.types import Frame, Image

# Greatest difference between ONNX Runtime and torch, times a head's greatest value where that is above 1.
TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """What to write.

    size: (width, height) of the input; the default is the official one. batch: images per run, None leaves
    it open. heads: "peaks" puts the heat map's sigmoid and peak test into the graph, "raw" leaves them to the
    front end. names: of the classes. Appearance is never normalised in the graph: the front end does that
    for at most 500 peaks, where the graph would have to for every cell.
    """

    size: tuple[int, int] = (1088, 608)
    batch: int | None = 1
    heads: Literal["peaks", "raw"] = "peaks"
    names: tuple[str, ...] = ("person",)
    lowering: Lowering = field(default_factory=Lowering)

    def __post_init__(self) -> None:
        check_shape(self.size, self.batch)


def check_shape(size: tuple[int, int], batch: int | None) -> None:
    """Raise ConfigError for an input that FairMOT does not take. batch: None leaves it open."""
    if any(side < MULTIPLE or side % MULTIPLE for side in size):
        raise ConfigError(f"size is {size[0]}×{size[1]}; both sides must be multiples of {MULTIPLE}")
    if batch is not None and batch < 1:
        raise ConfigError(f"batch is {batch}; it must be at least 1, or dynamic")


def check_names(names: Sequence[str], model: FairMOT) -> None:
    """Raise ConfigError unless they are as many as the model's classes."""
    if len(names) != model.config.classes:
        raise ConfigError(
            f"the network has {model.config.classes} classes, {len(names)} are named "
            f"({', '.join(names)}): name each with --names"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """What came of it. errors: by output, what the file's answers differ by from those of the network in
    torch and FP32: absolute and greatest for an ONNX file, relative and over all for a program.
    """

    manifest: Manifest
    errors: dict[str, float]
    bytes: int
    write_seconds: float
    verify_seconds: float


class _Peaks(FairMOT):
    """A network's own layers, under their names, with the peaks of its heat maps in place of their logits."""

    def __init__(self, model: FairMOT) -> None:
        nn.Module.__init__(self)
        for name, layer in model.named_children():
            self.add_module(name, layer)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        heads = super().forward(images)
        peaks = peak_scores(heads["hm"])
        return {"peaks": peaks, **{role: heads[role] for role in ("wh", "reg", "id")}}


@torch.no_grad()
def export_fairmot(model: FairMOT, out: Path, config: ExportConfig, frames: Sequence[Frame]) -> Export:
    """Write FairMOT to `out` and its manifest beside it, after checking both on these frames.

    Raises ConfigError where the names do not fit the model, EngineError where ONNX Runtime does not answer
    as torch does, SinkError where nothing can be written. Then no file is left and an old one stays.
    """
    check_names(config.names, model)
    model = model.eval()
    begun = perf_counter()
    width, height = config.size
    example = torch.zeros(config.batch or 2, 3, height, width)
    network = _Peaks(model) if config.heads == "peaks" else model
    graph = to_onnx(network, example, config.lowering, input_name="images", open_batch=config.batch is None)

    def describe(runtime: OnnxRuntime, sha256: str) -> Manifest:
        manifest = Fairmot.describe(runtime, onnx_sha256=sha256, names=config.names)
        Fairmot(runtime, manifest).close()
        return manifest

    def check(manifest: Manifest, runtime: OnnxRuntime) -> dict[str, float]:
        images = inputs_of(manifest, len(example), frames)
        return compare(model(images), runtime.run({manifest.input.name: images}))

    return write_checked(graph, out, describe, check, begun=begun)


def write_checked(
    graph: onnx.ModelProto,
    out: Path,
    describe: Callable[[OnnxRuntime, str], Manifest],
    check: Callable[[Manifest, OnnxRuntime], dict[str, float]],
    *,
    begun: float,
) -> Export:
    """Write a graph to `out`, and its manifest beside it once ONNX Runtime has opened it and it was checked.

    describe: from the file's runtime and hash, once a front end takes it. check: errors by output. begun: of
    the export, by `perf_counter`. Raises what these raise, and as `unfinished`; then nothing is written.
    """
    with unfinished(out) as file:
        onnx.save(graph, file)
        written = perf_counter()
        runtime = OnnxRuntime(file, device="cpu", lanes=1)
        manifest = describe(runtime, manifests.sha256(file))
        errors = check(manifest, runtime)
        verified = perf_counter()
        size = file.stat().st_size
    manifests.write(manifest, manifests.beside(out))
    return Export(
        manifest=manifest,
        errors=errors,
        bytes=size,
        write_seconds=written - begun,
        verify_seconds=verified - written,
    )


def compare(heads: dict[str, Tensor], answers: dict[str, Tensor]) -> dict[str, float]:
    """The greatest absolute difference of each answer from the network's raw heads, both by role.

    Raises EngineError for one above TOLERANCE, and for what is no number.
    """
    errors = {}
    for role, answer in answers.items():
        raw = heads["hm" if role == "peaks" else role]
        limit = TOLERANCE * max(1.0, float(raw.abs().max()))
        expected = peak_scores(raw) if role == "peaks" else raw
        difference = (answer - expected).abs()
        if role == "peaks":  # of two neighbours whose scores differ by less, either may be the peak
            scores = torch.sigmoid(raw)
            tied = F.max_pool2d(scores, 3, stride=1, padding=1) - scores <= limit
            difference = torch.where(tied & ((answer == 0) | (expected == 0)), 0.0, difference)
        errors[role] = within(role, float(difference.max()), limit)
    return errors


def within(output: str, error: float, limit: float) -> float:
    """The error. EngineError for one above the limit, and for what is no number."""
    if not error <= limit:
        raise EngineError(
            f"ONNX Runtime's {output} differs from torch's by {error:.2g}, more than {limit:.2g}: "
            "nothing was written. Weights that overflow do this; otherwise please report it"
        )
    return error


def frames_of(video: str, count: int = 4) -> list[Frame]:
    """The first frames of a video or image directory. Raises SourceError."""
    with open_source(video) as source:
        return list(islice(source, count))


def generated_frames(size: tuple[int, int], count: int = 4) -> list[Frame]:
    """Drawn street scenes, for want of a video. size: (width, height)."""
    scene = Scene(1, SceneConfig(size=size))
    images = (Image(format="bgr", planes=(scene.frame(float(moment))[0],)) for moment in range(count))
    return [Frame(index=k, pts_seconds=0.0, size=size, image=image) for k, image in enumerate(images)]


def inputs_of(manifest: Manifest, batch: int, frames: Sequence[Frame]) -> Tensor:
    """(batch, 3, H, W) as the front end would feed them, repeated where there are fewer frames.

    Raises ConfigError without any.
    """
    if not frames:
        raise ConfigError("no frame to check the export with: name another video with --verify")
    images, _ = Preprocessor(manifest.input, batch)(list(islice(cycle(frames), batch)))
    return images


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[Path]:
    """A file to write, in the same directory; becomes `path` at the end, or nothing if that is not reached.

    Raises SinkError where the directory cannot be made or written to.
    """
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield unfinished
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise SinkError(f"cannot write {path}: {error.strerror or error}") from error
