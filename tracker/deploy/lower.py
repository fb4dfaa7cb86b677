"""DeformConv nodes of an ONNX graph written as GridSample, for runtimes that have only that.

The same answers, coordinates in FP32 when the graph is cast later (see `islands`); several times slower than
a fused kernel. `graph.Lowering` writes the same at export, with a little less to compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from tracker.deploy.islands import Array, copy_of
from tracker.errors import EngineError
from tracker.models.deform import TAPS, sampling_grid

ATTRIBUTES: dict[str, tuple[Any, Any]] = {  # what our networks have and we compute, and ONNX's default
    "kernel_shape": ([3, 3], [3, 3]),
    "strides": ([1, 1], [1, 1]),
    "pads": ([1, 1, 1, 1], [0, 0, 0, 0]),
    "dilations": ([1, 1], [1, 1]),
    "group": (1, 1),
    "offset_group": (1, 1),
}


def unlike_ours(node: onnx.NodeProto) -> str | None:
    """What a DeformConv node has that a 3×3 one with stride 1, one group and a mask has not, in words."""
    given = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    for key, (ours, default) in ATTRIBUTES.items():
        value = given.get(key, default)
        if value != ours:
            return f"has {key} {value}; {ours} can be had"
    return None if len(node.input) > 4 and node.input[4] else "has no mask"


def lowered(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph without DeformConv; node and weight names of all else stay. The given one is left alone.

    Raises EngineError for a deformable convolution of another kind or of unknown size.
    """
    return _Lowering(copy_of(model)).write()


class _Lowering:
    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        inferred = onnx.shape_inference.infer_shapes(model).graph
        values = (*inferred.input, *inferred.value_info, *inferred.output)
        self._values = {value.name: value for value in values}
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._nodes: list[onnx.NodeProto] = []

    def write(self) -> onnx.ModelProto:
        graph = self._model.graph
        for node in graph.node:
            if node.op_type == "DeformConv":
                self._lower(node)
            else:
                self._nodes.append(copy_of(node))
        used = {name for node in self._nodes for name in node.input}
        weights = [copy_of(tensor) for name, tensor in self._weights.items() if name in used]
        del graph.node[:], graph.initializer[:]
        graph.node.extend(self._nodes)
        graph.initializer.extend(weights)
        return self._model

    def _lower(self, node: onnx.NodeProto) -> None:
        name = node.name or node.output[0]
        why = unlike_ours(node)
        if why is not None:
            raise EngineError(f"the deformable convolution {name} {why} as GridSample")
        x, weight_name, offset, bias, mask = node.input
        height, width = self._size(name, offset)
        weight = numpy_helper.to_array(self._weights[weight_name])
        order = np.array([*range(1, 2 * TAPS, 2), *range(0, 2 * TAPS, 2)])  # x before y, as grids have it
        unit = np.array([2 / width, 2 / height], weight.dtype)
        unshifted = sampling_grid(torch.zeros(1, 2 * TAPS, height, width)).numpy().astype(weight.dtype)
        grid = self._constant("deform.x_before_y", order)
        grid = self._add("Gather", [offset, grid], f"{name}.offset_xy", axis=1)
        grid = self._reshape(grid, f"{name}.offset_by_axis", 2, TAPS * height, width)
        grid = self._add("Transpose", [grid], f"{name}.shift", perm=(0, 2, 3, 1))  # (B, 9H, W, 2)
        pixel = self._constant(f"pixel.{height}x{width}", unit)
        base = self._constant(f"grid.{height}x{width}", unshifted)
        grid = self._add("Mul", [grid, pixel], f"{name}.scaled_shift")
        grid = self._add("Add", [grid, base], f"{name}.grid")
        samples = self._add("GridSample", [x, grid], f"{name}.samples", padding_mode="zeros")
        by_tap = self._reshape(mask, f"{name}.mask_by_tap", 1, TAPS * height, width)
        samples = self._add("Mul", [samples, by_tap], f"{name}.masked_samples")  # (B, C, 9H, W)
        columns = self._reshape(samples, f"{name}.columns", weight[0].size, height, width)
        flat = self._constant(f"{weight_name}.by_column", weight.reshape(len(weight), -1, 1, 1))
        self._nodes.append(
            helper.make_node("Conv", [columns, flat, *([bias] if bias else [])], node.output, name=name)
        )

    def _size(self, name: str, offset: str) -> tuple[int, int]:
        dimensions = self._values[offset].type.tensor_type.shape.dim if offset in self._values else ()
        sizes = [each.dim_value for each in dimensions][2:]
        if len(sizes) != 2 or min(sizes) < 1:
            raise EngineError(
                f"the size of {offset}, offsets of {name}, is open: fix the image size and export again"
            )
        return sizes[0], sizes[1]

    def _add(self, kind: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        self._nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def _constant(self, name: str, values: Array) -> str:
        self._weights.setdefault(name, numpy_helper.from_array(values, name))
        return name

    def _reshape(self, tensor: str, name: str, *shape: int) -> str:
        """Each image of the batch gets this shape."""
        target = self._constant("shape." + "x".join(map(str, shape)), np.array([0, *shape], np.int64))
        return self._add("Reshape", [tensor, target], name)
