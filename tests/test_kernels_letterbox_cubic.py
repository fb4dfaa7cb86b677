"""Bicubic resizing by the GPU kernel, as PP-YOLOE+ wants it: OpenCV's values within one level."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from kernel_runs import PLACES, Run, run_at
from torch import Tensor

from tracker.boxes import fit_stretch
from tracker.kernels.letterbox import FrameTable, letterbox
from tracker.types import Image


def resized(samples: Tensor, size: tuple[int, int]) -> Tensor:
    """(3, H, W) a BGR image (H, W, 3) stretched to size (width, height)."""
    table = FrameTable(1, samples.device, interpolation="cubic")
    height, width = samples.shape[:2]
    table.put(0, Image(format="bgr", planes=(samples,)), fit_stretch((width, height), size))
    table.upload()
    out = torch.empty(1, 3, size[1], size[0], device=samples.device)
    letterbox(table, out)
    return out[0]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("source", "size"),
    [((64, 48), (40, 40)), ((30, 20), (64, 64)), ((64, 64), (32, 32)), ((50, 33), (50, 33))],
)
def test_as_opencv(
    request: pytest.FixtureRequest, place: str, source: tuple[int, int], size: tuple[int, int]
) -> None:
    request.param = place
    run: Run = run_at(request)
    pixels = np.random.default_rng(3).integers(0, 256, (source[1], source[0], 3), np.uint8)
    mine = run(resized, torch.from_numpy(pixels), size).numpy().transpose(1, 2, 0)
    theirs = cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC).astype(np.float32)
    assert np.abs(mine - theirs).max() <= 1
    assert (mine != theirs).mean() < 0.06
