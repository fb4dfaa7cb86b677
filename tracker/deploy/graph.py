"""A torch module written as an ONNX graph: one node per layer, named as the layer is.

Traces the module with `torch.fx` and translates the few layers and functions our networks are made of;
anything else is refused by name. torch's own exporters know no deformable convolution, fold no batch
normalisation into one, and lose the layers' names, by which precision is later chosen.
Knows layers; knows no network and no file.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import onnx
import torch
import torch.nn.functional as F  # noqa: N812 (everybody's name for it)
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.shape_prop import ShapeProp

from tracker.deploy import detector_layers
from tracker.models.deform import TAPS, DeformConv, sampling_grid
from tracker.runtimes.onnx_parts import PARTS

OPSET = 19  # the first with DeformConv
IR_VERSION = 9  # the one that came with it

Array = NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowering:
    """How to write what runtimes disagree about; every choice computes the same.

    deform: "DeformConv" as it is, or "GridSample": one sampling of all nine taps and a 1×1 convolution, for
        runtimes without DeformConv (TensorRT before 10.15, TensorRT-RTX).
    dense_upsampling: write transposed convolutions of single channels as dense ones, with zeros between the
        channels. TensorRT has fast kernels for those only: DLA-34 at 1088×608 in FP16 takes 4.6 ms instead
        of 10.8 on an H200 (TensorRT 8.6). On a CPU it costs up to 15 %.
    """

    deform: Literal["DeformConv", "GridSample"] = "DeformConv"
    dense_upsampling: bool = True


def to_onnx(
    module: nn.Module,
    example: Tensor,
    lowering: Lowering,
    *,
    input_name: str,
    open_batch: bool,
    parts: Mapping[str, Tensor] | None = None,
) -> onnx.ModelProto:
    """The module in its evaluation mode as a checked ONNX model.

    module: takes one tensor and returns a dict of tensors, whose keys name the outputs.
    example: (B, C, H, W) input; the graph takes its shape, except the batch where that shall be open.
    parts: examples of further inputs, by the names of the module's further arguments. Each has a part of the
    network to itself, which shares nothing with the others, and a batch of its own, always open.
    """
    parts = parts or {}
    traced = fx.GraphModule(module, _Tracer().trace(module))
    ShapeProp(traced, FakeTensorMode()).propagate(example, *parts.values())
    batches = {input_name: "batch" if open_batch else len(example)} | {name: f"n_{name}" for name in parts}
    model = Writer(traced, lowering, batches).write()
    if parts:
        onnx.helper.set_model_props(model, {PARTS: ", ".join(batches)})
    return model


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return type(m) in _LAYERS or super().is_leaf_module(m, module_qualified_name)


class Writer:
    """Walks a traced graph and collects nodes and weights."""

    def __init__(self, traced: fx.GraphModule, lowering: Lowering, batches: Mapping[str, int | str]) -> None:
        """batches: inputs by name, in the module's order, and how many they are."""
        self.lowering = lowering
        self._traced = traced
        self._inputs = iter(batches.items())
        self._batch: dict[fx.Node, int | str] = {}  # of traced values
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, onnx.TensorProto] = {}
        self._tensors: dict[fx.Node, str] = {}  # what each traced value is called
        self._names: dict[fx.Node, str] = {}  # of layers

    def write(self) -> onnx.ModelProto:
        inputs, outputs = [], []
        for node in self._traced.graph.nodes:
            if node.op == "placeholder":
                self._tensors[node], self._batch[node] = next(self._inputs)
                inputs.append(self._describe(self._tensors[node], node))
            elif node.op == "output":
                for name, value in cast(dict[str, fx.Node], node.args[0]).items():
                    self._rename(self._tensors[value], name)
                    outputs.append(self._describe(name, value))
            else:
                sizes = [self._batch[each] for each in node.all_input_nodes if each in self._batch]
                if sizes:
                    self._batch[node] = sizes[0]
                if node not in self._tensors:  # else folded into the layer before
                    self._tensors[node] = self._translate(node)
        used = {name for node in self._nodes for name in node.input}
        weights = [weight for name, weight in self._weights.items() if name in used]
        graph = helper.make_graph(self._nodes, "network", inputs, outputs, weights)
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="tracker")
        onnx.checker.check_model(model, full_check=True)
        return model

    def name_of(self, node: fx.Node) -> str:
        """The layer's; numbered where a layer is used again, since what is folded into it may differ."""
        if node not in self._names:
            uses = sum(other.target == node.target for other in self._names)
            self._names[node] = f"{node.target}.{uses}" if uses else str(node.target)
        return self._names[node]

    def tensor(self, value: Any) -> str:
        """What a traced value is called."""
        return self._tensors[value]

    def constant_of(self, node: Any) -> Tensor:
        """What a `Constant` layer answers."""
        value: Tensor = self._traced.get_submodule(str(node.target))()
        return value

    def convolution(
        self,
        name: str,
        source: str,
        weight: Tensor,
        bias: Tensor | None,
        norm: nn.BatchNorm2d | None,
        like: nn.Conv2d,
        weights: str | None = None,
    ) -> str:
        """Append a convolution, with `norm` folded into it and the strides, padding and groups of `like`.

        weights: what its weights are called, for those that others share; None calls them after it.
        """
        return _add_conv(self, name, source, *_folded(weight, bias, norm), like, weights)

    def add(self, kind: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """Append a node of one output, both called `name`."""
        self._nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def split(self, tensor: str, sizes: Sequence[int], names: Sequence[str]) -> None:
        """Append a node that cuts the channels into parts with these sizes and names."""
        parts = self.constant("split." + "_".join(map(str, sizes)), np.array(sizes, np.int64))
        self._nodes.append(
            helper.make_node("Split", [tensor, parts], names, name=f"{names[0]}.split", axis=1)
        )

    def reshape(self, tensor: str, name: str, *shape: int) -> str:
        """Append a node that gives each image of the batch this shape (C, H, W)."""
        target = self.constant("shape." + "x".join(map(str, shape)), np.array([0, *shape], np.int64))
        return self.add("Reshape", [tensor, target], name)

    def constant(self, name: str, values: Array | float) -> str:
        """Weights by name; what has been stored under that name already is taken for the same."""
        if name not in self._weights:
            array = (
                np.asarray(values, np.float32) if isinstance(values, float) else np.ascontiguousarray(values)
            )
            self._weights[name] = numpy_helper.from_array(array, name)
        return name

    def following_normalisation(self, node: fx.Node) -> nn.BatchNorm2d | None:
        """The batch normalisation that alone uses this layer's result; it then counts as translated."""
        users = list(node.users)
        layer = self._traced.get_submodule(str(users[0].target)) if users[0].op == "call_module" else None
        if len(users) != 1 or not isinstance(layer, nn.BatchNorm2d):
            return None
        self._tensors[users[0]] = self.name_of(node)
        return layer

    def _translate(self, node: fx.Node) -> str:
        inputs = [self._tensors[value] for value in node.all_input_nodes]
        if node.op == "call_module":
            layer = self._traced.get_submodule(str(node.target))
            if type(layer) in _LAYERS:
                return _LAYERS[type(layer)](self, node, layer, inputs)
        if node.op == "get_attr":
            module, _, name = str(node.target).rpartition(".")
            return self.constant(str(node.target), _array(getattr(self._traced.get_submodule(module), name)))
        if node.op == "call_function" and node.target in _FUNCTIONS:
            return _FUNCTIONS[node.target](self, node, inputs)
        raise NotImplementedError(f"nothing is known of how to write {node.format_node()}")

    def _rename(self, old: str, new: str) -> None:
        for node in self._nodes:
            node.output[:] = [new if name == old else name for name in node.output]
            node.input[:] = [new if name == old else name for name in node.input]

    def _describe(self, name: str, node: fx.Node) -> onnx.ValueInfoProto:
        shape = (self._batch[node], *node.meta["tensor_meta"].shape[1:])
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _array(values: Tensor) -> Array:
    return values.detach().cpu().numpy()


def _folded(weight: Tensor, bias: Tensor | None, norm: nn.BatchNorm2d | None) -> tuple[Array, Array]:
    """Weight (O, …) and bias (O,) of a convolution and the normalisation behind it as one convolution."""
    if bias is None:
        bias = weight.new_zeros(len(weight))
    if norm is None:
        return _array(weight), _array(bias)
    assert norm.running_mean is not None and norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    weight = weight.double() * scale.view(-1, *[1] * (weight.ndim - 1))
    return _array(weight.float()), _array((bias.double() * scale + shift).float())


def _add_conv(
    writer: Writer,
    name: str,
    source: str,
    weight: Array,
    bias: Array,
    like: nn.Conv2d,
    weights: str | None = None,
) -> str:
    called = weights or name
    tensors = [source, writer.constant(f"{called}.weight", weight), writer.constant(f"{called}.bias", bias)]
    return writer.add(
        "Conv", tensors, name, **_window(like, weight), dilations=like.dilation, group=like.groups
    )


def _window(layer: nn.Conv2d | nn.ConvTranspose2d, weight: Array) -> dict[str, Any]:
    padding = cast(tuple[int, int], layer.padding)  # never one of torch's words for it
    return {"kernel_shape": weight.shape[2:], "strides": layer.stride, "pads": (*padding, *padding)}


def _conv(writer: Writer, node: fx.Node, layer: nn.Conv2d, inputs: list[str]) -> str:
    norm = writer.following_normalisation(node)
    # Where nothing is folded in, a layer that is used again has one set of weights.
    shared = None if norm else str(node.target)
    return writer.convolution(writer.name_of(node), inputs[0], layer.weight, layer.bias, norm, layer, shared)


def _conv_transpose(writer: Writer, node: fx.Node, layer: nn.ConvTranspose2d, inputs: list[str]) -> str:
    name, weight, groups = str(node.target), _array(layer.weight), layer.groups
    assert groups == 1 or weight.shape[:2] == (groups, 1), "all channels together, or each by itself"
    if groups > 1 and writer.lowering.dense_upsampling:
        dense = np.zeros((groups, groups, *weight.shape[2:]), weight.dtype)
        dense[np.arange(groups), np.arange(groups)] = weight[:, 0]
        weight, groups = dense, 1
    tensors = [*inputs, writer.constant(f"{name}.weight", weight)]
    if layer.bias is not None:
        tensors.append(writer.constant(f"{name}.bias", _array(layer.bias)))
    return writer.add("ConvTranspose", tensors, name, **_window(layer, weight), group=groups)


def _deform_conv(writer: Writer, node: fx.Node, layer: DeformConv, inputs: list[str]) -> str:
    name, shifts, (source,) = str(node.target), layer.conv_offset_mask, inputs
    weight, bias = _folded(layer.weight, layer.bias, writer.following_normalisation(node))
    shift_weight, shift_bias = _folded(shifts.weight, shifts.bias, None)
    if writer.lowering.deform == "GridSample":
        size = node.meta["tensor_meta"].shape[2:]
        shift_weight, shift_bias = _in_grid_units(shift_weight, shift_bias, *size)
        columns = _sampled_columns(writer, name, source, shift_weight, shift_bias, shifts, *size)
        plain = nn.Conv2d(1, 1, 1)
        return _add_conv(writer, name, columns, weight.reshape(len(weight), -1, 1, 1), bias, plain)
    predicted = _add_conv(writer, f"{name}.conv_offset_mask", source, shift_weight, shift_bias, shifts)
    offset, logits = f"{name}.offset", f"{name}.mask_logits"
    writer.split(predicted, (2 * TAPS, TAPS), (offset, logits))
    mask = writer.add("Sigmoid", [logits], f"{name}.mask")
    tensors = [source, writer.constant(f"{name}.weight", weight), offset]
    tensors += [writer.constant(f"{name}.bias", bias), mask]
    return writer.add("DeformConv", tensors, name, kernel_shape=(3, 3), pads=(1, 1, 1, 1))


def _in_grid_units(weight: Array, bias: Array, height: int, width: int) -> tuple[Array, Array]:
    """The convolution that predicts shifts and masks, so that it gives x before y, and both in the units of
    the sampling grid: then only the unshifted grid is left to add.
    """
    order = [*range(1, 2 * TAPS, 2), *range(0, 2 * TAPS, 2), *range(2 * TAPS, 3 * TAPS)]
    unit = np.repeat(np.array([2 / width, 2 / height, 1], np.float32), TAPS)
    return weight[order] * unit[:, None, None, None], bias[order] * unit


def _sampled_columns(
    writer: Writer,
    name: str,
    source: str,
    weight: Array,
    bias: Array,
    like: nn.Conv2d,
    height: int,
    width: int,
) -> str:
    """(B, 9·C, H, W): `source` sampled at the shifted taps times their masks, for a 1×1 convolution.

    Four dimensions throughout. The sum of grid and shifts is where half precision would do harm.
    """
    predicted = _add_conv(writer, f"{name}.conv_offset_mask", source, weight, bias, like)
    offset, logits = f"{name}.offset", f"{name}.mask_logits"
    writer.split(predicted, (2 * TAPS, TAPS), (offset, logits))
    offset = writer.reshape(offset, f"{name}.offset_by_axis", 2, TAPS * height, width)
    offset = writer.add("Transpose", [offset], f"{name}.offset_xy", perm=(0, 2, 3, 1))  # (B, 9H, W, 2)
    unshifted = _array(sampling_grid(torch.zeros(1, 2 * TAPS, height, width)))
    grid = writer.constant(f"grid.{height}x{width}", unshifted)
    grid = writer.add("Add", [offset, grid], f"{name}.grid")
    samples = writer.add("GridSample", [source, grid], f"{name}.samples", padding_mode="zeros")
    mask = writer.reshape(writer.add("Sigmoid", [logits], f"{name}.mask"), f"{name}.mask_by_tap",
                          1, TAPS * height, width)  # fmt: skip
    samples = writer.add("Mul", [samples, mask], f"{name}.masked_samples")  # (B, C, 9H, W)
    return writer.reshape(samples, f"{name}.columns", -1, height, width)


def _max_pool(writer: Writer, name: str, inputs: list[str], *, size: Any, stride: Any, padding: Any) -> str:
    window = {"kernel_shape": [size] * 2, "strides": [stride] * 2, "pads": [padding] * 4}
    return writer.add("MaxPool", inputs, name, **window)


def _choice(writer: Writer, node: fx.Node, inputs: list[str]) -> str:
    """torch.where(condition, number, tensor)."""
    number = cast(float, node.args[1])
    constant = writer.constant(f"number.{number}", number)
    return writer.add("Where", [inputs[0], constant, inputs[1]], node.name)


_LAYERS: dict[type[nn.Module], Callable[[Writer, fx.Node, Any, list[str]], str]] = {
    nn.Conv2d: _conv,
    nn.ConvTranspose2d: _conv_transpose,
    DeformConv: _deform_conv,
    nn.Identity: lambda writer, node, layer, inputs: inputs[0],
    nn.MaxPool2d: lambda writer, node, layer, inputs: _max_pool(
        writer, str(node.target), inputs, size=layer.kernel_size, stride=layer.stride, padding=layer.padding
    ),
    nn.ReLU: lambda writer, node, layer, inputs: writer.add("Relu", inputs, node.name),
    **detector_layers.LAYERS,
}
_FUNCTIONS: dict[Any, Callable[[Writer, fx.Node, list[str]], str]] = {
    operator.add: lambda writer, node, inputs: writer.add("Add", inputs, node.name),
    operator.gt: lambda writer, node, inputs: writer.add("Greater", inputs, node.name),
    torch.cat: lambda writer, node, inputs: writer.add("Concat", inputs, node.name, axis=node.kwargs["dim"]),
    torch.sigmoid: lambda writer, node, inputs: writer.add("Sigmoid", inputs, node.name),
    torch.where: _choice,
    F.max_pool2d: lambda writer, node, inputs: _max_pool(
        writer,
        node.name,
        inputs,
        size=node.args[1],
        stride=node.kwargs["stride"],
        padding=node.kwargs["padding"],
    ),
    **detector_layers.FUNCTIONS,
}
