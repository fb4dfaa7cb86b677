"""Where Triton programs can run: on CUDA tensors, or in Triton's interpreter on any; else an error in words.

Nothing here falls back: on a CPU, the torch code that each kernel reproduces is what to call.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from tracker.errors import EngineError

# Triton contracts a·b + c into one rounding unless told not to. Results that are compared to thresholds or
# rounded to integers must round where torch and OpenCV do.
EXACT = {"enable_fp_fusion": False}


def programs(name: str, *tensors: Tensor) -> Any:
    """The module jit/<name>.py, to be launched on these tensors.

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


def on_device_of(tensor: Tensor) -> torch.cuda.device_of:
    """Triton launches on the current device, whichever its arguments are on."""
    return torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]


def power_of_two(least: int) -> int:
    """The smallest power of two that is no less: what the sides of Triton's blocks must be."""
    return 1 << (least - 1).bit_length()
