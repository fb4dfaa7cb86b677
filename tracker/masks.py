"""Instance masks of one picture: small, where they were computed, until somebody asks for pixels.

A front end gives what its network gives: 28×28 crops with their boxes (`MaskCrops`), or one bit per pixel
(`MaskBits`). Taking some of the rows copies nothing. Pixels are pasted one instance after another, each
within its own window, so that memory is that of the windows asked for: never N whole pictures, unless
somebody wants just these. What comes to the host comes in one piece, at the first `crop` or `rle`.

Knows nothing of tracks. Windows are (x1, y1, x2, y2) in whole source pixels, x2 and y2 beyond the last one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tracker.errors import DetectionsError
from tracker.rle import encode

Rows = NDArray[np.int64]
Windows = NDArray[np.int64]
Window = tuple[int, int, int, int]

# Masks whose places are worked out together: 8 MB of weights for windows as high as 1080p.
_AT_ONCE = 64


class Crop(NamedTuple):
    """A mask on the host. x, y: where its top-left pixel lies in the picture. pixels: (h, w)."""

    x: int
    y: int
    pixels: NDArray[np.bool_]


NOTHING = Crop(0, 0, np.zeros((0, 0), bool))


@dataclass(slots=True)
class _Host:
    """What has been brought to the host, by row as the front end gave it; shared by all subsets."""

    boxes: NDArray[np.float32] | None = None  # of crops
    windows: Windows | None = None
    crops: dict[int, Crop] = field(default_factory=lambda: {-1: NOTHING})


class Masks(ABC):
    """N masks of one picture. size: its (width, height) in source pixels.

    Row −1 is a mask without pixels: that of a track no detection was given to.
    """

    def __init__(self, size: tuple[int, int], count: int) -> None:
        self.size = size
        self._rows: Rows = np.arange(count)  # of what the front end gave
        self._together = self._rows  # brought to the host at once
        self._host = _Host()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: Rows | NDArray[np.bool_] | slice) -> Self:
        """These rows, in this order. Nothing is copied: the others stay in memory as long as these do."""
        if isinstance(rows, slice) or rows.dtype == np.bool_:
            chosen = self._rows[rows]
        else:
            chosen = np.full(len(rows), -1)
            known = rows != -1
            chosen[known] = self._rows[rows[known]]
        subset = copy(self)
        subset._rows = subset._together = chosen
        return subset

    def one(self, row: int) -> Self:
        """That row alone. It is still brought to the host together with the others here."""
        subset = copy(self)
        subset._rows = self._rows[[row]]
        return subset

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where they are."""

    @property
    def windows(self) -> Windows:
        """(N, 4) what surely holds each mask's pixels, within the picture. Waits for the device once."""
        return self._of_all()[self._rows]

    def pasted(self, rows: Rows | None = None, window: Window | None = None) -> Tensor:
        """(N, h, w) bool on the device: the pixels of a window, by default of the whole picture.

        One byte each: 100 masks of 1920×1080 are 207 MB.
        """
        chosen = self if rows is None else self[rows]
        left, top, right, bottom = window or (0, 0, *self.size)
        shape = (len(chosen), max(bottom - top, 0), max(right - left, 0))
        pixels = torch.zeros(shape, dtype=torch.bool, device=self.device)
        windows = [_common(own, (left, top, right, bottom)) for own in chosen.windows]
        pastes = self._pastes(chosen._rows, windows)
        for picture, (x1, y1, x2, y2), paste in zip(pixels, windows, pastes, strict=True):
            picture[y1 - top : y2 - top, x1 - left : x2 - left] = paste
        return pixels

    def crop(self, row: int) -> Crop:
        """The mask's pixels within its window, on the host.

        The first call waits for the device, once, and brings every row here with it.
        """
        number = int(self._rows[row])
        if number not in self._host.crops:
            self._fetch()
        return self._host.crops[number]

    def rle(self, row: int) -> bytes:
        """COCO's compressed `counts` of the whole picture, whose `size` is [height, width]: `rle.encode`."""
        x, y, pixels = self.crop(row)
        return encode(pixels, (x, y), self.size)

    @property
    def area(self) -> Tensor:
        """(N,) int64 on the device: pixels of each mask."""
        return self._counted(self._pastes(self._rows, [_common(window) for window in self.windows]))

    def iou(self, other: Masks, pairs: tuple[Rows, Rows]) -> Tensor:
        """(P,) float32 on the device: intersection over union, to the pixel, of rows here with rows of other.

        Two masks without pixels have IoU 0. One pair after another: made for tests and evaluation, while
        association compares fixed-size `patches`.
        """
        mine, theirs = pairs
        windows = [_common(a, b) for a, b in zip(self.windows[mine], other.windows[theirs], strict=True)]
        ours = self._pastes(self._rows[mine], windows), other._pastes(other._rows[theirs], windows)
        inter = self._counted(a & b for a, b in zip(*ours, strict=True))
        area, other_area = (
            masks.area[torch.from_numpy(rows).to(self.device)]
            for masks, rows in ((self, mine), (other, theirs))
        )
        return inter / (area + other_area - inter).clamp(min=1)

    @abstractmethod
    def patches(self, xyxy: Tensor, side: int) -> Tensor:
        """(N, side, side) bool on the device: each mask at the centres of as many equal cells of its box.

        xyxy: (N, 4) float32 corners in source pixels, on the device. Never waits. A box without area has an
        empty patch.
        """

    @abstractmethod
    def _windows(self) -> Windows:
        """(N, 4) of every row that the front end gave."""

    @abstractmethod
    def _pastes(self, rows: Rows, windows: Sequence[Window]) -> Iterator[Tensor]:
        """(h, w) bool on the device for each row of all there are: pixels of a window within its own. Never
        waits.
        """

    def _counted(self, pixels: Iterable[Tensor]) -> Tensor:
        """(N,) int64 on the device."""
        counts = [each.sum() for each in pixels]
        return torch.stack(counts) if counts else torch.zeros(0, dtype=torch.int64, device=self.device)

    def _fetch(self) -> None:
        """Bring to the host what belongs together: one copy, and one wait for it."""
        crops = self._host.crops
        rows = np.array([row for row in np.unique(self._together).tolist() if row not in crops])
        windows = [_common(window) for window in self._of_all()[rows]]
        pixels = torch.cat([paste.flatten() for paste in self._pastes(rows, windows)])
        flat, start = pixels.cpu().numpy(), 0
        for row, (x1, y1, x2, y2) in zip(rows.tolist(), windows, strict=True):
            stop = start + (y2 - y1) * (x2 - x1)
            crops[row] = Crop(x1, y1, flat[start:stop].reshape(y2 - y1, x2 - x1))
            start = stop

    def _of_all(self) -> Windows:
        if self._host.windows is None:
            self._host.windows = np.concatenate((self._windows(), np.zeros((1, 4), np.int64)))  # −1's last
        return self._host.windows


class MaskCrops(Masks):
    """Mask R-CNN's masks (He et al., ICCV 2017): a small square of logits in each box.

    logits: (N, S, S), any floating type. xyxy: (N, 4) corners of the boxes in source pixels; on the host,
    where they spare a wait, or on the device. threshold: probability from which a pixel is in the mask.

    Pasted as mmdet does it (`fcn_mask_head.py`, `_do_paste_mask`): probabilities at the pixels' centres,
    bilinear between the cells' centres, 0 outside of the box. There a box without width paints across the
    picture; here it paints nothing.

    Raises DetectionsError for shapes that do not fit and for a threshold outside of 0…1.
    """

    def __init__(self, logits: Tensor, xyxy: Tensor, size: tuple[int, int], threshold: float = 0.5) -> None:
        count = len(logits)
        if logits.ndim != 3 or logits.shape[1] != logits.shape[2] or xyxy.shape != (count, 4):
            raise DetectionsError(
                f"masks need logits (N, S, S) and boxes (N, 4), got {tuple(logits.shape)} and "
                f"{tuple(xyxy.shape)}"
            )
        if not 0 < threshold < 1:
            raise DetectionsError(f"a mask's threshold must lie between 0 and 1, got {threshold}")
        super().__init__(size, count)
        self._logits, self._xyxy, self._threshold = logits, xyxy, threshold

    @property
    def device(self) -> torch.device:
        return self._logits.device

    def patches(self, xyxy: Tensor, side: int) -> Tensor:
        rows = torch.from_numpy(self._rows).to(self.device, non_blocking=True)
        # −1 takes the last row and is emptied below; of no rows at all there is none to take.
        if not len(self._logits):
            return torch.zeros((len(self), side, side), dtype=torch.bool, device=self.device)
        probability, cells = _in_use(self._logits)[rows].float().sigmoid(), self._logits.shape[1]
        own = self._xyxy.to(self.device, torch.float32, non_blocking=True)[rows]
        origin, extent = own[:, None, :2], own[:, None, 2:] - own[:, None, :2]
        x, y = ((cell_centres(xyxy, side) - origin) / extent).unbind(dim=-1)  # (N, side) each
        sampled = _between(y, cells) @ probability @ _between(x, cells).mT
        whole = (rows >= 0) & (xyxy[:, 2:] > xyxy[:, :2]).all(dim=1)
        return (sampled >= self._threshold) & whole[:, None, None]

    def _windows(self) -> Windows:
        xyxy = self._boxes().astype(np.float64)
        # Beyond the outermost cells' centres probabilities fade to 0 within a cell, half of it outside.
        fade = np.tile((xyxy[:, 2:] - xyxy[:, :2]) / (2 * self._logits.shape[1]), 2) * (-1, -1, 1, 1)
        windows = np.concatenate((np.floor(xyxy + fade)[:, :2], np.ceil(xyxy + fade)[:, 2:]), axis=1)
        inside: Windows = np.clip(windows, 0, np.tile(self.size, 2)).astype(np.int64)
        return inside

    def _pastes(self, rows: Rows, windows: Sequence[Window]) -> Iterator[Tensor]:
        if not len(self._logits):  # all are −1
            yield from (torch.zeros((0, 0), dtype=torch.bool, device=self.device) for _ in rows)
            return
        cells = self._logits.shape[1]
        for first in range(0, len(rows), _AT_ONCE):
            some = slice(first, first + _AT_ONCE)
            at = np.array(windows[some])
            box = np.concatenate((self._boxes(), np.zeros((1, 4), np.float32)))[rows[some]]
            extent = np.where(box[:, 2:] > box[:, :2], box[:, 2:] - box[:, :2], np.nan)  # NaN is in no mask
            low = np.concatenate((at[:, :2], box[:, :2], extent), axis=1).astype(np.float32)
            begin, origin, extent_there = (
                torch.from_numpy(low).to(self.device, non_blocking=True).split_with_sizes([2, 2, 2], 1)
            )
            reach = int((at[:, 2:] - at[:, :2]).max())
            pixel = torch.arange(reach, dtype=torch.float32, device=self.device)[:, None]
            share = (begin[:, None] + pixel + 0.5 - origin[:, None]) / extent_there[:, None]  # (K, reach, 2)
            x, y = (_between(along, cells) for along in share.unbind(dim=-1))
            index = torch.from_numpy(np.maximum(rows[some], 0)).to(self.device, non_blocking=True)
            probability = _in_use(self._logits)[index].float().sigmoid()
            for k, (x1, y1, x2, y2) in enumerate(windows[some]):
                yield y[k, : y2 - y1] @ probability[k] @ x[k, : x2 - x1].mT >= self._threshold

    def _boxes(self) -> NDArray[np.float32]:
        if self._host.boxes is None:
            self._host.boxes = self._xyxy.to("cpu", torch.float32).numpy()  # waits, if they are on the device
        return self._host.boxes


class MaskBits(Masks):
    """One bit per pixel of the picture, as SOLOv2 finds its masks (Wang et al., NeurIPS 2020).

    bits: (N, H, ceil(W / 8)) uint8 rows as `numpy.packbits` packs them, the leftmost pixel in the highest bit
    and 0 beyond the last. 100 masks of 1920×1080 are 26 MB.

    Raises DetectionsError for another shape or type.
    """

    def __init__(self, bits: Tensor, size: tuple[int, int]) -> None:
        width, height = size
        if bits.ndim != 3 or bits.shape[1:] != (height, -(-width // 8)) or bits.dtype != torch.uint8:
            raise DetectionsError(
                f"bits of masks of {width}×{height} pixels must be (N, {height}, {-(-width // 8)}) uint8, "
                f"got {tuple(bits.shape)} {bits.dtype}"
            )
        super().__init__(size, len(bits))
        self._bits = bits

    @classmethod
    def pack(cls, pixels: Tensor, size: tuple[int, int]) -> MaskBits:
        """From (N, H, W) bool, on their device. Takes no more memory than the bits and one byte plane's."""
        width, height = size
        if pixels.ndim != 3 or pixels.shape[1:] != (height, width) or pixels.dtype != torch.bool:
            raise DetectionsError(
                f"masks of {width}×{height} pixels must be (N, {height}, {width}) bool, "
                f"got {tuple(pixels.shape)} {pixels.dtype}"
            )
        bits = pixels.new_zeros((len(pixels), height, -(-width // 8)), dtype=torch.uint8)
        for place in range(min(8, width)):
            column = pixels[:, :, place::8]
            bits[:, :, : column.shape[2]] |= column.to(torch.uint8) << (7 - place)
        return cls(bits, size)

    @property
    def device(self) -> torch.device:
        return self._bits.device

    def bounds(self) -> Tensor:
        """(N, 4) int64 on the device: the smallest window around the pixels of every row that the front end
        gave; zeros where there are none. Never waits.
        """
        if not len(self._bits):
            return torch.zeros((0, 4), dtype=torch.int64, device=self.device)
        down = (_any(self._bits, 2).squeeze(2) > 0).to(torch.uint8)  # (N, H)
        across = _unpacked(_any(self._bits, 1), _places(self.device)).squeeze(
            1
        )  # (N, W, and what fills the last byte)
        ends = [  # argmax gives the first of equals
            low_or_high
            for line in (across, down)
            for low_or_high in (line.argmax(dim=1), line.shape[1] - line.flip(1).argmax(dim=1))
        ]
        x1, x2, y1, y2 = ends
        return torch.stack((x1, y1, x2, y2), dim=1) * down.amax(dim=1)[:, None]

    def patches(self, xyxy: Tensor, side: int) -> Tensor:
        width, height = self.size
        if not len(self._bits):
            return torch.zeros((len(self), side, side), dtype=torch.bool, device=self.device)
        rows = torch.from_numpy(self._rows).to(self.device, non_blocking=True)
        x, y = cell_centres(xyxy, side).floor().to(torch.int64).unbind(dim=-1)  # (N, side) each
        inside_x, inside_y = (x >= 0) & (x < width), (y >= 0) & (y < height)
        x, y = x.clamp(0, width - 1)[:, None, :], y.clamp(0, height - 1)[:, :, None]
        bit = _in_use(self._bits)[rows[:, None, None], y, x // 8] >> (7 - x % 8).to(torch.uint8) & 1
        whole = (rows >= 0) & (xyxy[:, 2:] > xyxy[:, :2]).all(dim=1)
        return bit.bool() & inside_x[:, None, :] & inside_y[:, :, None] & whole[:, None, None]

    def _windows(self) -> Windows:
        windows: Windows = self.bounds().cpu().numpy()  # waits
        return windows

    def _pastes(self, rows: Rows, windows: Sequence[Window]) -> Iterator[Tensor]:
        bits, places = _in_use(self._bits), _places(self.device)
        for row, (x1, y1, x2, y2) in zip(rows.tolist(), windows, strict=True):
            if row < 0:
                yield torch.zeros((y2 - y1, x2 - x1), dtype=torch.bool, device=self.device)
                continue
            first = x1 // 8
            pixels = _unpacked(bits[row, y1:y2, first : -(-x2 // 8)], places)
            yield pixels[:, x1 - 8 * first : x2 - 8 * first].bool()


def cell_centres(xyxy: Tensor, side: int) -> Tensor:
    """(N, side, 2): columns' x and rows' y at the centres of cells, side² of which fill each box (N, 4)."""
    share = (torch.arange(side, dtype=torch.float32, device=xyxy.device) + 0.5) / side
    low, high = xyxy[:, None, :2], xyxy[:, None, 2:]
    return low + (high - low) * share[:, None]


def _in_use(tensor: Tensor) -> Tensor:
    """It was made on a front end's stream and is read on the current one: its memory must outlast both."""
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
    return tensor


def _between(share: Tensor, cells: int) -> Tensor:
    """(…, P) points, 0…1 across a box → (…, P, cells): how much of each cell bilinear sampling takes there.

    The same as `grid_sample` with align_corners=False and zeros around. Being a product of one factor along x
    and one along y, it samples a box by two matrix products, and needs no grid of points.
    """
    cell = torch.arange(cells, dtype=share.dtype, device=share.device)
    return (1 - (share[..., None] * cells - 0.5 - cell).abs()).clamp(min=0)


def _unpacked(bits: Tensor, places: Tensor) -> Tensor:
    """(…, B) bytes → (…, 8 B) of 0 and 1, the highest bit first."""
    return (bits[..., None] >> places & 1).flatten(-2)


def _places(device: torch.device) -> Tensor:
    """(8,) how far to the right each pixel's bit is."""
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=device)


def _any(bits: Tensor, axis: int) -> Tensor:
    """All along an axis, which stays with length 1, joined by bitwise or: folded in halves."""
    while (length := bits.shape[axis]) > 1:
        half = -(-length // 2)  # of an odd length the middle is in both
        bits = bits.narrow(axis, 0, half) | bits.narrow(axis, length - half, half)
    return bits


def _common(window: Any, other: Any = None) -> Window:
    """What two windows share, be it nothing; of one alone, itself, as plain numbers."""
    x1, y1, x2, y2 = (int(value) for value in window)
    if other is not None:
        x1, y1 = max(x1, int(other[0])), max(y1, int(other[1]))
        x2, y2 = min(x2, int(other[2])), min(y2, int(other[3]))
    return x1, y1, max(x1, x2), max(y1, y2)
