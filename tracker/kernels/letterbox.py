"""Frames wherever they lie on the device → a batch of network inputs, in one launch.

Gives the values of `pixels.network_input`: each plane is resized and rounded as OpenCV does it for 8-bit
images (`modules/imgproc/src/resize.cpp`; 4.14 and 5.0 agree; bicubic is a level off in a few hundredths of
the pixels, whose sums OpenCV rounds otherwise), converted as its `transform` does it
(`modules/core/src/matmul.simd.hpp`: in steps of 1/1024), then normalised in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tracker.boxes import Fit
from tracker.errors import SourceError
from tracker.kernels.launch import EXACT, launch, on_device_of, programs
from tracker.manifest import Interpolation
from tracker.pixels import Triple, by_channel, yuv_to_bgr
from tracker.types import Image, YuvMatrix

Size = tuple[int, int]

# Ways to resize a plane, as jit/letterbox.py knows them.
LINEAR, LINEAR_CELLS, AREA, AREA_WHOLE, CUBIC = range(5)
# 64-bit words of a frame in the table: three planes of (pointer, byte steps, size, way, and as float64 how
# many samples a pixel spans and its inverse), where the image lies in the input, and 3 × 4 colour
# coefficients in 1/1024.
_PLANE = 10
_PLANES = range(0, 3 * _PLANE, _PLANE)
_WORDS = 3 * _PLANE + 4 + 12
_IDENTITY = np.eye(3, 4, dtype=np.float32)


class Plane(NamedTuple):
    """8-bit samples in device memory.

    pointer: address of the top left sample. step_x, step_y: bytes to the next sample to the right and below,
    of either sign. width, height: in samples. owner: whatever keeps the memory alive.
    """

    pointer: int
    step_x: int
    step_y: int
    width: int
    height: int
    owner: object = None

    @classmethod
    def of(cls, samples: Tensor) -> Plane:
        """A tensor (H, W) as it lies; SourceError unless it is uint8."""
        if samples.dtype != torch.uint8 or samples.ndim != 2:
            raise SourceError(
                f"planes of frames are 8-bit and (H, W), not {samples.dtype} {tuple(samples.shape)}: have "
                "the decoder convert them"
            )
        (height, width), (step_y, step_x) = samples.shape, samples.stride()
        return cls(samples.data_ptr(), step_x, step_y, width, height, samples)

    def upright(self, *, turned: bool = False, mirrored: bool = False, flipped: bool = False) -> Plane:
        """The same memory seen with rows as columns, then left to right, then top to bottom exchanged."""
        pointer, step_x, step_y, width, height, owner = self
        if turned:
            step_x, step_y, width, height = step_y, step_x, height, width
        if mirrored:
            pointer, step_x = pointer + (width - 1) * step_x, -step_x
        if flipped:
            pointer, step_y = pointer + (height - 1) * step_y, -step_y
        return Plane(pointer, step_x, step_y, width, height, owner)


class FrameTable:
    """A batch of frames as one launch reads them: where their pixels are and where they go.

    Fill rows with `put`, then `upload`: one copy from page-locked memory, on the current stream. The table's
    address never changes, so a CUDA graph that reads it need not be captured again. For one thread at a time,
    and no `put` before the last upload's stream has passed it.

    interpolation, rgb: as `manifest.Input` has them; rgb where the input's first channel is red.
    """

    def __init__(
        self, batch: int, device: torch.device, *, interpolation: Interpolation = "linear", rgb: bool = False
    ) -> None:
        self._host = torch.zeros(batch, _WORDS, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._rows = self._host.numpy()  # the same memory
        self.words = torch.zeros_like(self._host, device=device)
        self._interpolation: Interpolation = interpolation
        self._rgb = rgb
        self._owners: list[tuple[object, ...]] = [()] * batch

    def __len__(self) -> int:
        return len(self._rows)

    def put(
        self,
        index: int,
        image: Image,
        fit: Fit,
        *,
        turned: bool = False,
        mirrored: bool = False,
        flipped: bool = False,
    ) -> None:
        """Frame `index` of the batch; its memory is kept alive until the next one at this index.

        image: planes as tensors of any strides or as `Plane`s, in memory of the table's device. fit: of the
        upright image.
        turned, mirrored, flipped: what makes it upright, as in `Plane.upright`.
        """
        planes = [
            plane.upright(turned=turned, mirrored=mirrored, flipped=flipped)
            for plane in planes_of(image, self.words.device)
        ]
        sizes = tuple((plane.width, plane.height) for plane in planes)
        if sizes[0] != fit.source_size:
            raise SourceError(f"the frame is {sizes[0]}, but was to be fitted as {fit.source_size}")
        colours = None if image.format == "bgr" else (image.matrix, image.full_range)
        row = self._rows[index]
        row[:] = _constants(sizes, fit, colours, self._interpolation, self._rgb)
        for place, plane in zip(_PLANES, planes, strict=True):
            row[place : place + 3] = plane[:3]
        self._owners[index] = tuple(plane.owner for plane in planes)

    @property
    def placed(self) -> Tensor:
        """(batch, 4) int64 on the device, as `upload` hands it over: offset (x, y) and size (width, height)
        of each image within its input.
        """
        return self.words[:, 3 * _PLANE : 3 * _PLANE + 4]

    def upload(self) -> None:
        """Hand all rows to the device. Does not wait."""
        self.words.copy_(self._host, non_blocking=True)


def letterbox(
    table: FrameTable,
    out: Tensor,
    *,
    mean: Triple = (0.0, 0.0, 0.0),
    std: Triple = (1.0, 1.0, 1.0),
    pad: float | Triple = 0.0,
) -> None:
    """Fill out (B, 3, H, W), float16 or float32 of any strides, from the first B rows of the uploaded table.

    mean, std, pad: as in `pixels.network_input`, channels in the order of `out`. Every value is overwritten.
    """
    batch, _, height, width = out.shape
    kernel = programs("letterbox", out, table.words)
    border = [(around - low) / scale for around, low, scale in zip(by_channel(pad), mean, std, strict=True)]
    grid = (-(-width // kernel.TILE_X.value), -(-height // kernel.TILE_Y.value), batch)
    with on_device_of(out):
        launch(
            kernel.letterbox, grid,
            table.words, out, height, width, *out.stride(), *mean, *std, *border, WORDS=_WORDS, **EXACT,
        )  # fmt: skip


def planes_of(image: Image, device: torch.device) -> tuple[Plane, ...]:
    """Y, U, V, or B, G, R: three planes, whatever the image's are. SourceError for tensors elsewhere."""
    planes: Sequence[Any] = image.planes
    if not isinstance(planes[0], Plane) and planes[0].device != device:
        raise SourceError(
            f"the frame lies on {planes[0].device}, but {device} is to read it: copy it there first"
        )
    if image.format == "nv12":
        return _nv12(Plane.of(planes[0]))
    if len(planes) == 1:
        planes = planes[0].unbind(2)
    return tuple(plane if isinstance(plane, Plane) else Plane.of(plane) for plane in planes)


def _nv12(whole: Plane) -> tuple[Plane, ...]:
    """Y, U and V in a surface that has two rows of Y for one of U and V in turn."""
    pointer, step_x, step_y, width, rows, owner = whole
    height = rows * 2 // 3
    chroma, half = pointer + height * step_y, (width // 2, height // 2)
    return (
        Plane(pointer, step_x, step_y, width, height, owner),
        Plane(chroma, 2 * step_x, step_y, *half, owner),
        Plane(chroma + step_x, 2 * step_x, step_y, *half, owner),
    )


@lru_cache
def _constants(
    sizes: tuple[Size, ...],
    fit: Fit,
    colours: tuple[YuvMatrix, bool] | None,
    interpolation: Interpolation,
    rgb: bool,
) -> NDArray[np.int64]:
    """A row of the table without its pointers and steps."""
    row = np.zeros(_WORDS, np.int64)
    for place, size in zip(_PLANES, sizes, strict=True):
        inverse = np.array(fit.resized) / np.array(size)  # in OpenCV's order: 1 / (1 / a) need not be a
        row[place + 3 : place + 6] = *size, _way(size, fit.resized, interpolation)
        row[place + 6 : place + _PLANE] = np.concatenate((1 / inverse, inverse)).view(np.int64)
    matrix = _IDENTITY if colours is None else yuv_to_bgr(*colours)
    # OpenCV cuts what lies beyond the point instead of rounding, hence the half.
    fixed = np.rint((matrix + np.array([0, 0, 0, 0.5], np.float32)) * np.float32(1024))
    row[3 * _PLANE : 3 * _PLANE + 4] = *fit.offset, *fit.resized
    row[3 * _PLANE + 4 :] = (fixed[::-1] if rgb else fixed).reshape(-1)
    return row


def _way(size: Size, resized: Size, interpolation: Interpolation) -> int:
    """How OpenCV resizes a plane to a size, which is not always what it is asked for."""
    if size == resized:
        return LINEAR  # each sample is itself
    if interpolation == "cubic":
        return CUBIC
    scales = [1 / (after / before) for before, after in zip(size, resized, strict=True)]
    whole = all(abs(scale - round(scale)) < np.finfo(np.float64).eps for scale in scales)
    if interpolation == "linear":
        return AREA_WHOLE if whole and all(round(scale) == 2 for scale in scales) else LINEAR
    if min(scales) < 1:
        return LINEAR_CELLS
    return AREA_WHOLE if whole else AREA
