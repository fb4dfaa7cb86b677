"""The strongest of many, in fixed shapes: candidates are listed as they are found, then the best are chosen.

A candidate is one int64, its key: the bits of its score, which order as positive floats do, above an index
of `INDEX_BITS` bits that counts down, so that of equal scores the first wins and no two keys are equal. The
bits of NaN lie above those of every number. Key −1 is nobody.
"""

import triton
import triton.language as tl

NAN = tl.constexpr(0x7FC00000)
STATE = tl.constexpr(2)  # int32 per image: how many candidates were found; whether some input was NaN or inf


@triton.jit
def key_of(score, index, INDEX_BITS: tl.constexpr):
    bits = tl.where(score == score, score.to(tl.int32, bitcast=True), NAN)
    return (bits.to(tl.int64) << INDEX_BITS) | ((1 << INDEX_BITS) - 1 - index)


@triton.jit
def score_of(key, INDEX_BITS: tl.constexpr):
    return (key >> INDEX_BITS).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def index_of(key, INDEX_BITS: tl.constexpr):
    last: tl.constexpr = (1 << INDEX_BITS) - 1
    return (last - (key & last)).to(tl.int32)


@triton.jit
def append(keys, state, key, found):
    """Put the found ones of a block of keys behind what the image's list holds already, in any order."""
    count = found.to(tl.int32)
    start = tl.atomic_add(state, tl.sum(count))
    tl.store(keys + start + tl.cumsum(count) - count, key, mask=found)


@triton.jit
def select(
    keys,  # (B, capacity), the first state[0] of each row listed
    state,  # (B, STATE)
    chosen,  # (B, limit): the highest keys in any order, −1 behind them
    capacity,
    limit,
    INDEX_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLOTS: tl.constexpr,  # limit or more, a power of two
):
    """Grid: (B,). Finds the lowest key to keep bit by bit, counting how many lie above it."""
    image = tl.program_id(0).to(tl.int64)
    keys += image * capacity
    chosen += image * limit
    count = tl.load(state + image * STATE)
    lane = tl.arange(0, BLOCK)
    least = count.to(tl.int64) * 0
    above = count
    bit = 31 + INDEX_BITS
    while (bit > 0) & (above > limit):
        bit -= 1
        trial = least | (tl.full((), 1, tl.int64) << bit)
        reached = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, count, BLOCK):
            key = tl.load(keys + start + lane, mask=start + lane < count, other=-1)
            reached += (key >= trial).to(tl.int32)
        total = tl.sum(reached)
        if total >= limit:
            least = trial
            above = total
    slot = tl.arange(0, SLOTS)
    tl.store(chosen + slot, tl.full((SLOTS,), -1, tl.int64), mask=(slot >= above) & (slot < limit))
    taken = above * 0
    for start in range(0, count, BLOCK):
        key = tl.load(keys + start + lane, mask=start + lane < count, other=-1)
        take = (key >= least).to(tl.int32)
        tl.store(chosen + taken + tl.cumsum(take) - take, key, mask=take > 0)
        taken += tl.sum(take)


@triton.jit
def rank(key, chosen, state, limit, SLOTS: tl.constexpr):
    """How many of an image's chosen keys are higher, for each of some of them."""
    block: tl.constexpr = min(SLOTS, 512)
    count = tl.minimum(tl.load(state), limit)
    higher = tl.zeros(key.shape, tl.int32)
    for start in range(0, count, block):
        slot = start + tl.arange(0, block)
        other = tl.load(chosen + slot, mask=slot < count, other=-1)
        higher += tl.sum((other[None, :] > key[:, None]).to(tl.int32), axis=1)
    return higher
