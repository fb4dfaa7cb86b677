"""Masks of a picture: pasted as the official code does it, small until asked for, the same wherever asked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco
from torch.nn.functional import grid_sample
from torch.utils._python_dispatch import TorchDispatchMode

from tracker.errors import DetectionsError
from tracker.masks import MaskBits, MaskCrops, Masks

SIZE = (317, 203)  # a width that no byte divides


def blobs(count: int, seed: int = 0, size: tuple[int, int] = SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 28, 28) smooth logits and (N, 4) boxes, some of them partly outside of the picture."""
    made = torch.Generator().manual_seed(seed)
    rough = torch.randn((count, 1, 5, 5), generator=made) * 6
    logits = torch.nn.functional.interpolate(rough, size=28, mode="bicubic")[:, 0]
    centre = torch.rand((count, 2), generator=made) * torch.tensor(size)
    half = (5 + torch.rand((count, 2), generator=made) * 80) / 2
    return logits, torch.cat((centre - half, centre + half), dim=1)


def pictures(count: int, seed: int = 0) -> np.ndarray:
    """(N, H, W) bool: ellipses; the first touches every side of the picture, the second has no pixel."""
    random, (width, height) = np.random.default_rng(seed), SIZE
    y, x = np.mgrid[:height, :width]
    drawn = np.zeros((count, height, width), bool)
    for mask in drawn:
        cx, cy, rx, ry = random.uniform(0, (width, height, width / 3, height / 3))
        mask[:] = ((x - cx) / (rx + 2)) ** 2 + ((y - cy) / (ry + 2)) ** 2 < 1
    if count > 1:
        drawn[0], drawn[1] = True, False
    return drawn


def of_kind(kind: str, count: int = 12) -> Masks:
    if kind == "crops":
        return MaskCrops(*blobs(count), SIZE)
    return MaskBits.pack(torch.from_numpy(pictures(count)), SIZE)


def official_paste(logits: torch.Tensor, xyxy: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """mmdet 3.3, `fcn_mask_head.py`, `_do_paste_mask(skip_empty=False)`: probabilities (N, H, W)."""
    width, height = size
    x0, y0, x1, y1 = torch.split(xyxy, 1, dim=1)
    y = (torch.arange(0, height).float() + 0.5 - y0) / (y1 - y0) * 2 - 1
    x = (torch.arange(0, width).float() + 0.5 - x0) / (x1 - x0) * 2 - 1
    shape = (len(xyxy), height, width)
    grid = torch.stack((x[:, None, :].expand(shape), y[:, :, None].expand(shape)), dim=3)
    return grid_sample(logits.sigmoid()[:, None], grid, align_corners=False)[:, 0]


class Largest(TorchDispatchMode):
    """Watches torch: bytes of the largest tensor that any of its operations makes."""

    bytes = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result._base is None:
            self.bytes = max(self.bytes, result.nbytes)
        return result


# What they are


@pytest.mark.parametrize("threshold", [0.5, 0.3, 0.05])
def test_crops_are_pasted_as_the_official_code_pastes_them(threshold: float) -> None:
    logits, xyxy = blobs(40)
    expected = official_paste(logits, xyxy, SIZE) >= threshold
    assert expected.any(dim=(1, 2)).sum() > 30
    pasted = MaskCrops(logits, xyxy, SIZE, threshold).pasted()
    # Pixels at the threshold itself may fall on either side: sums are taken in another order.
    assert (pasted != expected).sum() <= expected.sum() / 100_000


def test_half_precision_logits_are_taken_in_full() -> None:
    logits, xyxy = blobs(8)
    assert torch.equal(
        MaskCrops(logits.half(), xyxy, SIZE).pasted(), MaskCrops(logits.half().float(), xyxy, SIZE).pasted()
    )


def test_a_box_without_width_has_no_pixels() -> None:
    flat = MaskCrops(torch.full((1, 28, 28), 9.0), torch.tensor([[10.0, 10, 10, 50]]), SIZE)
    assert flat.crop(0).pixels.sum() == flat.area.sum() == 0
    assert not flat.patches(torch.tensor([[10.0, 10, 10, 50]]), 8).any()


def test_bits_are_packed_as_numpy_packs_them() -> None:
    drawn = pictures(5)
    masks = MaskBits.pack(torch.from_numpy(drawn), SIZE)
    assert np.array_equal(masks.pasted().numpy(), drawn)
    again = MaskBits(torch.from_numpy(np.packbits(drawn, axis=2)), SIZE)
    assert np.array_equal(again.pasted().numpy(), drawn)


def test_bounds_are_those_of_the_pixels() -> None:
    drawn = pictures(9)
    bounds = MaskBits.pack(torch.from_numpy(drawn), SIZE).bounds().tolist()
    for mask, found in zip(drawn, bounds, strict=True):
        rows, columns = mask.any(axis=1).nonzero()[0], mask.any(axis=0).nonzero()[0]
        expected = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1] if len(rows) else [0, 0, 0, 0]
        assert found == expected


# Asking


@pytest.mark.parametrize("kind", ["crops", "bits"])
def test_whole_pictures_windows_crops_areas_and_run_lengths_agree(kind: str) -> None:
    masks = of_kind(kind)
    whole = masks.pasted().numpy()
    assert np.array_equal(masks.area.numpy(), whole.sum(axis=(1, 2)))
    assert np.array_equal(masks.pasted(window=(30, 20, 201, 130)).numpy(), whole[:, 20:130, 30:201])
    assert np.array_equal(masks.pasted(rows=np.array([7, 2])).numpy(), whole[[7, 2]])
    for row, picture in enumerate(whole):
        x, y, pixels = masks.crop(row)
        again = np.zeros_like(picture)
        again[y : y + pixels.shape[0], x : x + pixels.shape[1]] = pixels
        assert np.array_equal(again, picture)
        assert masks.rle(row) == coco.encode(np.asfortranarray(picture.astype(np.uint8)))["counts"]


@pytest.mark.parametrize("kind", ["crops", "bits"])
def test_iou_of_pairs_is_to_the_pixel(kind: str) -> None:
    masks, whole = of_kind(kind), of_kind(kind).pasted().numpy()
    row, column = (each.ravel() for each in np.mgrid[:12, :12])
    inter = (whole[row] & whole[column]).sum(axis=(1, 2))
    union = (whole[row] | whole[column]).sum(axis=(1, 2))
    assert (inter > 0).sum() > 12
    assert np.allclose(masks.iou(masks, (row, column)).numpy(), inter / np.maximum(union, 1))
    # ... and between kinds, and subsets
    other = MaskBits.pack(torch.from_numpy(whole), SIZE)[np.array([3, -1, 5])]
    found = masks.iou(other, (np.array([3, 3, 5]), np.array([0, 1, 2]))).tolist()
    assert found == pytest.approx([1.0, 0.0, 1.0])


@pytest.mark.parametrize("kind", ["crops", "bits"])
def test_patches_are_the_masks_in_their_boxes(kind: str) -> None:
    """At the centres of 16 × 16 cells: what the picture, looked at there, has."""
    masks = of_kind(kind)
    x1, y1, x2, y2 = box = (40, 24, 40 + 16 * 8, 24 + 16 * 8)  # cells of 8 × 8 pixels
    patches = masks.patches(torch.tensor([box] * 12, dtype=torch.float32), 16)
    # A cell's centre is a corner of four pixels: sure where all four agree.
    around = masks.pasted()[:, y1:y2, x1:x2].unfold(1, 8, 8).unfold(2, 8, 8)[..., 3:5, 3:5]
    sure = around.all(dim=(3, 4)) | ~around.any(dim=(3, 4))
    assert sure.float().mean() > 0.8
    assert torch.equal(patches[sure], around[..., 1, 1][sure])


@pytest.mark.parametrize(
    "rows", [np.array([4, 0, 4]), slice(3, 9), np.arange(12) % 5 == 1, np.empty(0, np.int64)]
)
def test_subsets_are_the_same_masks(rows: Any) -> None:
    masks = of_kind("bits")
    subset = masks[rows]
    assert np.array_equal(subset.pasted().numpy(), masks.pasted().numpy()[rows])
    assert len(subset) == len(subset.windows) == len(subset.area)
    # ... also of subsets, and copies nothing
    assert np.array_equal(subset[::-1].pasted().numpy(), masks.pasted().numpy()[rows][::-1])
    assert subset.device == masks.device and subset._bits is masks._bits


@pytest.mark.parametrize("kind", ["crops", "bits"])
def test_row_minus_one_is_a_mask_without_pixels(kind: str) -> None:
    masks = of_kind(kind)[np.array([3, -1])]
    assert masks.area.tolist()[1] == 0 and masks.crop(1).pixels.size == 0
    assert masks[::-1].rle(0) == coco.encode(np.zeros(SIZE[::-1], np.uint8, "F"))["counts"]
    assert not masks.patches(torch.tensor([[0.0, 0, 100, 100]] * 2), 8)[1].any()


@pytest.mark.parametrize("kind", ["crops", "bits"])
def test_no_masks_at_all(kind: str) -> None:
    none = of_kind(kind, 0)
    assert none.pasted().shape == (0, SIZE[1], SIZE[0]) and none.area.shape == (0,)
    assert none.patches(torch.zeros((0, 4)), 8).shape == (0, 8, 8)
    assert none.iou(none, (np.empty(0, np.int64), np.empty(0, np.int64))).shape == (0,)
    lost = none[np.array([-1, -1])]
    assert lost.crop(1).pixels.size == 0 and not lost.patches(torch.zeros((2, 4)), 8).any()


def test_masks_come_to_the_host_together(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = of_kind("bits")
    copies = []
    to_host = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(1) or to_host(tensor))
    tracked = masks[np.array([5, 3, 8])]
    for single in [tracked.one(row) for row in range(3)]:
        single.rle(0)
    assert len(copies) == 2  # where they are, and what they are
    assert set(masks._host.crops) == {-1, 3, 5, 8}  # and none that nobody wanted


# What is refused


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MaskCrops(torch.zeros(2, 28, 27), torch.zeros(2, 4), SIZE), r"got \(2, 28, 27\)"),
        (lambda: MaskCrops(torch.zeros(2, 28, 28), torch.zeros(3, 4), SIZE), r"and \(3, 4\)"),
        (lambda: MaskCrops(torch.zeros(2, 28, 28), torch.zeros(2, 4), SIZE, 0.0), "between 0 and 1, got 0.0"),
        (lambda: MaskBits(torch.zeros(1, 203, 39, dtype=torch.uint8), SIZE), r"must be \(N, 203, 40\) uint8"),
        (lambda: MaskBits(torch.zeros(1, 203, 40), SIZE), "got .* torch.float32"),
        (lambda: MaskBits.pack(torch.zeros(1, 203, 317), SIZE), r"must be \(N, 203, 317\) bool"),
    ],
)
def test_masks_that_cannot_be(make: Callable[[], Masks], words: str) -> None:
    with pytest.raises(DetectionsError, match=words):
        make()


# Memory


@pytest.mark.parametrize("kind", ["crops", "bits"])
def test_a_hundred_masks_of_full_hd_stay_small(kind: str, one_thread: None) -> None:
    """Whole pictures would be 207 MB, and 1.7 GB of sampling grids. The bits are 26 MB."""
    size = (1920, 1080)
    logits, xyxy = blobs(100, size=size)
    xyxy = torch.cat((xyxy[:, :2] - 60, xyxy[:, 2:] + 60), dim=1)
    masks: Masks = MaskCrops(logits, xyxy, size)
    if kind == "bits":
        masks = MaskBits.pack(masks.pasted(), size)
        masks = MaskBits(masks._bits, size)
    with Largest() as largest:
        for row in range(100):
            masks.rle(row)
        masks.patches(xyxy, 48)
        every = np.arange(100)
        assert masks.iou(masks, (every, every)).min() >= 0
    assert largest.bytes <= (2 if kind == "crops" else 13) * 2**20 + sum(
        masks.crop(row).pixels.size for row in range(100)
    )
