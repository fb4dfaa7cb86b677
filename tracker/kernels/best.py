"""Candidates on the device, and the strongest of them: what decoders of different heads share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tracker.errors import EngineError
from tracker.kernels.launch import EXACT, launch, on_device_of, power_of_two, programs

MAX_LIMIT = 4096  # TensorRT's own top-K takes 3840; each row is compared with all others


@dataclass(frozen=True, slots=True)
class Candidates:
    """Of each image: what was found (see jit/best.py for keys), how much, and the best of it.

    keys: (B, capacity) int64. state: (B, 2) int32. chosen: (B, K) int64, K = `limit` or less.
    index_bits: of a key's index.
    """

    keys: Tensor
    state: Tensor
    chosen: Tensor
    index_bits: int

    @classmethod
    def none(cls, batch: int, capacity: int, limit: int, indices: int, device: torch.device) -> Candidates:
        """Empty lists, for indices below `indices`. EngineError for a limit that is out of bounds."""
        if not 1 <= limit <= MAX_LIMIT:
            raise EngineError(f"{limit} candidates per image wanted; on a GPU, 1 to {MAX_LIMIT} can be had")
        limit = min(limit, capacity)
        return cls(
            keys=torch.empty(batch, capacity, dtype=torch.int64, device=device),
            state=torch.zeros(batch, 2, dtype=torch.int32, device=device),
            chosen=torch.empty(batch, limit, dtype=torch.int64, device=device),
            index_bits=(indices - 1).bit_length(),
        )

    @property
    def slots(self) -> int:
        return power_of_two(self.chosen.shape[1])

    def choose(self) -> None:
        """Fill `chosen` from what is listed."""
        (batch, capacity), limit = self.keys.shape, self.chosen.shape[1]
        with on_device_of(self.keys):
            launch(
                programs("best", self.keys).select, (batch,),
                self.keys, self.state, self.chosen, capacity, limit,
                INDEX_BITS=self.index_bits, BLOCK=4096, SLOTS=self.slots, num_warps=16, **EXACT,
            )  # fmt: skip


def result(out: Tensor | None, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Float32 memory for rows: fresh, or `out`; EngineError where that is not just so."""
    if out is None:
        return torch.empty(shape, device=device)
    if out.shape != shape or out.dtype != torch.float32 or not out.is_contiguous():
        raise EngineError(
            f"rows are written to contiguous float32 {shape}, not {out.dtype} {tuple(out.shape)} with "
            f"strides {out.stride()}"
        )
    return out


def strides(head: Tensor) -> tuple[int, int, int]:
    """Of images, channels and cells (row by row) of (B, C, H, W); EngineError where rows have gaps."""
    image, channel, row, cell = head.stride()
    if head.shape[2] > 1 and row != cell * head.shape[3]:
        raise EngineError(
            f"a head's rows must follow each other: {tuple(head.shape)} has strides {head.stride()}"
        )
    return image, channel, cell
