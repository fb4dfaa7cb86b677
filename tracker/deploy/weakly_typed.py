"""A graph as a TensorRT without strong typing (8.x) reads it best: the same answers, in words it has.

    normalisation    InstanceNormalization as sums and roots: its plugin needs cuDNN 8, and with the parser
                     flag for a form of its own builds crashed (8.6.0's library under 8.6.1's Python)
    weights          FP32 constants through QuantizeLinear and DequantizeLinear, as NVIDIA's quantiser of that
                     time writes them (pytorch-quantization, `TensorQuantizer`). Constants stored as INT8
                     are new in 8.6, and what merges or rearranges weights there wants floating point
    scales           of Q and DQ in FP32
    resizing         TensorRT would move a Q behind a Resize to before it, to resize in INT8 (NVIDIA/TensorRT
                     issue 2976), and then finds no kernel. So what is only added, as in feature pyramids, is
                     added unquantised; what is interpolated is convolved unquantised; and before any other Q
                     stands a Max of the tensor and itself, which is the tensor

Knows ONNX and what TensorRT 8.6 refuses; knows no TensorRT.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tracker.deploy.islands import Array, copy_of, element_types
from tracker.deploy.quantise import taken_back_weights
from tracker.errors import EngineError

_QUANTISING = ("QuantizeLinear", "DequantizeLinear")


def adapted(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph without InstanceNormalization, constants in INT8, and Q right behind Resize; the given one is
    left alone.

    Node, input and output names stay, and so do types.
    Raises EngineError for a normalisation whose size or weights are not known beforehand.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    resized = _resized(model)
    if not any(
        each.op_type == "InstanceNormalization" or _integers(each, stored) or _quantises(each, resized)
        for each in model.graph.node
    ):
        return model
    return _Adapter(copy_of(model)).write()


def scales_in_fp32(model: onnx.ModelProto) -> onnx.ModelProto:
    """The parser of 8.6 reads scales of Q and DQ as FP32 whatever they are (onnx-tensorrt 8.6,
    `QuantDequantLinearHelper`); the network has no types yet that this could contradict.
    """
    scales = {node.input[1] for node in model.graph.node if node.op_type in _QUANTISING}
    if all(t.data_type == TensorProto.FLOAT for t in model.graph.initializer if t.name in scales):
        return model
    model = copy_of(model)
    for tensor in model.graph.initializer:
        if tensor.name in scales:
            tensor.CopyFrom(_in_fp32(tensor, tensor.name))
    return model


class _Adapter:
    """Writes one graph, once."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._types = element_types(model)
        inferred = onnx.shape_inference.infer_shapes(model).graph
        values = (*inferred.input, *inferred.value_info, *inferred.output)
        self._ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in values}
        self._nodes: list[onnx.NodeProto] = []

    def write(self) -> onnx.ModelProto:
        graph = self._model.graph
        self._behind_resizes()
        matrices, resized = self._matrices(), _resized(self._model)
        needed = {value.name for value in graph.output}
        for node in reversed(graph.node):
            if needed.intersection(node.output):
                needed.update(node.input)
        for node in graph.node:
            if not needed.intersection(node.output):
                continue  # Q and DQ of what is added without them
            if node.op_type == "InstanceNormalization":
                self._normalise(node)
            elif _integers(node, self._stored):
                self._weights(node, transposed=node.output[0] in matrices)
            elif _quantises(node, resized):
                self._stay(node)
            else:
                self._nodes.append(copy_of(node))
        ends = {value.name for value in graph.output}
        used = {name for node in self._nodes for name in node.input} | ends
        stored = [copy_of(tensor) for name, tensor in self._stored.items() if name in used]
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(self._nodes)
        graph.initializer.extend(stored)
        return self._model

    def _matrices(self) -> set[str]:
        """Weights that only MatMul takes: their output channels come last, where scales must come first."""
        users: dict[str, set[str]] = {}
        for node in self._model.graph.node:
            for place, name in enumerate(node.input):
                users.setdefault(name, set()).add(f"{node.op_type} {place}")
        return {name for name, kinds in users.items() if kinds == {"MatMul 1"}}

    def _weights(self, node: onnx.NodeProto, *, transposed: bool) -> None:
        """A DequantizeLinear of constant integers, behind a QuantizeLinear that finds those integers.

        integer × scale, rounded to FP32, is back at that integer when divided by the scale and rounded. A
        matrix is stored as PyTorch has it, output channels first, and turned behind DequantizeLinear, as the
        export of `torch.nn.Linear` does.
        """
        scale = node.input[1]
        numbers = taken_back_weights(node, self._stored)
        steps = numpy_helper.to_array(self._stored[scale]).astype(np.float32)
        axis = next((each.i for each in node.attribute if each.name == "axis"), 1) % numbers.ndim
        transposed = transposed and numbers.ndim == 2 and steps.ndim == 1 and axis == 1
        if transposed:
            numbers, axis = np.ascontiguousarray(numbers.T), 0
        name = node.output[0]
        values = self._constant(f"{name}.fp32", numbers)
        wide = self._constant(f"{name}.scale.fp32", steps)
        zero = self._constant(f"{name}.zero.int8", np.zeros(steps.shape, np.int8))
        quantised = self._add("QuantizeLinear", [values, wide, zero], f"{name}.q", axis=axis)
        back = copy_of(node)
        del back.attribute[:]
        back.attribute.append(helper.make_attribute("axis", axis))
        back.input[0] = quantised
        self._nodes.append(back)
        if transposed:
            back.output[0] = f"{name}.rows"
            self._nodes.append(
                helper.make_node("Transpose", [back.output[0]], [name], f"{name}.columns", perm=(1, 0))
            )

    def _behind_resizes(self) -> None:
        """Additions of what a Resize gives, and convolutions of what it interpolates, without the Q and DQ
        between."""
        makers = {name: node for node in self._model.graph.node for name in node.output}
        chain = ("DequantizeLinear", "QuantizeLinear", "Resize")
        for node in self._model.graph.node:
            for place, name in enumerate(node.input):
                steps: list[onnx.NodeProto] = []
                while (
                    len(steps) < len(chain) and name in makers and makers[name].op_type == chain[len(steps)]
                ):
                    steps.append(makers[name])
                    name = makers[name].input[0]
                if len(steps) < len(chain):
                    continue
                if node.op_type == "Add":
                    node.input[place] = steps[-1].output[0]
                if node.op_type == "Conv" and place == 0 and _interpolates(steps[-1]):
                    node.input[0] = steps[-1].output[0]
                    if (back := makers.get(node.input[1])) is not None and _integers(back, self._stored):
                        kind = helper.tensor_dtype_to_np_dtype(self._types[node.input[0]])
                        numbers = taken_back_weights(back, self._stored).astype(kind)
                        node.input[1] = self._constant(f"{node.name}.weight.numbers", numbers)

    def _stay(self, node: onnx.NodeProto) -> None:
        """A QuantizeLinear that is not moved before the Resize it takes: behind something that is."""
        back = copy_of(node)
        back.input[0] = self._add("Max", [node.input[0]] * 2, f"{node.output[0]}.stay")
        self._nodes.append(back)

    def _normalise(self, node: onnx.NodeProto) -> None:
        """(x − mean) / √(variance + ε) × scale + bias, over all but the first two axes, in FP32.

        As ONNX defines InstanceNormalization; the variance from differences, which squares no large mean.
        """
        name = node.name or node.output[0]
        x, scale, bias = node.input
        epsilon = next((each.f for each in node.attribute if each.name == "epsilon"), 1e-5)
        kind = self._types[x]
        if kind != TensorProto.FLOAT:
            x = self._add("Cast", [x], f"{name}.fp32", to=TensorProto.FLOAT)
        # GlobalAveragePool: the mean over those axes whatever their number, in every opset
        mean = self._add("GlobalAveragePool", [x], f"{name}.mean")
        centred = self._add("Sub", [x, mean], f"{name}.centred")
        square = self._add("Mul", [centred, centred], f"{name}.square")
        variance = self._add("GlobalAveragePool", [square], f"{name}.variance")
        least = self._constant(f"{name}.epsilon", np.array(epsilon, np.float32))
        above = self._add("Add", [variance, least], f"{name}.above_zero")
        deviation = self._add("Sqrt", [above], f"{name}.deviation")
        last = self._add("Div", [centred, deviation], f"{name}.normal")
        for operator, factor, neutral in (("Mul", scale, 1), ("Add", bias, 0)):
            values = self._by_channel(node, factor)
            if (values != neutral).any():
                last = self._add(
                    operator, [last, self._constant(f"{name}.{operator}", values)], f"{name}.{operator}.out"
                )
        if kind != TensorProto.FLOAT:
            self._add("Cast", [last], f"{name}.narrow", to=kind)
        self._nodes[-1].output[0] = node.output[0]
        self._nodes[-1].name = name

    def _by_channel(self, node: onnx.NodeProto, constant: str) -> Array:
        """A constant of C numbers, to be combined with (N, C, …)."""
        name, sizes = node.name or node.output[0], self._ranks.get(node.input[0], 0)
        if constant not in self._stored or not sizes:
            unknown = f"the values of {constant}" if sizes else f"the axes of {node.input[0]}"
            raise EngineError(
                f"{unknown} are not known beforehand, which the normalisation {name} takes: fix the image "
                "size and export again"
            )
        values = numpy_helper.to_array(self._stored[constant]).astype(np.float32)
        return values.reshape(-1, *(1,) * (sizes - 2))

    def _add(self, kind: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        self._nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def _constant(self, name: str, values: Array) -> str:
        self._stored[name] = numpy_helper.from_array(values, name)
        return name


def _integers(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether it takes back constants stored as INT8 around 0; others TensorRT does not take at all."""
    if node.op_type != "DequantizeLinear" or node.input[0] not in stored:
        return False
    zeros = [numpy_helper.to_array(stored[name]) for name in node.input[2:] if name in stored]
    return stored[node.input[0]].data_type == TensorProto.INT8 and not any(zero.any() for zero in zeros)


def _resized(model: onnx.ModelProto) -> frozenset[str]:
    return frozenset(node.output[0] for node in model.graph.node if node.op_type == "Resize")


def _interpolates(resize: onnx.NodeProto) -> bool:
    mode = next((each.s for each in resize.attribute if each.name == "mode"), b"nearest")
    return bool(mode != b"nearest")


def _quantises(node: onnx.NodeProto, names: frozenset[str]) -> bool:
    return node.op_type == "QuantizeLinear" and node.input[0] in names


def _in_fp32(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), name)
