"""ONNX files made for tests: small, exact, and wrong in one chosen way each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def save(
    path: Path,
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, Sequence[int | str]],
    outputs: dict[str, Sequence[int | str]],
    *,
    weights: Sequence[onnx.TensorProto] = (),
    kind: int = TensorProto.FLOAT,
    opset: int = 17,
) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in outputs.items()],
        list(weights),
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("nowhere", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def detector(
    path: Path,
    rows: np.ndarray,
    *,
    size: tuple[int, int] = (64, 64),
    batch: int | str = 1,
    half: bool = False,
) -> Path:
    """images (batch, 3, H, W) → output (batch, A, 5 + C): the same rows (A, 5 + C) for every image."""
    dtype, kind = (np.float16, TensorProto.FLOAT16) if half else (np.float32, TensorProto.FLOAT)
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], axes=[1, 2, 3], keepdims=1),  # (batch, 1, 1, 1)
        helper.make_node("Reshape", ["mean", "shape"], ["each"]),  # (batch, 1, 1)
        helper.make_node("Mul", ["each", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "rows"], ["output"]),
    ]
    weights = [
        numpy_helper.from_array(np.array([-1, 1, 1], np.int64), "shape"),
        numpy_helper.from_array(np.zeros(1, dtype), "zero"),
        numpy_helper.from_array(rows[None].astype(dtype), "rows"),
    ]
    inputs = {"images": (batch, 3, size[1], size[0])}
    return save(path, nodes, inputs, {"output": (batch, *rows.shape)}, weights=weights, kind=kind)
