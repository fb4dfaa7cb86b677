"""Deformable convolution v2 (3×3, stride 1, one offset group) as one fused kernel: the torch operator
`tracker::deform_conv2d`.

The arithmetic of `deform_reference`, which the operator runs on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tracker.errors import EngineError
from tracker.kernels import deform_reference
from tracker.kernels.launch import EXACT, launch, on_device_of, power_of_two, programs
from tracker.kernels.operators import channels_last, launch_traced, register, traced

TAPS = 9
ENOUGH = 200  # programs: more than a large GPU has multiprocessors
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class Plan:
    """How the work is cut. tile_y, tile_x: output pixels of a program. block_o: its output channels. split:
    programs that share these, 1, 3 or 9, each with its part of the taps. warps: Triton's. block_c: at most so
    many input channels at once.
    """

    tile_y: int = 8
    tile_x: int = 8
    block_o: int = 64
    split: int = 1
    warps: int = 4
    block_c: int = 64


_CUTS = (  # tile_y, tile_x, warps, block_c
    *((8, 8, warps, block_c) for warps in (4, 8) for block_c in (32, 64)),
    *((4, 16, 4, block_c) for block_c in (32, 64)),
    *((4, 8, 4, 64), (8, 16, 8, 32)),
)
PLANS = tuple(
    Plan(tile_y, tile_x, block_o, split, warps, block_c)
    for tile_y, tile_x, warps, block_c in _CUTS
    for block_o in (64, 128)
    for split in (1, 3, 9)
)
_fastest: dict[tuple[object, ...], Plan] = {}


def pack_weight(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) → (9, C, O) contiguous: what the operator takes."""
    return weight.flatten(2).permute(2, 1, 0).contiguous()


def plan_for(x: Tensor, outputs: int) -> Plan:
    """What `tune` found for such sizes on this device, else the least split that keeps a large GPU busy: for
    each of FairMOT's sizes, at batch 1 and 8, within a fifth of an H200's best plan.
    """
    # A compiler may ask for sizes that it has not decided on.
    known = _fastest.get(_key(x, outputs)) if all(type(side) is int for side in x.shape) else None
    if known is not None:
        return known
    batch, _, height, width = x.shape
    wide = x.dtype == torch.float32  # twice the registers
    plan = Plan(block_o=min(128, max(16, power_of_two(outputs))), block_c=32 if wide else 64)
    tiles = -(-height // plan.tile_y) * -(-width // plan.tile_x)
    programs = batch * tiles * -(-outputs // plan.block_o)
    return replace(plan, split=next((split for split in (1, 3) if programs * split >= ENOUGH), TAPS))


def tune(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor) -> list[tuple[float, Plan]]:
    """Measure every plan on these tensors and use the fastest for such sizes from now on.

    Arguments as of `deform_conv2d`. Microseconds and plans, fastest first. Waits for the device, and compiles
    for half a second per plan; for a CUDA graph, tune before capturing.
    """
    from triton.testing import do_bench_cudagraph

    def run(plan: Plan) -> Callable[[], Tensor]:
        return lambda: deform_conv2d(x, offset, mask, weight, plan=plan)

    batch, _, height, width = x.shape
    outputs = weight.shape[2]
    enough = 1 << 15  # pixels keep any GPU busy without a split
    plans = [
        plan
        for plan in PLANS
        if plan.block_o <= max(64, outputs) and (plan.split == 1 or batch * height * width < enough)
    ]
    with torch.cuda.stream(torch.cuda.Stream(x.device)):  # type: ignore[no-untyped-call]
        measured = [(1e3 * do_bench_cudagraph(run(plan), rep=2), plan) for plan in plans]
    measured.sort(key=lambda pair: pair[0])
    _fastest[_key(x, outputs)] = measured[0][1]
    return measured


def deform_conv2d(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask_logits: bool = False,
    relu: bool = False,
    shift_bias: Tensor | None = None,
    *,
    out: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """(B, O, H, W): the 3×3 convolution of x sampled at shifted taps, zero outside.

    x: (B, C, H, W), C a multiple of 16; fastest in float16, and copied first unless channels lie together.
    offset: (B, 18, H, W), for each tap its shift down, then right, in pixels. mask: (B, 9, H, W) factor of
    each tap, or with mask_logits its logit. Both of any strides, and parts of one tensor if need be: that
    tensor itself, of 27 channels or more, may be given as both, for compilers copy parts that begin anywhere.
    weight: (9, C, O) as `pack_weight` makes it, of x's type. bias: (O,). relu: of the result.
    shift_bias: (27,), still to be added to offset and mask, before its sigmoid.
    out: where to write, of any strides; None is fresh memory of x's type, channels last. plan: None is
    `plan_for`.
    Coordinates and sums are float32. Raises EngineError for tensors that do not fit, and on a CPU.
    """
    _check(x, offset, mask, weight, bias, shift_bias, out)
    kernels = programs("deform", x, offset, mask, weight)
    start: Callable[..., None] = launch_traced if traced(x) else partial(launch, **EXACT)
    if x.stride(1) != 1:
        x = x.contiguous(memory_format=torch.channels_last)
    (batch, channels, height, width), outputs = x.shape, weight.shape[2]
    plan = plan or plan_for(x, outputs)
    block_c = next(size for size in (plan.block_c, 32, 16) if channels % size == 0)
    out = channels_last(x, outputs, x.dtype) if out is None else out
    parts = (
        x.new_empty(plan.split, batch, height, width, outputs, dtype=torch.float32) if plan.split > 1 else out
    )
    ends = {"BIAS": bias is not None, "RELU": relu}
    biases = [weight if each is None else each for each in (bias, shift_bias)]
    grid = (
        -(-height // plan.tile_y) * -(-width // plan.tile_x),
        -(-outputs // plan.block_o),
        batch * plan.split,
    )
    with on_device_of(x):
        start(
            kernels.deform, grid,
            x, offset, mask, weight, *biases, parts,
            batch, height, width, channels, outputs,
            *x.stride(), *offset.stride(), *mask.stride(), *out.stride(),
            SIGMOID=mask_logits, SHIFT_BIAS=shift_bias is not None, **ends,
            MASK_AT=2 * TAPS if _together(offset, mask) else 0,
            HALF=x.dtype == torch.float16, PRECISION="tf32x3",
            TILE_Y=plan.tile_y, TILE_X=plan.tile_x, BLOCK_C=block_c, BLOCK_O=plan.block_o, SPLIT=plan.split,
            num_warps=plan.warps, num_stages=1,
        )  # fmt: skip
        if plan.split > 1:
            pixels = batch * height * width
            start(
                kernels.join, (-(-pixels // 16), -(-outputs // 64)),
                parts, biases[0], out, pixels, height, width, outputs, *out.stride(),
                **ends, SPLIT=plan.split, BLOCK=16, BLOCK_O=64,
            )  # fmt: skip
    return out


def _operate(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask_logits: bool = False,
    relu: bool = False,
    shift_bias: Tensor | None = None,
) -> Tensor:
    return deform_conv2d(x, offset, mask, weight, bias, mask_logits, relu, shift_bias)


def _shape(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask_logits: bool = False,
    relu: bool = False,
    shift_bias: Tensor | None = None,
) -> Tensor:
    """What comes out, for those who trace without running, with Triton or without."""
    _check(x, offset, mask, weight, bias, shift_bias, None)
    return channels_last(x, weight.shape[2], x.dtype)


def _check(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    shift_bias: Tensor | None,
    out: Tensor | None,
) -> None:
    batch, channels, height, width = x.shape
    outputs = weight.shape[-1]
    offset, mask = _parts(offset, mask)
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "offset": (offset, (batch, 2 * TAPS, height, width)),
        "mask": (mask, (batch, TAPS, height, width)),
        "weight": (weight, (TAPS, channels, outputs)),
        "bias": (bias, (outputs,)),
        "shift_bias": (shift_bias, (3 * TAPS,)),
        "out": (out, (batch, outputs, height, width)),
    }
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise EngineError(
                f"{name} of a deformable convolution of {tuple(x.shape)} has shape {tuple(tensor.shape)}; "
                f"it must be {shape}"
            )
    if channels % 16 or x.dtype not in _FLOATS or weight.dtype != x.dtype:
        raise EngineError(
            f"the fused deformable convolution takes a multiple of 16 channels and weights of the images' "
            f"floating-point type, not {channels} of {x.dtype} with {weight.dtype}: use models.deform"
        )


def _parts(offset: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Offsets and masks, each by itself."""
    if not _together(offset, mask):
        return offset, mask
    return offset[:, : 2 * TAPS], mask[:, 2 * TAPS : 3 * TAPS]


def _together(offset: Tensor, mask: Tensor) -> bool:
    return offset.shape == mask.shape and offset.shape[1] >= 3 * TAPS


def _on_cpu(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask_logits: bool = False,
    relu: bool = False,
    shift_bias: Tensor | None = None,
) -> Tensor:
    """The reference, in float32 as the kernel's sums are: programs that hold the operator run anywhere."""
    _check(x, offset, mask, weight, bias, shift_bias, None)
    _, channels, outputs = weight.shape
    offset, mask = (part.float() for part in _parts(offset, mask))
    if shift_bias is not None:
        down_and_right, factor = torch.split(shift_bias.float()[:, None, None], [2 * TAPS, TAPS])
        offset, mask = offset + down_and_right, mask + factor
    factors = mask.sigmoid() if mask_logits else mask
    plain = weight.float().permute(2, 1, 0).reshape(outputs, channels, 3, 3)
    wide = deform_reference.deform_conv2d(
        x.float(), offset, factors, plain, None if bias is None else bias.float()
    )
    return channels_last(x, outputs, x.dtype).copy_(wide.relu() if relu else wide)


def _key(x: Tensor, outputs: int) -> tuple[object, ...]:
    return (*x.shape, outputs, x.dtype, x.device)


_registered: Any = register("tracker::deform_conv2d", _operate, shape=_shape, cpu=_on_cpu)
