"""`.pt2` files: programs of torch.export, for GPUs without TensorRT, and for the CPU.

A program runs on any device, as it is on a CPU. On CUDA torch.compile makes kernels of it when a batch size
first comes (seconds, kept on disk by torch), which needs Triton and a C compiler on that machine.

It is code. Loading it unpickles (torch.export's own warning) and evaluates expressions in it: there is no
safe way to open one from somebody else. So a file is only opened when its manifest's hash says that it is the
one its user described, or on the user's own word.

The network's forward takes tensors by position, the batch first in each, and returns a dict of tensors by
name, the batch first. Knows nothing of images or boxes.
"""

from __future__ import annotations

import io
import logging
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tracker.kernels.deform  # the operators that programs hold by name
import tracker.kernels.tails  # noqa: F401
from tracker.errors import EngineError
from tracker.graphs import first_line
from tracker.manifest import Manifest
from tracker.runtimes.lanes import LaneRuntime, Shape, capturing, check_batch, on, resolve

LANES = 2  # on CUDA, see `TensorRTRuntime`; a program on a CPU takes all its cores
MOST = 8  # images at once where a program sets no limit
_EXPORT = "export it again with this torch, or use the .onnx file"

Call = Callable[..., Mapping[str, Tensor]]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output. row: shape of one image's part. channels_last: how an input lies in memory."""

    row: tuple[int, ...]
    dtype: str
    channels_last: bool = False

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def buffer(self, batch: int, device: torch.device) -> Tensor:
        zeros = torch.zeros(batch, *self.row, dtype=self.torch_dtype, device=device)
        return zeros.to(memory_format=torch.channels_last) if self.channels_last else zeros


@dataclass(frozen=True, slots=True)
class Signature:
    """What a network takes and gives, by name and in order. batch: the least and the greatest."""

    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    batch: tuple[int, int]

    def shapes(self, side: Mapping[str, TensorSpec]) -> dict[str, Shape]:
        least, most = self.batch
        return {name: (most if least == most else None, *spec.row) for name, spec in side.items()}


class TorchExportRuntime(LaneRuntime):
    """One `.pt2` file, loaded. Attributes and `run`: see `LaneRuntime`.

    device: as for `OnnxRuntime`. manifest: its hash is checked before the file is opened. trusted: open a
    file without a manifest all the same, on the caller's word. compiled: whether torch.compile makes kernels
    of a program; None is on CUDA only. Where it cannot, the program runs as it is, and `description` says so.

    Raises EngineError for a file that is not the manifest's, or no program, or not for this torch or this
    device.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str | torch.device = "auto",
        manifest: Manifest | None = None,
        trusted: bool = False,
        lanes: int | None = None,
        compiled: bool | None = None,
    ) -> None:
        self.device = resolve(device, cpu=True)
        by_default = LANES if self.device.type == "cuda" else 1
        super().__init__(by_default if lanes is None else lanes)
        content = _content(path, manifest, trusted)
        loaded = _load(path, content, self.device)
        self.signature = signature_of(loaded, str(path))
        self._program = _Program(loaded, self.device.type == "cuda" if compiled is None else compiled)
        self.library = f"torch.export, torch {torch.__version__}"
        self.inputs = self.signature.shapes(self.signature.inputs)
        self.outputs = self.signature.shapes(self.signature.outputs)
        both = {**self.signature.inputs, **self.signature.outputs}
        self.dtypes = {name: spec.torch_dtype for name, spec in both.items()}
        self.max_batch = self.signature.batch[1]

    @property
    def problems(self) -> tuple[str, ...]:
        problem = self._program.problem
        return (*super().problems, *((f"not compiled: {problem}",) if problem else ()))

    def lane(self) -> TorchLane:
        """Buffers of its own; the weights are shared."""
        return TorchLane(self._program, self.signature, self.device)


class TorchLane:
    """See `LaneRuntime.lane`. Outputs lie where torch put them for this call."""

    def __init__(self, call: Call, signature: Signature, device: torch.device) -> None:
        self._call = call
        self._least, self._most = signature.batch
        self._device = device
        try:
            self.inputs: Mapping[str, Tensor] = {
                name: spec.buffer(self._most, device) for name, spec in signature.inputs.items()
            }
        except RuntimeError as error:  # torch's, for want of memory
            raise EngineError(f"{device} has no memory for another lane: use fewer lanes") from error
        self._ran: set[int] = set()

    @torch.inference_mode()
    def enqueue(self, batch: int) -> dict[str, Tensor]:
        check_batch(batch, self._most)
        rows = self._rows(batch)
        if rows not in self._ran and capturing(self._device):
            raise EngineError(
                f"batch {batch} has not run yet: enqueue it once before it is captured in a CUDA graph"
            )
        try:
            # Shapes never change, so trying cuDNN's algorithms when a size first comes pays ever after.
            with on(self._device), torch.backends.cudnn.flags(enabled=True, benchmark=True):
                outputs = self._call(*(tensor[:rows] for tensor in self.inputs.values()))
        except Exception as error:  # torch raises of every kind here
            raise EngineError(f"the engine failed to run: {first_line(error)}") from error
        self._ran.add(rows)
        return {name: output[:batch] for name, output in outputs.items()}

    def _rows(self, batch: int) -> int:
        """What is run for a batch: on CUDA the next power of two, for each size is compiled and captured by
        itself; the rows beyond the batch hold older images.
        """
        rows = max(batch, self._least)
        if self._device.type == "cuda" and rows > 1:
            rows = 1 << (rows - 1).bit_length()
        return min(rows, self._most)


class _Program:
    """An exported program as a function, for any number of threads. problem: why it is not compiled though
    it should be.
    """

    def __init__(self, program: Any, compiled: bool) -> None:
        self.problem: str | None = None
        self._plain: Call = program.module()
        # Kernels for one size are faster than kernels for any.
        self._compiled: Call | None = torch.compile(self._plain, dynamic=False) if compiled else None
        self._compiling = threading.Lock()
        self._sizes: set[int] = set()

    def __call__(self, *inputs: Tensor) -> Mapping[str, Tensor]:
        size = len(inputs[0])
        if self._compiled is None:
            return self._plain(*inputs)
        if size in self._sizes:
            return self._compiled(*inputs)
        with self._compiling:
            try:
                with _quiet():
                    outputs = self._compiled(*inputs)
            except Exception as error:  # the compilers' own classes, derived from nothing narrower
                self.problem, self._compiled = first_line(error), None
                return self._plain(*inputs)
            self._sizes.add(size)
            return outputs


def signature_of(program: Any, name: str) -> Signature:
    """Of a torch.export.ExportedProgram. name: of its file. Raises EngineError for one no lane can run."""
    inputs = {
        node.name: node.meta["val"]
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in program.graph_signature.user_inputs
    }
    spec = program.call_spec.out_spec
    if spec.type is not dict:
        raise EngineError(f"{name} gives no named tensors: export a forward that returns a dict of them")
    (result,) = (node for node in program.graph.nodes if node.op == "output")
    given = result.args[0][-len(spec.context) :]  # after what it changes in place
    outputs = {key: node.meta["val"] for key, node in zip(spec.context, given, strict=True)}
    batches = set()
    for tensor, value in {**inputs, **outputs}.items():
        if (
            not isinstance(value, Tensor)
            or value.ndim == 0
            or not all(type(n) is int for n in value.shape[1:])
        ):
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise EngineError(f"{name}: {tensor} is {shape}; it must be a tensor, open in its batch at most")
        batches.add(str(value.shape[0]))
    if len(batches) != 1:
        raise EngineError(
            f"{name}: inputs and outputs differ in their first dimension ({', '.join(sorted(batches))}); it "
            "must be the batch in all of them"
        )
    return Signature(
        {tensor: _spec(value) for tensor, value in inputs.items()},
        {tensor: _spec(value) for tensor, value in outputs.items()},
        _batches(program, next(iter(inputs.values())).shape[0]),
    )


def _spec(value: Tensor) -> TensorSpec:
    last = value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last)
    dtype = str(value.dtype).removeprefix("torch.")
    return TensorSpec(tuple(value.shape[1:]), dtype, last and not value.is_contiguous())


def _batches(program: Any, batch: Any) -> tuple[int, int]:
    if type(batch) is int:
        return batch, batch
    limits = program.range_constraints[batch.node.expr]
    least = int(limits.lower)
    return least, int(limits.upper) if limits.upper.is_finite else max(least, MOST)


def _content(path: Path, manifest: Manifest | None, trusted: bool) -> bytes:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror}") from error
    if manifest is not None:
        manifest.verify(path, content)
    elif not trusted:
        raise EngineError(
            f"{path} has no manifest: a .pt2 file is code, run as soon as it is opened. If you trust it, "
            "describe it with tools/manifest.py first"
        )
    return content


def _check(path: Path, content: bytes) -> None:
    """Raise EngineError for what is no program, before torch opens it."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            inside = [name.partition("/")[2] for name in archive.namelist()]
    except zipfile.BadZipFile as error:
        raise EngineError(f"{path} is no .pt2 file or is cut short: export or copy it again") from error
    if any(name.startswith("data/aotinductor/") for name in inside):
        raise EngineError(
            f"{path} is a package compiled by AOTInductor; only programs of torch.export are run: write one "
            "with tools/export.py"
        )
    if not any(name.startswith("models/") for name in inside):
        raise EngineError(f"{path} holds no network exported by torch ≥ 2.8: {_EXPORT}")


def _load(path: Path, content: bytes, device: torch.device) -> Any:
    from torch.export.passes import move_to_device_pass

    _check(path, content)
    logger, swallowed = logging.getLogger(torch.export.__name__), _Swallowed()
    logger.addFilter(swallowed)
    try:
        with _quiet():
            program = torch.export.load(io.BytesIO(content))
        if any(weight.device.type != device.type for weight in program.state_dict.values()):
            program = move_to_device_pass(program, str(device))
        return program
    except Exception as error:  # torch raises of every kind here
        raise _cannot_load(path, swallowed.error or error) from error
    finally:
        logger.removeFilter(swallowed)


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch's loaders and compilers warn of what their own makers could change, and no user can."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class _Swallowed(logging.Filter):
    """torch.export.load logs a traceback of what went wrong and raises something else: this keeps it."""

    error: BaseException | None = None

    def filter(self, record: logging.LogRecord) -> bool:
        self.error = record.exc_info[1] if record.exc_info else self.error
        return False


def _cannot_load(path: Path, error: BaseException) -> EngineError:
    while error.__cause__ is not None:
        error = error.__cause__
    reason = first_line(error).partition(". ")[0]
    return EngineError(f"cannot load {path} with torch {torch.__version__}: {reason}; {_EXPORT}")
