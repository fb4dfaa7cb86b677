"""Which parts of an ONNX graph must stay in FP32 when the rest becomes half precision.

    coordinates     whatever computes a sampling grid, and GridSample and DeformConv with it: TensorRT wants
                    all inputs of either in one type, and its plugin for DeformConv holds positions in that
                    type (`modulatedDeformConvPluginKernel.cu`): FP16 has steps of 1/8 pixel beyond 128
    ranges          exponentials, powers, roots, norms, softmax, sums over many values
    the tail        arithmetic behind the last layer with weights, and what feeds it there: box decoding
    comparisons     also the layer whose answers are compared: two neighbours on a heat map that are rounded
                    to one number are both peaks, two objects of one (seen on PETS09)
    exact numbers   what is computed from shapes, and constants that half precision cannot hold

What only moves data goes to whichever side saves a cast. Knows ONNX; knows no network and no runtime, but
for what TensorRT cannot do. Cut a graph into parts after casting it, not before: every part has a tail.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper, version_converter

from tracker.errors import ConfigError, EngineError
from tracker.manifest import Precision

Half = Literal["fp16", "bf16"]
Array = NDArray[Any]
M = TypeVar("M", onnx.ModelProto, onnx.NodeProto, onnx.TensorProto, onnx.ValueInfoProto)

BF16_OPSET = 22  # the first whose convolutions take bfloat16
FLOAT = TensorProto.FLOAT
Ports = tuple[frozenset[int], frozenset[int]]
HALVES: dict[Half, tuple[int, torch.dtype, str]] = {
    "fp16": (TensorProto.FLOAT16, torch.float16, "tensor(float16)"),
    "bf16": (TensorProto.BFLOAT16, torch.bfloat16, "tensor(bfloat16)"),
}


def _kinds(text: str) -> frozenset[str]:
    return frozenset(text.split())


HEAVY = _kinds("Conv ConvTranspose Gemm MatMul Einsum DeformConv GridSample")
MOVEMENT = _kinds(
    """Reshape Transpose Slice Concat Split Squeeze Unsqueeze Flatten Identity Expand Tile Gather
    GatherElements GatherND DepthToSpace SpaceToDepth"""
)
_EITHER = MOVEMENT | _kinds("QuantizeLinear DequantizeLinear")  # as precise as what is around it
_COMPARISONS = _kinds("Greater GreaterOrEqual Less LessOrEqual Equal")
_ARITHMETIC = _kinds("Add Sub Mul Div Neg Abs Min Max Mod Floor Ceil Round Clip Sum Mean") | _COMPARISONS
WIDE = _kinds(
    """GridSample DeformConv RoiAlign NonMaxSuppression TopK ArgMax ArgMin
    Exp Log Pow Sqrt Reciprocal Sin Cos Tan Atan Softmax LogSoftmax CumSum
    ReduceMean ReduceSum ReduceProd ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceSumSquare
    LpNormalization LayerNormalization InstanceNormalization GroupNormalization RMSNormalization
    MeanVarianceNormalization
    Cast CastLike ConstantOfShape Range EyeLike RandomNormal RandomUniform"""
)  # the last line: their type is not that of an input
_SEEDS = _ARITHMETIC | (WIDE - HEAVY)
GRIDS = {"GridSample": 1, "DeformConv": 2, "RoiAlign": 1}  # which input holds coordinates


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfConfig:
    """kind: FP16 is finer, bfloat16 has FP32's range. keep: regular expressions of names of nodes that stay
    in FP32, beyond those that always do. compared: outputs whose values are compared with each other later,
    heat maps say: the layers that give them stay in FP32. half_io: inputs and outputs in half precision too.
    """

    kind: Half = "fp16"
    keep: tuple[str, ...] = ()
    compared: tuple[str, ...] = ()
    half_io: bool = False

    def __post_init__(self) -> None:
        if self.kind not in HALVES:
            raise ConfigError(f"half precision is {self.kind!r}; it must be {' or '.join(HALVES)}")
        for pattern in self.keep:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError(f"{pattern!r} is no regular expression of node names: {error}") from error


def precision_of(model: onnx.ModelProto) -> Precision:
    """What a graph computes in, by its own types: int8 where it quantises, else its weights' type."""
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node):
        return "int8"
    types = {tensor.data_type for tensor in model.graph.initializer}
    types |= {node.attribute[0].t.data_type for node in model.graph.node if _is_constant(node)}
    return "fp16" if TensorProto.FLOAT16 in types else "bf16" if TensorProto.BFLOAT16 in types else "fp32"


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """Element type by tensor, as in TensorProto. Raises EngineError where one cannot be known."""
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except onnx.shape_inference.InferenceError as error:
        raise EngineError(f"the graph contradicts itself: {' '.join(str(error).split())}") from error
    values = (*graph.input, *graph.value_info, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        for name in node.output:
            if name and not types.get(name):
                raise EngineError(
                    f"nothing tells the type of {name}, from {node.op_type} {node.name}: cast the graph "
                    "before adding operators of your own, or build in fp32"
                )
    return types


class Islands:
    """One graph, judged.

    model: a copy whose nodes all have names and whose constants are all weights. constants: those, by name.
    types: see `element_types`. wide: names of the nodes that stay in FP32.
    Raises ConfigError for a pattern that fits no node and a graph that is in half precision already,
    EngineError for a graph that cannot be judged.
    """

    def __init__(self, model: onnx.ModelProto, config: HalfConfig) -> None:
        self.config = config
        self.model = _prepared(model, config.kind)
        graph = self.model.graph
        self.constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        self.types = element_types(self.model)
        self._producers = {name: node for node in graph.node for name in node.output}
        self._consumers: dict[str, list[onnx.NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self._consumers.setdefault(name, []).append(node)
        self._ops = {node.name: node.op_type for node in graph.node}
        self._outputs = {value.name for value in graph.output}
        self._ports = {node.name: self._half_ports(node) for node in graph.node}
        self.wide = self._forced(config.keep) | self._coordinates() | self._tail_arithmetic()
        self.wide |= self._compared(config.compared)
        self.wide |= self._between()

    def halves(self, node: onnx.NodeProto) -> Ports:
        """Indices of the inputs and outputs of a node that become half precision."""
        return (frozenset(), frozenset()) if node.name in self.wide else self._ports[node.name]

    def is_float(self, tensor: str) -> bool:
        return self.types.get(tensor) == FLOAT

    def _half_ports(self, node: onnx.NodeProto) -> Ports:
        """Indices of the float inputs and outputs which ONNX lets this node have in half precision."""
        version = next((each.version for each in self.model.opset_import if each.domain == node.domain), 1)
        try:
            schema = onnx.defs.get_schema(node.op_type, version, node.domain)
        except onnx.defs.SchemaError:
            return frozenset(), frozenset()
        _, _, type_name = HALVES[self.config.kind]
        able = {c.type_param_str for c in schema.type_constraints if type_name in c.allowed_type_strs}

        def of(names: Iterable[str], formal: Any) -> frozenset[int]:
            each = enumerate(names)
            return frozenset(
                i for i, n in each if self.is_float(n) and formal[min(i, len(formal) - 1)].type_str in able
            )

        return of(node.input, schema.inputs), of(node.output, schema.outputs)

    def _forced(self, patterns: tuple[str, ...]) -> set[str]:
        """Nodes that are wide by themselves."""
        nodes = self.model.graph.node
        wide = {node.name for node in nodes if node.op_type in WIDE or not any(self._ports[node.name])}
        wide |= {node.name for node in nodes if not self._constants_survive(node)}
        if self.config.kind == "bf16":  # TensorRT-RTX 1.7: "Could not infer output types"
            wide |= {node.name for node in nodes if node.op_type == "ConvTranspose"}
        for pattern in patterns:
            kept = {node.name for node in nodes if re.fullmatch(pattern, node.name)}
            if not kept:
                raise ConfigError(f"no node is called {pattern!r}: nodes are called {_some(nodes)}")
            wide |= kept
        images = {value.name for value in self.model.graph.input}
        for node in nodes:  # in topological order, as ONNX demands
            if node.op_type not in ("Shape", "Size") and not images.isdisjoint(node.input):
                images.update(node.output)
        alone = (node for node in nodes if images.isdisjoint(node.output) and node.op_type not in _EITHER)
        return wide | {node.name for node in alone}

    def _constants_survive(self, node: onnx.NodeProto) -> bool:
        """Whether half precision holds each of its constants as exactly as it holds numbers near 1."""
        held = torch.finfo(HALVES[self.config.kind][1])
        for index in self._ports[node.name][0]:
            if node.input[index] in self.constants:
                values = within_bounds(node, self.constants[node.input[index]], held.max)
                sizes = np.abs(values)
                largest = np.max(sizes, where=np.isfinite(sizes), initial=0)
                fits = largest == 0 or held.tiny <= largest <= held.max
                if not (fits or _held_exactly(values, HALVES[self.config.kind][1])):
                    return False
        return True

    def _coordinates(self) -> set[str]:
        grids = [node.input[GRIDS[node.op_type]] for node in self.model.graph.node if node.op_type in GRIDS]
        return self._feeders(grids)

    def _tail_arithmetic(self) -> set[str]:
        """Arithmetic that no layer with weights follows, and what computes for it there."""
        tail, seeds = set(), []
        for node in reversed(self.model.graph.node):
            users = [user for name in node.output for user in self._consumers.get(name, ())]
            if all(user.name in tail and user.op_type not in HEAVY for user in users):
                tail.add(node.name)
                if node.op_type in _SEEDS and self._ports[node.name][0]:
                    seeds.append(node)
        wide = self._feeders(name for node in seeds for name in node.input) & tail
        return wide | {node.name for node in seeds}

    def _compared(self, outputs: Iterable[str]) -> set[str]:
        """The layers with weights whose answers are compared with each other, in the graph or after it."""
        nodes = [node for node in self.model.graph.node if node.op_type in _COMPARISONS]
        tensors = [name for node in nodes for name in node.input if self.is_float(name)]
        return self._feeders([*tensors, *outputs], heavy=True)

    def _feeders(self, names: Iterable[str], *, heavy: bool = False) -> set[str]:
        """Nodes that compute on the way from the nearest layers with weights to these tensors.

        heavy: with those layers.
        """
        rest, seen = list(names), set()
        while rest:
            node = self._producers.get(rest.pop())
            if node is None or node.name in seen or (node.op_type in HEAVY and not heavy):
                continue
            seen.add(node.name)
            if node.op_type not in HEAVY:
                rest += [name for name in node.input if self.is_float(name)]
        return {name for name in seen if self._ops[name] not in _EITHER}

    def _between(self) -> set[str]:
        """Nodes that may as well be wide, because they are between wide ones.

        Q of an image or of what must be wide is wide; DQ is as precise as what takes it: a cast between it
        and a layer hides from TensorRT that the layer takes integers.
        """
        wide = set(self.wide)
        for node in self.model.graph.node:
            sources = [n for n in node.input if self.is_float(n) and n not in self.constants]
            if node.op_type not in HEAVY and sources:
                fed = [self._is_wide(name, wide) for name in sources]
                if any(fed) if node.op_type in _EITHER else all(fed):
                    wide.add(node.name)
        for node in reversed(self.model.graph.node):
            used_wide = all(
                (name not in self._outputs or not self.config.half_io)
                and all(user.name in wide for user in self._consumers.get(name, ()))
                for name in node.output
            )
            if node.op_type == "DequantizeLinear" and used_wide:
                wide.add(node.name)
            elif node.name not in self.wide and not used_wide and not self._quantises_wide(node):
                wide.discard(node.name)
        return wide

    def _quantises_wide(self, node: onnx.NodeProto) -> bool:
        """Whether it quantises what is wide in any case. DeformConv's answer is what its kernel makes it."""
        if node.op_type != "QuantizeLinear":
            return False
        producer = self._producers.get(node.input[0])
        if producer is None:
            return not self.config.half_io
        return producer.name in self.wide and producer.op_type not in HEAVY

    def _is_wide(self, tensor: str, wide: set[str]) -> bool:
        producer = self._producers.get(tensor)
        return producer.name in wide if producer else not self.config.half_io


def _prepared(model: onnx.ModelProto, kind: Half) -> onnx.ModelProto:
    """A copy whose nodes have names and whose constants are all weights."""
    if precision_of(model) in HALVES:
        raise ConfigError(f"the graph is in {precision_of(model)} already: start from the one in fp32")
    model = copy_of(model)
    opset = next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx"))
    if kind == "bf16" and opset < BF16_OPSET:
        model = version_converter.convert_version(model, BF16_OPSET)
    kept = []
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
        if any(attribute.HasField("g") for attribute in node.attribute):
            raise EngineError(
                f"{node.name} is a {node.op_type} with graphs of its own, which cannot be judged: export "
                "without control flow, or build in fp32"
            )
        if _is_constant(node) and node.attribute[0].HasField("t"):
            weight = model.graph.initializer.add()
            weight.CopyFrom(node.attribute[0].t)
            weight.name = node.output[0]
        else:
            kept.append(copy_of(node))
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model


def within_bounds(node: onnx.NodeProto, values: Array, limit: float) -> Array:
    """The constant; bounds that half precision does not reach become its own."""
    return np.clip(values, -limit, limit) if node.op_type == "Clip" else values


def _held_exactly(values: Array, kind: torch.dtype) -> bool:
    exact = torch.tensor(values)
    return torch.equal(exact, exact.to(kind).to(exact.dtype))


def copy_of(message: M) -> M:
    copied = type(message)()
    copied.CopyFrom(message)
    return copied


def _is_constant(node: onnx.NodeProto) -> bool:
    return bool(node.op_type == "Constant" and node.attribute)


def _some(nodes: Iterable[onnx.NodeProto]) -> str:
    """A few of the nodes with weights, to see how they are named."""
    named = [node.name for node in nodes if node.op_type in HEAVY]
    return f"{', '.join(named[:3])}, …, {named[-1]}" if len(named) > 3 else ", ".join(named)
