"""`deform` in the form that TensorRT starts: inputs, then numbers, then outputs. See `deploy/plugin.py`."""

import triton
import triton.language as tl

from tracker.kernels.jit.deform import deform


@triton.jit(do_not_specialize=["batch"])
def deform_plugin(
    x,  # (B, H, W, X_COLUMN), of which C are channels
    shifts,  # (B, 27, H, W) by strides: offsets, then masks
    weight,  # (9, C, O)
    bias,  # (O,)
    batch,
    out,  # (B, H, W, OUT_COLUMN), of which O are channels
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    X_COLUMN: tl.constexpr,
    OUT_COLUMN: tl.constexpr,
    SHIFTS_IMAGE: tl.constexpr,
    SHIFTS_CHANNEL: tl.constexpr,
    SHIFTS_ROW: tl.constexpr,
    SHIFTS_COLUMN: tl.constexpr,
    LOGITS: tl.constexpr,
    RELU: tl.constexpr,
    HALF: tl.constexpr,
    TILE_Y: tl.constexpr,
    TILE_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """Grid: (tiles of TILE_Y × TILE_X pixels, ⌈O / BLOCK_O⌉, B)."""
    # fmt: off
    deform(
        x, shifts, shifts + 18 * SHIFTS_CHANNEL, weight, bias, bias, out,
        batch, HEIGHT, WIDTH, CHANNELS, OUTPUTS,
        HEIGHT * WIDTH * X_COLUMN, 1, WIDTH * X_COLUMN, X_COLUMN,
        SHIFTS_IMAGE, SHIFTS_CHANNEL, SHIFTS_ROW, SHIFTS_COLUMN,
        SHIFTS_IMAGE, SHIFTS_CHANNEL, SHIFTS_ROW, SHIFTS_COLUMN,
        HEIGHT * WIDTH * OUT_COLUMN, 1, WIDTH * OUT_COLUMN, OUT_COLUMN,
        SIGMOID=LOGITS, MASK_AT=0, BIAS=True, SHIFT_BIAS=False, RELU=RELU, HALF=HALF, PRECISION="tf32x3",
        TILE_Y=TILE_Y, TILE_X=TILE_X, BLOCK_C=BLOCK_C, BLOCK_O=BLOCK_O, SPLIT=1,
    )
    # fmt: on
