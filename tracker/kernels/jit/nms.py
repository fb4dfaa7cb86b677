"""Greedy non-maximum suppression in fixed shapes, and YOLOX's rows up to it. See `kernels/nms.py`."""

import triton
import triton.language as tl

from tracker.kernels.jit.best import STATE, append, index_of, key_of, rank, score_of

# Rows are a box, its score and its label: ROW is 6 where the box is corners, 7 where it is rotated: centre,
# size, angle.


@triton.jit
def list_rows(rows, keys, state, count, ROW: tl.constexpr, INDEX_BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Grid: (⌈count / BLOCK⌉, B). Lists the rows (B, count, ROW) whose score is above 0."""
    image = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = place < count
    score = tl.load(rows + (image * count + place) * ROW + ROW - 2, mask=there, other=0.0)
    found = there & ~(score <= 0)
    append(keys + image * count, state + image * STATE, key_of(score, place, INDEX_BITS), found)


@triton.jit
def list_cells(
    raw,  # (B, A, 5 + C) by strides: box, objectness, class scores
    wanted,  # (C,) of any type, 0 for classes to leave out
    keys,  # (B, A)
    state,  # (B, STATE), zero at first
    cells,
    classes,
    least,
    raw_image,
    raw_cell,
    raw_value,
    INDEX_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,  # C or more, a power of two
):
    """Grid: (⌈A / BLOCK⌉, B). Lists cells whose objectness × best class score is `least` or more, and is of
    a wanted class; a key's index is cell · BLOCK_C + class.
    """
    image = tl.program_id(1).to(tl.int64)
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = cell < cells
    row = raw + image * raw_image + cell * raw_cell
    objectness = tl.load(row + 4 * raw_value, mask=there, other=0.0).to(tl.float32)
    likely = objectness >= least  # class scores are at most 1
    label = tl.arange(0, BLOCK_C)
    shares = tl.load(
        row[:, None] + (5 + label[None, :]) * raw_value,
        mask=likely[:, None] & (label < classes)[None, :],
        other=-float("inf"),
    ).to(tl.float32)
    best = tl.max(shares, axis=1)
    kind = tl.min(tl.where(shares == best[:, None], label[None, :], BLOCK_C - 1), axis=1)  # the first
    kind = tl.minimum(kind, classes - 1)  # where NaN is about
    score = objectness * best
    found = likely & (score >= least) & (tl.load(wanted + kind, mask=likely, other=0) != 0)
    append(
        keys + image * cells, state + image * STATE, key_of(score, cell * BLOCK_C + kind, INDEX_BITS), found
    )
    # NaN is neither above nor below `least`; inf − inf and NaN − NaN are NaN, everything else is 0.
    whole = tl.sum(tl.where(likely[:, None] & (label < classes)[None, :], shares - shares, 0.0), axis=1)
    for side in tl.static_range(4):
        value = tl.load(row + side * raw_value, mask=likely, other=0.0).to(tl.float32)
        whole += value - value
    whole += objectness - objectness
    broken = tl.max((whole != 0).to(tl.int32), axis=0)
    tl.atomic_max(state + image * STATE + 1, broken, mask=broken > 0)


@triton.jit
def sort(
    chosen,  # (B, limit) keys
    state,
    source,  # boxes, by strides: rows (B, N, ROW), or YOLOX's rows (B, A, 5 + C)
    cells,  # (A, 3) column, row and stride of YOLOX's cells
    out,  # (B, limit, ROW): rows by falling score; what lies behind the last is not written
    limit,
    source_image,
    source_row,
    source_value,
    ROW: tl.constexpr,
    KIND: tl.constexpr,  # "rows", "undecoded" or "decoded"
    CLASSES: tl.constexpr,  # as BLOCK_C of `list_cells`
    INDEX_BITS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (⌈limit / BLOCK⌉, B)."""
    image = tl.program_id(1).to(tl.int64)
    chosen += image * limit
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(chosen + slot, mask=slot < limit, other=-1)
    there = key >= 0
    index = index_of(key, INDEX_BITS)
    place = index if KIND == "rows" else index // CLASSES
    box = source + image * source_image + place * source_row
    out += (image * limit + rank(key, chosen, state + image * STATE, limit, SLOTS)) * ROW
    tl.store(out + ROW - 2, score_of(key, INDEX_BITS), mask=there)
    if KIND == "rows":
        for value in tl.static_range(ROW - 2):
            tl.store(out + value, tl.load(box + value * source_value, mask=there, other=0.0), mask=there)
        label = tl.load(box + (ROW - 1) * source_value, mask=there, other=0.0)
        tl.store(out + ROW - 1, label, mask=there)
    else:
        _store_yolox(index, box, cells, out, there, source_value, KIND, CLASSES)


@triton.jit
def _store_yolox(index, box, cells, out, there, source_value, KIND: tl.constexpr, CLASSES: tl.constexpr):
    """Corners and label of YOLOX's rows at `box`, to rows of 6 at `out`."""
    place = index // CLASSES
    first = tl.load(box, mask=there, other=0.0).to(tl.float32)
    second = tl.load(box + source_value, mask=there, other=0.0).to(tl.float32)
    third = tl.load(box + 2 * source_value, mask=there, other=0.0).to(tl.float32)
    fourth = tl.load(box + 3 * source_value, mask=there, other=0.0).to(tl.float32)
    if KIND == "undecoded":
        stride = tl.load(cells + place * 3 + 2, mask=there, other=0.0)
        x = (first + tl.load(cells + place * 3, mask=there, other=0.0)) * stride
        y = (second + tl.load(cells + place * 3 + 1, mask=there, other=0.0)) * stride
        half_width, half_height = tl.exp(third) * (stride / 2), tl.exp(fourth) * (stride / 2)
    else:
        x, y = first, second
        half_width, half_height = third / 2, fourth / 2
    tl.store(out, x - half_width, mask=there)
    tl.store(out + 1, y - half_height, mask=there)
    tl.store(out + 2, x + half_width, mask=there)
    tl.store(out + 3, y + half_height, mask=there)
    tl.store(out + 5, (index % CLASSES).to(tl.float32), mask=there)


@triton.jit
def cover(
    rows,  # (B, limit, 6) by falling score
    state,
    covers,  # int32 (B, limit, WORDS): bit i of row j: whether i, which is stronger, covers j
    limit,
    iou_threshold,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Grid: (⌈limit / BLOCK⌉, ⌈limit / 32 / STEP⌉, B). STEP words for each of BLOCK weaker rows; none beyond
    what was found, or of rows that are weaker still.
    """
    image = tl.program_id(2).to(tl.int64)
    count = tl.minimum(tl.load(state + image * STATE), limit)
    start = tl.program_id(0) * BLOCK
    rows += image * limit * 6
    weak = start + tl.arange(0, BLOCK)
    bit = tl.arange(0, 32)
    if start < count:
        left, top, right, bottom, size, kind = _box(rows, weak, weak < count)
        end = tl.minimum((tl.program_id(1) + 1) * STEP, tl.cdiv(tl.minimum(start + BLOCK, count), 32))
        for word in range(tl.program_id(1) * STEP, end):
            strong = word * 32 + bit
            x1, y1, x2, y2, area, label = _box(rows, strong, strong < count)
            width = tl.minimum(x2[None, :], right[:, None]) - tl.maximum(x1[None, :], left[:, None])
            height = tl.minimum(y2[None, :], bottom[:, None]) - tl.maximum(y1[None, :], top[:, None])
            inter = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
            union = (area[None, :] + size[:, None]) - inter
            covered = (inter > union * iou_threshold) & (label[None, :] == kind[:, None])
            covered = covered & (strong[None, :] < weak[:, None])
            bits = tl.sum(covered.to(tl.int32) << bit[None, :], axis=1)
            tl.store(covers + (image * limit + weak) * WORDS + word, bits, mask=weak < count)


@triton.jit
def _box(rows, index, there):
    box = rows + index * 6
    left = tl.load(box, mask=there, other=0.0)
    top = tl.load(box + 1, mask=there, other=0.0)
    right = tl.load(box + 2, mask=there, other=0.0)
    bottom = tl.load(box + 3, mask=there, other=0.0)
    label = tl.load(box + 5, mask=there, other=-1.0)
    return left, top, right, bottom, (right - left) * (bottom - top), label


@triton.jit
def cover_turned(
    rows,  # (B, limit, 7) by falling score
    turns,  # (B, limit, 2): cosine and sine of their angles
    state,
    covers,  # as in `cover`
    limit,
    iou_threshold,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """As `cover`, of rotated boxes, by `boxes.rotated_iou`; there is how the common area is found.

    Boxes are compared only where the circles around two of a block meet.
    """
    image = tl.program_id(2).to(tl.int64)
    count = tl.minimum(tl.load(state + image * STATE), limit)
    start = tl.program_id(0) * BLOCK
    rows += image * limit * 7
    turns += image * limit * 2
    weak = start + tl.arange(0, BLOCK)
    bit = tl.arange(0, 32)
    if start < count:
        x, y, half_width, half_height, cos, sin, reach, kind = _turned_box(rows, turns, weak, weak < count)
        end = tl.minimum((tl.program_id(1) + 1) * STEP, tl.cdiv(tl.minimum(start + BLOCK, count), 32))
        for word in range(tl.program_id(1) * STEP, end):
            strong = word * 32 + bit
            x0, y0, right, bottom, cos0, sin0, reach0, label = _turned_box(
                rows, turns, strong, strong < count
            )
            dx, dy = x[:, None] - x0[None, :], y[:, None] - y0[None, :]
            far = reach[:, None] + reach0[None, :]
            near = (dx * dx + dy * dy < far * far) & (label[None, :] == kind[:, None])
            near = near & (strong[None, :] < weak[:, None])
            bits = tl.zeros((BLOCK,), tl.int32)
            if tl.max(near.to(tl.int32)) > 0:
                # The weak ones as the strong see them.
                along = dx * cos0[None, :] + dy * sin0[None, :]
                across = dy * cos0[None, :] - dx * sin0[None, :]
                c = cos[:, None] * cos0[None, :] + sin[:, None] * sin0[None, :]
                s = sin[:, None] * cos0[None, :] - cos[:, None] * sin0[None, :]
                inter = _common_area(
                    along, across, c, s, half_width[:, None], half_height[:, None],
                    right[None, :] + dx * 0, bottom[None, :] + dx * 0,
                )  # fmt: skip
                area = 4 * half_width * half_height
                area0 = 4 * right * bottom
                union = (area0[None, :] + area[:, None]) - inter
                covered = near & (inter > union * iou_threshold)
                bits = tl.sum(covered.to(tl.int32) << bit[None, :], axis=1)
            tl.store(covers + (image * limit + weak) * WORDS + word, bits, mask=weak < count)


@triton.jit
def _turned_box(rows, turns, index, there):
    """Centre, half sides, cosine and sine, radius of the circle around it, label."""
    box = rows + index * 7
    x = tl.load(box, mask=there, other=0.0)
    y = tl.load(box + 1, mask=there, other=0.0)
    half_width = tl.load(box + 2, mask=there, other=0.0) / 2
    half_height = tl.load(box + 3, mask=there, other=0.0) / 2
    cos = tl.load(turns + index * 2, mask=there, other=1.0)
    sin = tl.load(turns + index * 2 + 1, mask=there, other=0.0)
    label = tl.load(box + 6, mask=there, other=-1.0)
    reach = tl.sqrt(half_width * half_width + half_height * half_height)
    return x, y, half_width, half_height, cos, sin, reach, label


@triton.jit
def _common_area(x, y, c, s, half_width, half_height, right, bottom):
    """Of boxes at (x, y) turned by an angle of cosine c and sine s, and upright ones around the origin."""
    width_x, width_y = half_width * c, half_width * s
    height_x, height_y = half_height * -s, half_height * c
    area = _under(x - width_x - height_x, y - width_y - height_y, 2 * width_x, 2 * width_y, right, bottom)
    area += _under(x + width_x - height_x, y + width_y - height_y, 2 * height_x, 2 * height_y, right, bottom)
    area += _under(x + width_x + height_x, y + width_y + height_y, -2 * width_x, -2 * width_y, right, bottom)
    area += _under(
        x - width_x + height_x, y - width_y + height_y, -2 * height_x, -2 * height_y, right, bottom
    )
    return tl.maximum(area, 0.0)


@triton.jit
def _under(x, y, dx, dy, right, bottom):
    """∫ min(max(x, −right), right) dy along an edge, from (x, y) by (dx, dy), between −bottom and bottom."""
    low = tl.minimum(tl.maximum(y, -bottom), bottom)
    high = tl.minimum(tl.maximum(y + dy, -bottom), bottom)
    slope = dx / tl.where(dy == 0, 1.0, dy)
    first, last = x + slope * (low - y), x + slope * (high - y)
    begin = tl.minimum(tl.maximum(first, -right), right)
    end = tl.minimum(tl.maximum(last, -right), right)
    span, inside = last - first, end - begin
    mean = begin + inside * ((last - end + inside / 2) / tl.where(span == 0, 1.0, span))
    return (high - low) * mean


@triton.jit
def settle(
    rows,  # (B, limit, ROW) by falling score
    state,
    covers,
    out,  # (B, limit, ROW): what is kept, then zeros
    limit,
    ROW: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (B,). BLOCK rows at a time, all before them settled: a row is kept unless a kept row covers it.

    That holds for exactly one choice. Starting from all kept, turn t settles at least the first t rows, so
    the choice stops changing, mostly after two or three turns, and is then the greedy loop's.
    """
    image = tl.program_id(0).to(tl.int64)
    count = tl.minimum(tl.load(state + image * STATE), limit)
    rows += image * limit * ROW
    out += image * limit * ROW
    covers += image * limit * WORDS
    word = tl.arange(0, WORDS)
    lane = tl.arange(0, BLOCK)
    chosen = tl.zeros((WORDS,), tl.int32)
    total = count * 0
    for start in range(0, count, BLOCK):
        row = start + lane
        there = row < count
        by = tl.load(
            covers + row[:, None] * WORDS + word[None, :],
            mask=there[:, None] & (word[None, :] * 32 <= row[:, None]),
            other=0,
        )
        keep = there
        changed = total * 0 + 1
        while changed > 0:
            before = chosen | _bits(keep, start, WORDS, BLOCK)
            now = there & (tl.max(((by & before[None, :]) != 0).to(tl.int32), axis=1) == 0)
            changed = tl.sum((now != keep).to(tl.int32))
            keep = now
        chosen |= _bits(keep, start, WORDS, BLOCK)
        kept = keep.to(tl.int32)
        place = out + (total + tl.cumsum(kept) - kept) * ROW
        for value in tl.static_range(ROW):
            tl.store(place + value, tl.load(rows + row * ROW + value, mask=keep, other=0.0), mask=keep)
        total += tl.sum(kept)
    for start in range(total * ROW, limit * ROW, BLOCK):
        tl.store(out + start + lane, tl.zeros((BLOCK,), tl.float32), mask=start + lane < limit * ROW)
    if tl.load(state + image * STATE + 1) > 0:
        tl.debug_barrier()  # another thread may have written this value
        tl.store(out + ROW - 2, float("nan"))


@triton.jit
def _bits(keep, start, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """Row `start` + n as bit n % 32 of word (start + n) // 32."""
    words = tl.sum(tl.reshape(keep.to(tl.int32), (BLOCK // 32, 32)) << tl.arange(0, 32)[None, :], axis=1)
    at = start // 32 + tl.arange(0, BLOCK // 32)
    return tl.sum(tl.where(tl.arange(0, WORDS)[:, None] == at[None, :], words[None, :], 0), axis=1)
