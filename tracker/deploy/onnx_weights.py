"""FairMOT's network again from an ONNX file that `export` wrote, where its checkpoint is gone.

What is in such a file is the folded network (`models.folded`): each weight under its layer's name. How large
the network is, the weights' shapes say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from tracker.errors import CheckpointError
from tracker.models.checkpoint import load_state
from tracker.models.fairmot import DLA34_CHANNELS, FairMOT, FairMOTConfig
from tracker.models.folded import folded

_NOTHING = re.compile(r"(?!)")
_FINEST = 1 / 1024  # steps in which widths are tried


def fairmot_of_onnx(path: Path) -> FairMOT:
    """The network, folded, in evaluation mode. Raises CheckpointError for any other file."""
    try:
        graph = onnx.load(path).graph
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # protobuf's and onnx's own, derived from nothing narrower
        raise CheckpointError(f"{path} is no ONNX file or is cut short: export or copy it again") from error
    if any(node.op_type in ("GridSample", "QuantizeLinear") for node in graph.node):
        raise CheckpointError(
            f"{path} was lowered or quantised, which changes its weights: name the file it was made from"
        )
    weights = {
        tensor.name: torch.from_numpy(np.array(numpy_helper.to_array(tensor)))
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.FLOAT and re.search(r"\.(weight|bias)$", tensor.name)
    }
    strides = {
        node.name: helper.get_attribute_value(attribute)
        for node in graph.node
        for attribute in node.attribute
        if attribute.name == "strides"
    }
    try:
        config = _config(weights, strides)
    except (LookupError, StopIteration, ValueError) as error:
        raise CheckpointError(
            f"{path} holds no FairMOT in fp32 as tools/export.py writes it: name such a file, or a checkpoint"
        ) from error
    model = folded(FairMOT(config))
    load_state(
        model, {name: _single(name, weight) for name, weight in weights.items()}, path,
        network="FairMOT, exported", unused=_NOTHING,
    )  # fmt: skip
    return model


def _config(weights: Mapping[str, Tensor], strides: Mapping[str, list[int]]) -> FairMOTConfig:
    """Raises LookupError, StopIteration or ValueError where the weights are of something else."""

    def rows(layer: str) -> int:
        return len(weights[f"{layer}.weight"])

    roots = [_layers(weights, rf"base\.level{level}\..*root\.conv") for level in range(2, 6)]
    convolutions = [len(_layers(weights, rf"base\.level{level}\.\d+")) for level in (0, 1)]
    depths = (1 + max(len(re.findall(r"\.tree", root)) for root in each) for each in roots)
    channels = tuple(map(rows, ("base.level0.0", "base.level1.0", *(each[0] for each in roots))))
    rest: dict[str, Any] = {
        "classes": rows("hm.2"),
        "embedding": rows("id.2"),
        "box": rows("wh.2"),
        "head_channels": rows("hm.0"),
        "levels": (*convolutions, *depths),
        "stem_stride": strides["base.base_layer.0"][0],
        "deformable": "ida_up.node_1.conv.conv_offset_mask.weight" in weights,
        "max_channels": max(channels),
    }
    widths = (count / base for count, base in zip(channels, DLA34_CHANNELS, strict=True))
    grid = (step * _FINEST for step in range(1, int(4 / _FINEST) + 1))
    sizes = (FairMOTConfig(width=width, **rest) for width in (1.0, *widths, *grid) if width <= 4)
    return next(config for config in sizes if config.channels == channels)


def _layers(weights: Mapping[str, Tensor], names: str) -> list[str]:
    """Those whose whole name the pattern fits."""
    return [name.removesuffix(".weight") for name in weights if re.fullmatch(names + r"\.weight", name)]


def _single(name: str, weight: Tensor) -> Tensor:
    """A transposed convolution of single channels, where it was written as a dense one."""
    if not re.search(r"\.up_\d+\.weight$", name) or weight.shape[1] == 1:
        return weight
    return weight.diagonal(dim1=0, dim2=1).movedim(2, 0)[:, None].contiguous()
