"""Inputs of the comparisons with official code: raw outputs of detectors and weights of networks, from seeds.

The same functions fed the official repositories when tests/data/official_*.json were made, so the numbers
there are what official code answers to exactly these.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch
from torch import Tensor, nn

SIZE = (64, 96)  # width, height of the input
CELLS = 126  # 8×12 at stride 8, 4×6 at 16, 2×3 at 32


def raw_outputs(name: str, seed: int) -> dict[str, Tensor]:
    """What an engine might answer to one image, by role: boxes in crowds, few scores that count."""
    rng = np.random.default_rng(seed)
    places = 3 * CELLS if name in ("yolov5", "yolov7") else CELLS
    if name in ("detr", "rtdetr"):
        classes, scale, shift = (92, 3.0, 0.0) if name == "detr" else (80, 1.0, -4.6)
        logits, boxes = rng.normal(shift, scale, (1, 100, classes)), rng.random((1, 100, 4))
        return _tensors(logits=logits, boxes=boxes)
    score = rng.random((places, 80)) ** 6 * 0.08
    hot = rng.choice(places, places // 4, replace=False)
    for _ in range(2):
        score[hot, rng.integers(0, 4, len(hot))] = rng.random(len(hot))
    if name == "rtmdet-r":  # DOTA's 15 classes; distances in strides
        score = np.clip(score[:, :15], 1e-4, 1 - 1e-4)
        distances = rng.normal(2.0, 0.7, (1, 4, places))
        angle = rng.uniform(-2.5, 2.5, (1, 1, places))
        return _tensors(logits=np.log(score / (1 - score)).T[None], distances=distances, angle=angle)
    if name in ("ppyoloe_plus", "rtmdet"):
        score = np.clip(score, 1e-4, 1 - 1e-4)
        logits = np.log(score / (1 - score)).T[None]
        if name == "rtmdet":
            return _tensors(logits=logits, distances=rng.normal(2.0, 0.7, (1, 4, places)))
        return _tensors(logits=logits, bins=rng.normal(0.0, 1.5, (1, 68, places)))
    centres, sizes = rng.random((6, 2)) * SIZE, rng.random((6, 2)) * 30 + 8
    crowd = rng.integers(0, 6, places)
    box = np.hstack(
        (
            centres[crowd] + rng.normal(0, 2, (places, 2)),
            sizes[crowd] * np.exp(rng.normal(0, 0.15, (places, 2))),
        )
    )
    if name == "yolov8":
        return _tensors(decoded=np.hstack((box, score)).T[None])
    objectness = np.ones((places, 1)) if name == "yolov6" else rng.random((places, 1))
    return _tensors(decoded=np.hstack((box, objectness, score))[None])


def fill(weights: dict[str, Tensor]) -> None:
    """Overwrite a network's parameters and running statistics, each from its name alone."""
    for name, weight in weights.items():
        if name.endswith(("num_batches_tracked", "proj_conv.weight")):
            continue
        noise = torch.from_numpy(
            np.random.default_rng(zlib.crc32(name.encode())).uniform(-1, 1, tuple(weight.shape))
        ).float()
        if weight.ndim > 1:
            value = noise * (1.0 if "query_embed" in name else (4.5 / weight[0].numel()) ** 0.5)
        elif name.endswith(("weight", "running_var", "alpha")):
            value = 1 + 0.3 * noise
        else:
            value = 0.1 * noise
        weight.copy_(value)


@torch.no_grad()
def filled(network: nn.Module) -> nn.Module:
    fill(network.state_dict())
    return network.eval()


def images(brightest: float = 1.0) -> Tensor:
    """(1, 3, 96, 64)"""
    pixels = np.random.default_rng(5).random((1, 3, SIZE[1], SIZE[0])) * brightest
    return torch.from_numpy(pixels).float()


def sample(values: Tensor) -> list[float]:
    """Forty of the numbers, spread over all."""
    flat = values.detach().flatten()
    return [round(float(v), 6) for v in flat[torch.linspace(0, len(flat) - 1, 40).long()]]


def _tensors(**arrays: np.ndarray) -> dict[str, Tensor]:
    return {role: torch.from_numpy(values).float() for role, values in arrays.items()}
