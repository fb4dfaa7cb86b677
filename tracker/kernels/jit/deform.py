"""Modulated deformable convolution as one Triton kernel: sample, weigh and multiply, without the 9·C·H·W
samples ever lying in memory. See `kernels/deform.py`.

Plain functions of pointers, sizes and strides, so that they can be launched, captured in a CUDA graph or
compiled ahead of time.
"""

import triton
import triton.language as tl

# Compiled once for images of every size: Triton need look only at what says how wide a load can be.
_SIZES = ["batch", "height", "width"]
_SHIFTS = [f"{part}_{axis}" for part in ("offset", "mask") for axis in ("image", "channel", "row", "column")]


@triton.jit(do_not_specialize=_SIZES + _SHIFTS)
def deform(
    x,  # (B, H, W, C) by strides
    offset,  # (B, 18, H, W) by strides: down, then right, of each tap
    mask,  # (B, 9, H, W) by strides
    weight,  # (9, C, O) contiguous
    bias,  # (O,); unread unless BIAS
    shift_bias,  # (27,) to be added to offsets and masks; unread unless SHIFT_BIAS
    out,  # (B, H, W, O) by strides; where SPLIT > 1, float32 (SPLIT, B, H, W, O) contiguous
    batch,
    height,
    width,
    channels,
    outputs,
    x_image,
    x_channel,
    x_row,
    x_column,
    offset_image,
    offset_channel,
    offset_row,
    offset_column,
    mask_image,
    mask_channel,
    mask_row,
    mask_column,
    out_image,
    out_channel,
    out_row,
    out_column,
    SIGMOID: tl.constexpr,  # of the masks
    MASK_AT: tl.constexpr,  # channel of `mask` at which masks begin
    BIAS: tl.constexpr,
    SHIFT_BIAS: tl.constexpr,
    RELU: tl.constexpr,
    HALF: tl.constexpr,  # blend in float16: half the instructions, an error of 0.04 % instead of 0.03 %
    PRECISION: tl.constexpr,  # of float32 products
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
    SPLIT: tl.constexpr,  # programs that share a pixel, each with 9 / SPLIT taps
):
    """Grid: (tiles of TILE_Y × TILE_X pixels, ⌈O / BLOCK_O⌉, B · SPLIT). C is a multiple of BLOCK_C.

    Coordinates and sums are float32 whatever the tensors hold.
    """
    tile, part = tl.program_id(0), tl.program_id(2) % SPLIT
    image = (tl.program_id(2) // SPLIT).to(tl.int64)
    tiles_across = tl.cdiv(width, TILE_X)
    # Tiles, not runs of a row: pixels above each other sample much the same, and the cache is near.
    pixel = tl.arange(0, TILE_Y * TILE_X)
    row = tile // tiles_across * TILE_Y + pixel // TILE_X
    column = tile % tiles_across * TILE_X + pixel % TILE_X
    there = (row < height) & (column < width)
    y, x_ = row.to(tl.float32), column.to(tl.float32)
    shifts = offset + image * offset_image + row * offset_row + column * offset_column
    masks = mask + image * mask_image + row * mask_row + column * mask_column
    channel = tl.arange(0, BLOCK_C)
    output = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    x += image * x_image + channel[None, :] * x_channel
    weight += channel[:, None] * outputs + output[None, :]
    blend: tl.constexpr = tl.float16 if HALF else tl.float32

    total = tl.zeros((TILE_Y * TILE_X, BLOCK_O), tl.float32)
    # No software pipeline: its asynchronous copies pass by the L1 cache, where a tap's samples lie after the
    # last one's. Enough programs are resident to hide the loads.
    for turn in tl.range(0, 9 // SPLIT, num_stages=1):
        tap = part * (9 // SPLIT) + turn
        down = tl.load(shifts + 2 * tap * offset_channel, mask=there, other=0.0).to(tl.float32)
        right = tl.load(shifts + (2 * tap + 1) * offset_channel, mask=there, other=0.0).to(tl.float32)
        factor = tl.load(masks + (MASK_AT + tap) * mask_channel, mask=there, other=0.0).to(tl.float32)
        if SHIFT_BIAS:
            down += tl.load(shift_bias + 2 * tap).to(tl.float32)
            right += tl.load(shift_bias + 2 * tap + 1).to(tl.float32)
            factor += tl.load(shift_bias + 18 + tap).to(tl.float32)
        if SIGMOID:
            factor = tl.sigmoid(factor)
        top, bottom, weigh_top, weigh_bottom = _around(y + (tap // 3 - 1) + down, height)
        left, right, weigh_left, weigh_right = _around(x_ + (tap % 3 - 1) + right, width)
        weigh_top, weigh_bottom = weigh_top * factor, weigh_bottom * factor
        top_left = (weigh_top * weigh_left).to(blend)[:, None]
        top_right = (weigh_top * weigh_right).to(blend)[:, None]
        bottom_left = (weigh_bottom * weigh_left).to(blend)[:, None]
        bottom_right = (weigh_bottom * weigh_right).to(blend)[:, None]
        top, bottom, left, right = top * x_row, bottom * x_row, left * x_column, right * x_column
        for start in tl.range(0, channels, BLOCK_C, num_stages=1):
            here = x + start
            factors = tl.load(
                weight + (tap * channels + start) * outputs, mask=(output < outputs)[None, :], other=0.0
            )
            sample = tl.load(here + (top + left)[:, None]).to(blend) * top_left
            sample = tl.fma(tl.load(here + (top + right)[:, None]).to(blend), top_right, sample)
            sample = tl.fma(tl.load(here + (bottom + left)[:, None]).to(blend), bottom_left, sample)
            sample = tl.fma(tl.load(here + (bottom + right)[:, None]).to(blend), bottom_right, sample)
            total = tl.dot(sample.to(factors.dtype), factors, total, input_precision=PRECISION)

    kept = there[:, None] & (output < outputs)[None, :]
    if SPLIT > 1:
        place = ((part * batch + image) * height + row) * width + column
        tl.store(out + place[:, None] * outputs + output[None, :], total, mask=kept)
    else:
        if BIAS:
            total += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
        if RELU:
            total = tl.maximum(total, 0.0)
        place = image * out_image + (row * out_row + column * out_column)[:, None]
        tl.store(out + place + output[None, :] * out_channel, total.to(out.dtype.element_ty), mask=kept)


@triton.jit
def _around(position, size):
    """Along one axis, the two samples around each position, within 0..size−1, and what each weighs.

    One outside weighs 0. Positions beyond the reach of any sample are cut first: they may not fit int32.
    """
    position = tl.minimum(tl.maximum(position, -2.0), size + 1.0)
    start = tl.floor(position)
    share = position - start
    first = start.to(tl.int32)
    second = first + 1
    weigh_first = tl.where((first >= 0) & (first < size), 1.0 - share, 0.0)
    weigh_second = tl.where((second >= 0) & (second < size), share, 0.0)
    first = tl.minimum(tl.maximum(first, 0), size - 1)
    second = tl.minimum(tl.maximum(second, 0), size - 1)
    return first, second, weigh_first, weigh_second


@triton.jit
def join(
    parts,  # float32 (SPLIT, B·H·W, O) contiguous
    bias,
    out,  # (B, H, W, O) by strides
    pixels,  # B·H·W
    height,
    width,
    outputs,
    out_image,
    out_channel,
    out_row,
    out_column,
    BIAS: tl.constexpr,
    RELU: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Grid: (⌈B·H·W / BLOCK⌉, ⌈O / BLOCK_O⌉). Sums what a pixel's programs found, always in one order."""
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    output = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    kept = (pixel < pixels)[:, None] & (output < outputs)[None, :]
    place = pixel[:, None].to(tl.int64) * outputs + output[None, :]
    total = tl.load(parts + place, mask=kept, other=0.0)
    size = tl.full((), outputs, tl.int64) * pixels  # of a part; either may be a number known beforehand
    for part in tl.static_range(1, SPLIT):
        total += tl.load(parts + place + part * size, mask=kept, other=0.0)
    if BIAS:
        total += tl.load(bias + output, mask=output < outputs, other=0.0).to(tl.float32)[None, :]
    if RELU:
        total = tl.maximum(total, 0.0)
    image, row, column = pixel // (height * width), pixel // width % height, pixel % width
    place = image.to(tl.int64) * out_image + row * out_row + column * out_column
    tl.store(out + place[:, None] + output[None, :] * out_channel, total.to(out.dtype.element_ty), mask=kept)
