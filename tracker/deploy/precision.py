"""An ONNX graph cast to half precision around its FP32 islands, and what that changes in its answers.

One file for every TensorRT: those that take precision from the graph (10 and later, TensorRT-RTX) and those
that are given flags and pinned layers (8.6). What must stay in FP32, `islands` says. Knows no network and no
TensorRT.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import helper, numpy_helper

from tracker.deploy.islands import (
    FLOAT,
    HALVES,
    MOVEMENT,
    Array,
    HalfConfig,
    Islands,
    copy_of,
    within_bounds,
)
from tracker.errors import EngineError


def to_half(model: onnx.ModelProto, config: HalfConfig | None = None) -> onnx.ModelProto:
    """The FP32 graph with casts, checked; node, weight, input and output names stay.

    Raises as `Islands` does.
    """
    half = _Writer(Islands(model, config or HalfConfig())).cast()
    if all(opset.domain in ("", "ai.onnx") for opset in half.opset_import):
        onnx.checker.check_model(half, full_check=True)
    return half


def rounded(model: onnx.ModelProto, config: HalfConfig | None = None) -> onnx.ModelProto:
    """A graph of FP32 tensors that answers as `to_half`'s does: every value is rounded as that stores it.

    For machines that compute in FP32 only. ONNX Runtime would run the half graph on a CPU too, but leaves
    out the casts between its nodes, and so most of the error. Sums run in FP32, as on tensor cores.
    """
    return _Writer(Islands(model, config or HalfConfig())).rounded()


def relative_errors(
    model: onnx.ModelProto, config: HalfConfig, inputs: Mapping[str, Array]
) -> dict[str, float]:
    """By output, |half − FP32| / |FP32| (Euclidean norms over all its elements), on the CPU.

    Where an output is one tensor or another by a test, peaks of a heat map say, what is tested is compared:
    of two neighbours nearly as high either may be the peak. Raises EngineError where ONNX Runtime does not
    run the graph.
    """
    names, model = _untested(model)
    expected, answers = _run(model, inputs), _run(rounded(model, config), inputs)
    errors = {}
    for output, name in names.items():
        truth, answer = expected[name], answers[name]
        if truth.dtype == np.float32:
            errors[output] = float(np.linalg.norm(answer - truth)) / (float(np.linalg.norm(truth)) or 1.0)
    return errors


def dense_upsampling(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with transposed convolutions of single channels as dense ones, zeros between the channels.

    The same answers; see `graph.Lowering.dense_upsampling` for what TensorRT gains.
    """
    dense = copy_of(model)
    weights = {tensor.name: tensor for tensor in dense.graph.initializer}
    for node in dense.graph.node:
        weight = weights.get(node.input[1]) if node.op_type == "ConvTranspose" else None
        group = next((attribute for attribute in node.attribute if attribute.name == "group"), None)
        if weight is None or group is None or group.i < 2 or tuple(weight.dims[:2]) != (group.i, 1):
            continue
        single = numpy_helper.to_array(weight)  # (C, 1, kh, kw)
        each = np.arange(len(single))
        full = np.zeros((len(single), len(single), *single.shape[2:]), single.dtype)
        full[each, each] = single[:, 0]
        node.input[1] = f"{weight.name}.dense"
        dense.graph.initializer.append(numpy_helper.from_array(full, node.input[1]))
        group.i = 1
    _drop_unused(dense.graph)
    return dense


class _Writer:
    """Writes one judged graph, once."""

    def __init__(self, islands: Islands) -> None:
        self._islands = islands
        self._kind, self._half_io = islands.config.kind, islands.config.half_io
        self._element, self._dtype, _ = HALVES[self._kind]
        self._model = islands.model

    def cast(self) -> onnx.ModelProto:
        graph, nodes = self._model.graph, []
        outputs = {value.name for value in graph.output}
        names: dict[tuple[str, bool], str] = {}  # what a tensor is called in FP32 and in half precision
        for value in graph.input:
            if self._islands.is_float(value.name):
                names[value.name, self._half_io] = value.name
                if self._half_io:
                    value.type.tensor_type.elem_type = self._element
        for node in graph.node:
            ins, outs = self._islands.halves(node)
            for index, name in enumerate(node.input):
                half = index in ins
                if not self._islands.is_float(name) or name in self._islands.constants:
                    continue
                if (name, half) not in names:
                    names[name, half] = f"{name}.{self._kind if half else 'fp32'}"
                    nodes.append(self._cast(names[name, not half], names[name, half], half))
                node.input[index] = names[name, half]
            nodes.append(node)
            for index, name in enumerate(node.output):
                half = index in outs
                names[name, half] = name
                if self._islands.is_float(name) and name in outputs and half != self._half_io:
                    names[name, half] = node.output[index] = f"{name}.{self._kind if half else 'fp32'}"
                    names[name, not half] = name
                    nodes.append(self._cast(node.output[index], name, not half))
        for value in graph.output:
            if self._half_io and self._islands.is_float(value.name):
                value.type.tensor_type.elem_type = self._element
        self._write_constants(rounded=False)
        return self._finished(nodes)

    def rounded(self) -> onnx.ModelProto:
        graph, nodes = self._model.graph, []
        wide = {value.name for value in graph.input}
        wide |= {
            name
            for node in graph.node
            for index, name in enumerate(node.output)
            if index not in self._islands.halves(node)[1]
        }
        inputs = {name for name in wide if self._islands.is_float(name)}  # cast where half precision begins
        seen: set[str] = set()
        for node in graph.node:
            ins, outs = self._islands.halves(node)
            for index, name in enumerate(node.input):
                if index in ins and name in inputs:
                    if name not in seen:
                        seen.add(name)
                        nodes += self._rounding(name, f"{name}.rounded")
                    node.input[index] = f"{name}.rounded"
            nodes.append(node)
            if node.op_type not in MOVEMENT:
                for index in outs:
                    name = node.output[index]
                    node.output[index] = f"{name}.exact"
                    nodes += self._rounding(f"{name}.exact", name)
        self._write_constants(rounded=True)
        return self._finished(nodes)

    def _cast(self, source: str, target: str, half: bool) -> onnx.NodeProto:
        return helper.make_node(
            "Cast", [source], [target], f"cast.{target}", to=self._element if half else FLOAT
        )

    def _rounding(self, source: str, target: str) -> list[onnx.NodeProto]:
        return [self._cast(source, f"{target}.half", True), self._cast(f"{target}.half", target, False)]

    def _write_constants(self, *, rounded: bool) -> None:
        """Weights in the type their nodes want, twice where nodes differ."""
        graph = self._model.graph
        users: dict[str, dict[bool, list[tuple[onnx.NodeProto, int]]]] = {}
        for node in graph.node:
            ins, _ = self._islands.halves(node)
            for index, name in enumerate(node.input):
                if name in self._islands.constants and self._islands.is_float(name):
                    users.setdefault(name, {}).setdefault(index in ins, []).append((node, index))
        kept = [
            tensor for tensor in graph.initializer if tensor.name not in users or False in users[tensor.name]
        ]
        for name, kinds in users.items():
            for node, _ in kinds.get(True, ())[:1]:
                stored = name if False not in kinds else f"{name}.{self._kind}"
                values = within_bounds(node, self._islands.constants[name], torch.finfo(self._dtype).max)
                kept.append(self._half_tensor(stored, values, rounded))
                for user, place in kinds[True]:
                    user.input[place] = stored
        del graph.initializer[:]
        graph.initializer.extend(kept)

    def _half_tensor(self, name: str, values: Array, rounded: bool) -> onnx.TensorProto:
        half = torch.tensor(values).to(self._dtype)
        if rounded:
            return numpy_helper.from_array(half.float().numpy(), name)
        raw = half.view(torch.int16).numpy().tobytes()
        return helper.make_tensor(name, self._element, values.shape, raw, raw=True)

    def _finished(self, nodes: list[onnx.NodeProto]) -> onnx.ModelProto:
        graph = self._model.graph
        nodes = [copy_of(node) for node in nodes]
        del graph.node[:], graph.value_info[:]
        graph.node.extend(nodes)
        return self._model


def _untested(model: onnx.ModelProto) -> tuple[dict[str, str], onnx.ModelProto]:
    """By output, the tensor to compare in its place; and the graph with those among its outputs."""
    shown = copy_of(model)
    constant = {tensor.name for tensor in model.graph.initializer}
    choices = {node.output[0]: node.input[1:] for node in model.graph.node if node.op_type == "Where"}
    names = {}
    for value in model.graph.output:
        chosen = [name for name in choices.get(value.name, ()) if name not in constant]
        names[value.name] = chosen[0] if len(chosen) == 1 else value.name
        if names[value.name] != value.name:
            tested = copy_of(value)
            tested.name = chosen[0]
            shown.graph.output.append(tested)
    return names, shown


def _run(model: onnx.ModelProto, inputs: Mapping[str, Array]) -> dict[str, Array]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised, not printed
    try:
        content = model.SerializeToString()
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(inputs)), strict=True))
    except Exception as error:  # classes of ONNX Runtime's own, derived from nothing narrower
        reason = " ".join(str(error).split())
        raise EngineError(f"ONNX Runtime {onnxruntime.__version__} cannot run the graph: {reason}") from error


def _drop_unused(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    if len(kept) < len(graph.initializer):
        copies = [copy_of(tensor) for tensor in kept]
        del graph.initializer[:]
        graph.initializer.extend(copies)
