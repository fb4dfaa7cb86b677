"""The network and the pictures that mmdet answered to when tests/data/official_maskrcnn.json was made; and
that network as an engine whose lanes compute with torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from official_cases import fill, images
from torch import Tensor

from tracker.frontends.maskrcnn import MaskRcnn
from tracker.models.maskrcnn import MaskRCNN, MaskRCNNConfig, parts, settle

SIZE = (192, 128)  # of the input: width, height


def small() -> MaskRCNN:
    """A narrow one whose weights come from their names alone, settled."""
    model = MaskRCNN(MaskRCNNConfig(classes=5, channels=32, hidden=64, convolutions=2)).eval()
    fill(model.state_dict())
    settle(model, images())
    return model


def picture(index: int) -> NDArray[np.uint8]:
    """(H, W, 3) shapes of many sizes; one wider than the input's proportions, one narrower."""
    width, height = ((320, 180), (150, 200))[index]
    rng = np.random.default_rng(index)
    pixels = rng.integers(90, 110, (height, width, 3))
    for side in (80, 60, 40, 25, 15):
        x, y = rng.integers(0, (width - side, height - side))
        pixels[y : y + side, x : x + side * 2 // 3] += rng.integers(-90, 140, 3)
    return pixels.clip(0, 255).astype(np.uint8)


class TorchLane:
    """An `EngineLane` that computes with torch: one part, in memory that stays where it is."""

    def __init__(
        self,
        work: Callable[[Tensor], dict[str, Tensor]],
        name: str,
        shape: Sequence[int],
        device: torch.device,
    ) -> None:
        self._work, self._name = work, name
        self.inputs = {name: torch.zeros(*shape, device=device)}
        with torch.no_grad():
            self._outputs = work(self.inputs[name])

    @torch.no_grad()
    def enqueue(self, batch: int) -> dict[str, Tensor]:
        answers = self._work(self.inputs[self._name][:batch])
        for name, answer in answers.items():
            self._outputs[name][:batch].copy_(answer)
        return {name: output[:batch] for name, output in self._outputs.items()}


class TorchPart:
    """A `LaneRuntime` of such lanes."""

    lanes, description = 1, "torch"

    def __init__(
        self,
        work: Callable[[Tensor], dict[str, Tensor]],
        name: str,
        shape: Sequence[int],
        device: torch.device,
        batch: int | None,
    ) -> None:
        self.device, self.max_batch = device, shape[0]
        self._lane = TorchLane(work, name, shape, device)
        self.inputs = {name: (batch, *shape[1:])}
        self.outputs = {key: (batch, *value.shape[1:]) for key, value in self._lane._outputs.items()}

    def lane(self) -> TorchLane:
        return self._lane

    def run(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        raise AssertionError("on a GPU lanes are used")


def torch_engine(model: MaskRCNN, size: tuple[int, int], batch: int, device: torch.device) -> TorchPart:
    """The whole network as an engine in parts."""
    engine = TorchPart(model.trunk, "images", (batch, 3, size[1], size[0]), device, None)
    shapes, most = parts(model.config), MaskRcnn.parts
    works = {"box_regions": model.boxes, "mask_regions": model.masks}
    engine.parts = {  # type: ignore[attr-defined]
        name: TorchPart(works[name], name, (batch * most[name], *shape), device, None)
        for name, shape in shapes.items()
    }
    return engine
