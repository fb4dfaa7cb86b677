"""Networks as graphs of layers, from ONNX or from torch.

A layer is a node that computes something from the image. What only changes how numbers are stored
(QuantizeLinear, DequantizeLinear, Cast, copies) belongs to the layer before it, and so does the batch
normalisation behind a convolution, which exporters fold into it. Knows graphs; runs nothing.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import onnx
import torch
import torch.nn.functional as F  # noqa: N812 (everybody's name for it)
from onnx import helper, numpy_helper
from torch import fx, nn

from tracker.deploy.islands import Array
from tracker.models.deform import DeformConv

STORAGE = frozenset(("QuantizeLinear", "DequantizeLinear", "Cast", "CastLike", "Identity", "Dropout"))
SHAPES = frozenset(("Shape", "Size"))
IMAGE = ""  # the layer that stands for the input
NORMALISED = frozenset(("Conv", "ConvTranspose", "DeformConv", "Gemm"))
OFFSETS = ".conv_offset_mask"


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """name: of its node. kind: ONNX's word for it. tensor: what it gives, as its side calls that.
    inputs: layers it reads. reads: the tensors it reads them as, after storage. weight: as float32, or None.
    """

    name: str
    kind: str
    tensor: str
    inputs: tuple[str, ...]
    reads: tuple[str, ...] = ()
    weight: Array | None = None

    @property
    def signature(self) -> tuple[str, int, int]:
        """Kind, and size of its weights. A deformable convolution may be written as sampling and a plain one,
        with the same weights in the same order.
        """
        kind = "Conv" if self.kind == "DeformConv" else self.kind
        return (kind, 0, 0) if self.weight is None else (kind, len(self.weight), self.weight.size)


@dataclass(frozen=True, slots=True)
class Layers:
    """by_name: in the order they are computed. outputs: the layer that gives each, by the network's name."""

    by_name: Mapping[str, Layer]
    outputs: Mapping[str, str]

    def ancestors(self, name: str) -> set[str]:
        """All layers that feed a layer, without itself."""
        found: set[str] = set()
        rest = [name]
        while rest:
            layer = self.by_name.get(rest.pop())
            for source in layer.inputs if layer else ():
                if source != IMAGE and source not in found:
                    found.add(source)
                    rest.append(source)
        return found


def layers_of_onnx(model: onnx.ModelProto) -> Layers:
    return _OnnxReader(model).read()


def layers_of_torch(network: fx.GraphModule) -> Layers:
    """Of a traced module (`trace`), or of an exported program's `module()`."""
    return _TorchReader(network).read()


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, DeformConv) or super().is_leaf_module(m, module_qualified_name)


def trace(module: nn.Module) -> fx.GraphModule:
    """The module as a graph; deformable convolutions stay whole."""
    return fx.GraphModule(module, _Tracer().trace(module))


class _Collector:
    """Layers as they come, and which one gives each tensor."""

    def __init__(self) -> None:
        self.layers: dict[str, Layer] = {}
        self.given_by: dict[str, str] = {}  # tensor → layer

    def add(
        self, name: str, kind: str, tensor: str, reads: Sequence[str], weight: Array | None = None
    ) -> None:
        inputs = tuple(self.given_by[each] for each in reads)
        self.layers[name] = Layer(name, kind, tensor, inputs, tuple(reads), weight)
        self.given_by[tensor] = name

    def extend(self, name: str, tensor: str, factor: Array | None = None) -> None:
        """The layer goes on to another tensor; factor: of its weights, by output channel."""
        layer = self.layers[name]
        weight = layer.weight
        if weight is not None and factor is not None:
            axis = 1 if layer.kind == "ConvTranspose" and weight.shape[1] == len(factor) else 0
            weight = weight * factor.reshape([-1 if place == axis else 1 for place in range(weight.ndim)])
        self.layers[name] = Layer(layer.name, layer.kind, tensor, layer.inputs, layer.reads, weight)
        self.given_by[tensor] = name


class _OnnxReader:
    def __init__(self, model: onnx.ModelProto) -> None:
        self._graph = model.graph
        self._constants = {each.name: each for each in self._graph.initializer}
        self._values: dict[str, Array] = {}
        self._users = Counter(name for node in self._graph.node for name in node.input)
        self._users.update(value.name for value in self._graph.output)

    def read(self) -> Layers:
        found = _Collector()
        for value in self._graph.input:
            if value.name not in self._constants:
                found.given_by[value.name] = IMAGE
        for place, node in enumerate(self._graph.node):
            reads = [name for name in node.input if name in found.given_by]
            if not reads:
                self._fold(node)
            elif node.op_type in SHAPES:
                continue
            elif node.op_type in STORAGE:
                found.given_by[node.output[0]] = found.given_by[reads[0]]
            elif node.op_type == "BatchNormalization" and self._follows(found, reads[0]):
                factor = self._array(node.input[1]) / np.sqrt(
                    self._array(node.input[4]) + _attribute(node, "epsilon", 1e-5)
                )
                found.extend(found.given_by[reads[0]], node.output[0], factor)
            else:
                self._add(found, node, reads, place)
        outputs = {v.name: found.given_by[v.name] for v in self._graph.output if v.name in found.given_by}
        return Layers(found.layers, outputs)

    def _add(self, found: _Collector, node: onnx.NodeProto, reads: list[str], place: int) -> None:
        name = node.name or next(filter(None, node.output), f"{node.op_type}_{place}")
        weight = self._weight(node)
        given = [output for output in node.output if output]
        for index, output in enumerate(given):
            one = len(given) == 1
            kind = node.op_type if one else f"{node.op_type} {index}"
            found.add(name if one else f"{name} {index}", kind, output, reads, weight)

    def _follows(self, found: _Collector, tensor: str) -> bool:
        """Whether what normalises a tensor can be taken for part of the layer before."""
        layer = found.layers.get(found.given_by[tensor])
        return layer is not None and layer.kind in NORMALISED and self._users[tensor] == 1

    def _weight(self, node: onnx.NodeProto) -> Array | None:
        if node.op_type not in ("Conv", "ConvTranspose", "DeformConv", "Gemm", "MatMul"):
            return None
        if not self._is_constant(node.input[1]):
            return None
        weight = self._array(node.input[1]).astype(np.float32)
        return _single(weight) if node.op_type == "ConvTranspose" else weight

    def _fold(self, node: onnx.NodeProto) -> None:
        """Constants stored otherwise: weights in integers or half precision."""
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            self._constants[node.output[0]] = node.attribute[0].t
        elif not all(self._is_constant(name) for name in node.input if name):
            return
        elif node.op_type in ("Identity", "Cast"):
            self._values[node.output[0]] = self._array(node.input[0])
        elif node.op_type in ("DequantizeLinear", "QuantizeLinear"):
            self._values[node.output[0]] = self._stored(node)

    def _is_constant(self, name: str) -> bool:
        return name in self._constants or name in self._values

    def _stored(self, node: onnx.NodeProto) -> Array:
        """What DequantizeLinear gives; for QuantizeLinear the integers, unclipped."""
        values = self._array(node.input[0]).astype(np.float64)
        axis = _attribute(node, "axis", 1)

        def along(name: str) -> Array:
            array = self._array(name).astype(np.float64)
            shape = [-1 if place == axis else 1 for place in range(values.ndim)]
            return array.reshape(shape) if array.size > 1 else array

        scale = along(node.input[1])
        zero = along(node.input[2]) if len(node.input) > 2 else np.zeros(1)
        if node.op_type == "QuantizeLinear":
            return np.rint(values / scale) + zero
        return (values - zero) * scale

    def _array(self, name: str) -> Array:
        if name not in self._values:
            self._values[name] = numpy_helper.to_array(self._constants[name])
        return self._values[name]


def _single(weight: Array) -> Array:
    """Of an up-sampling written densely, zeros between the channels, the channels: (C, C, …) → (C, 1, …)."""
    count = len(weight)
    if weight.shape[1] != count:
        return weight
    diagonal: Array = weight[np.arange(count), np.arange(count)]
    dense = np.count_nonzero(weight) > np.count_nonzero(diagonal)
    return weight if dense else diagonal[:, None]


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


_MODULES: dict[type[nn.Module], str] = {
    nn.Conv2d: "Conv",
    nn.ConvTranspose2d: "ConvTranspose",
    nn.Linear: "Gemm",
    nn.MaxPool2d: "MaxPool",
    nn.ReLU: "Relu",
    nn.SiLU: "Silu",
    nn.Sigmoid: "Sigmoid",
    nn.Upsample: "Resize",
}
_FUNCTIONS: dict[Any, str] = {
    operator.add: "Add",
    operator.gt: "Greater",
    operator.mul: "Mul",
    torch.cat: "Concat",
    torch.sigmoid: "Sigmoid",
    torch.where: "Where",
    F.max_pool2d: "MaxPool",
}
_OPERATORS = {  # of exported programs, by name without overload
    "aten.add": "Add",
    "aten.add_": "Add",
    "aten.mul": "Mul",
    "aten.cat": "Concat",
    "aten.conv2d": "Conv",
    "aten.conv_transpose2d": "ConvTranspose",
    "aten.gt": "Greater",
    "aten.max_pool2d": "MaxPool",
    "aten.relu": "Relu",
    "aten.relu_": "Relu",
    "aten.sigmoid": "Sigmoid",
    "aten.where": "Where",
    "tracker.deform_conv2d": "DeformConv",
}
_COPIES = frozenset(
    ("aten.to", "aten._to_copy", "aten.clone", "aten.contiguous", "aten.alias", "aten.detach")
)


class _TorchReader:
    """Tensors are called as the graph's nodes are."""

    def __init__(self, network: fx.GraphModule) -> None:
        self._network = network
        self._weights: dict[str, str] = {}  # node that fetches a weight → the weight's name

    def read(self) -> Layers:
        found = _Collector()
        outputs: dict[str, str] = {}
        readers: dict[str, Callable[[_Collector, fx.Node, list[str]], None]] = {
            "call_module": self._module,
            "call_function": self._function,
        }
        for node in self._network.graph.nodes:
            reads = [each.name for each in node.all_input_nodes if each.name in found.given_by]
            if node.op == "placeholder":
                found.given_by[node.name] = IMAGE
            elif node.op == "get_attr":
                self._weights[node.name] = str(node.target)
            elif node.op == "output":
                outputs = self._named(node, found)
            elif reads and node.op in readers and node.target != "_guards_fn":  # torch.export's own check
                readers[node.op](found, node, reads)
        return Layers(found.layers, outputs)

    def _named(self, node: fx.Node, found: _Collector) -> dict[str, str]:
        """Output names → layers; of an exported program the names are those of its dict."""
        (given,) = node.args
        if isinstance(given, dict):
            pairs = [(str(name), value) for name, value in given.items()]
        else:
            spec = getattr(self._network, "_out_spec", None)
            names = spec.context if spec is not None and spec.type is dict else ()
            pairs = list(
                zip(map(str, names), given if isinstance(given, Sequence) else (given,), strict=False)
            )
        return {
            name: found.given_by[value.name]
            for name, value in pairs
            if isinstance(value, fx.Node) and value.name in found.given_by
        }

    def _module(self, found: _Collector, node: fx.Node, reads: list[str]) -> None:
        layer, name = self._network.get_submodule(str(node.target)), str(node.target)
        if name in found.layers:  # used again: an activation, which has no state
            name = node.name
        if isinstance(layer, nn.Identity):
            found.given_by[node.name] = found.given_by[reads[0]]
        elif isinstance(layer, nn.BatchNorm2d) and self._follows(found, node, reads[0]):
            factor = _array(layer.weight) / np.sqrt(_array(layer.running_var) + layer.eps)
            found.extend(found.given_by[reads[0]], node.name, factor)
        elif isinstance(layer, DeformConv):
            shifts = f"{name}{OFFSETS}"
            found.add(shifts, "Conv", shifts, reads, _array(layer.conv_offset_mask.weight))
            found.add(name, "DeformConv", node.name, [*reads, shifts], _array(layer.weight))
        else:
            kind = _MODULES.get(type(layer), type(layer).__name__)
            weight = getattr(layer, "weight", None)
            found.add(name, kind, node.name, reads, None if weight is None else _array(weight))

    def _function(self, found: _Collector, node: fx.Node, reads: list[str]) -> None:
        kind, weight, name = _FUNCTIONS.get(node.target), None, node.name
        if isinstance(node.target, torch._ops.OpOverload):
            operator_name = str(node.target).rpartition(".")[0]
            if operator_name in _COPIES:
                found.given_by[node.name] = found.given_by[reads[0]]
                return
            if operator_name == "aten.batch_norm" and self._follows(found, node, reads[0]):
                found.extend(found.given_by[reads[0]], node.name, self._factor(node))
                return
            kind = _OPERATORS.get(operator_name, operator_name)
            if kind in NORMALISED:
                fetched = [
                    self._weights[each.name] for each in node.all_input_nodes if each.name in self._weights
                ]
                if fetched:
                    weight = _array(_deep(self._network, fetched[0]))
                    name = fetched[0].removesuffix(".weight")
        found.add(name, kind or str(node.target), node.name, reads, weight)

    def _factor(self, node: fx.Node) -> Array:
        """What an exported batch normalisation multiplies each channel by."""
        weight, _, _, variance, _, _, epsilon = cast(tuple[Any, ...], node.args[1:8])
        scale, spread = (
            _array(_deep(self._network, self._weights[each.name]))
            if isinstance(each, fx.Node)
            else np.ones(1)
            for each in (weight, variance)
        )
        factor: Array = scale / np.sqrt(spread + epsilon)
        return factor

    def _follows(self, found: _Collector, node: fx.Node, tensor: str) -> bool:
        layer = found.layers.get(found.given_by[tensor])
        return layer is not None and layer.kind in NORMALISED and len(node.all_input_nodes[0].users) == 1


def _array(values: Any) -> Array:
    array: Array = values.detach().cpu().float().numpy()
    return array


def _deep(module: nn.Module, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module
