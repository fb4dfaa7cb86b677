"""Mask probabilities on a map → bits in source pixels: as two bilinear resizes have it, on the host and in
the GPU kernel.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 (everybody's name for it)
from kernel_runs import PLACES, Run, run_at
from torch import Tensor

from tracker.boxes import Fit, fit_center, fit_corner
from tracker.errors import EngineError
from tracker.frontends.mask_upsampling import taps_of, upsampled
from tracker.kernels.mask_bits import mask_bits
from tracker.masks import MaskBits

FITS = {
    "enlarged": fit_corner((151, 90), (96, 64)),
    "as it is": fit_corner((96, 64), (96, 64)),
    "shrunk": fit_corner((40, 24), (96, 64)),
    "letterboxed": fit_center((70, 131), (96, 64)),
    "many tiles": fit_corner((300, 20), (96, 64)),
}


@pytest.fixture(params=PLACES)
def run(request: pytest.FixtureRequest) -> Run:
    return run_at(request)


def probabilities(count: int = 3) -> Tensor:
    """(N, 16, 24): smooth blobs, some of which touch the map's edges; the last is nowhere above 0.5."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.randn(count, 1, 4, 6, generator=generator) * 4
    smooth = F.interpolate(coarse, size=(16, 24), mode="bicubic").squeeze(1).sigmoid()
    smooth[-1] *= 0.49
    return smooth


def resized_twice(probability: Tensor, fit: Fit) -> Tensor:
    """(N, H, W) probabilities as mmdet computes them."""
    (x, y), (width, height) = fit.offset, fit.resized
    enlarged = F.interpolate(probability[None], size=fit.input_size[::-1], mode="bilinear")
    shown = enlarged[..., y : y + height, x : x + width]
    return F.interpolate(shown, size=fit.source_size[::-1], mode="bilinear")[0]


def assert_masks(bits: Tensor, boxes: Tensor, probability: Tensor, fit: Fit) -> None:
    """Every pixel but those within rounding of the threshold, and the boxes around them."""
    wanted = resized_twice(probability, fit)
    pixels = MaskBits(bits, fit.source_size).pasted()
    clear = (wanted - 0.5).abs() > 1e-6
    assert torch.equal(pixels[clear], (wanted > 0.5)[clear])
    for own, box in zip(pixels, boxes, strict=True):
        if not own.any():
            assert box[2] <= box[0]
            continue
        rows, columns = own.any(dim=1).nonzero(), own.any(dim=0).nonzero()
        around = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert box.tolist() == [float(side) for side in around]


@pytest.mark.parametrize("name", FITS)
def test_on_the_host(name: str) -> None:
    probability, fit = probabilities(), FITS[name]
    assert_masks(*upsampled(probability, torch.ones(3), fit, 0.5), probability, fit)


@pytest.mark.parametrize("name", FITS)
def test_in_the_kernel(run: Run, name: str) -> None:
    probability, fit = probabilities(), FITS[name]
    across, down = taps_of(fit, (24, 16), torch.device("cpu"))
    bits, boxes = run(mask_bits, probability, torch.ones(3), tuple(across), tuple(down), threshold=0.5)
    assert_masks(bits, boxes, probability, fit)


def test_masks_without_a_score_are_left_out(run: Run) -> None:
    probability, fit = probabilities(), FITS["enlarged"]
    score = torch.tensor([0.0, 1.0, torch.nan])
    across, down = taps_of(fit, (24, 16), torch.device("cpu"))
    kernel = run(mask_bits, probability, score, tuple(across), tuple(down), threshold=0.5)
    for bits, boxes in (kernel, upsampled(probability, score, fit, 0.5)):
        assert bits.flatten(1).any(dim=1).tolist() == [False, True, False]
        assert (boxes[:, 2] > boxes[:, 0]).tolist() == [False, True, False]


def test_the_kernel_takes_nothing_on_a_cpu() -> None:
    probability, fit = probabilities(), FITS["enlarged"]
    across, down = taps_of(fit, (24, 16), torch.device("cpu"))
    with pytest.raises(EngineError, match="the GPU kernels"):
        mask_bits(probability, torch.ones(3), across, down, threshold=0.5)
