"""Engines in segments: TensorRT plans and fused deformable convolutions in turn, in one file.

For a TensorRT that has no DeformConv. A file holds a few plans and, between them, the weights of the
deformable convolutions; `deploy.segments` makes it. Like a plan it is code, and its hash is what the
manifest checks. Knows nothing of images or boxes, and builds nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tracker.errors import EngineError
from tracker.graphs import Graphs, first_line
from tracker.kernels.deform import TAPS, deform_conv2d
from tracker.manifest import Manifest
from tracker.runtimes.container import Container, Pieces, begins_with
from tracker.runtimes.lanes import LaneRuntime, Shape, check_batch, on, resolve
from tracker.runtimes.tensorrt import (
    LANES,
    REBUILD,
    Engine,
    EngineLane,
    TensorSpec,
    check_origin,
    read_engine,
)
from tracker.runtimes.trt import TrtName, collector, trt_module

MAGIC = b"trkseg1\n"
_PACKED = 8  # channels: what a pixel is filled up to where no plan says how a tensor lies
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_HIGH = -1  # priority of side streams: torch shares its streams out in turn, and hands these to nobody else


@dataclass(frozen=True, slots=True, kw_only=True)
class Deform:
    """One deformable convolution, 3×3 with stride 1, its normalisation folded; see `kernels.deform`.

    x, out: tensors' names. shifts: of one tensor (B, 27, H, W), the offsets, then the masks, or of two, the
    offsets and the masks. weight: (9, C, O) of x's type. bias: (O,) of that type. logits: masks are logits.
    """

    name: str
    x: str
    shifts: tuple[str, ...]
    out: str
    weight: Tensor
    bias: Tensor | None
    relu: bool
    logits: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """What such a file holds.

    inputs, outputs: of the whole. plans: run one after another, stages[k] after plans[k]; b"" where there is
    nothing to run before a stage. stages: deformable convolutions that do not depend on each other.
    """

    library: TrtName
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    plans: Sequence[bytes | memoryview]
    stages: Sequence[Sequence[Deform]]


class Kernel(Protocol):
    """`kernels.deform.deform_conv2d`, or another that computes the same."""

    def __call__(
        self,
        x: Tensor,
        offset: Tensor,
        mask: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        mask_logits: bool,
        relu: bool,
        *,
        out: Tensor,
    ) -> object: ...


class SegmentsRuntime(LaneRuntime):
    """One such file, loaded. Attributes and `run`: see `LaneRuntime`.

    Arguments and errors as of `TensorRTRuntime`. kernel: what computes the deformable convolutions; None is
    the Triton program, compiled when it first runs on a machine.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str | torch.device = "auto",
        manifest: Manifest | None = None,
        lanes: int | None = None,
        bindings: Any = None,
        kernel: Kernel | None = None,
    ) -> None:
        super().__init__(LANES if lanes is None else lanes)
        self.device = resolve(device, cpu=False) if bindings is None else torch.device(device)
        content = read_engine(path, manifest)
        segments = unpack(content, str(path))
        trt = bindings or trt_module(segments.library)
        if manifest is not None:
            check_origin(path, manifest, trt, self.device)
        self.segments = _Loaded(segments, trt, self.device, str(path), kernel or deform_conv2d)
        library = f"{trt.__name__.removesuffix('_bindings')} {trt.__version__}"
        between = sum(map(len, segments.stages))
        parts = len(self.segments.engines)
        self.library = f"{library} in {parts} parts, {between} deformable convolutions between them"
        specs = self.segments.specs
        open_batch = self.segments.least_batch != self.segments.max_batch
        shapes: dict[str, Shape] = {
            name: (None, *spec.shape[1:]) if open_batch else spec.shape for name, spec in specs.items()
        }
        self.inputs: Mapping[str, Shape] = {name: shapes[name] for name in segments.inputs}
        self.outputs: Mapping[str, Shape] = {name: shapes[name] for name in segments.outputs}
        self.dtypes = {name: specs[name].dtype for name in (*segments.inputs, *segments.outputs)}
        self.max_batch = self.segments.max_batch
        self._spare: list[SegmentsLane] = []
        if self.device.type == "cuda":
            self._probe(trt)

    def lane(self) -> SegmentsLane:
        """Contexts and buffers of its own; weights are shared."""
        try:
            return self._spare.pop()  # in one step: whichever thread asks
        except IndexError:
            return SegmentsLane(self.segments)

    def _probe(self, trt: Any) -> None:
        """As `TensorRTRuntime` does: what does not run is found now, what is not captured is said."""
        lane = SegmentsLane(self.segments)
        graphs = Graphs(lane.enqueue, self.device)
        try:
            graphs(1)
            torch.cuda.synchronize(self.device)
        except EngineError:
            raise
        except Exception as error:  # Triton's and torch's, derived from nothing narrower
            raise EngineError(
                f"{self.segments.name} cannot run here: {first_line(error)}; it needs memory on the GPU and "
                "Triton, which comes with torch's CUDA builds"
            ) from error
        self.uncapturable = graphs.problem
        if graphs.problem is None:
            self._spare.append(lane)
        else:
            collector(trt)  # forgets what it has said


class _Loaded:
    """What all lanes share: engines, weights on the device, and what every tensor is."""

    def __init__(self, segments: Segments, trt: Any, device: torch.device, name: str, kernel: Kernel) -> None:
        self.device, self.name, self.kernel = device, name, kernel
        self.inputs, self.outputs = segments.inputs, segments.outputs
        self.parts = [
            Engine(plan, trt=trt, device=device, name=f"{name}, part {index}") if plan else None
            for index, plan in enumerate(segments.plans)
        ]
        self.engines = [part for part in self.parts if part is not None]
        self.stages = [[_moved(deform, device) for deform in stage] for stage in segments.stages]
        batches = {(engine.least_batch, engine.max_batch) for engine in self.engines}
        if len(batches) != 1:
            raise _damaged(name, "its parts differ in their batch")
        ((self.least_batch, self.max_batch),) = batches
        self.memory = max(engine.memory for engine in self.engines)
        self.specs: dict[str, TensorSpec] = {}
        for engine in self.engines:
            for spec in engine.tensors:
                self._add(spec)
        for stage in self.stages:
            for deform in stage:
                self._add(self._out_of(deform))
        missing = {*self.inputs, *self.outputs} - self.specs.keys()
        if missing:
            raise _damaged(name, f"nothing gives {', '.join(sorted(missing))}")

    def _add(self, spec: TensorSpec) -> None:
        known = self.specs.setdefault(spec.name, spec)
        if (known.shape, known.dtype, known.packed) != (spec.shape, spec.dtype, spec.packed):
            raise _damaged(self.name, f"its parts disagree about {spec.name}")

    def _out_of(self, deform: Deform) -> TensorSpec:
        """What a deformable convolution gives, laid out as whoever takes it wants it."""
        x = self.specs.get(deform.x)
        shifts = [self.specs.get(name) for name in deform.shifts]
        taps, channels, outputs = deform.weight.shape
        if x is None or len(x.shape) != 4 or (x.shape[1], x.dtype) != (channels, deform.weight.dtype):
            raise _damaged(self.name, f"{deform.name} does not fit {deform.x}")
        batch, _, height, width = x.shape
        wanted = [(batch, count * TAPS, height, width) for count in ((3,) if len(shifts) == 1 else (2, 1))]
        if taps != TAPS or [spec and spec.shape for spec in shifts] != wanted:
            raise _damaged(self.name, f"{deform.name} does not fit {', '.join(deform.shifts)}")
        known = self.specs.get(deform.out)
        packed = _PACKED if known is None else known.packed
        return TensorSpec(deform.out, False, (batch, outputs, height, width), x.dtype, packed)


class SegmentsLane:
    """See `LaneRuntime.lane`. All parts work on one set of buffers, and in one memory for activations.

    Convolutions of one stage run side by side on streams of the lane's own, which the stream of `enqueue`
    waits for: the coarse ones are too small to fill a GPU.
    """

    def __init__(self, loaded: _Loaded, *, side_by_side: bool = True) -> None:
        self._loaded, device = loaded, loaded.device
        try:
            self._buffers = {name: spec.buffer(device) for name, spec in loaded.specs.items()}
            memory = torch.empty(max(loaded.memory, 1), dtype=torch.uint8, device=device)
        except RuntimeError as error:  # torch's, for want of memory
            raise EngineError(
                f"{loaded.name} needs {loaded.memory / 2**20:.0f} MiB and what is between its parts for each "
                f"lane, more than {device} has left: use fewer --lanes, or build with a smaller batch"
            ) from error
        self.inputs: Mapping[str, Tensor] = {name: self._buffers[name] for name in loaded.inputs}
        self._parts = [part and EngineLane(part, self._buffers, memory) for part in loaded.parts]
        aside = max(map(len, loaded.stages), default=1) - 1 if side_by_side and device.type == "cuda" else 0
        self._aside = [torch.cuda.Stream(device, _HIGH) for _ in range(aside)]  # type: ignore[no-untyped-call]

    def enqueue(self, batch: int) -> dict[str, Tensor]:
        check_batch(batch, self._loaded.max_batch)
        rows = max(batch, self._loaded.least_batch)
        for part, stage in zip_longest(self._parts, self._loaded.stages, fillvalue=()):
            if isinstance(part, EngineLane):
                part.enqueue(batch)
            with on(self._loaded.device):
                self._sample(stage or (), rows)
        return {name: self._buffers[name][:batch] for name in self._loaded.outputs}

    def _sample(self, stage: Sequence[Deform], rows: int) -> None:
        """Run a stage: its first convolutions aside, the rest here."""
        aside = list(zip(stage[1:], self._aside, strict=False))
        for _, stream in aside:
            stream.wait_stream(torch.cuda.current_stream(self._loaded.device))
        for deform, stream in aside:
            with torch.cuda.stream(stream):
                self._run(deform, rows)
        for deform in (*stage[:1], *stage[1 + len(aside) :]):
            self._run(deform, rows)
        for _, stream in aside:
            torch.cuda.current_stream(self._loaded.device).wait_stream(stream)

    def _run(self, deform: Deform, rows: int) -> None:
        x, out = self._buffers[deform.x][:rows], self._buffers[deform.out][:rows]
        shifts = [self._buffers[name][:rows] for name in deform.shifts]
        offset, mask = shifts if len(shifts) == 2 else (shifts[0][:, : 2 * TAPS], shifts[0][:, 2 * TAPS :])
        flags = deform.logits, deform.relu
        self._loaded.kernel(x, offset, mask, deform.weight, deform.bias, *flags, out=out)


def in_segments(path: Path) -> bool:
    """Whether a file is one of these. Raises EngineError where it cannot be read."""
    return begins_with(path, MAGIC)


def pack(segments: Segments) -> bytes:
    """The file's content; see `container`."""
    pieces = Pieces()

    def tensor(values: Tensor) -> dict[str, object]:
        raw = values.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        dtype = str(values.dtype).removeprefix("torch.")
        return {"dtype": dtype, "shape": list(values.shape), "data": pieces.add(raw)}

    def deform(one: Deform) -> dict[str, object]:
        bias = None if one.bias is None else tensor(one.bias)
        names = {"name": one.name, "x": one.x, "shifts": one.shifts, "out": one.out}
        flags = {"relu": one.relu, "logits": one.logits}
        return names | flags | {"weight": tensor(one.weight), "bias": bias}

    index = {
        "library": segments.library,
        "inputs": segments.inputs,
        "outputs": segments.outputs,
        "stages": [[deform(each) for each in stage] for stage in segments.stages],
        "plans": [pieces.add(plan) for plan in segments.plans],
    }
    return pieces.packed(MAGIC, index)


def unpack(content: bytes, name: str) -> Segments:
    """What `pack` put there; plans lie in `content`. name: of the file, for messages.

    Raises EngineError for what is no such file, is cut short or says what cannot be.
    """

    def tensor(about: Any) -> Tensor:
        values = torch.frombuffer(bytearray(container.piece(about["data"])), dtype=_DTYPES[about["dtype"]])
        return values.reshape(about["shape"])

    def deform(about: Any) -> Deform:
        bias = None if about["bias"] is None else tensor(about["bias"])
        shifts = tuple(about["shifts"])
        if len(shifts) not in (1, 2) or len(about["weight"]["shape"]) != 3:
            raise ValueError(f"{about['name']} cannot be read")
        return Deform(
            name=about["name"],
            x=about["x"],
            shifts=shifts,
            out=about["out"],
            weight=tensor(about["weight"]),
            bias=bias,
            relu=bool(about["relu"]),
            logits=bool(about["logits"]),
        )

    try:
        container = Container(content, MAGIC)
        index = container.index
        library: TrtName = index["library"]
        if library not in ("tensorrt", "tensorrt_rtx") or len(index["plans"]) < len(index["stages"]):
            raise ValueError(f"it is for {library}, or has fewer plans than stages")
        return Segments(
            library=library,
            inputs=tuple(index["inputs"]),
            outputs=tuple(index["outputs"]),
            plans=[container.piece(place) for place in index["plans"]],
            stages=[[deform(each) for each in stage] for stage in index["stages"]],
        )
    except ValueError as error:
        raise _damaged(name, str(error)) from error
    except (KeyError, TypeError, RuntimeError) as error:  # torch's, and what is not there
        raise _damaged(name, "what it holds cannot be read") from error


def _moved(deform: Deform, device: torch.device) -> Deform:
    bias = None if deform.bias is None else deform.bias.to(device)
    return dataclasses.replace(deform, weight=deform.weight.to(device), bias=bias)


def _damaged(name: str, why: str) -> EngineError:
    return EngineError(f"{name} is damaged, or no engine in segments ({why}): {REBUILD}")
