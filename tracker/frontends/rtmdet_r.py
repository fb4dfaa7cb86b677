"""RTMDet-R, rotated boxes (Lyu et al., "RTMDet", 2022, §5.2; mmrotate 1.x,
`models/dense_heads/rotated_rtmdet_head.py`).
"""

from __future__ import annotations

import dataclasses

import torch

from tracker.frontends.dense import DenseDetector
from tracker.frontends.geometry import turned_sides
from tracker.frontends.lanes import Outputs
from tracker.frontends.layout import Layout, Raw, Size
from tracker.frontends.rtmdet import RTMDET

# DOTA 1.0, in mmrotate's order (`mmrotate/datasets/dota.py`).
DOTA_NAMES = (
    "plane", "baseball-diamond", "bridge", "ground-track-field", "small-vehicle", "large-vehicle", "ship",
    "tennis-court", "basketball-court", "storage-tank", "soccer-ball-field", "roundabout", "harbor",
    "swimming-pool", "helicopter",
)  # fmt: skip


def _linear(outputs: Outputs, size: Size) -> Raw:
    return Raw(torch.cat((outputs["distances"], outputs["angle"]), dim=1).mT, outputs["logits"].mT)


def _exponential(outputs: Outputs, size: Size) -> Raw:
    return Raw(torch.cat((outputs["log_distances"], outputs["angle"]), dim=1).mT, outputs["logits"].mT)


# tools/export.py: the last convolutions' own numbers. Of mmrotate's configurations m and l take the
# exponential of the distances (exp_on_reg), tiny and s do not.
LINEAR = Layout(
    outputs={"logits": ("C", "A"), "distances": ("4", "A"), "angle": ("1", "A")},
    split=_linear,
    boxes=turned_sides(offset=0.0),
    sigmoid=True,
)
EXPONENTIAL = Layout(
    outputs={"logits": ("C", "A"), "log_distances": ("4", "A"), "angle": ("1", "A")},
    split=_exponential,
    boxes=turned_sides(offset=0.0, exponential=True),
    sigmoid=True,
)

# `configs/rotated_rtmdet/rotated_rtmdet_l-3x-dota.py`: the pixels are RTMDet's.
RTMDET_R = dataclasses.replace(
    RTMDET,
    name="rtmdet-r",
    title="RTMDet-R",
    layouts={"linear": LINEAR, "exponential": EXPONENTIAL},
    nms_iou=0.1,
    names=DOTA_NAMES,
    rotated=True,
)


class RtmdetR(DenseDetector):
    spec = RTMDET_R
