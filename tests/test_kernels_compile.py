"""Every GPU kernel compiles for real GPUs, on machines that have none: what the interpreter cannot tell.

Also the form in which a kernel can be compiled ahead of time: types, compile-time values, what is known of
divisibility.
"""

from __future__ import annotations

import re
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tracker.kernels.compile import Program, compile_program
from tracker.kernels.launch import EXACT

# Pointers and floats by parameter; everything else is int32, or a compile-time value.
TYPES = {
    "bias": "*fp16",
    "cells": "*fp32",
    "chosen": "*i64",
    "covers": "*i32",
    "embedding": "*fp16",
    "hidden": "*fp16",
    "hidden_bias": "*fp16",
    "iou_threshold": "fp32",
    "keys": "*i64",
    "least": "fp32",
    "mask": "*fp16",
    "offset": "*fp16",
    "out": "*fp32",
    "parts": "*fp32",
    "raw": "*fp16",
    "reg": "*fp16",
    "rows": "*fp32",
    "scores": "*fp16",
    "shift_bias": "*fp16",
    "source": "*fp16",
    "state": "*i32",
    "table": "*i64",
    "turns": "*fp32",
    "wanted": "*i1",
    "weight": "*fp16",
    "wh": "*fp16",
    "x": "*fp16",
} | {f"{name}_{channel}": "fp32" for name in ("mean", "std", "border") for channel in range(3)}

DEFORM = {
    **{"TILE_Y": 8, "TILE_X": 8, "BLOCK_C": 64, "BLOCK_O": 128, "SPLIT": 1, "PRECISION": "tf32x3"},
    **{"SIGMOID": True, "BIAS": True, "RELU": True, "HALF": True, "x_channel": 1, "out_channel": 1},
    **{"SHIFT_BIAS": True, "MASK_AT": 18},
}
SINGLE = dict.fromkeys(("x", "offset", "mask", "weight", "bias", "shift_bias"), "*fp32")
JOIN = {"BIAS": True, "RELU": True, "SPLIT": 3, "BLOCK": 16, "BLOCK_O": 64}
TAIL = {"CHANNELS": 1024, "K": 256, "PRECISION": "tf32", "BLOCK": 64, "BLOCK_K": 64, "BLOCK_N": 128}
ROWS = {"SIDES": 4, "INDEX_BITS": 16, "SLOTS": 512, "BLOCK": 8, "BLOCK_D": 128}
SORT = {"ROW": 6, "KIND": "undecoded", "CLASSES": 128, "INDEX_BITS": 21, "SLOTS": 1024, "BLOCK": 16}


ROI_ALIGN = {
    **{"features": "*fp16", "boxes": "*fp32", "levels": "*i32", "out": "*fp16", "scale": "fp32"},
    **dict.fromkeys(("channels", "features_row", "features_column", "features_image"), "i32:16"),
}
MASK_BITS = {
    **dict.fromkeys(("probability", "score", "weight_x", "weight_y"), "*fp32"),
    **dict.fromkeys(("rows_inside", "columns_inside"), "*i1"),
    **dict.fromkeys(("first_x", "first_y"), "*i64"),
    **{"bits": "*u8", "box": "*i32", "rows": "i32", "columns": "i32", "threshold": "fp32"},
}


class Kernel(NamedTuple):
    """A function of jit/<module>.py, compile-time values, types other than above, Triton's options."""

    module: str
    function: str
    fixed: dict[str, Any]
    types: dict[str, str] = {}  # noqa: RUF012 (never changed)
    options: dict[str, int] = {}  # noqa: RUF012


KERNELS = {
    "letterbox": Kernel("letterbox", "letterbox", {"WORDS": 46, "out_column": 1}),
    "letterbox to FP16": Kernel("letterbox", "letterbox", {"WORDS": 46, "out_column": 1}, {"out": "*fp16"}),
    "peaks": Kernel("heads", "peaks", {"LOGITS": True, "INDEX_BITS": 16, "BLOCK": 1024}),
    "select": Kernel(
        "best", "select", {"INDEX_BITS": 16, "BLOCK": 4096, "SLOTS": 512}, {}, {"num_warps": 16}
    ),
    "rows": Kernel("heads", "rows", ROWS, {"cells": "i32"}),
    "list rows": Kernel("nms", "list_rows", {"ROW": 6, "INDEX_BITS": 10, "BLOCK": 1024}),
    "list cells": Kernel(
        "nms", "list_cells", {"INDEX_BITS": 21, "BLOCK": 16, "BLOCK_C": 128}, {"cells": "i32"}
    ),
    "sort": Kernel("nms", "sort", SORT),
    "cover": Kernel("nms", "cover", {"WORDS": 32, "BLOCK": 128, "STEP": 8}, {}, {"num_warps": 8}),
    "settle": Kernel("nms", "settle", {"ROW": 6, "WORDS": 128, "BLOCK": 128}, {}, {"num_warps": 8}),
    "sort rotated": Kernel(
        "nms", "sort", SORT | {"ROW": 7, "KIND": "rows", "CLASSES": 1}, {"source": "*fp32"}
    ),
    "cover rotated": Kernel(
        "nms", "cover_turned", {"WORDS": 128, "BLOCK": 32, "STEP": 8}, {}, {"num_warps": 8}
    ),
    "settle rotated": Kernel("nms", "settle", {"ROW": 7, "WORDS": 128, "BLOCK": 128}, {}, {"num_warps": 8}),
    "deform": Kernel("deform", "deform", DEFORM, {"out": "*fp16"}, {"num_stages": 1}),
    "deform in part": Kernel("deform", "deform", DEFORM | {"SPLIT": 3}, {}, {"num_stages": 1}),
    "deform in FP32": Kernel(
        "deform", "deform", DEFORM | {"HALF": False, "BLOCK_C": 32}, SINGLE, {"num_stages": 1}
    ),
    "join": Kernel("deform", "join", JOIN),
    "tail": Kernel("tails", "tail", TAIL),
    "tail in FP32": Kernel(
        "tails",
        "tail",
        TAIL | {"BLOCK": 128, "BLOCK_K": 32, "BLOCK_N": 16, "PRECISION": "ieee"},
        {"weight": "*fp32", "bias": "*fp32", "hidden_bias": "*fp32"},
    ),
    "roi align": Kernel(
        "roi_align", "roi_align", {"SIDE": 7, "BLOCK": 256, "features_channel": 1}, ROI_ALIGN
    ),
    "mask bits": Kernel("mask_bits", "mask_bits", {"ROWS": 8, "BYTES": 32}, MASK_BITS),
}
LEAST_SHARED_MEMORY = 99 * 1024  # bytes that a program may have on any GPU since Ampere
A_FEW_REGISTERS = 64  # bytes per thread that may spill


def compiled(name: str, capability: int = 90) -> Program:
    """The kernel at FairMOT's strides, through to machine code."""
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    module, function, fixed, types, options = KERNELS[name]
    kernel = getattr(import_module(f"tracker.kernels.jit.{module}"), function)
    sized = ("x_image", "x_row", "x_column", "channels", "outputs", "out_image", "out_row", "out_column")

    def kind(parameter: str) -> str:
        if parameter in fixed:
            return str(fixed[parameter])  # a stride of 1
        element = (TYPES | types).get(parameter, "i32")
        wide = element[0] == "*" or (module == "deform" and parameter in sized)
        return f"{element}:16" if wide else element

    plain = [each.name for each in kernel.params if not each.is_constexpr]
    constants = {each: value for each, value in fixed.items() if each not in plain}
    return compile_program(kernel, tuple(map(kind, plain)), constants | options | EXACT, capability)


@pytest.mark.parametrize("name", KERNELS)
def test_compiles_to_machine_code_that_spills_little(name: str, tmp_path: Path) -> None:
    kernel = compiled(name)
    assert kernel.shared <= LEAST_SHARED_MEMORY
    usage = resources(kernel, tmp_path)
    assert usage["STACK"] <= A_FEW_REGISTERS, usage


@pytest.mark.parametrize("name", KERNELS)
def test_what_is_handed_over_is_what_the_code_takes(name: str) -> None:
    """Triton puts pointers of its own behind a program's arguments: more are read than a signature shows."""
    kernel = compiled(name)
    (entry,) = re.findall(rf"\.entry {kernel.name}\((.*?)\)", kernel.ptx, re.DOTALL)
    taken = re.findall(r"\.param \.(\w+)", entry)
    widths = {"i32": "32", "fp32": "32"}
    given = [widths.get(kind, "64") for kind in kernel.kinds] + ["64"] * kernel.scratch
    assert [kind[1:] for kind in taken] == given


@pytest.mark.parametrize("capability", [80, 89, 100, 120])
def test_the_largest_kernel_compiles_for_every_generation(capability: int) -> None:
    assert compiled("deform", capability).shared <= LEAST_SHARED_MEMORY


def test_deform_loads_wide_and_multiplies_on_tensor_cores() -> None:
    """16 bytes at a time: lost with a stride whose divisors Triton does not see, and much slower then."""
    ptx = compiled("deform").ptx
    assert len(re.findall(r"ld\.global[.\w]*\.v4\.b32", ptx)) >= 16
    assert "cp.async" not in ptx, "asynchronous copies pass by the L1 cache"
    assert "fma.rn.f16" in ptx
    assert "wgmma.mma_async" in ptx


def resources(kernel: Program, tmp_path: Path) -> dict[str, int]:
    """What the machine code uses, by name, as the tool that Triton ships reports it."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip(f"this Triton ships no {tool.name}")
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(kernel.cubin)
    said = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    pairs = (word.split(":") for line in said.splitlines() if "STACK" in line for word in line.split())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
