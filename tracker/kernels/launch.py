"""Where Triton programs can run, and how they are started: on CUDA tensors, or in Triton's interpreter on
any; else an error in words.

Nothing here falls back: on a CPU, the torch code that each kernel reproduces is what to call.
"""

from __future__ import annotations

import importlib
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tracker.errors import EngineError
from tracker.kernels.driver import Grid, Launcher

# Triton contracts a·b + c into one rounding unless told not to. Results that are compared to thresholds or
# rounded to integers must round where torch and OpenCV do.
EXACT: dict[str, Any] = {"enable_fp_fusion": False}


def programs(name: str, *tensors: Tensor) -> Any:
    """The module jit/<name>.py, whose functions `launch` starts on these tensors.

    Raises EngineError where they lie on several devices, where Triton is missing, and for CPU tensors unless
    Triton interprets (environment variable TRITON_INTERPRET=1, for tests).
    """
    device = tensors[0].device
    if any(tensor.device != device for tensor in tensors):
        raise EngineError(
            f"one launch takes tensors of one device, not {', '.join(str(t.device) for t in tensors)}"
        )
    try:
        import triton
    except ImportError as error:
        raise EngineError(
            "the GPU kernels need Triton, which comes with torch's CUDA builds: install one of those, "
            "or run on the CPU"
        ) from error
    if device.type != "cuda" and not triton.knobs.runtime.interpret:
        raise EngineError(
            f"the GPU kernels take CUDA tensors, not {device.type}: run on cuda, or decode there"
        )
    return importlib.import_module(f"tracker.kernels.jit.{name}")


def launch(kernel: Any, grid: Grid, first: Tensor, *others: Tensor | float, **options: object) -> None:
    """Enqueue a function of `programs` on torch's current stream of the tensors' device, which is current.

    grid: blocks along x, y, z. first, others: its arguments in order, but for compile-time ones; these and
    Triton's own options are given by name. A grid without blocks does nothing.

    Through CUDA's driver, which needs no C compiler; without NVIDIA's binding of it (cuda-python) Triton
    builds a launcher with one. Raises EngineError where neither can be had.
    """
    device = first.device
    launcher = _launcher(device.index) if device.type == "cuda" else None
    if launcher is not None:
        stream = torch.cuda.current_stream(device).cuda_stream
        launcher(kernel, grid, (first, *others), options, stream)
    elif all(grid):
        _launch_by_triton(kernel, grid, (first, *others), options)


def on_device_of(tensor: Tensor) -> torch.cuda.device_of:
    """Programs start on the current device, whichever their arguments are on."""
    return torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]


def power_of_two(least: int) -> int:
    """The smallest power of two that is no less: what the sides of Triton's blocks must be."""
    return 1 << (least - 1).bit_length()


@cache
def _launcher(device: int) -> Launcher | None:
    """None where Triton interprets, and without NVIDIA's binding."""
    import triton

    if triton.knobs.runtime.interpret:
        return None
    try:
        driver = importlib.import_module("cuda.bindings.driver")
    except ImportError:
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return Launcher(driver, device, 10 * major + minor)


def _launch_by_triton(kernel: Any, grid: Grid, arguments: Sequence[Any], options: Mapping[str, Any]) -> None:
    try:
        kernel[grid](*arguments, **options)
    except (OSError, subprocess.SubprocessError) as error:
        raise _no_compiler(error) from error
    except RuntimeError as error:
        if "compiler" not in str(error):
            raise
        raise _no_compiler(error) from error


def _no_compiler(error: Exception) -> EngineError:
    return EngineError(
        f"Triton cannot build its launcher ({str(error).splitlines()[0]}): install cuda-python (pip install "
        "'tracker[gpu]'), with which the GPU kernels need no C compiler, or gcc and Python's headers"
    )
