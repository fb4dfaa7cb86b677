"""What a SOLOv2 engine might answer, from seeds: the input of the comparison with mmdet's post-processing.

The same function fed mmdet 3.3 when tests/data/official_solov2.json was made.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tracker.frontends.solov2 import CELLS, GRIDS

SIZE = (96, 64)  # width, height of the input
SOURCE = (151, 90)  # fills 96×57 of it
NAMES = ("person", "car", "dog")


def raw_outputs(seed: int, *, objects: int = 12) -> dict[str, Tensor]:
    """Discs, by role: several cells say much the same of each, as a network's do.

    The logits of a disc are linear in (x² + y², x, y, 1), which "seg" therefore holds.
    """
    rng = np.random.default_rng(seed)
    width, height = (side // 4 for side in SIZE)
    y, x = np.mgrid[:height, :width] + 0.5
    seg = np.stack((x * x + y * y, x, y, np.ones_like(x)))[None]
    logits = rng.normal(-6.0, 1.0, (1, CELLS, len(NAMES)))
    kernel = rng.normal(0.0, 0.1, (1, CELLS, 4))
    starts = np.cumsum([0, *(side * side for side in GRIDS)])
    for _ in range(objects):
        centre, radius = rng.random(2) * (width, height), rng.uniform(2.0, 6.5)
        label, steep = rng.integers(len(NAMES)), rng.uniform(0.1, 1.0)
        for level in rng.choice(len(GRIDS), 2, replace=False):
            side = GRIDS[level]
            column, row = np.minimum((centre / (width, height) * side).astype(int), side - 1)
            for beside in (0, 1):
                cell = starts[level] + row * side + min(column + beside, side - 1)
                logits[0, cell, label] = rng.uniform(-2.5, 3.0)
                (cx, cy), r = centre + rng.normal(0, 0.3, 2), radius * rng.uniform(0.9, 1.1)
                kernel[0, cell] = steep * np.array((-1.0, 2 * cx, 2 * cy, r * r - cx * cx - cy * cy))
    arrays = {"cate_logits": logits, "kernel": kernel, "seg": seg}
    return {role: torch.from_numpy(values).float() for role, values in arrays.items()}
