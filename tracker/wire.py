"""Messages between processes: plain content and arrays, through pipes.

An array crosses as its bytes, with type and shape beside it: half of what pickling it costs. Content is
pickled, so both ends must be this package's own. Knows nothing of what the arrays mean.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_SIZES = struct.Struct("=QQ")  # bytes of the head, bytes of the body
_ALIGNMENT = 8  # of every array in the body


def write(pipe: io.RawIOBase, content: Any, arrays: Sequence[Array | None] = ()) -> None:
    """Send one message, waiting for room in the pipe. Raises OSError, BrokenPipeError if nobody reads it."""
    layout: list[tuple[str, tuple[int, ...]] | None] = []
    pieces: list[bytes] = []
    size = 0
    for array in arrays:
        if array is None:
            layout.append(None)
            continue
        layout.append((array.dtype.str, array.shape))
        pieces.append(array.tobytes())
        if padding := -array.nbytes % _ALIGNMENT:
            pieces.append(bytes(padding))
        size += array.nbytes + padding
    head = pickle.dumps((content, layout), pickle.HIGHEST_PROTOCOL)
    rest = memoryview(b"".join((_SIZES.pack(len(head), size), head, *pieces)))
    while rest:  # a pipe may take less than it is given
        rest = rest[pipe.write(rest) :]


def read(pipe: io.BufferedReader[Any]) -> tuple[Any, list[Array | None]] | None:
    """The next message, waiting for it; None where the pipe ends, be it within a message.

    The arrays may be written to; those of one message share its memory.
    """
    sizes = pipe.read(_SIZES.size)
    if len(sizes) < _SIZES.size:
        return None
    head_size, body_size = _SIZES.unpack(sizes)
    head, body = pipe.read(head_size), bytearray(body_size)
    if len(head) < head_size or pipe.readinto(body) < body_size:
        return None
    content, layout = pickle.loads(head)
    arrays: list[Array | None] = []
    offset = 0
    for entry in layout:
        if entry is None:
            arrays.append(None)
            continue
        array: Array = np.ndarray(entry[1], entry[0], body, offset)
        arrays.append(array)
        offset += array.nbytes + -array.nbytes % _ALIGNMENT
    return content, arrays
