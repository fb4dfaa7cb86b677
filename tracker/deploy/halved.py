"""An ONNX graph whose first layers see blocks of 2×2 pixels instead of pixels; see `models.halved`.

Before a cast: the check against FP32 then judges the graph that is built. Before a graph is cut, which loses
sight of where it begins. After quantising: integers are moved, none is rounded again.

Knows ONNX; knows no network and no TensorRT.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from tracker.deploy.islands import Array, copy_of
from tracker.errors import ConfigError
from tracker.models.halved import halved_weight

StemChoice = Literal["pixels", "blocks"]

DEFAULT: StemChoice = "pixels"  # of graphs that can have either
NARROW = 16  # channels; a block has four times as many, and 64 fill tensor cores
_BY_ELEMENT = ("Relu", "Cast", "QuantizeLinear", "DequantizeLinear")  # with one scale for all channels


def with_stem(model: onnx.ModelProto, asked: StemChoice | None) -> tuple[onnx.ModelProto, StemChoice]:
    """The graph with its first layers as asked, None for DEFAULT where that can be had; and what they see.

    Raises ConfigError for "blocks" where `halved_stem` has none.
    """
    halved = halved_stem(model) if (asked or DEFAULT) == "blocks" else None
    if halved is not None:
        return halved, "blocks"
    if asked == "blocks":
        raise ConfigError(
            "--stem blocks: the graph does not begin with two or more plain convolutions, of at most "
            f"{NARROW} channels and at the images' full size down to one of stride 2: leave the option out"
        )
    return model, "pixels"


def halved_stem(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """The graph with the layers at the images' full size, and the one of stride 2 behind them, on blocks.

    The same answers, the same integers where it is quantised. Names stay, and all behind those layers.
    None where it does not begin with such layers: at least two square odd convolutions that keep the size,
    the last of stride 2 and none before it wider than NARROW, nothing but ReLUs between; images of one known
    and even size. The model is left alone.
    """
    halved = copy_of(model)
    graph = halved.graph
    reader = _Reader(graph)
    stem = reader.stem()
    if stem is None:
        return None
    for layer in stem.layers:
        weight = _halved(reader.array(layer.weight), layer)
        repeats = weight.shape[0] // layer.channels
        arrays = {name: np.tile(reader.array(name), repeats) for name in layer.by_channel}
        for name, values in {layer.weight: weight, **arrays}.items():
            reader.weights[name].CopyFrom(numpy_helper.from_array(values, name))
        size = weight.shape[2]
        window = {"kernel_shape": [size] * 2, "pads": [size // 2] * 4}
        del layer.node.attribute[:]
        layer.node.attribute.extend(helper.make_attribute(*each) for each in window.items())
    first = stem.layers[0].node
    steps = _moved(first.input[0], stem.pair, f"{stem.images}.blocks")
    place = next(index for index, node in enumerate(graph.node) if node.output[0] == first.output[0])
    first.input[0] = steps[-1].output[0]
    for step in reversed(steps):
        graph.node.insert(place, step)
    known = [copy_of(value) for value in graph.value_info if value.name not in stem.between]
    del graph.value_info[:]
    graph.value_info.extend(known)
    return halved


@dataclass(frozen=True, slots=True)
class _Layer:
    """A convolution. weight: its constant, the integers where it is quantised. channels: that it gives.
    by_channel: constants with one number for each of them: bias, scales, zero points.
    """

    node: onnx.NodeProto
    weight: str
    channels: int
    by_channel: tuple[str, ...]
    stride: int
    padding: int


@dataclass(frozen=True, slots=True)
class _Stem:
    """pair: Q and DQ, where they feed the first layer. between: tensors whose shapes change."""

    images: str
    layers: tuple[_Layer, ...]
    pair: tuple[onnx.NodeProto, ...]
    between: frozenset[str]


class _Reader:
    """What a graph begins with."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        inputs = {value.name for value in graph.input}
        self.weights = {tensor.name: tensor for tensor in graph.initializer if tensor.name not in inputs}
        self._graph = graph
        self._makers = {name: node for node in graph.node for name in node.output}
        self._outputs = {value.name for value in graph.output}
        self._users: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._users.setdefault(name, []).append(node)

    def array(self, name: str) -> Array:
        values: Array = numpy_helper.to_array(self.weights[name])
        return values

    def stem(self) -> _Stem | None:
        """None where the first layers are of another kind."""
        images = self._images()
        before: list[onnx.NodeProto] = []  # what comes before the first layer
        between: set[str] = set()
        layers: list[_Layer] = []
        for node in self._chain(images) if images else ():
            layer = self._layer(node) if node.op_type == "Conv" else None
            if layer is not None:
                layers.append(layer)
                between.add(node.input[1])
                if layer.stride == 2:
                    paired = [each.op_type for each in before[-2:]] == ["QuantizeLinear", "DequantizeLinear"]
                    pair = tuple(before[-2:]) if paired else ()
                    found = _Stem(images, tuple(layers), pair, frozenset(between))
                    return found if len(layers) > 1 else None
                if layer.channels > NARROW:
                    return None
            elif node.op_type not in _BY_ELEMENT or any(self._count(name) != 1 for name in node.input[1:]):
                return None
            if layers:
                between.update(node.output)
            else:
                before.append(node)
        return None

    def _images(self) -> str:
        """The one input, where it is of a known and even size; else nothing."""
        if len(self._graph.input) != 1:
            return ""
        images = self._graph.input[0]
        dimensions = images.type.tensor_type.shape.dim
        sides = [each.dim_value for each in dimensions][2:]
        known = len(dimensions) == 4 and all(side and side % 2 == 0 for side in sides)
        return images.name if known else ""

    def _chain(self, tensor: str) -> Iterator[onnx.NodeProto]:
        """The nodes behind it, as long as each alone takes what the one before gives."""
        while tensor not in self._outputs and len(users := self._users.get(tensor, [])) == 1:
            yield users[0]
            tensor = users[0].output[0]

    def _count(self, name: str) -> int:
        """Numbers in a constant, 0 for what is none."""
        return int(np.prod(self.weights[name].dims)) if name in self.weights else 0

    def _layer(self, node: onnx.NodeProto) -> _Layer | None:
        stored = self._stored(node.input[1])
        name, vectors = stored[0], [each for each in (*stored[1:], *node.input[2:]) if each]
        if any(each not in self.weights for each in (name, *vectors)) or len(self._users[node.input[1]]) > 1:
            return None
        shape = tuple(self.weights[name].dims)
        told = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        strides, pads = told.get("strides", [1, 1]), told.get("pads", [0] * 4)
        square = len(shape) == 4 and shape[2] == shape[3] and shape[2] % 2 == 1
        plain = told.get("group", 1) == 1 and set(told.get("dilations", [1])) == {1}
        if not (square and plain and set(pads) == {shape[2] // 2} and strides in ([1, 1], [2, 2])):
            return None
        by_channel = tuple(each for each in vectors if self.weights[each].dims)
        if any(tuple(self.weights[each].dims) != shape[:1] for each in by_channel):
            return None
        if any(len(self._users[each]) > 1 for each in (name, *by_channel)):
            return None
        return _Layer(node, name, shape[0], by_channel, strides[0], pads[0])

    def _stored(self, tensor: str) -> tuple[str, ...]:
        """A weight's constant; where it is taken back from integers, those with scale and zero point."""
        node = self._makers.get(tensor)
        if node is None or node.op_type != "DequantizeLinear" or node.input[0] not in self.weights:
            return (tensor,)
        told = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        by_rows = told.get("axis", 1) == 0 or self._count(node.input[1]) == 1
        zeros = [name for name in node.input[2:] if name in self.weights]
        around_zero = not any(self.array(name).any() for name in zeros)  # as what is filled in is 0
        return tuple(node.input) if by_rows and around_zero else (tensor,)


def _moved(tensor: str, pair: Sequence[onnx.NodeProto], name: str) -> list[onnx.NodeProto]:
    """The nodes that give a tensor's blocks.

    What is quantised is moved as integers, between two pairs of one scale (as `quantise` does with all that
    only moves numbers). Moved before it, images would be rounded to half precision before they are quantised.
    """
    steps = [helper.make_node("SpaceToDepth", [tensor], [name], name, blocksize=2)]
    for node, suffix in zip(pair, ("q", "dq"), strict=False):
        step = copy_of(node)
        step.input[0] = steps[-1].output[0]
        step.name = step.output[0] = f"{name}.{suffix}"
        steps.append(step)
    return steps


def _halved(weight: Array, layer: _Layer) -> Array:
    """As bits: torch has not all of ONNX's types, and none of them is computed with."""
    bits = torch.from_numpy(weight.view(f"i{weight.itemsize}").copy())
    moved: Array = halved_weight(bits, layer.stride, layer.padding).numpy()
    return moved.view(weight.dtype)
