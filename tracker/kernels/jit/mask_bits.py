"""Mask probabilities on a map to bits in source pixels. See `kernels/mask_bits.py`."""

import triton
import triton.language as tl

TAPS = tl.constexpr(3)  # cells that a pixel is made of, along one axis


@triton.jit
def mask_bits(
    probability,  # (N, rows, columns) float32, contiguous
    score,  # (N,) float32
    rows_inside,  # (N, rows) whether a cell of the row is above the threshold
    columns_inside,  # (N, columns)
    first_x,  # (W,) int64
    weight_x,  # (W, TAPS) float32
    first_y,  # (H,)
    weight_y,  # (H, TAPS)
    bits,  # (N, H, in_bytes) uint8, zero at first
    box,  # (N, 4) int32, at first W, H, 0, 0
    rows,
    columns,
    height,
    width,
    in_bytes,
    threshold,
    ROWS: tl.constexpr,
    BYTES: tl.constexpr,
):
    """Grid: (⌈in_bytes / BYTES⌉, ⌈H / ROWS⌉, N). Most tiles see no cell of their mask and are left as they
    are.
    """
    mask = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * BYTES * 8 + tl.arange(0, BYTES * 8)
    down, across = row < height, column < width
    y = tl.load(first_y + row, mask=down, other=0).to(tl.int32)
    x = tl.load(first_x + column, mask=across, other=0).to(tl.int32)
    seen_y = tl.zeros((ROWS,), tl.int32)
    seen_x = tl.zeros((BYTES * 8,), tl.int32)
    for tap in tl.static_range(TAPS):
        seen_y |= tl.load(rows_inside + mask * rows + y + tap, mask=down, other=0).to(tl.int32)
        seen_x |= tl.load(columns_inside + mask * columns + x + tap, mask=across, other=0).to(tl.int32)
    if (tl.load(score + mask) > 0) & (tl.max(seen_y) > 0) & (tl.max(seen_x) > 0):
        cells = probability + mask * rows * columns
        total = tl.zeros((ROWS, BYTES * 8), tl.float32)
        for below in tl.static_range(TAPS):
            line = tl.zeros((ROWS, BYTES * 8), tl.float32)
            for beside in tl.static_range(TAPS):
                place = (y + below)[:, None] * columns + (x + beside)[None, :]
                value = tl.load(cells + place)  # where there is no pixel, of the first cells
                line += value * tl.load(weight_x + column * TAPS + beside, mask=across, other=0.0)[None, :]
            total += line * tl.load(weight_y + row * TAPS + below, mask=down, other=0.0)[:, None]
        inside = (total > threshold) & down[:, None] & across[None, :]
        places = inside.to(tl.int32) << (7 - column % 8)[None, :]
        byte = tl.sum(tl.reshape(places, (ROWS, BYTES, 8)), axis=2)
        beyond = tl.program_id(0) * BYTES + tl.arange(0, BYTES)
        line_of = (mask * height + row) * in_bytes
        there = down[:, None] & (beyond < in_bytes)[None, :]
        tl.store(bits + line_of[:, None] + beyond[None, :], byte.to(tl.uint8), mask=there)
        box += mask * 4
        tl.atomic_min(box, tl.min(tl.where(inside, column[None, :], width)))
        tl.atomic_min(box + 1, tl.min(tl.where(inside, row[:, None], height)))
        tl.atomic_max(box + 2, tl.max(tl.where(inside, column[None, :] + 1, 0)))
        tl.atomic_max(box + 3, tl.max(tl.where(inside, row[:, None] + 1, 0)))
