"""Triton programs to machine code: with what Triton's wheel holds, so without a GPU and without a C compiler.

Kinds of arguments are written as in Triton's own ahead-of-time compiler (triton/tools/compile.py): "*fp16:16"
is a pointer to float16 whose address 16 divides, "i32:16" a number that 16 divides, "i32" any other, and "1"
the number one, which is then part of the code. Compiled programs are kept on disk by Triton (in
TRITON_CACHE_DIR, by default ~/.triton/cache).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tracker.errors import EngineError

Kinds = tuple[str, ...]

_ELEMENTS = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
_POINTERS = {dtype: (f"*{name}", f"*{name}:16") for dtype, name in _ELEMENTS.items()}
_SCRATCH = ("global_scratch_size", "profile_scratch_size")  # each a pointer behind the arguments


@dataclass(frozen=True, slots=True)
class Program:
    """Machine code for one GPU architecture, and how to start it.

    name: of its entry. kinds: of the arguments it takes, those that became part of the code left out.
    scratch: pointers behind these, null for programs that need no such memory. shared: bytes of shared
    memory. threads: of a block.
    """

    name: str
    cubin: bytes
    ptx: str
    kinds: Kinds
    scratch: int
    shared: int
    threads: int


def specialised(arguments: Sequence[object], general: Sequence[bool]) -> tuple[Kinds, list[int | float]]:
    """Kinds of arguments, and what a launch hands over: addresses, and numbers that are not in the code.

    general: which of them Triton is not to look at (`do_not_specialize`).
    """
    kinds: list[str] = []
    values: list[int | float] = []
    for argument, plain in zip(arguments, general, strict=True):
        if isinstance(argument, Tensor):
            address = argument.data_ptr()
            kinds.append(_POINTERS[argument.dtype][address % 16 == 0 and not plain])
            values.append(address)
        elif type(argument) is int:
            if argument == 1 and not plain:
                kinds.append("1")
                continue
            kind = "i32" if -(2**31) <= argument < 2**31 else "i64"
            kinds.append(kind if plain or argument % 16 else f"{kind}:16")
            values.append(argument)
        elif isinstance(argument, float):
            kinds.append("fp32")
            values.append(argument)
        else:
            raise TypeError(f"a Triton program is launched on tensors, int and float, not {argument!r}")
    return tuple(kinds), values


def compile_program(kernel: Any, kinds: Kinds, options: Mapping[str, object], capability: int) -> Program:
    """A program of `kernels.jit` for these kinds of arguments, in order, and a GPU: 90 is sm_90.

    options: its compile-time values by name, and Triton's own options such as num_warps.
    Raises EngineError where Triton cannot compile it.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    constants: dict[tuple[int], object] = {
        (index,): options[name] for index, name in enumerate(names) if name in options
    }
    constants |= {(index,): 1 for index, kind in enumerate(kinds) if kind == "1"}
    signature = {
        name: "constexpr" if (index,) in constants else kinds[index].partition(":")[0]
        for index, name in enumerate(names)
    }
    multiples = {
        (index,): [["tt.divisibility", 16]] for index, kind in enumerate(kinds) if kind.endswith(":16")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=multiples)
    own = {name: value for name, value in options.items() if name not in names}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=own)
    except Exception as error:  # Triton's own, its assembler's, and where its files cannot be written
        raise EngineError(
            f"Triton {triton.__version__} cannot compile {kernel.__name__} for sm_{capability}: "
            f"{_reason(error)}; the kernels need Triton ≥ 3.6 (which comes with torch ≥ 2.10), a GPU since "
            "sm_80, and a TRITON_CACHE_DIR (by default ~/.triton/cache) that can be written"
        ) from error
    about = compiled.metadata
    sizes = [getattr(about, name) for name in _SCRATCH if hasattr(about, name)]
    assert not any(sizes) and about.num_ctas == 1 and not about.launch_cooperative_grid
    return Program(
        name=about.name,
        cubin=compiled.asm["cubin"],
        ptx=compiled.asm["ptx"],
        kinds=tuple(kind.partition(":")[0] for kind in kinds if kind != "1"),
        scratch=len(sizes),
        shared=about.shared,
        threads=about.num_warps * 32,
    )


def _reason(error: BaseException) -> str:
    """Triton's errors begin with a place and end with what is wrong there."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " … ".join(dict.fromkeys((lines[0], lines[-1]))) if lines else type(error).__name__
