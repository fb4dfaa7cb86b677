"""ONNX files through ONNX Runtime, on the CPU or a CUDA device.

Named torch tensors in and out, on the engine's device and without copies. Knows nothing of images or boxes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch.utils.dlpack import from_dlpack

from tracker.errors import ConfigError, EngineError
from tracker.runtimes.onnx_parts import PARTS, read_parts

Shape = tuple[int | None, ...]

_TYPES = {  # what ONNX Runtime calls them
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(uint8)": torch.uint8,
    "tensor(int32)": torch.int32,
    "tensor(int64)": torch.int64,
}
_NUMPY_TYPES = {
    tensor_type: torch.empty(0, dtype=tensor_type).numpy().dtype.type for tensor_type in _TYPES.values()
}
MAX_LANES = 4  # each holds a batch and its activations in memory
_SILENT = 4  # ONNX Runtime's severity "fatal": what goes wrong is raised, not printed


class OnnxRuntime:
    """One ONNX file, loaded.

    device: "cpu", "cuda", "cuda:N" or "auto": CUDA where both ONNX Runtime and torch can use it, else the
        CPU. CUDA that was asked for and cannot be had is an error, never a silent run on the CPU.
    lanes: runs that go on at once, each in a thread of its caller's; None is one on CUDA, and on a CPU as
        many as it has cores, but at most MAX_LANES: frames side by side lose nothing to waiting for each
        other, threads within a frame do.
    threads: of the CPU for one run; None shares the cores out among the lanes.

    content: what to load in place of the file.

    Of a file of several parts (`onnx_parts`) it is the first. parts: runtimes of the others, by their input.

    Raises EngineError when the file cannot be loaded, ConfigError for an impossible option.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str = "auto",
        lanes: int | None = None,
        threads: int | None = None,
        content: bytes | None = None,
    ) -> None:
        for key, count in (("lanes", lanes), ("threads", threads)):
            if count is not None and count < 1:
                raise ConfigError(f"{key} is {count}; it must be at least 1")
        self.device = _resolve(device)
        cores = usable_cores()
        self.lanes = lanes or (min(cores, MAX_LANES) if self.device.type == "cpu" else 1)
        self.threads = threads or max(1, cores // self.lanes)
        self._session = _load(path, self.device, self.threads, content)
        self.parts: Mapping[str, OnnxRuntime] = {}
        if PARTS in self._session.get_modelmeta().custom_metadata_map:
            (_, own), *others = read_parts(path, content).items()
            self._session = _load(path, self.device, self.threads, own)
            self.parts = {
                name: OnnxRuntime(path, device=device, lanes=self.lanes, threads=self.threads, content=part)
                for name, part in others
            }
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        self.inputs: Mapping[str, Shape] = {node.name: _open_dimensions(node.shape) for node in inputs}
        self.outputs: Mapping[str, Shape] = {node.name: _open_dimensions(node.shape) for node in outputs}
        self._types = {node.name: _TYPES.get(node.type) for node in inputs}
        self.description = f"ONNX Runtime {onnxruntime.__version__} on {self.device}"

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """All outputs by name, in memory of their own on the engine's device.

        Floating-point inputs are cast to the engine's own precision. Raises EngineError for inputs whose
        names, types or shapes the engine does not take, and for a run that fails.
        """
        if inputs.keys() != self.inputs.keys():
            raise EngineError(f"the engine takes inputs {_names(self.inputs)}, not {_names(inputs)}")
        ready = {name: self._prepared(name, tensor) for name, tensor in inputs.items()}
        binding = self._session.io_binding()
        place = self.device.type, self.device.index or 0
        for name, tensor in ready.items():
            kind = _NUMPY_TYPES[tensor.dtype]
            binding.bind_input(name, *place, kind, tuple(tensor.shape), tensor.data_ptr())
        for name in self.outputs:
            binding.bind_output(name, *place)
        if self.device.type == "cuda":  # the engine reads on its own stream what the caller's stream writes
            torch.cuda.current_stream(self.device).synchronize()
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # pybind11 translates to RuntimeError and to classes of ONNX Runtime's own
            raise EngineError(f"the engine failed to run: {_reason(error)}") from error
        return dict(zip(self.outputs, map(from_dlpack, binding.get_outputs()), strict=True))

    def _prepared(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        wanted, shape = self._types[name], self.inputs[name]
        fits = len(shape) == tensor.ndim and all(
            want is None or want == have for want, have in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            raise EngineError(f"input {name} needs shape {_shape(shape)}, got {_shape(tensor.shape)}")
        castable = wanted is not None and wanted.is_floating_point and tensor.is_floating_point()
        if wanted is None or (tensor.dtype != wanted and not castable):
            raise EngineError(
                f"input {name} needs {wanted or 'a type no torch tensor has'}, got {tensor.dtype}"
            )
        return tensor.to(self.device, wanted).contiguous()


def usable_cores() -> int:
    """Those this process may use, where the system tells; containers and batch systems give away few."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _resolve(device: str) -> torch.device:
    match = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", device)
    if match is None:
        raise ConfigError(f"device is {device!r}; it must be auto, cpu, cuda or cuda:N")
    provided = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    count = torch.cuda.device_count() if provided else 0
    if device == "cpu" or (device == "auto" and count == 0):
        return torch.device("cpu")
    index = int(match[1] or 0)
    if not provided:
        raise EngineError(
            f"device {device} asked for, but this ONNX Runtime has no CUDA provider: install "
            "onnxruntime-gpu in place of onnxruntime, or use --device cpu"
        )
    if index >= count:
        raise EngineError(
            f"device {device} asked for, but torch sees {count} CUDA devices: use --device cpu, a device "
            "that exists, or a torch built for CUDA"
        )
    return torch.device("cuda", index)


def _load(path: Path, device: torch.device, threads: int, content: bytes | None) -> Any:
    if content is None and not path.is_file():
        raise EngineError(f"{path} is {'a directory' if path.is_dir() else 'missing'}: name an .onnx file")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    options.intra_op_num_threads = threads
    # Threads that spin while they wait gain a fifth on an idle machine and lose severalfold on a busy one.
    # YOLOX-nano on two cores, ms per frame: 18.4 with and 22.9 without; beside other work 160 and 42.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": device.index}))
    try:
        session = onnxruntime.InferenceSession(content or path, options, providers=providers)
    except Exception as error:  # classes of ONNX Runtime's own, derived from nothing narrower
        raise EngineError(f"cannot load {path}: {_reason(error)}; {_remedy(str(error))}") from error
    if device.type == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
        raise EngineError(
            f"ONNX Runtime {onnxruntime.__version__} could not start its CUDA provider: its CUDA and cuDNN "
            "libraries are missing or of another version; install them, or use --device cpu"
        )
    return session


def _reason(error: Exception) -> str:
    """ONNX Runtime's message without its codes, source lines and C++ signatures, on one line."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (Load model from .*? failed:)?", "", str(error))
    text = re.sub(r"/onnxruntime_src/.*?\) (?=[A-Z])", "", text)
    return " ".join(text.split()).rstrip(".")


def _remedy(message: str) -> str:
    if "Protobuf parsing failed" in message or "No graph was found" in message:
        return "the file is no ONNX model or is cut short: export or copy it again"
    if "xternal data" in message:
        return "its weights lie in a separate file: put that file beside it, under its own name"
    return (
        f"export it again with what ONNX Runtime {onnxruntime.__version__} supports, or install a newer one"
    )


def _open_dimensions(shape: list[int | str | None]) -> Shape:
    return tuple(size if isinstance(size, int) else None for size in shape)


def _names(tensors: Mapping[str, object]) -> str:
    return ", ".join(tensors) or "none"


def _shape(shape: Shape) -> str:
    return "×".join("?" if size is None else str(size) for size in shape) or "()"
