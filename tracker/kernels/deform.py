"""Deformable convolution v2 (3×3, stride 1, one offset group) as one fused kernel: the torch operator
`tracker::deform_conv2d`.

The arithmetic of `models.deform`, which is its reference and what runs on a CPU. An operator of torch's
library: torch.compile and AOTInductor see through it to the kernel, torch.export keeps it by name, CUDA
graphs capture it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op, triton_op, wrap_triton

from tracker.errors import EngineError
from tracker.kernels.launch import EXACT, on_device_of, power_of_two, programs

TAPS = 9
TILE_Y, TILE_X = 4, 8  # pixels; larger tiles are slower at every one of FairMOT's sizes
ENOUGH = 300  # programs: at least two for each multiprocessor of a large GPU
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class Plan:
    """How the work is cut. tile_y, tile_x: output pixels of a program. block_o: its output channels. split:
    programs that share these, 1, 3 or 9, each with its part of the taps. warps, stages: Triton's.
    """

    tile_y: int = TILE_Y
    tile_x: int = TILE_X
    block_o: int = 64
    split: int = 1
    warps: int = 4
    stages: int = 2


_CUTS = (  # tile_y, tile_x, warps, stages
    *((4, 8, 4, stages) for stages in (2, 3)),
    *((8, 8, 4, stages) for stages in (1, 2, 3)),
    *((8, 16, warps, stages) for warps, stages in ((4, 1), (8, 1), (8, 2))),
)
PLANS = tuple(
    Plan(tile_y, tile_x, block_o, split, warps, stages)
    for tile_y, tile_x, warps, stages in _CUTS
    for block_o in (64, 128)
    for split in (1, 3, 9)
)
_fastest: dict[tuple[object, ...], Plan] = {}


def pack_weight(weight: Tensor) -> Tensor:
    """(O, C, 3, 3) → (9, C, O) contiguous: what the operator takes."""
    return weight.flatten(2).permute(2, 1, 0).contiguous()


def plan_for(x: Tensor, outputs: int) -> Plan:
    """What `tune` found for such sizes on this device, else small tiles and the least split that keeps a
    large GPU busy: for each of FairMOT's sizes, at batch 1 and 8, within a quarter of an H200's best plan.
    """
    # A compiler may ask for sizes that it has not decided on.
    known = _fastest.get(_key(x, outputs)) if all(type(side) is int for side in x.shape) else None
    if known is not None:
        return known
    batch, _, height, width = x.shape
    block_o = min(128, max(16, power_of_two(outputs)))
    tiles = batch * -(-height // TILE_Y) * -(-width // TILE_X) * -(-outputs // block_o)
    split = next((split for split in (1, 3) if tiles * split >= ENOUGH), TAPS)
    # Prefetched float32 would not fit the shared memory of smaller GPUs.
    return Plan(block_o=block_o, split=split, stages=1 if x.dtype == torch.float32 else 2)


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
    *,
    out: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:
    """(B, O, H, W): the 3×3 convolution of x sampled at shifted taps, zero outside.

    x: (B, C, H, W), C a multiple of 16; fastest in float16, and copied first unless channels lie together.
    offset: (B, 18, H, W), for each tap its shift down, then right, in pixels. mask: (B, 9, H, W) factor of
    each tap, or with mask_logits its logit. Both may be parts of one tensor, of any strides.
    weight: (9, C, O) as `pack_weight` makes it, of x's type. bias: (O,). relu: of the result.
    out: where to write, of any strides; None is fresh memory of x's type, channels last. plan: None is
    `plan_for`.
    Coordinates and sums are float32. Raises EngineError for tensors that do not fit, and on a CPU.
    """
    _check(x, offset, mask, weight, bias, out)
    kernels = programs("deform", x, offset, mask, weight)
    # A compiler passes tensors of its own through here, and sees only launches that are wrapped for it.
    traced = type(x) not in (Tensor, torch.nn.Parameter)
    kernel, options = (wrap_triton, {}) if traced else (lambda plain: plain, EXACT)
    if x.stride(1) != 1:
        x = x.contiguous(memory_format=torch.channels_last)
    (batch, channels, height, width), outputs = x.shape, weight.shape[2]
    plan = plan or plan_for(x, outputs)
    block_c = 32 if channels % 32 == 0 else 16
    out = _empty(x, outputs) if out is None else out
    parts = (
        x.new_empty(plan.split, batch, height, width, outputs, dtype=torch.float32) if plan.split > 1 else out
    )
    ends = {"BIAS": bias is not None, "RELU": relu}
    grid = (
        -(-height // plan.tile_y) * -(-width // plan.tile_x),
        -(-outputs // plan.block_o),
        batch * plan.split,
    )
    with on_device_of(x):
        kernel(kernels.deform)[grid](
            x, offset, mask, weight, weight if bias is None else bias, parts,
            batch, height, width, channels, outputs,
            *x.stride(), *offset.stride(), *mask.stride(), *out.stride(),
            SIGMOID=mask_logits, **ends, HALF=x.dtype == torch.float16, PRECISION="tf32x3",
            TILE_Y=plan.tile_y, TILE_X=plan.tile_x, BLOCK_C=block_c,
            CHUNKS=2 if channels % (2 * block_c) == 0 else 1, BLOCK_O=plan.block_o, SPLIT=plan.split,
            num_warps=plan.warps, num_stages=plan.stages, **options,
        )  # fmt: skip
        if plan.split > 1:
            pixels = batch * height * width
            kernel(kernels.join)[-(-pixels // 16), -(-outputs // 64)](
                parts, weight if bias is None else bias, out, pixels, height, width, outputs, *out.stride(),
                **ends, SPLIT=plan.split, BLOCK=16, BLOCK_O=64, **options,
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
) -> Tensor:
    return deform_conv2d(x, offset, mask, weight, bias, mask_logits, relu)


def _shape(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask_logits: bool = False,
    relu: bool = False,
) -> Tensor:
    """What comes out, for those who trace without running, with Triton or without."""
    _check(x, offset, mask, weight, bias, None)
    return _empty(x, weight.shape[2])


def _check(
    x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None
) -> None:
    batch, channels, height, width = x.shape
    outputs = weight.shape[-1]
    wanted: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "offset": (offset, (batch, 2 * TAPS, height, width)),
        "mask": (mask, (batch, TAPS, height, width)),
        "weight": (weight, (TAPS, channels, outputs)),
        "bias": (bias, (outputs,)),
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


def _empty(x: Tensor, outputs: int) -> Tensor:
    batch, _, height, width = x.shape
    return torch.empty(
        batch, outputs, height, width, dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )


def _key(x: Tensor, outputs: int) -> tuple[object, ...]:
    return (*x.shape, outputs, x.dtype, x.device)


# triton_op would complain about a missing Triton, aloud and whether anybody calls it or not.
_operator = triton_op if importlib.util.find_spec("triton") else custom_op
_registered: Any = _operator("tracker::deform_conv2d", mutates_args=())(_operate)
_registered.register_fake(_shape)
