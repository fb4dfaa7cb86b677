"""FairMOT's heads to packed rows. See `kernels/heads.py`."""

import triton
import triton.language as tl

from tracker.kernels.jit.best import STATE, append, index_of, key_of, rank, score_of


@triton.jit
def peaks(
    scores,  # (B, C, H, W) by strides
    keys,  # (B, C·H·W)
    state,  # (B, STATE), zero at first
    classes,
    height,
    width,
    scores_image,
    scores_class,
    scores_cell,
    LOGITS: tl.constexpr,
    INDEX_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (⌈C·H·W / BLOCK⌉, B). Lists the cells with a score; of logits, those where no neighbour's is
    higher.
    """
    image = tl.program_id(1).to(tl.int64)
    cells = height * width
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = place < classes * cells
    label, cell = place // cells, place % cells
    here = scores + image * scores_image + label * scores_class + cell * scores_cell
    score = tl.load(here, mask=there, other=0.0).to(tl.float32)
    peak = there
    if LOGITS:
        score = tl.sigmoid(score)
        row, column = cell // width, cell % width
        around = score
        for step in tl.static_range(9):
            y, x = row + (step // 3 - 1), column + (step % 3 - 1)
            inside = there & (y >= 0) & (y < height) & (x >= 0) & (x < width)
            shift = ((step // 3 - 1) * width + step % 3 - 1) * scores_cell
            neighbour = tl.sigmoid(tl.load(here + shift, mask=inside, other=-float("inf")).to(tl.float32))
            around = tl.maximum(around, neighbour, propagate_nan=tl.PropagateNan.ALL)
        peak = there & ~(around > score)
    found = peak & ~(score <= 0)  # NaN goes on, and is the highest
    append(keys + image * classes * cells, state + image * STATE, key_of(score, place, INDEX_BITS), found)


@triton.jit
def rows(
    chosen,  # (B, limit) keys
    state,
    wh,  # (B, 4 or 2, H, W) by strides, as the next two
    reg,
    embedding,
    out,  # (B, limit, 6 + D) float32, contiguous
    limit,
    cells,
    width,
    dimensions,
    wh_image,
    wh_channel,
    wh_cell,
    reg_image,
    reg_channel,
    reg_cell,
    embedding_image,
    embedding_channel,
    embedding_cell,
    SIDES: tl.constexpr,  # 4 or 2
    INDEX_BITS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,  # D or more
):
    """Grid: (⌈limit / BLOCK⌉, B). Each key becomes the row of its rank; −1 a row of zeros where it lies."""
    image = tl.program_id(1).to(tl.int64)
    chosen += image * limit
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(chosen + slot, mask=slot < limit, other=-1)
    there = key >= 0
    order = tl.where(there, rank(key, chosen, state + image * STATE, limit, SLOTS), slot)
    place = index_of(key, INDEX_BITS)
    cell = place % cells
    column, row = (cell % width).to(tl.float32), (cell // width).to(tl.float32)

    reg += image * reg_image + cell * reg_cell
    x = column + tl.load(reg, mask=there, other=0.0).to(tl.float32)
    y = row + tl.load(reg + reg_channel, mask=there, other=0.0).to(tl.float32)
    wh += image * wh_image + cell * wh_cell
    left = tl.load(wh, mask=there, other=0.0).to(tl.float32)
    top = tl.load(wh + wh_channel, mask=there, other=0.0).to(tl.float32)
    if SIDES == 2:
        left, top = left / 2, top / 2
        right, bottom = left, top
    else:
        right = tl.load(wh + 2 * wh_channel, mask=there, other=0.0).to(tl.float32)
        bottom = tl.load(wh + 3 * wh_channel, mask=there, other=0.0).to(tl.float32)
    dimension = tl.arange(0, BLOCK_D)
    wanted = dimension < dimensions
    look = tl.load(
        embedding
        + image * embedding_image
        + (cell * embedding_cell)[:, None]
        + dimension * embedding_channel,
        mask=there[:, None] & wanted[None, :],
        other=0.0,
    ).to(tl.float32)
    norm = tl.maximum(tl.sqrt_rn(tl.sum(look * look, axis=1)), 1e-12)
    unit = tl.div_rn(look, tl.broadcast_to(norm[:, None], look.shape))

    out += (image * limit + order) * (6 + dimensions)
    kept = slot < limit
    tl.store(out, tl.where(there, x - left, 0.0), mask=kept)
    tl.store(out + 1, tl.where(there, y - top, 0.0), mask=kept)
    tl.store(out + 2, tl.where(there, x + right, 0.0), mask=kept)
    tl.store(out + 3, tl.where(there, y + bottom, 0.0), mask=kept)
    tl.store(out + 4, tl.where(there, score_of(key, INDEX_BITS), 0.0), mask=kept)
    tl.store(out + 5, tl.where(there, place // cells, 0).to(tl.float32), mask=kept)
    tl.store(out[:, None] + 6 + dimension[None, :], unit, mask=kept[:, None] & wanted[None, :])
