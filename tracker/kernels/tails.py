"""Last layers of heads, each 1×1 behind a ReLU, as one kernel: the torch operator `tracker::last_layer`.

What the first layers of FairMOT's heads give is the network's largest tensor: 677 MB for eight images. Bias
and ReLU as a pass of their own, as compilers of torch make them, read and write all of it once more. Here
each last layer reads its part of it, and nothing is written but its answer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 (everybody's name for it)
from torch import Tensor

from tracker.errors import EngineError
from tracker.kernels.launch import EXACT, launch, on_device_of, power_of_two, programs
from tracker.kernels.operators import channels_last, launch_traced, register, traced

CHANNELS = 64  # the kernel takes multiples of it
_MOST = 256  # outputs that one program holds


def last_layer(hidden: Tensor, weight: Tensor, bias: Tensor, hidden_bias: Tensor, first: int) -> Tensor:
    """(B, N, H, W) of weight's type, channels last: weight · relu(hidden + hidden_bias) + bias.

    hidden: (B, C, H, W), of which the channels first to first + K are taken; copied first unless channels
    lie last. weight: (N, K), K a multiple of 64; float32 is multiplied as such. bias: (N,).
    hidden_bias: (K,).
    Raises EngineError for tensors that do not fit, and on a CPU.
    """
    _check(hidden, weight, bias, hidden_bias, first)
    kernels = programs("tails", hidden, weight, bias, hidden_bias)
    start: Callable[..., None] = launch_traced if traced(hidden) else partial(launch, **EXACT)
    hidden = hidden.contiguous(memory_format=torch.channels_last)
    outputs, inputs = weight.shape
    batch, channels, height, width = hidden.shape
    out = _shape(hidden, weight, bias, hidden_bias, first)
    pixels, wide = batch * height * width, weight.dtype == torch.float32
    block = 64 if outputs > 64 else 128
    with on_device_of(hidden):
        start(
            kernels.tail, (-(-pixels // block),),
            hidden, hidden_bias, weight, bias, out, pixels, first, outputs,
            CHANNELS=channels, K=inputs, PRECISION="ieee" if wide else "tf32",
            BLOCK=block, BLOCK_K=CHANNELS // 2 if wide else CHANNELS, BLOCK_N=power_of_two(max(16, outputs)),
            num_warps=4,
        )  # fmt: skip
    return out


def _operate(hidden: Tensor, weight: Tensor, bias: Tensor, hidden_bias: Tensor, first: int) -> Tensor:
    return last_layer(hidden, weight, bias, hidden_bias, first)


def _shape(hidden: Tensor, weight: Tensor, bias: Tensor, hidden_bias: Tensor, first: int) -> Tensor:
    return channels_last(hidden, len(weight), weight.dtype)


def _on_cpu(hidden: Tensor, weight: Tensor, bias: Tensor, hidden_bias: Tensor, first: int) -> Tensor:
    _check(hidden, weight, bias, hidden_bias, first)
    part = hidden[:, first : first + weight.shape[1]].permute(0, 2, 3, 1)
    rows = F.relu(part.float() + hidden_bias.float()).to(weight.dtype)
    return _shape(hidden, weight, bias, hidden_bias, first).copy_(
        F.linear(rows, weight, bias).permute(0, 3, 1, 2)
    )


def _check(hidden: Tensor, weight: Tensor, bias: Tensor, hidden_bias: Tensor, first: int) -> None:
    outputs, inputs = weight.shape
    shapes = {"bias": (bias, (outputs,)), "hidden_bias": (hidden_bias, (inputs,))}
    for name, (tensor, shape) in shapes.items():
        if tensor.shape != shape:
            raise EngineError(
                f"{name} of a last layer of {inputs} to {outputs} channels has shape {tuple(tensor.shape)}; "
                f"it must be {shape}"
            )
    if not 0 <= first <= hidden.shape[1] - inputs or inputs % CHANNELS or outputs > _MOST:
        raise EngineError(
            f"a last layer takes a multiple of {CHANNELS} of the channels it is given and gives {_MOST} at "
            f"most, not channels {first} to {first + inputs} of {hidden.shape[1]} to {outputs}"
        )


_registered: Any = register("tracker::last_layer", _operate, shape=_shape, cpu=_on_cpu)
