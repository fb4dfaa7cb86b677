"""One ONNX graph through TensorRT's parser and builder into a serialised engine, a plan.

Where TensorRT takes precision from the graph (10 and later, TensorRT-RTX) the graph says it all; 8.6 gets
the same graph, flags for what is in it, and its FP32 parts pinned. Which of the two it is, the library's own
names tell. Knows no network, and no file but the timing cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from time import perf_counter
from types import ModuleType
from typing import Any, TypeVar

import onnx
import torch
from onnx import TensorProto

from tracker.deploy.islands import element_types, precision_of
from tracker.deploy.refusals import refused
from tracker.deploy.weakly_typed import adapted, scales_in_fp32
from tracker.errors import ConfigError, EngineError
from tracker.manifest import Batch, Builder
from tracker.runtimes.trt import collector, reason, remedy, trt_module
from tracker.sinks.output import PartialFile

Progress = Callable[[str, float | None], None]
Layouts = Mapping[str, str]  # of inputs and outputs by name, as in `trt.TensorFormat`: "HWC8"
T = TypeVar("T")

OPEN_BATCH: Batch = (1, 4, 8)
TICK_SECONDS = 0.2  # between calls of a Progress
# Layers whose precision is what they do. TensorRT refuses another for those that quantise.
_AS_THEY_ARE = ("CAST", "IDENTITY", "CONSTANT", "SHAPE", "QUANTIZE", "DEQUANTIZE")


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildConfig:
    """How to build.

    builder: TensorRT needs the GPU it builds for; TensorRT-RTX needs none. batch: images per run, least,
    usual and greatest; for a graph with an open batch (None: OPEN_BATCH), else what the graph has.
    workspace_mib: memory that may be tried while building, None for all. tactics: names of
    `trt.TacticSource`, None for TensorRT's own choice. level: 0 to 5, how long to search (TensorRT: 3).
    tf32: FP32 convolutions on tensor cores with 10 bits of mantissa, as TensorRT does unless told.
    sm: of TensorRT-RTX alone, the one compute capability to build for (89 is 8.9), None for all it runs on.
    device: index of the GPU. timing_cache: what was measured before, read and written, None to measure anew.
    """

    builder: Builder = "tensorrt"
    batch: Batch | None = None
    workspace_mib: int | None = None
    tactics: tuple[str, ...] | None = None
    level: int | None = None
    tf32: bool = True
    sm: int | None = None
    device: int = 0
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        if self.batch is not None and not 1 <= self.batch[0] <= self.batch[1] <= self.batch[2]:
            raise ConfigError(
                f"batch is {_batch(self.batch)}; it must be MIN,OPT,MAX, rising and each at least 1"
            )
        for key, least in (("workspace_mib", 1), ("level", 0)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise ConfigError(f"{key} is {value}; it must be at least {least}")
        if self.sm is not None and self.builder == "tensorrt":
            raise ConfigError("TensorRT builds for the GPU it runs on: --sm is for --builder tensorrt_rtx")


@dataclass(frozen=True, slots=True)
class Plan:
    """A serialised engine and what it is bound to; see `Manifest`. notes: what is not as it was asked for."""

    content: bytes
    tensorrt_version: str
    sm: int | None
    batch: Batch
    seconds: float
    notes: tuple[str, ...] = ()


def compile_plan(
    model: onnx.ModelProto,
    config: BuildConfig,
    progress: Progress | None = None,
    *,
    layouts: Layouts | None = None,
) -> Plan:
    """Build one graph as it is, precision by its own types; graphs need no manifest here.

    progress: called from this thread while it waits, with what goes on and how far it is, 0 to 1 or None.
    layouts: how inputs and outputs lie in memory where not row by row; names the graph has not are ignored.
    Works in a thread of its own, so that `progress` and Ctrl-C get their turn. An interrupted build stops
    where TensorRT can be told so (it has IProgressMonitor); otherwise it goes on until the process ends.
    Raises EngineError with TensorRT's reason and the remedy, ConfigError for options it does not know.
    """
    trt = trt_module(config.builder)
    sm = _sm(config)
    begun = perf_counter()
    work = _Compilation(trt, model, config, layouts or {})
    content = _while_working(work.run, lambda: progress and progress(*work.state()), work.cancel)
    return Plan(content, trt.__version__, sm, work.batch, perf_counter() - begun)


@contextlib.contextmanager
def builder_held(config: BuildConfig) -> Iterator[None]:
    """One builder for all graphs that are built with this library and GPU meanwhile, one after another.

    TensorRT loads its kernels with the first builder and lets go of them with the last; 8.6 takes 3 GB of
    memory, 4 GB of the GPU's and about 4 seconds for it. Raises EngineError where the library cannot start.
    """
    key = config.builder, config.device
    if key in _held:
        yield
        return
    trt = trt_module(config.builder)
    _sm(config)
    with _on_device(config):
        _held[key] = _new_builder(trt, config)
    try:
        yield
    finally:
        del _held[key]


def parses(model: onnx.ModelProto, config: BuildConfig) -> bool:
    """Whether the library's parser takes a graph. Raises EngineError where the library cannot start."""
    trt = trt_module(config.builder)
    _sm(config)
    return _Compilation(trt, model, config, {}).parses()


_held: dict[tuple[Builder, int], Any] = {}  # by library and GPU; see `builder_held`


class _Compilation:
    """One run of parser and builder."""

    def __init__(
        self, trt: ModuleType, model: onnx.ModelProto, config: BuildConfig, layouts: Layouts
    ) -> None:
        self._trt: Any = trt
        self._layouts = layouts
        self._config = config
        self._model = model if self._strong else adapted(model)
        self._messages = collector(trt)
        self._monitor = _monitor(trt)
        self.batch: Batch = OPEN_BATCH

    def run(self) -> bytes:
        with _on_device(self._config):
            return self._run()

    def parses(self) -> bool:
        with _on_device(self._config):
            _, _, refusal = self._parsed()
            return refusal is None

    def cancel(self) -> bool:
        if self._monitor is not None:
            self._monitor.cancelled = True
        return self._monitor is not None

    def state(self) -> tuple[str, float | None]:
        return self._monitor.state() if self._monitor is not None else ("building", None)

    def _run(self) -> bytes:
        builder, network, refusal = self._parsed()
        if refusal is not None:
            raise refusal
        options = self._options(builder)
        if not self._strong:
            mark_precision(self._trt, network, options, self._model)
        self._profile(builder, network, options)
        self._lay_out(network)
        cache = self._timing_cache(options)
        serialised = builder.build_serialized_network(network, options)
        if cache is not None and self._config.timing_cache is not None:
            # of a graph that was refused as well: tried again without a layer, it is nearly all known
            measured = memoryview(options.get_timing_cache().serialize())
            with partial_file(self._config.timing_cache) as file, file.step():
                file.write(bytes(measured))
        if serialised is None:
            raise self._unbuilt()
        return bytes(memoryview(serialised))

    def _parsed(self) -> tuple[Any, Any, EngineError | None]:
        """Builder, the network as far as the parser came, and why it did not come further."""
        builder = _held.get((self._config.builder, self._config.device))
        if builder is None:
            builder = _new_builder(self._trt, self._config)
        kinds = self._trt.NetworkDefinitionCreationFlag
        flag = kinds.STRONGLY_TYPED if self._strong else kinds.EXPLICIT_BATCH
        network = builder.create_network(1 << int(flag))
        parser = self._trt.OnnxParser(network, self._messages)
        model = self._model if self._strong else scales_in_fp32(self._model)
        parsed = parser.parse(model.SerializeToString())
        return builder, network, None if parsed else self._refusal(parser)

    @property
    def _strong(self) -> bool:
        """Whether precision comes from the graph."""
        return hasattr(self._trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")

    def _refusal(self, parser: Any) -> EngineError:
        for index in range(parser.num_errors):
            complaint = parser.get_error(index)
            nodes, place = self._model.graph.node, complaint.node()
            if 0 <= place < len(nodes):
                node = nodes[place]
                return EngineError(
                    f"{self._name} cannot take the {node.op_type} {node.name or node.output[0]} "
                    f"({reason([complaint.desc()])}): {remedy([node.op_type, complaint.desc()])}"
                )
        return self._error("cannot read the graph")

    def _options(self, builder: Any) -> Any:
        trt, config = self._trt, self._config
        options = builder.create_builder_config()
        if config.workspace_mib is not None:
            options.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, config.workspace_mib << 20)
        if config.tactics is not None:
            options.set_tactic_sources(_bits(trt.TacticSource, config.tactics, "tactic source"))
        if config.level is not None:
            options.builder_optimization_level = config.level
        if not config.tf32:
            options.clear_flag(trt.BuilderFlag.TF32)
        if config.sm is not None:
            options.num_compute_capabilities = 1
            options.set_compute_capability(_named(trt.ComputeCapability, f"SM{config.sm}", "sm"), 0)
        if self._monitor is not None:
            options.progress_monitor = self._monitor
        return options

    def _profile(self, builder: Any, network: Any, options: Any) -> None:
        """Say which batches the engine takes; `batch` is then what it will be."""
        inputs = [network.get_input(index) for index in range(network.num_inputs)]
        shapes = {tensor.name: tuple(tensor.shape) for tensor in inputs}
        for name, shape in shapes.items():
            if any(side < 0 for side in shape[1:]):
                raise EngineError(f"input {name} has shape {shape}: only the batch may be open")
        wanted = self._config.batch
        if all(shape[0] >= 0 for shape in shapes.values()):
            size = next(iter(shapes.values()))[0]
            if wanted not in (None, (size, size, size)):
                raise ConfigError(
                    f"the graph takes {size} image{'s' * (size > 1)} per run, --batch asks for "
                    f"{_batch(wanted)}: leave the option out, or export with --batch dynamic"
                )
            self.batch = (size, size, size)
            return
        self.batch = wanted or OPEN_BATCH
        profile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            profile.set_shape(name, *((size, *shape[1:]) for size in self.batch))
        options.add_optimization_profile(profile)
        sharing = getattr(getattr(self._trt, "PreviewFeature", None), "PROFILE_SHARING_0806", None)
        if sharing is not None:  # without it 8.6 gives the one profile to a single context: no second lane
            options.set_preview_feature(sharing, True)

    def _lay_out(self, network: Any) -> None:
        inputs = [network.get_input(index) for index in range(network.num_inputs)]
        for tensor in (*inputs, *(network.get_output(index) for index in range(network.num_outputs))):
            if tensor.name in self._layouts:
                layout = _named(self._trt.TensorFormat, self._layouts[tensor.name], "tensor format")
                tensor.allowed_formats = 1 << int(layout)

    def _timing_cache(self, options: Any) -> Any:
        """What was measured before, or nothing yet; TensorRT-RTX measures when the engine first runs."""
        path = self._config.timing_cache
        if path is None or self._config.builder == "tensorrt_rtx":
            return None
        try:
            content = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise ConfigError(f"cannot read timing cache {path}: {error.strerror}") from error
        cache = options.create_timing_cache(content)
        if not options.set_timing_cache(cache, False):  # of another GPU or version
            cache = options.create_timing_cache(b"")
            options.set_timing_cache(cache, False)
        return cache

    def _unbuilt(self) -> EngineError:
        """Why there is no plan; of a quantised graph, which layers to leave as they were."""
        what = f"{self._name} cannot build the graph in INT8 ({self._messages.reason()})"
        quantised = precision_of(self._model) == "int8"
        refusal = refused(self._model, "\n".join(self._messages.errors), what) if quantised else None
        return refusal or self._error("cannot build the graph")

    @property
    def _name(self) -> str:
        return _label(self._trt, self._config)

    def _error(self, what: str) -> EngineError:
        said = self._messages
        return EngineError(f"{self._name} {what} ({said.reason()}): {said.remedy()}")


def _label(trt: Any, config: BuildConfig) -> str:
    name = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}[config.builder]
    return f"{name} {trt.__version__}"


def _new_builder(trt: Any, config: BuildConfig) -> Any:
    messages = collector(trt)
    try:
        return trt.Builder(messages)
    except TypeError as error:  # pybind11's word for a null pointer
        raise EngineError(
            f"{_label(trt, config)} cannot start ({messages.reason()}): {messages.remedy()}"
        ) from error


def _on_device(config: BuildConfig) -> contextlib.AbstractContextManager[Any]:
    """The GPU to build for; which one is current, each thread knows for itself."""
    return contextlib.nullcontext() if config.builder == "tensorrt_rtx" else torch.cuda.device(config.device)


def mark_precision(trt: Any, network: Any, options: Any, model: onnx.ModelProto) -> int:
    """Tell a TensorRT that knows no strong typing what the graph's types mean; returns the layers pinned.

    It may then use half precision and integers where the graph does, and is held to FP32 in every layer that
    touches one of its FP32 tensors: such a layer would otherwise be free to round what it is given, the grid
    of a GridSample say.
    """
    types = element_types(model)
    kinds = set(types.values())
    flags = {"INT8": precision_of(model) == "int8", "FP16": TensorProto.FLOAT16 in kinds,
             "BF16": TensorProto.BFLOAT16 in kinds}  # fmt: skip
    for flag in (name for name, needed in flags.items() if needed):
        if not hasattr(trt.BuilderFlag, flag):
            raise EngineError(f"TensorRT {trt.__version__} knows no {flag}: build with --precision fp16")
        options.set_flag(getattr(trt.BuilderFlag, flag))
    if not (flags["FP16"] or flags["BF16"]):
        return 0
    options.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    as_they_are = {getattr(trt.LayerType, name, None) for name in _AS_THEY_ARE}
    pinned = 0
    for layer in map(network.get_layer, range(network.num_layers)):
        outputs = [layer.get_output(place) for place in range(layer.num_outputs)]
        inputs = [layer.get_input(place) for place in range(layer.num_inputs)]
        touched = {types.get(tensor.name) for tensor in inputs + outputs if tensor is not None}
        if layer.type in as_they_are or TensorProto.FLOAT not in touched:
            continue
        layer.precision = trt.float32
        pinned += 1
        for place, tensor in enumerate(outputs):
            if types.get(tensor.name) == TensorProto.FLOAT:
                layer.set_output_type(place, trt.float32)
    return pinned


def _monitor(trt: Any) -> Any:
    """Something TensorRT tells how far it is, None where it has no such thing (before 9)."""
    if not hasattr(trt, "IProgressMonitor"):
        return None

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Phases lie within phases; called from TensorRT's threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)  # pybind11 demands it by name
            self.cancelled = False
            self._phases: dict[str, tuple[int, int]] = {}  # name → steps done, steps

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self._phases[name] = (0, max(1, steps))

        def step_complete(self, name: str, step: int) -> bool:
            _, steps = self._phases.get(name, (0, 1))
            self._phases[name] = (min(step + 1, steps), steps)
            return not self.cancelled

        def phase_finish(self, name: str) -> None:
            self._phases.pop(name, None)

        def state(self) -> tuple[str, float | None]:
            """The innermost phase, and how far all is."""
            done, share = 0.0, 1.0
            phases = dict(self._phases)
            for steps_done, steps in phases.values():
                done += share * steps_done / steps
                share /= steps
            return (next(reversed(phases)), min(done, 1.0)) if phases else ("parsing", None)

    return Monitor()


def _while_working(work: Callable[[], T], tick: Callable[[], object], cancel: Callable[[], bool]) -> T:
    """The result of work in a thread, `tick` called now and then.

    Where that, or Ctrl-C, raises, `cancel` says whether the work will stop soon.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    thread = Thread(target=run, name="build", daemon=True)
    thread.start()
    try:
        while not future.done():
            with contextlib.suppress(TimeoutError):
                future.exception(timeout=TICK_SECONDS)
            tick()
    except BaseException:
        if cancel():
            thread.join()
        raise
    return future.result()


def _sm(config: BuildConfig) -> int | None:
    if config.builder == "tensorrt_rtx":
        return config.sm
    if not torch.cuda.is_available() or config.device >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise EngineError(
            f"TensorRT builds on the GPU it builds for; cuda:{config.device} is asked for and torch sees "
            f"{count}: run on a machine with one, or use --builder tensorrt_rtx"
        )
    major, minor = torch.cuda.get_device_capability(config.device)
    return 10 * major + minor


def _named(kind: Any, name: str, what: str) -> Any:
    """A member of one of TensorRT's enumerations."""
    if name not in kind.__members__:
        raise ConfigError(f"no {what} {name} in this TensorRT; there is {', '.join(kind.__members__)}")
    return kind.__members__[name]


def _bits(kind: Any, names: Sequence[str], what: str) -> int:
    return sum(1 << int(_named(kind, name, what)) for name in set(names))


def _batch(batch: Batch) -> str:
    return ",".join(map(str, batch))


@contextlib.contextmanager
def partial_file(path: Path) -> Iterator[PartialFile]:
    """The file becomes `path` at the end, or nothing if that is not reached."""
    file = PartialFile(path.parent, path.stem, path.suffix)
    try:
        yield file
        file.close(complete=True)
    finally:
        file.discard()
