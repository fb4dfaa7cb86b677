"""Regions of a feature map, resampled to squares. See `kernels/roi_align.py`."""

import triton
import triton.language as tl


@triton.jit
def roi_align(
    features,  # (B, C, H, W) by strides; fast where channels lie together
    boxes,  # (N, 4) corners in input pixels
    levels,  # (N,) int32: which map each box is cut from
    out,  # (N, C, SIDE, SIDE) by strides
    level,  # of this map
    scale,  # cells per input pixel
    per_image,  # boxes of one image: the first belong to the first
    channels,
    height,
    width,
    features_image,
    features_channel,
    features_row,
    features_column,
    out_region,
    out_channel,
    out_row,
    out_column,
    SIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (SIDE, N, ⌈C / BLOCK⌉). One row of bins of one box, unless it is another map's.

    Arithmetic in mmcv's order (`roi_align_cuda_kernel.cuh`), so that samples lie where its samples lie.
    """
    region = tl.program_id(1).to(tl.int64)
    if tl.load(levels + region) == level:
        channel = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
        there = channel < channels
        left = tl.load(boxes + region * 4) * scale - 0.5
        top = tl.load(boxes + region * 4 + 1) * scale - 0.5
        bin_width = (tl.load(boxes + region * 4 + 2) * scale - 0.5 - left) / SIDE
        bin_height = (tl.load(boxes + region * 4 + 3) * scale - 0.5 - top) / SIDE
        columns = tl.ceil(bin_width).to(tl.int32)
        rows = tl.ceil(bin_height).to(tl.int32)
        samples = tl.maximum(rows * columns, 1).to(tl.float32)
        image = features + (region // per_image) * features_image + channel.to(tl.int64) * features_channel
        bin_row = tl.program_id(0)
        place = out + region * out_region + channel.to(tl.int64) * out_channel + bin_row * out_row
        for bin_column in range(SIDE):
            total = tl.zeros((BLOCK,), tl.float32)
            for row in range(rows):
                y = top + bin_row * bin_height + (row + 0.5) * bin_height / rows
                y_low, y_high, down = _between(y, height)
                near_y = (y >= -1.0) & (y <= height.to(tl.float32))
                for column in range(columns):
                    x = left + bin_column * bin_width + (column + 0.5) * bin_width / columns
                    near_x = (x >= -1.0) & (x <= width.to(tl.float32))
                    inside = channel < tl.where(near_y & near_x, channels, 0)
                    x_low, x_high, along = _between(x, width)
                    upper, lower = image + y_low * features_row, image + y_high * features_row
                    near, far = x_low * features_column, x_high * features_column
                    total += (1 - down) * (1 - along) * tl.load(upper + near, mask=inside, other=0.0)
                    total += (1 - down) * along * tl.load(upper + far, mask=inside, other=0.0)
                    total += down * (1 - along) * tl.load(lower + near, mask=inside, other=0.0)
                    total += down * along * tl.load(lower + far, mask=inside, other=0.0)
            tl.store(place + bin_column * out_column, total / samples, mask=there)


@triton.jit
def _between(place, length):
    """The cells around a place, and how far it is from the first to the second."""
    place = tl.maximum(place, 0.0)
    low = tl.minimum(place.to(tl.int32), length - 1)
    high = tl.minimum(low + 1, length - 1)
    share = tl.where(low >= length - 1, 0.0, place - low)
    return low, high, share
