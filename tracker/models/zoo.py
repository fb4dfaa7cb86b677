"""Detectors by the name that tools/export.py takes: which network, with which official weights, for whom.

Adding one is a row in `NETWORKS`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tracker.errors import CheckpointError, ConfigError
from tracker.models import detr, ppyoloe, rtmdet, yolox
from tracker.models.checkpoint import State, load_state, read_checkpoint

Size = tuple[int, int]
NOTHING = re.compile("$.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """A family of networks.

    title: for people. build: a configuration and an input size (width, height) → the network.
    configs: by variant. frontend: who reads its answers. size: (width, height) that it was trained for.
    classes: the parameter whose rows are classes, and how many more rows it has. unused: names of parameters
    in official checkpoints that nothing needs, as a pattern for their start. multiple: of both input sides.
    brightest: value of a pixel.
    """

    title: str
    build: Callable[[Any, Size], nn.Module]
    configs: Mapping[str, Any]
    frontend: str
    size: Size
    classes: tuple[str, int]
    unused: re.Pattern[str] = NOTHING
    multiple: int = 32
    brightest: float = 1.0


NETWORKS = {
    "yolox": Network(
        title="YOLOX",
        build=lambda config, size: yolox.YOLOX(config),
        configs=yolox.VARIANTS,
        frontend="yolox",
        size=(640, 640),
        classes=("head.cls_preds.0.weight", 0),
        brightest=255.0,
    ),
    "rtmdet": Network(
        title="RTMDet",
        build=lambda config, size: rtmdet.RTMDet(config),
        configs=rtmdet.VARIANTS,
        frontend="rtmdet",
        size=(640, 640),
        classes=("bbox_head.rtm_cls.0.weight", 0),
        unused=re.compile(r"data_preprocessor\."),
    ),
    "rtmdet-r": Network(
        title="RTMDet-R",
        build=lambda config, size: rtmdet.RTMDet(config),
        configs=rtmdet.ROTATED_VARIANTS,
        frontend="rtmdet-r",
        size=(1024, 1024),
        classes=("bbox_head.rtm_cls.0.weight", 0),
        unused=re.compile(r"data_preprocessor\."),
    ),
    "ppyoloe-plus": Network(
        title="PP-YOLOE+",
        build=lambda config, size: ppyoloe.PPYOLOE(config),
        configs=ppyoloe.VARIANTS,
        frontend="ppyoloe_plus",
        size=(640, 640),
        classes=("yolo_head.pred_cls.0.weight", 0),
        unused=re.compile(r"yolo_head\.(proj_conv|anchor_points|stride_tensor)"),
    ),
    "detr": Network(
        title="DETR",
        build=lambda config, size: detr.DETR(dataclasses.replace(config, size=size)),
        configs={"r50": detr.DetrConfig()},
        frontend="detr",
        size=(1066, 800),
        classes=("class_embed.weight", 1),
        multiple=1,
    ),
}

# As tools/export.py takes them: family and variant.
NAMES = {
    f"{family}-{variant}": (family, variant) for family, each in NETWORKS.items() for variant in each.configs
}


def network_of(name: str) -> tuple[Network, Any]:
    """The family and the configuration of a name; ConfigError for an unknown one."""
    if name not in NAMES:
        raise ConfigError(f"network is {name!r}; there is {', '.join(NAMES)}")
    family, variant = NAMES[name]
    return NETWORKS[family], NETWORKS[family].configs[variant]


def load_detector(name: str, path: Path, size: Size | None = None) -> nn.Module:
    """The network with the weights of an official checkpoint, in evaluation mode, its classes as many as the
    checkpoint's. Raises CheckpointError.
    """
    network, config = network_of(name)
    state = _renamed(read_checkpoint(path)[0])
    key, more = network.classes
    if key not in state:
        raise CheckpointError(f"{path} is no checkpoint of {name}: it has no {key}")
    config = dataclasses.replace(config, classes=len(state[key]) - more)
    model = network.build(config, size or network.size)
    load_state(model, state, path, network=name, unused=network.unused)
    return model.eval()


def random_detector(name: str, size: Size | None = None, *, seed: int = 0, **changes: Any) -> nn.Module:
    """A network for measuring and testing, in evaluation mode, whose activations keep their scale and whose
    normalisations are not as they begin. changes: to its configuration.
    """
    network, config = network_of(name)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = network.build(dataclasses.replace(config, **changes), size or network.size)
    generator = torch.Generator().manual_seed(seed)
    for key, weight in model.named_parameters():
        noise = torch.empty(weight.shape).uniform_(-1, 1, generator=generator)
        if weight.ndim > 1:
            weight.data = noise * math.sqrt(3.0 if "query_embed" in key else 6.0 / weight[0].numel())
        else:
            weight.data = noise * 0.3 + (weight == 1)
    side = 64 if network.multiple == 32 else 0
    width, height = (side, side) if side else size or network.size
    with torch.no_grad():  # in training mode: moves running statistics
        for _ in range(8):
            model(torch.rand(2, 3, height, width, generator=generator) * network.brightest)
    return model.eval()


def _renamed(state: State) -> State:
    """Paddle's names for running statistics as torch's."""
    ends = {"._mean": ".running_mean", "._variance": ".running_var"}

    def own(key: str) -> str:
        return next((key.removesuffix(old) + new for old, new in ends.items() if key.endswith(old)), key)

    return {own(key): value for key, value in state.items()}
