"""TensorRT or TensorRT-RTX behind one import, and what they say as words for our errors.

Both offer the same Python interface under two names; versions differ in what is there, which is asked for
by name (`hasattr`), never by number. Knows how TensorRT complains; knows no engine and no network.
"""

from __future__ import annotations

import functools
import importlib
import re
from types import ModuleType
from typing import Any, Literal, Protocol

from tracker.errors import EngineError

TrtName = Literal["tensorrt", "tensorrt_rtx"]

_MODULES: dict[TrtName, tuple[str, ...]] = {
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),  # the second is all that its wheels install
}
_INSTALL: dict[TrtName, str] = {
    "tensorrt": "pip install 'tracker[tensorrt]'",
    "tensorrt_rtx": "pip install tensorrt-rtx-cu13-libs tensorrt-rtx-cu13-bindings",
}
_KEPT = 100  # errors; one failure says at most a dozen

# What TensorRT 8.6 to 11 and TensorRT-RTX say, and what helps. The first that fits is taken, so causes come
# before their consequences.
_REMEDIES: tuple[tuple[str, str], ...] = (
    (
        r"out of memory|OutOfMemory|OOM|insufficient memory",
        "free GPU memory, or build with a smaller batch or --workspace",
    ),
    (
        r"cudaError 35|initialization failure with error: 35|driver version is insufficient|CUDA driver",
        "install an NVIDIA driver as new as this TensorRT needs, or use a machine that has one",
    ),
    (
        r"no CUDA-capable device|initialization failure with error|cudaErrorNoDevice|cudaError 100\b",
        "no GPU can be used: look at nvidia-smi, or use the .onnx file with --device cpu",
    ),
    (
        r"[Ii]llegal memory access|[Ll]aunch failure|cudaError 7\d\d|device-side assert|unspecified launch",
        "the GPU has given up on this process: start it again, and look at nvidia-smi if it comes back",
    ),
    (
        r"expecting compute|incompatible device|does not support this compute|different GPU",
        "it belongs to another GPU model: build it again on this machine with tools/build.py",
    ),
    (
        r"DeformConv|DeformableConv",
        "it comes with TensorRT 10.15; elsewhere build with --deform segments, or export with --lower-deform",
    ),
    (
        r"[Pp]lugin.*not found|could not find plugin|creator &&|Plugin Registry|no importer registered",
        "this TensorRT lacks an operator or its plugin: export what it has, or install a newer TensorRT",
    ),
    (
        r"host code|HostCode|lean runtime",
        "engines may bring no code of their own: build it again with tools/build.py",
    ),
    (
        r"Failed to parse the ONNX model|ParseFromCodedStream",
        "the file is no ONNX model or is cut short: export or copy it again",
    ),
    (
        r"older plan|[Vv]ersion tag|serializationVersion|not compatible with this version",
        "it belongs to another version of TensorRT: build it again with tools/build.py",
    ),
    (
        r"[Mm]agic|Serialization|deserializ|not a valid (engine|plan)|corrupt|truncated|checksum",
        "it is damaged, or no engine of this TensorRT: build it again with tools/build.py",
    ),
    (
        r"not stream capturable",  # 8.6 of transformers with an open batch
        "this TensorRT cannot record the engine in a CUDA graph; it runs without one, launch by launch",
    ),
    (
        r"[Cc]ould not find any implementation|No valid tactics",
        "allow it more: a larger --workspace, other --tactics, or another --precision",
    ),
)
_ELSE = "build it again with tools/build.py on this machine, or use the .onnx file"


class Messages(Protocol):
    """What TensorRT has said; pass it where TensorRT takes a logger. errors: newest last."""

    errors: list[str]
    warnings: list[str]

    def reason(self) -> str:
        """The first error without its codes and source lines, on one line."""
        ...

    def remedy(self) -> str:
        """What its user can do about the errors."""
        ...


def trt_module(name: TrtName) -> ModuleType:
    """The library's module. Raises EngineError where it is not installed or cannot be loaded."""
    failure = ""
    for module in _MODULES[name]:
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            failure = failure or str(error)
        except (
            ImportError,
            OSError,
            RuntimeError,
        ) as error:  # a shared library is missing or of another CUDA
            failure = " ".join(str(error).split())
    raise EngineError(
        f"{name} cannot be used here ({failure}): install it with `{_INSTALL[name]}`, or use the .onnx file"
    )


def collector(trt: ModuleType) -> Messages:
    """The process's one logger of this library, with its errors so far forgotten.

    One, and never freed, because TensorRT takes the first logger it meets for all that is made while
    another is alive, and keeps a bare pointer to it.
    """
    messages: Messages = _logger(trt)
    messages.errors.clear()
    messages.warnings.clear()
    return messages


def reason(errors: list[str]) -> str:
    """The first of TensorRT's errors without its codes and source lines, on one line."""
    if not errors:
        return "TensorRT gives no reason"
    text = " ".join(errors[0].split())
    text = re.sub(r"^\d+: |^\S+\.cpp:\d+: ", "", text)
    text = re.sub(r"^\[\S+\.cpp::\S+\] |^\(?[\w:]+\)?: (?=Error Code|[A-Z_]+: )", "", text)
    text = re.sub(r"Error Code \d+: |[A-Z]+_[A-Z_]+: |\(?\bIn \S+ at /\S+:\d+ ?", "", text)
    return re.sub(r'^(?:Assertion failed: )?creator(?::| &&) "?(.*?)"?$', r"\1", text).rstrip(". ")


def remedy(errors: list[str]) -> str:
    """What the user can do about these errors of TensorRT's."""
    said = "\n".join(errors)
    return next((words for pattern, words in _REMEDIES if re.search(pattern, said)), _ELSE)


@functools.cache
def _logger(trt: ModuleType) -> Any:
    severe = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class Collector(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 demands it by name
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, text: str) -> None:
            kept = self.errors if severity in severe else self.warnings
            if severity in (*severe, trt.ILogger.Severity.WARNING) and len(kept) < _KEPT:
                kept.append(text)

        def reason(self) -> str:
            return reason(self.errors)

        def remedy(self) -> str:
            return remedy(self.errors)

    return Collector()
