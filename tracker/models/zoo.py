"""Detectors by the name that tools/export.py takes: which network, with which official weights, for whom.

Adding one is a row in `NETWORKS`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tracker.errors import CheckpointError, ConfigError
from tracker.models import detr, maskrcnn, ppyoloe, rtmdet, solov2, yolox
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
    brightest: value of a pixel. parts: of networks in several parts, by configuration: further inputs, and
    (C, H, W) of one of their rows. others: what names of parameters begin with in other checkpoints of these
    networks, and with in ours. statistics: the part that has running statistics, all of it where nothing is
    said. settle: what random weights need beside, so that answers are like a trained network's.
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
    parts: Callable[[Any], Mapping[str, tuple[int, int, int]]] = lambda config: {}
    others: Mapping[str, str] = field(default_factory=dict)
    statistics: str = ""
    settle: Callable[[Any, Tensor], None] = lambda model, images: None


def _solov2(title: str, configs: Mapping[str, solov2.SOLOv2Config], size: Size) -> Network:
    return Network(
        title=title,
        build=lambda config, size: solov2.SOLOv2(dataclasses.replace(config, size=size)),
        configs=configs,
        frontend="solov2",
        size=size,
        classes=("mask_head.conv_cls.weight", 0),
        unused=re.compile(r"data_preprocessor\."),
        others=solov2.OFFICIAL_NAMES,
        statistics="backbone",
    )


NETWORKS = {
    "yolox": Network(
        title="YOLOX",
        build=lambda config, size: yolox.YOLOX(config),
        configs=yolox.VARIANTS,
        frontend="yolox",
        size=(640, 640),
        classes=("head.cls_preds.0.weight", 0),
        brightest=255.0,
        settle=yolox.settle,
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
        settle=detr.settle,
        size=(1066, 800),
        classes=("class_embed.weight", 1),
        multiple=1,
    ),
    "maskrcnn": Network(
        title="Mask R-CNN",
        build=lambda config, size: maskrcnn.MaskRCNN(config),
        configs={"r50": maskrcnn.MaskRCNNConfig()},
        frontend="maskrcnn",
        size=(1216, 800),
        classes=("roi_head.bbox_head.fc_cls.weight", 1),
        unused=re.compile(r"data_preprocessor\."),
        parts=maskrcnn.parts,
        statistics="backbone",
        settle=maskrcnn.settle,
    ),
    "solov2": _solov2("SOLOv2", solov2.VARIANTS, (1344, 800)),
    "solov2-light": _solov2("SOLOv2-light", solov2.LIGHT_VARIANTS, (768, 448)),
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
    state = _renamed(read_checkpoint(path)[0], network.others)
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
    # Small images do for running statistics; a network that is bound to its size has a twin that sees them.
    twin = network.build(dataclasses.replace(config, **changes), (64, 64))
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():  # in training mode: moves running statistics
        for _ in range(8):
            images = torch.rand(2, 3, 64, 64, generator=generator) * network.brightest
            twin.get_submodule(network.statistics)(images)
        network.settle(twin.eval(), images)
    model.load_state_dict(twin.state_dict())
    return model.eval()


def _renamed(state: State, others: Mapping[str, str]) -> State:
    """Paddle's names for running statistics as torch's, and names that begin with one of `others`."""
    ends = {"._mean": ".running_mean", "._variance": ".running_var"}

    def own(key: str) -> str:
        for begin, ours in others.items():
            if key.startswith(begin):
                return ours + key.removeprefix(begin)
        return next((key.removesuffix(old) + new for old, new in ends.items() if key.endswith(old)), key)

    return {own(key): value for key, value in state.items()}
