"""Triton programs as operators of torch's library: torch.compile sees through one to its kernels,
torch.export keeps it by name, CUDA graphs capture it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op, triton_op, wrap_triton

# triton_op would complain about a missing Triton, aloud and whether anybody calls it or not.
_operator = triton_op if importlib.util.find_spec("triton") else custom_op


def register(
    name: str, operate: Callable[..., Tensor], *, shape: Callable[..., Tensor], cpu: Callable[..., Tensor]
) -> Any:
    """The operator. shape: what comes out, for those who trace without running. cpu: the same on a CPU."""
    registered: Any = _operator(name, mutates_args=())(operate)
    registered.register_fake(shape)
    registered.register_kernel("cpu")(cpu)
    return registered


def traced(tensor: Tensor) -> bool:
    """Whether it is a compiler's own, which sees only launches that are wrapped for it."""
    return type(tensor) not in (Tensor, torch.nn.Parameter)


def launch_traced(kernel: Any, grid: tuple[int, ...], *arguments: object, **options: object) -> None:
    """`launch` for a compiler, which records it and starts the kernel by its own means."""
    wrap_triton(kernel)[grid](*arguments, **options)


def channels_last(like: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    """(B, channels, H, W) of unset numbers beside an image (B, C, H, W), channels together.

    By its strides: asked for a memory format, torch's compiler fills what is to be overwritten.
    """
    batch, _, height, width = like.shape
    strides = (channels * height * width, 1, channels * width, channels)
    return torch.empty_strided((batch, channels, height, width), strides, dtype=dtype, device=like.device)
