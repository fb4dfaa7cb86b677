"""One launch from frames to a batch of network inputs. See `kernels/letterbox.py`."""

import triton
import triton.language as tl

TILE_X = tl.constexpr(64)
TILE_Y = tl.constexpr(8)
PLANE = tl.constexpr(10)  # words of a plane in the table
LINEAR_CELLS = tl.constexpr(1)
AREA = tl.constexpr(2)
AREA_WHOLE = tl.constexpr(3)
CUBIC = tl.constexpr(4)
TO_EVEN = tl.constexpr(12582912.0)  # 1.5 · 2²³: float32 keeps nothing behind the point there


@triton.jit
def letterbox(
    table,  # int64 (B, WORDS)
    out,  # (B, 3, H, W) by strides
    height,
    width,
    out_image,
    out_channel,
    out_row,
    out_column,
    mean_0,
    mean_1,
    mean_2,
    std_0,
    std_1,
    std_2,
    border_0,
    border_1,
    border_2,
    WORDS: tl.constexpr,
):
    """Grid: (tiles across, tiles down, B)."""
    image = tl.program_id(2).to(tl.int64)
    row = tl.program_id(1) * TILE_Y + tl.arange(0, TILE_Y)
    column = tl.program_id(0) * TILE_X + tl.arange(0, TILE_X)
    frame = table + image * WORDS
    place = frame + 3 * PLANE
    left, top = tl.load(place).to(tl.int32), tl.load(place + 1).to(tl.int32)
    across, down = tl.load(place + 2).to(tl.int32), tl.load(place + 3).to(tl.int32)
    x, y = column - left, row - top
    inside = ((y >= 0) & (y < down))[:, None] & ((x >= 0) & (x < across))[None, :]
    x = tl.minimum(tl.maximum(x, 0), across - 1)
    y = tl.minimum(tl.maximum(y, 0), down - 1)
    first = _resized(frame, x, y)
    second = _resized(frame + PLANE, x, y)
    third = _resized(frame + 2 * PLANE, x, y)
    target = out + image * out_image + row[:, None] * out_row + column[None, :] * out_column
    kept = (row < height)[:, None] & (column < width)[None, :]
    matrix = place + 4
    value = tl.div_rn(_colour(matrix, first, second, third) - mean_0, std_0)
    tl.store(target, tl.where(inside, value, border_0).to(out.dtype.element_ty), mask=kept)
    value = tl.div_rn(_colour(matrix + 4, first, second, third) - mean_1, std_1)
    tl.store(target + out_channel, tl.where(inside, value, border_1).to(out.dtype.element_ty), mask=kept)
    value = tl.div_rn(_colour(matrix + 8, first, second, third) - mean_2, std_2)
    tl.store(target + 2 * out_channel, tl.where(inside, value, border_2).to(out.dtype.element_ty), mask=kept)


@triton.jit
def _colour(coefficients, first, second, third):
    """One channel, 0 to 255, from three: fixed-point steps of 1/1024."""
    a, b = tl.load(coefficients).to(tl.int32), tl.load(coefficients + 1).to(tl.int32)
    c, constant = tl.load(coefficients + 2).to(tl.int32), tl.load(coefficients + 3).to(tl.int32)
    value = (a * first + b * second + c * third + constant) >> 10
    return tl.minimum(tl.maximum(value, 0), 255).to(tl.float32)


@triton.jit
def _resized(plane, x, y):
    """int32 (Y, X): samples of a plane at columns x and rows y of what it is resized to."""
    samples = tl.load(plane).to(tl.pointer_type(tl.uint8))
    step_x, step_y = tl.load(plane + 1).to(tl.int32), tl.load(plane + 2).to(tl.int32)
    width, height = tl.load(plane + 3).to(tl.int32), tl.load(plane + 4).to(tl.int32)
    way = tl.load(plane + 5).to(tl.int32)
    scale_x, scale_y = _float64(plane + 6), _float64(plane + 7)
    inverse_x, inverse_y = _float64(plane + 8), _float64(plane + 9)
    if way == AREA:
        first_x, begin_x, end_x, head_x, tail_x = _covered(x, width, scale_x, inverse_x)
        first_y, begin_y, end_y, head_y, tail_y = _covered(y, height, scale_y, inverse_y)
        each_x, each_y = inverse_x.to(tl.float32), inverse_y.to(tl.float32)
        total = tl.zeros((y.shape[0], x.shape[0]), tl.float32)
        for j in range(0, tl.ceil(scale_y).to(tl.int32) + 1):
            weigh_y = _weight(first_y + j, begin_y, end_y, head_y, each_y, tail_y)
            at_y = _clamped(first_y + j, height) * step_y
            line = tl.zeros((y.shape[0], x.shape[0]), tl.float32)
            for i in range(0, tl.ceil(scale_x).to(tl.int32) + 1):
                weigh_x = _weight(first_x + i, begin_x, end_x, head_x, each_x, tail_x)
                at_x = _clamped(first_x + i, width) * step_x
                line += _sample(samples, at_x, at_y).to(tl.float32) * weigh_x[None, :]
            total += line * weigh_y[:, None]
        value = _to_even(total)
    elif way == AREA_WHOLE:
        across, down = (scale_x + 0.5).to(tl.int32), (scale_y + 0.5).to(tl.int32)
        count = tl.zeros((y.shape[0], x.shape[0]), tl.int32)
        for j in range(0, down):
            for i in range(0, across):
                count += _sample(
                    samples, _clamped(x * across + i, width) * step_x, _clamped(y * down + j, height) * step_y
                )
        mean = count.to(tl.float32) * tl.div_rn(1.0, (across * down).to(tl.float32))
        # OpenCV rounds the half of two by two samples up, of other numbers to even.
        value = tl.where((across == 2) & (down == 2), (count + 2) >> 2, _to_even(mean))
    elif way == CUBIC:
        left, share_x = _between(x, scale_x, inverse_x, False)
        top, share_y = _between(y, scale_y, inverse_y, False)
        total_ = tl.zeros((y.shape[0], x.shape[0]), tl.int32)
        for j in tl.static_range(4):
            line = tl.zeros((y.shape[0], x.shape[0]), tl.int32)
            at_y = _clamped(top - 1 + j, height) * step_y
            for i in tl.static_range(4):
                at_x = _clamped(left - 1 + i, width) * step_x
                line += _sample(samples, at_x, at_y) * _cubic(share_x, i)[None, :]
            total_ += line * _cubic(share_y, j)[:, None]
        value = tl.minimum(tl.maximum((total_ + (1 << 21)) >> 22, 0), 255)
    else:
        cells = way == LINEAR_CELLS
        left, share_x = _between(x, scale_x, inverse_x, cells)
        top, share_y = _between(y, scale_y, inverse_y, cells)
        # Beyond the outer samples' centres, left and right take the one sample alone; above and below,
        # OpenCV takes it twice by its two weights, which now and then loses a level.
        share_x = tl.where((left < 0) | (left >= width - 1), 0.0, share_x)
        at_left, at_right = _clamped(left, width) * step_x, _clamped(left + 1, width) * step_x
        at_top, at_bottom = _clamped(top, height) * step_y, _clamped(top + 1, height) * step_y
        weigh_left, weigh_right = _fixed(1.0 - share_x)[None, :], _fixed(share_x)[None, :]
        weigh_top, weigh_bottom = _fixed(1.0 - share_y)[:, None], _fixed(share_y)[:, None]
        above = (
            _sample(samples, at_left, at_top) * weigh_left + _sample(samples, at_right, at_top) * weigh_right
        )
        below = (
            _sample(samples, at_left, at_bottom) * weigh_left
            + _sample(samples, at_right, at_bottom) * weigh_right
        )
        value = (((above >> 4) * weigh_top >> 16) + ((below >> 4) * weigh_bottom >> 16) + 2) >> 2
    return value


@triton.jit
def _between(position, scale, inverse, cells):
    """Along an axis, the sample before each position and how far (0 to 1) the position lies beyond it.

    cells: as OpenCV enlarges under INTER_AREA; else between centres of samples, as under INTER_LINEAR.
    """
    if cells:
        before = tl.floor(position * scale)
        share = ((position + 1) - (before + 1.0) * inverse).to(tl.float32)
        share = tl.where(share <= 0, 0.0, share - tl.floor(share))
        first = before.to(tl.int32)
    else:
        centre = ((position + 0.5).to(tl.float64) * scale - 0.5).to(tl.float32)
        start = tl.floor(centre)
        share = centre - start
        first = start.to(tl.int32)
    return first, share


@triton.jit
def _cubic(share, which: tl.constexpr):
    """In 1/2048, the weight of one of four samples around a position `share` beyond the second: Keys' cubic
    convolution with a = −0.75, in OpenCV's order of operations.
    """
    a = -0.75
    far = share + 1.0
    near = 1.0 - share
    first = ((a * far - 5.0 * a) * far + 8.0 * a) * far - 4.0 * a
    second = ((a + 2.0) * share - (a + 3.0)) * share * share + 1.0
    third = ((a + 2.0) * near - (a + 3.0)) * near * near + 1.0
    if which == 0:
        weight = first
    elif which == 1:
        weight = second
    elif which == 2:
        weight = third
    else:
        weight = 1.0 - first - second - third
    return _fixed(weight)


@triton.jit
def _covered(position, size, scale, inverse):
    """Along an axis, what each position covers: the first sample of any share, the first and the one after
    the last that are covered whole, and the weights of the samples before and after these.
    """
    low = position * scale
    high = low + scale
    end = tl.minimum(tl.floor(high).to(tl.int32), size - 1)
    begin = tl.minimum(tl.ceil(low).to(tl.int32), end)
    before, beyond = begin - low, high - end
    first = begin - (before > 1e-3).to(tl.int32)  # OpenCV's own threshold
    head = (before * inverse).to(tl.float32)
    tail = tl.where(beyond > 1e-3, tl.minimum(beyond, 1.0) * inverse, 0.0).to(tl.float32)
    return first, begin, end, head, tail


@triton.jit
def _weight(at, begin, end, head, each, tail):
    return tl.where(at < begin, head, tl.where(at < end, each, tl.where(at == end, tail, 0.0)))


@triton.jit
def _sample(samples, at_x, at_y):
    return tl.load(samples + (at_y[:, None] + at_x[None, :])).to(tl.int32)


@triton.jit
def _clamped(position, size):
    return tl.minimum(tl.maximum(position, 0), size - 1)


@triton.jit
def _float64(word):
    return tl.load(word).to(tl.float64, bitcast=True)


@triton.jit
def _fixed(share):
    """In 1/2048."""
    return _to_even(share * 2048.0)


@triton.jit
def _to_even(value):
    """int32, halves to the even neighbour: cvRound."""
    return ((value + TO_EVEN) - TO_EVEN).to(tl.int32)
