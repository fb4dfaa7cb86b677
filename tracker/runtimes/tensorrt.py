"""TensorRT engines, 8.6 to 11, and TensorRT-RTX ones: torch owns the memory and the stream, they compute.

Only what all versions have, or what can be asked for by name: the named-tensor interface. Knows nothing of
images or boxes, and builds nothing.

A plan is executable code, and nothing in TensorRT notices one that was tampered with: the manifest's hash
is checked before a byte of the file is given to it, and host code in plans stays forbidden, as it is by
default (`engine_host_code_allowed`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from tracker.errors import EngineError
from tracker.graphs import Graphs
from tracker.manifest import Manifest
from tracker.runtimes.lanes import LaneRuntime, Shape, capturing, check_batch, on, resolve
from tracker.runtimes.trt import TrtName, collector, trt_module

LANES = 2  # one keeps the GPU busy while the other's host side works
REBUILD = "build it again with tools/build.py"

_DTYPES = {  # by name: which of them there are differs from version to version
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "FP8": torch.float8_e4m3fn,
    "INT8": torch.int8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}
# Channels of a pixel lie together, filled up to a multiple of this (NvInferRuntimeBase.h, TensorFormat).
_CHANNELS_LAST = {"HWC": 1, "HWC8": 8, "HWC16": 16}
_MOST_METADATA = 1 << 20  # bytes
_RTX_MAGIC = b"vtrt"  # what plans of TensorRT-RTX begin with; those of TensorRT begin with ftrt or ptrt


class TensorRTRuntime(LaneRuntime):
    """One engine file, loaded. Attributes and `run`: see `LaneRuntime`.

    device: "cuda", "cuda:N" or "auto"; the CPU is no choice. manifest: what the file must be; None leaves
    its origin to the caller. lanes: batches at once, each in a thread of its caller's; None is two.
    bindings: the Python module to use, on any device it knows; None takes `tensorrt` or `tensorrt_rtx`,
    whichever the file is for. content: what to load in place of the file, which its giver has verified.

    The engine's batch is static, or open with one optimisation profile; nothing else of it is open.
    metadata: what Ultralytics' export put before the plan, unverified, else empty.

    Raises EngineError where the file, this GPU and this TensorRT do not fit each other, before anything is
    enqueued.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str | torch.device = "auto",
        manifest: Manifest | None = None,
        lanes: int | None = None,
        bindings: Any = None,
        content: bytes | None = None,
    ) -> None:
        super().__init__(LANES if lanes is None else lanes)
        self.device = resolve(device, cpu=False) if bindings is None else torch.device(device)
        if content is None:
            content = read_engine(path, manifest)
        self.metadata, plan = split_metadata(content)
        said = None if manifest is None else manifest.builder
        trt = bindings or trt_module(said or library_of(plan))
        if manifest is not None:
            check_origin(path, manifest, trt, self.device)
        self.engine = Engine(plan, trt=trt, device=self.device, name=str(path))
        self.library = f"{trt.__name__.removesuffix('_bindings')} {trt.__version__}"
        open_batch = self.engine.least_batch != self.engine.max_batch
        shapes = {t.name: (None, *t.shape[1:]) if open_batch else t.shape for t in self.engine.tensors}
        self.inputs: Mapping[str, Shape] = {t.name: shapes[t.name] for t in self.engine.tensors if t.is_input}
        self.outputs: Mapping[str, Shape] = {
            t.name: shapes[t.name] for t in self.engine.tensors if not t.is_input
        }
        self.dtypes = {t.name: t.dtype for t in self.engine.tensors}
        self.max_batch = self.engine.max_batch
        self._spare: list[EngineLane] = []
        if self.device.type == "cuda":
            self._probe()

    def lane(self) -> EngineLane:
        """An execution context with buffers of its own; weights are shared."""
        try:
            return self._spare.pop()  # in one step: whichever thread asks
        except IndexError:
            return EngineLane(self.engine)

    def _probe(self) -> None:
        """Run and capture once, so that what does not run is found now and what is not captured is said."""
        lane = EngineLane(self.engine)
        graphs = Graphs(lane.enqueue, self.device)
        graphs(1)
        torch.cuda.synchronize(self.device)
        self.uncapturable = graphs.problem
        if graphs.problem is None:
            self._spare.append(lane)
        else:  # who knows what the attempt has left in its context; and what it said is no later error's
            collector(self.engine.trt)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of an engine: its shape at the greatest batch, and how it lies in memory.

    packed: 0 for row-major; else pixels lie one after another, their channels filled up to a multiple of it.
    """

    name: str
    is_input: bool
    shape: tuple[int, ...]
    dtype: torch.dtype
    packed: int = 0

    def buffer(self, device: torch.device) -> Tensor:
        """Zeros in torch's memory, laid out for the engine, of this shape."""
        if not self.packed:
            return torch.zeros(self.shape, dtype=self.dtype, device=device)
        batch, channels, height, width = self.shape
        filled = -(-channels // self.packed) * self.packed
        pixels = torch.zeros(batch, height, width, filled, dtype=self.dtype, device=device)
        return pixels.permute(0, 3, 1, 2)[:, :channels]


class Engine:
    """A plan, deserialised: the weights on the device, and what its tensors are.

    trt: the module that reads it. name: of the file, for messages. tensors: inputs, then outputs, as the
    engine orders them. least_batch, max_batch: what its profile allows, the same for a static batch.
    memory: bytes of device memory that one run needs for activations.
    """

    def __init__(self, plan: bytes | memoryview, *, trt: Any, device: torch.device, name: str) -> None:
        self.trt = trt
        self.device = device
        self.name = name
        self.messages = collector(trt)
        self._preparing = Lock()  # contexts are made one after another, in whichever thread
        with on(device):
            torch.empty(0, device=device)  # begins torch's CUDA context, which TensorRT then shares
            if hasattr(trt, "init_libnvinfer_plugins"):
                trt.init_libnvinfer_plugins(self.messages, "")
            self._engine = trt.Runtime(self.messages).deserialize_cuda_engine(plan)
        if self._engine is None:
            raise self._failure(f"{name} cannot be loaded")
        self.least_batch, self.max_batch = self._batches()
        first = self.context(self.max_batch)  # knows the shapes of what comes out
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        specs = [self._spec(each, first) for each in names]
        self.tensors = tuple(sorted(specs, key=lambda spec: not spec.is_input))
        size = getattr(self._engine, "device_memory_size_v2", None)  # ≥ 10.1, and all that 11 has
        self.memory = int(self._engine.device_memory_size if size is None else size)

    def context(self, batch: int) -> Any:
        """An execution context for this batch size alone, without device memory and tensor addresses."""
        trt = self.trt
        with self._preparing, on(self.device):
            if hasattr(trt, "ExecutionContextAllocationStrategy"):  # ≥ 10
                managed = trt.ExecutionContextAllocationStrategy.USER_MANAGED
                context = self._engine.create_execution_context(managed)
            else:
                context = self._engine.create_execution_context_without_device_memory()
            if context is None:
                raise self._failure(f"{self.name} cannot be prepared for running")
            for name in self._input_names():
                shape = tuple(self._engine.get_tensor_shape(name))
                if -1 in shape:
                    self._choose(context, name, (batch, *shape[1:]))
        return context

    def _choose(self, context: Any, name: str, shape: tuple[int, ...]) -> None:
        # 8.6 gives the one profile to the first context alone; others ask for it, and may have it where the
        # engine was built with PROFILE_SHARING_0806.
        if context.active_optimization_profile != 0 and not context.set_optimization_profile_async(
            0, self._stream()
        ):
            raise self._failure(f"{self.name} serves no more than one batch size at once")
        if not context.set_input_shape(name, shape):
            raise self._failure(f"{self.name} does not take {shape[0]} images at once")

    def give_memory(self, context: Any, memory: Tensor) -> None:
        if hasattr(context, "set_device_memory"):  # ≥ 10.1
            context.set_device_memory(memory.data_ptr(), memory.numel())
        else:
            context.device_memory = memory.data_ptr()

    def run(self, context: Any) -> None:
        """Enqueue on torch's current stream. Raises EngineError."""
        with on(self.device):
            done = context.execute_async_v3(self._stream())
        if not done:
            raise self._failure(f"{self.name} failed to run")

    def _stream(self) -> int:
        return torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0

    def _input_names(self) -> list[str]:
        engine, mode = self._engine, self.trt.TensorIOMode.INPUT
        names = (engine.get_tensor_name(i) for i in range(engine.num_io_tensors))
        return [name for name in names if engine.get_tensor_mode(name) == mode]

    def _batches(self) -> tuple[int, int]:
        """The least and the greatest batch. Raises EngineError where more is open than the batch."""
        engine, ranges = self._engine, set()
        for name in self._input_names():
            shape = tuple(engine.get_tensor_shape(name))
            if not shape or -1 in shape[1:]:
                raise EngineError(
                    f"{self.name}: input {name} has shape {shape}; only its first dimension, the batch, may "
                    f"be open (-1): fix the others and {REBUILD}"
                )
            if shape[0] == -1:
                if engine.num_optimization_profiles != 1:
                    raise EngineError(
                        f"{self.name} has {engine.num_optimization_profiles} optimisation profiles; it may "
                        f"have one: {REBUILD}"
                    )
                least, _, most = engine.get_tensor_profile_shape(name, 0)
                ranges.add((least[0], most[0]))
            else:
                ranges.add((shape[0], shape[0]))
        if len(ranges) != 1:
            raise EngineError(f"{self.name}: its inputs differ in their batch; they need one: {REBUILD}")
        return ranges.pop()

    def _spec(self, name: str, context: Any) -> TensorSpec:
        """One tensor at the greatest batch. Raises EngineError for what no lane can hold."""
        engine, trt = self._engine, self.trt
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        what = f"{self.name}: {'input' if is_input else 'output'} {name}"
        if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            raise EngineError(f"{what} is a shape, which lies on the host: fix it and {REBUILD}")
        shape = tuple(int(size) for size in context.get_tensor_shape(name))
        if not shape or shape[0] != self.max_batch or min(shape) < 0:
            raise EngineError(
                f"{what} has shape {shape} for {self.max_batch} images; it needs a size known beforehand, "
                "the batch first: leave what depends on the data, such as NMS, out of the engine"
            )
        dtype = _DTYPES.get(engine.get_tensor_dtype(name).name)
        if dtype is None:
            raise EngineError(f"{what} is {engine.get_tensor_dtype(name).name}, a type torch does not have")
        layout = engine.get_tensor_format(name).name
        if layout != "LINEAR" and (layout not in _CHANNELS_LAST or len(shape) != 4):
            usable = ", ".join(_CHANNELS_LAST)
            raise EngineError(f"{what} is laid out as {layout}; LINEAR, {usable} can be used: {REBUILD}")
        return TensorSpec(name, is_input, shape, dtype, _CHANNELS_LAST.get(layout, 0))

    def _failure(self, what: str) -> EngineError:
        return EngineError(f"{what}: {self.messages.reason()}; {self.messages.remedy()}")


class EngineLane:
    """See `LaneRuntime.lane`. Of a batch smaller than the engine takes, the other rows run as they are.

    Every batch size has an execution context of its own, made when it first comes, because a CUDA graph
    captured from a context holds only as long as its shapes stay (NVIDIA's developer guide, "CUDA graphs").
    All of them share the lane's buffers and, since they never run at the same time, its activations' memory.

    buffers: by name, made by `TensorSpec.buffer`; None makes them. memory: at least `Engine.memory` bytes;
    None takes that. Both for engines that work on each other's outputs, in turn.
    """

    def __init__(
        self, engine: Engine, buffers: Mapping[str, Tensor] | None = None, memory: Tensor | None = None
    ) -> None:
        self._engine = engine
        try:
            if buffers is None:
                buffers = {spec.name: spec.buffer(engine.device) for spec in engine.tensors}
            if memory is None:
                memory = torch.empty(max(engine.memory, 1), dtype=torch.uint8, device=engine.device)
        except RuntimeError as error:  # torch's, for want of memory
            raise EngineError(
                f"{engine.name} needs {engine.memory / 2**20:.0f} MiB and its inputs and outputs for each "
                f"lane, more than {engine.device} has left: use fewer lanes, or build with a smaller batch"
            ) from error
        self._memory = memory
        self.inputs: Mapping[str, Tensor] = {s.name: buffers[s.name] for s in engine.tensors if s.is_input}
        self._outputs = {s.name: buffers[s.name] for s in engine.tensors if not s.is_input}
        self._addresses = {spec.name: buffers[spec.name].data_ptr() for spec in engine.tensors}
        self._contexts: dict[int, Any] = {}

    def enqueue(self, batch: int) -> dict[str, Tensor]:
        check_batch(batch, self._engine.max_batch)
        rows = max(batch, self._engine.least_batch)
        context = self._contexts.get(rows)
        if context is None:
            if capturing(self._engine.device):
                raise EngineError(
                    f"batch {batch} has not run yet: enqueue it once before it is captured in a CUDA graph"
                )
            context = self._context(rows)
        self._engine.run(context)
        self._contexts[rows] = context  # only now, when it has run
        return {name: output[:batch] for name, output in self._outputs.items()}

    def _context(self, rows: int) -> Any:
        context = self._engine.context(rows)
        self._engine.give_memory(context, self._memory)
        for name, address in self._addresses.items():
            if not context.set_tensor_address(name, address):
                raise EngineError(f"{self._engine.name} does not take the memory of {name}: {REBUILD}")
        return context


def split_metadata(content: bytes) -> tuple[dict[str, object], memoryview]:
    """What stands before the plan in an engine file, and the plan.

    Ultralytics' exporter writes the length of a JSON text (4 bytes, little-endian) and the text before the
    plan (its `engine/exporter.py`). Plans of TensorRT's own begin with four letters, which as a length
    would be more than a gigabyte.
    """
    whole = memoryview(content)
    length = int.from_bytes(content[:4], "little")
    if not 2 <= length <= min(_MOST_METADATA, len(content) - 4) or content[4:5] != b"{":
        return {}, whole
    try:
        metadata = json.loads(content[4 : 4 + length])
    except ValueError:  # neither JSON nor UTF-8: then it is no such prefix
        return {}, whole
    return metadata, whole[4 + length :]


def library_of(plan: memoryview) -> TrtName:
    """Which library made a plan, by its first bytes; "tensorrt" where they say nothing."""
    return "tensorrt_rtx" if plan[:4] == _RTX_MAGIC else "tensorrt"


def read_engine(path: Path, manifest: Manifest | None) -> bytes:
    """What the file holds, seen to be the manifest's where there is one. Raises EngineError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror}") from error
    if manifest is not None:
        manifest.verify(path, content)
    return content


def check_origin(path: Path, manifest: Manifest, trt: Any, device: torch.device) -> None:
    """EngineError where the manifest says that the engine is for another TensorRT or GPU than these."""
    version, sm = manifest.tensorrt_version, manifest.sm
    if version is not None and version != trt.__version__:
        raise EngineError(
            f"{path} was built with TensorRT {version}, this is {trt.__version__}: {REBUILD}, or install "
            "that version"
        )
    if sm is not None and device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if sm != 10 * major + minor:
            raise EngineError(
                f"{path} was built for sm_{sm}, this GPU ({torch.cuda.get_device_name(device)}) is "
                f"sm_{major}{minor}: {REBUILD} on this machine"
            )
