"""Q/DQ pairs in an ONNX graph, placed where TensorRT turns them into integer kernels.

    layers        what has constant weights is fed integers and has INT8 weights, one scale per output channel
    residuals     the sum behind a convolution is fused into it if its other input is integers too
    concatenation, pooling    only move numbers, so what they take and give has one scale
    never         the last layers before an output; what computes coordinates (`islands`); biases;
                  convolutions with a constant of its own for every place (CoordConv);
                  ConvTranspose of single channels, dense or not: TensorRT runs them dense in half precision
                  (`precision`)

INT8 is symmetric and zero points are 0, as TensorRT demands (Developer Guide, "Explicit Quantization").
Scales are numbers that FP16 holds, so that casting the rest of the graph changes none. Knows ONNX and what
TensorRT fuses; where ranges come from, `calibration.ranges` knows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper, version_converter

from tracker.deploy.islands import GRIDS, HEAVY, Array, HalfConfig, Islands, copy_of, precision_of
from tracker.errors import ConfigError, EngineError

OPSET = 19  # the first whose QuantizeLinear takes FP16, as the graph around it may become
LEVELS = 127  # -128 is left out: symmetric
_MOVED = frozenset(("Concat", "MaxPool"))  # one scale before and after


@dataclass(frozen=True, slots=True)
class Layer:
    """A node with weights. weight: their name. axis: of their output channels."""

    name: str
    kind: str
    weight: str
    axis: int


class Quantiser:
    """One FP32 graph, judged once, written in many ways.

    layers: what can be quantised, by name, in the graph's order. high: what by rule is not, and why.
    tensors: all that a range is needed for.
    Raises ConfigError for a graph that is not FP32, EngineError for one that cannot be judged or has nothing
    to quantise.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        given = precision_of(model)
        if given == "int8":
            raise ConfigError("the graph is quantised already: start from the one in fp32")
        self.model = Islands(_of_opset(model), HalfConfig()).model
        graph = self.model.graph
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        self._producers = {name: node for node in graph.node for name in node.output}
        self._users: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in dict.fromkeys(node.input):
                self._users.setdefault(name, []).append(node)
        self._outputs = {value.name for value in graph.output}
        self._place = {node.name: index for index, node in enumerate(graph.node)}
        if len(self._place) < len(graph.node):
            raise EngineError("several nodes have one name: export the graph again")
        reached = self._reached()
        every = {
            node.name: layer
            for node in graph.node
            if node.input and node.input[0] in reached and (layer := self._layer(node)) is not None
        }
        self.high = (
            self._single_channels()
            | self._last(every)
            | self._coordinates(every)
            | self._mapped(every, reached)
        )
        self.layers = {name: layer for name, layer in every.items() if name not in self.high}
        if not self.layers:
            raise EngineError("the graph has no layer to quantise: only layers with constant weights can be")
        self.tensors = self._ranged()

    def write(
        self, ranges: Mapping[str, float], keep: Collection[str] = (), *, only: str | None = None
    ) -> onnx.ModelProto:
        """The graph with Q/DQ pairs; node and output names stay.

        ranges: greatest |value| to represent, by tensor; larger ones become that. keep: layers that are not
        quantised. only: the one layer that is, whatever `keep` says.
        """
        unknown = sorted(set(keep) - self.layers.keys())
        if unknown:
            raise ConfigError(f"no layer to quantise is called {unknown[0]!r}")
        kept = frozenset(keep) if only is None else frozenset(self.layers) - {only}
        points = self._points(kept)
        scales = self._scales(points, ranges)
        model = copy_of(self.model)
        graph = model.graph
        pairs: dict[str, list[onnx.NodeProto]] = {}
        constants: list[onnx.TensorProto] = []
        nodes = {node.name: node for node in graph.node}
        for tensor, users in points.items():
            pairs[tensor] = _pair(tensor, scales[tensor], constants)
            for user, place in users:
                nodes[user].input[place] = f"{tensor}.dq"
        weights: list[onnx.NodeProto] = []
        for layer in (layer for name, layer in self.layers.items() if name not in kept):
            weights.append(self._integers(layer, constants, weights))
            nodes[layer.name].input[1] = weights[-1].output[0]
        order = [pair for value in graph.input for pair in pairs.get(value.name, ())]
        for node in graph.node:
            order.append(copy_of(node))
            order += [pair for name in node.output for pair in pairs.get(name, ())]
        del graph.node[:], graph.value_info[:]
        graph.node.extend([*weights, *order])
        used = {name for node in graph.node for name in node.input} | self._outputs
        stored = [copy_of(tensor) for tensor in graph.initializer if tensor.name in used]
        del graph.initializer[:]
        graph.initializer.extend([*stored, *constants])
        if all(opset.domain in ("", "ai.onnx") for opset in model.opset_import):
            onnx.checker.check_model(model, full_check=True)
        return model

    def _reached(self) -> set[str]:
        """Tensors computed from the images. TensorRT computes all others while it builds, as they are."""
        reached = {value.name for value in self.model.graph.input}
        for node in self.model.graph.node:  # in topological order, as ONNX demands
            if not reached.isdisjoint(node.input):
                reached.update(node.output)
        return reached

    def _layer(self, node: onnx.NodeProto) -> Layer | None:
        """The node as a layer; None if it has no constant weights to quantise by output channel."""
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul") or len(node.input) < 2:
            return None
        weight = self._weights.get(node.input[1])
        if weight is None or node.input[0] in self._weights or len(weight.dims) < 2:
            return None
        given = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        axis = 0
        if node.op_type == "ConvTranspose":
            axis = 1
        elif node.op_type == "Gemm":
            axis = 0 if given.get("transB", 0) else 1
        elif node.op_type == "MatMul":
            axis = len(weight.dims) - 1
        return Layer(node.name, node.op_type, weight.name, axis)

    def _single_channels(self) -> dict[str, str]:
        """Transposed convolutions of single channels, and those written dense with zeros between them."""
        return {
            node.name: "upsamples channels by themselves"
            for node in self.model.graph.node
            if node.op_type == "ConvTranspose" and node.input[1] in self._weights and self._apart(node)
        }

    def _apart(self, node: onnx.NodeProto) -> bool:
        if any(attribute.name == "group" and attribute.i > 1 for attribute in node.attribute):
            return True
        weight = np.abs(numpy_helper.to_array(self._weights[node.input[1]])).sum(axis=(2, 3))
        return len(weight) == weight.shape[1] and not (weight * ~np.eye(len(weight), dtype=bool)).any()

    def _last(self, layers: Mapping[str, Layer]) -> dict[str, str]:
        """Layers after which none comes: their answers are the outputs, but for some arithmetic."""
        last, followed = {}, set[str]()
        for node in reversed(self.model.graph.node):
            ends = followed.isdisjoint(node.output)
            if node.name in layers and ends:
                last[node.name] = "gives an output"
            if node.op_type in HEAVY or not ends:
                followed.update(node.input)
        return last

    def _coordinates(self, layers: Mapping[str, Layer]) -> dict[str, str]:
        """Layers from which sampling positions and their masks are computed."""
        rest = []
        for node in self.model.graph.node:
            if node.op_type == "DeformConv":
                rest += [node.input[2], *node.input[4:]]
            elif node.op_type in GRIDS:
                rest.append(node.input[GRIDS[node.op_type]])
        found, seen = {}, set[str]()
        while rest:
            node = self._producers.get(rest.pop())
            if node is None or node.name in seen:
                continue
            seen.add(node.name)
            if node.name in layers:
                found[node.name] = "gives coordinates"
            elif node.op_type not in HEAVY:
                rest += node.input
        return found

    def _mapped(self, layers: Mapping[str, Layer], reached: set[str]) -> dict[str, str]:
        """Convolutions that a constant is added to, or multiplied with, place by place.

        TensorRT 8.6 makes one layer of an integer convolution and any constant behind it, and then finds that
        it can take one number per channel alone (`QConvScaleFusion`, "vol == params.nbOutputMaps").
        """
        found = {}
        for node in self.model.graph.node:
            for place, name in enumerate(node.input if node.op_type in ("Add", "Sub", "Mul", "Div") else ()):
                producer, other = self._producers.get(name), node.input[1 - place]
                if producer is None or producer.op_type != "Conv" or other in reached:
                    continue
                constant = self._weights.get(other)
                if producer.name in layers and (constant is None or any(n > 1 for n in constant.dims[2:])):
                    found[producer.name] = "has a constant of its own for every place"
        return found

    def _points(self, kept: frozenset[str]) -> dict[str, list[tuple[str, int]]]:
        """By tensor, the nodes and their inputs that take it as integers."""
        points: dict[str, list[tuple[str, int]]] = {}
        nodes = {node.name: node for node in self.model.graph.node}
        for name in self.layers:
            if name not in kept:
                points.setdefault(nodes[name].input[0], []).append((name, 0))
        for node in self.model.graph.node:
            place = self._residual(node, kept)
            if place is not None:
                points.setdefault(node.input[place], []).append((node.name, place))
        for node in reversed(self.model.graph.node):
            if node.op_type in _MOVED and self._only_integers(node.output[0], points):
                for place, name in enumerate(node.input):
                    if name not in self._weights:
                        points.setdefault(name, []).append((node.name, place))
        return points

    def _ranged(self) -> tuple[str, ...]:
        """All that can become integers, whichever layers are kept."""
        ranged = dict.fromkeys(self._points(frozenset()))
        for node in self.model.graph.node:
            if self._residual(node, frozenset()) is not None:
                ranged.update(dict.fromkeys(node.input))
        for node in reversed(self.model.graph.node):
            if node.op_type in _MOVED and node.output[0] in ranged:
                ranged.update(dict.fromkeys(name for name in node.input if name not in self._weights))
        return tuple(ranged)

    def _residual(self, node: onnx.NodeProto, kept: frozenset[str]) -> int | None:
        """The input of a sum that is not computed by the convolution which the sum becomes part of."""
        if node.op_type != "Add" or any(name in self._weights for name in node.input):
            return None
        fused = [
            (self._place[producer.name], place)
            for place, name in enumerate(node.input)
            if (producer := self._producers.get(name)) is not None
            and producer.op_type == "Conv"
            and producer.name in self.layers
            and producer.name not in kept
            and len(self._users[name]) == 1
            and name not in self._outputs
        ]
        return 1 - max(fused)[1] if fused else None

    def _only_integers(self, tensor: str, points: Mapping[str, list[tuple[str, int]]]) -> bool:
        """Whether everybody takes it as integers."""
        taking = {name for name, _ in points.get(tensor, ())}
        return tensor not in self._outputs and taking == {n.name for n in self._users.get(tensor, ())}

    def _scales(
        self, points: Mapping[str, list[tuple[str, int]]], ranges: Mapping[str, float]
    ) -> dict[str, float]:
        """By tensor; those that a node only moves numbers between share the largest."""
        group = {tensor: {tensor} for tensor in points}
        for node in self.model.graph.node:
            if node.op_type in _MOVED and any(node.name == user for user, _ in points.get(node.input[0], ())):
                together = set[str]().union(*(group[n] for n in (*node.input, node.output[0]) if n in group))
                group.update(dict.fromkeys(together, together))
        return {t: float(half_scales(max(ranges[each] for each in group[t]))) for t in points}

    def _integers(
        self, layer: Layer, constants: list[onnx.TensorProto], before: list[onnx.NodeProto]
    ) -> onnx.NodeProto:
        """The node that takes a layer's weights back from INT8, each output channel on its own scale.

        before: those of other layers. Layers with the same weights share the integers, but no node: TensorRT
        makes it part of one layer.
        """
        names = [f"{layer.weight}.{part}" for part in ("int8", "scale", "zero")]
        sharing = sum(list(node.input) == names for node in before)
        if not sharing:
            values = numpy_helper.to_array(self._weights[layer.weight]).astype(np.float32)
            across = tuple(axis for axis in range(values.ndim) if axis != layer.axis)
            scales = half_scales(np.abs(values).max(axis=across))
            shape = [-1 if axis == layer.axis else 1 for axis in range(values.ndim)]
            integers = np.clip(np.rint(values / scales.reshape(shape)), -LEVELS, LEVELS).astype(np.int8)
            arrays = (integers, scales, np.zeros(scales.shape, np.int8))
            constants += [
                numpy_helper.from_array(array, name) for array, name in zip(arrays, names, strict=True)
            ]
        output = f"{layer.weight}.{sharing}.dq" if sharing else f"{layer.weight}.dq"
        return helper.make_node("DequantizeLinear", names, [output], output, axis=layer.axis)


def taken_back_weights(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> Array:
    """What a DequantizeLinear of stored integers gives, in FP32."""
    integers, scales = (numpy_helper.to_array(stored[name]).astype(np.float32) for name in node.input[:2])
    axis = next((each.i for each in node.attribute if each.name == "axis"), 1)
    shape = [-1 if each == axis % integers.ndim else 1 for each in range(integers.ndim)]
    values: Array = integers * scales.reshape(shape if scales.ndim else ())
    return values


def unquantised(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph without its Q/DQ pairs, weights as the integers say, in the type of their scales.

    A pair may be where one type of float becomes another; a cast stays there.
    """
    plain = copy_of(model)
    graph = plain.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    quantised = {node.output[0]: node for node in graph.node if node.op_type == "QuantizeLinear"}
    instead: dict[str, str] = {}
    taken_back: dict[tuple[str, str], str] = {}  # by integers and scales, the weights that they are
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type != "DequantizeLinear":
            nodes += [] if node.op_type == "QuantizeLinear" else [node]
            continue
        stored, output = (node.input[0], node.input[1]), node.output[0]
        maker = quantised.get(node.input[0])
        if maker is not None:
            before, after = (weights[each.input[1]].data_type for each in (maker, node))
            if before == after:
                instead[output] = maker.input[0]
            else:
                nodes.append(helper.make_node("Cast", [maker.input[0]], [output], output, to=after))
            continue
        if stored in taken_back:
            instead[output] = taken_back[stored]
            continue
        taken_back[stored] = output
        values = taken_back_weights(node, weights).astype(numpy_helper.to_array(weights[stored[1]]).dtype)
        graph.initializer.append(numpy_helper.from_array(values, output))
    for node in nodes:
        for index, name in enumerate(node.input):
            node.input[index] = instead.get(name, name)
    kept = [copy_of(node) for node in nodes]
    used = {name for node in kept for name in node.input}
    constants = [copy_of(tensor) for tensor in graph.initializer if tensor.name in used]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(kept)
    graph.initializer.extend(constants)
    return plain


def half_scales(limits: Array | float) -> Array:
    """float32 scales that FP16 holds, just large enough for LEVELS of them to reach the limits; 1 for 0."""
    wanted = np.asarray(limits, np.float64) / LEVELS
    least = float(np.finfo(np.float16).smallest_subnormal)
    with np.errstate(over="ignore"):  # told below
        scales = np.clip(wanted, least, None).astype(np.float16)
        up = np.nextafter(scales, np.float16(np.inf))
    scales = np.where(scales.astype(np.float64) < wanted, up, scales)
    scales = np.where(wanted == 0, np.float16(1), scales)
    array: Array = scales.astype(np.float32)
    if not np.isfinite(array).all():
        raise EngineError(
            f"a range reaches {np.max(limits):.3g}, more than INT8 with FP16 scales holds: the network, or "
            "what its manifest says of pixels, is broken"
        )
    return array


def _pair(tensor: str, scale: float, constants: list[onnx.TensorProto]) -> list[onnx.NodeProto]:
    names = [f"{tensor}.scale", f"{tensor}.zero"]
    constants += [
        numpy_helper.from_array(np.array(scale, np.float32), names[0]),
        numpy_helper.from_array(np.array(0, np.int8), names[1]),
    ]
    return [
        helper.make_node("QuantizeLinear", [tensor, *names], [f"{tensor}.q"], f"{tensor}.q"),
        helper.make_node("DequantizeLinear", [f"{tensor}.q", *names], [f"{tensor}.dq"], f"{tensor}.dq"),
    ]


def _of_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    opset = next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), 0)
    if opset >= OPSET:
        return model
    try:
        return version_converter.convert_version(model, OPSET)
    except Exception as error:  # the converter's own RuntimeError, and protobuf's
        reason = " ".join(str(error).split())
        raise EngineError(
            f"the graph is of opset {opset} and cannot be brought to {OPSET} ({reason}): export it again"
        ) from error
