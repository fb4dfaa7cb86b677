"""The last layer of a head as one Triton program: bias, ReLU and product of matrices in one pass over what
the first layer gave. See `kernels/tails.py`.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["pixels"])
def tail(
    hidden,  # (pixels, CHANNELS) contiguous
    hidden_bias,  # (K,)
    weight,  # (outputs, K) contiguous
    bias,  # (outputs,)
    out,  # (pixels, outputs) contiguous
    pixels,
    first,  # of the channels that are read
    outputs,
    CHANNELS: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,  # of float32 products
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid: (⌈pixels / BLOCK⌉,). K is a multiple of BLOCK_K, BLOCK_N no less than outputs."""
    pixel = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = (pixel < pixels)[:, None]
    output, channel = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    wanted = output < outputs
    hidden += pixel[:, None] * CHANNELS + (first + channel)[None, :]
    weight += output[None, :] * K + channel[:, None]
    total = tl.zeros((BLOCK, BLOCK_N), tl.float32)
    for start in tl.range(0, K, BLOCK_K):
        factors = tl.load(weight + start, mask=wanted[None, :], other=0.0)
        value = tl.load(hidden + start, mask=there, other=0.0).to(tl.float32)
        value += tl.load(hidden_bias + start + channel).to(tl.float32)[None, :]
        value = tl.maximum(value, 0.0).to(factors.dtype)
        total = tl.dot(value, factors, total, input_precision=PRECISION)
    total += tl.load(bias + output, mask=wanted, other=0.0).to(tl.float32)[None, :]
    place = pixel[:, None] * outputs + output[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=there & wanted[None, :])
