"""An ONNX graph cut at its deformable convolutions, for a TensorRT whose parser has none.

The parts between become plans, the convolutions weights for `kernels.deform`, and both together one file,
which `runtimes.segments` runs. All nodes with equally many deformable convolutions above them, on the
longest way, form one part: FairMOT's sixteen come to lie in eight stages between nine parts. What crosses a
seam in half precision lies channels last (HWC8), as both sides compute.

Offsets cross in the precision of the graph. FP16 rounds them by at most 2⁻¹¹ of themselves: 0.001 pixel at 2
pixels, 0.008 at 16. Coordinates, pixel plus offset, are computed in FP32 from that. What a block's answer
changes by is proportional to its offsets: 0.05 % for 1 pixel (root mean square) over white noise, the worst
there is, and below 0.1 % for 2 pixels over features of a network (tests hold both); with a network's own
offsets 0.002 to 0.01 %, a third of what rounding the features to FP16 changes. `HalfConfig.keep` of
`.*conv_offset_mask` would carry them in FP32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from tracker.deploy.islands import Array, copy_of, precision_of
from tracker.deploy.lower import unlike_ours
from tracker.deploy.plan import BuildConfig, Layouts, Plan, Progress, compile_plan, parses
from tracker.deploy.precision import dense_upsampling
from tracker.deploy.quantise import unquantised
from tracker.errors import ConfigError, EngineError
from tracker.kernels.deform import TAPS, pack_weight
from tracker.runtimes.segments import Deform, Segments, pack

DeformChoice = Literal["plugin", "fused", "segments", "lower"]

_FLOATS: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
}
_CHANNELS = 16  # the kernel takes multiples of it


@dataclass(frozen=True, slots=True)
class Cut:
    """parts: graphs, one run after another, stages[k] after parts[k]; None where nothing is to be computed
    before a stage. stages: deformable convolutions that do not depend on each other. layouts: of the inputs
    and outputs of all parts that are not row-major, by name, as in `trt.TensorFormat`.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    parts: tuple[onnx.ModelProto | None, ...]
    stages: tuple[tuple[Deform, ...], ...]
    layouts: Layouts


def has_deform(model: onnx.ModelProto) -> bool:
    return any(node.op_type == "DeformConv" for node in model.graph.node)


def choose(model: onnx.ModelProto, config: BuildConfig, asked: DeformChoice | None) -> DeformChoice | None:
    """How the graph's deformable convolutions will run, None where it has none.

    "plugin": TensorRT's own, from 10.15; the choice where it is there, else "segments". "fused": see module
    `plugin`. "lower": see `lower`. Raises ConfigError for a choice that means nothing here.
    """
    if not has_deform(model):
        if asked is not None:
            raise ConfigError(f"--deform {asked}: the graph has no DeformConv: leave the option out")
        return None
    return asked or ("plugin" if parses(_SMALLEST, config) else "segments")


def compile_segments(model: onnx.ModelProto, config: BuildConfig, progress: Progress | None = None) -> Plan:
    """As `compile_plan`, for a graph with DeformConv nodes; the content is an engine in segments.

    Precision comes from the graph's types: cast it first, as a whole. A part that TensorRT refuses in INT8 is
    built in half precision, and noted. Raises as `cut` and `compile_plan`.
    """
    whole = cut(model)
    begun = perf_counter()
    count = sum(part is not None for part in whole.parts)
    plans: list[Plan | None] = []
    notes: list[str] = []
    for part in whole.parts:
        done = sum(plan is not None for plan in plans)

        def told(what: str, share: float | None, done: int = done) -> None:
            if progress is not None:
                progress(f"part {done + 1} of {count}: {what}", (done + (share or 0.0)) / count)

        plan = part and _compiled(part, config, told, whole.layouts)
        if plan is not None and plan.notes:
            notes += [f"part {done + 1} of {count}: {note}" for note in plan.notes]
        plans.append(plan)
    first = next(plan for plan in plans if plan is not None)
    segments = Segments(
        library=config.builder,
        inputs=whole.inputs,
        outputs=whole.outputs,
        plans=[b"" if plan is None else plan.content for plan in plans],
        stages=whole.stages,
    )
    return dataclasses.replace(
        first, content=pack(segments), seconds=perf_counter() - begun, notes=tuple(notes)
    )


def _compiled(part: onnx.ModelProto, config: BuildConfig, progress: Progress, layouts: Layouts) -> Plan:
    """One part's plan; in half precision, with a note, where TensorRT has no INT8 kernels for it.

    TensorRT 8.6 has none that quantise what lies as HWC8 at a seam.
    """
    try:
        return compile_plan(part, config, progress, layouts=layouts)
    except EngineError as error:
        if precision_of(part) != "int8":
            raise
        plain = dense_upsampling(unquantised(part))
        plan = compile_plan(plain, config, progress, layouts=layouts)
        return dataclasses.replace(plan, notes=(f"not in INT8 but in {precision_of(plain)} ({error})",))


def cut(model: onnx.ModelProto) -> Cut:
    """The graph in parts, deformable convolutions between them; the model is left alone.

    A batch normalisation and a ReLU that alone follow a deformable convolution become part of it, and so do
    the sigmoid of its masks and casts to FP32 around it, which the kernel does by itself.
    Raises EngineError for a deformable convolution that the kernel does not compute, and for a graph that
    cannot be cut.
    """
    return _Cutter(model).cut()


class _Cutter:
    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = copy_of(model)
        try:
            inferred = onnx.shape_inference.infer_shapes(self._model).graph
        except onnx.shape_inference.InferenceError as error:
            raise EngineError(f"the graph contradicts itself: {' '.join(str(error).split())}") from error
        graph = self._model.graph
        self._values = {
            value.name: value for value in (*inferred.input, *inferred.value_info, *inferred.output)
        }
        self._weights = {tensor.name: tensor for tensor in graph.initializer}
        nodes = []
        for node in graph.node:
            if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
                tensor = copy_of(node.attribute[0].t)
                tensor.name = node.output[0]
                self._weights[tensor.name] = tensor
            else:
                nodes.append(node)
        self._producers = {name: node for node in nodes for name in node.output}
        self._users: dict[str, list[onnx.NodeProto]] = {}
        for node in nodes:
            for name in node.input:
                self._users.setdefault(name, []).append(node)
        self._inputs = [value.name for value in graph.input if value.name not in self._weights]
        self._outputs = [value.name for value in graph.output]
        self._nodes = nodes
        self._absorbed: set[int] = set()  # ids of nodes that became part of a convolution

    def cut(self) -> Cut:
        order: list[onnx.NodeProto | Deform] = []
        for node in self._nodes:  # in topological order, as ONNX demands
            if node.op_type == "DeformConv":
                order += self._deform(node)
            elif id(node) not in self._absorbed:
                order.append(node)
        order = self._needed(order)
        depth: dict[str, int] = {}  # deformable convolutions above a tensor
        parts: list[list[onnx.NodeProto]] = [[]]
        stages: list[list[Deform]] = []
        for step in order:
            above = max((depth.get(name, 0) for name in _taken(step)), default=0)
            parts += [[] for _ in range(above + 1 - len(parts))]
            if isinstance(step, Deform):
                stages += [[] for _ in range(above + 1 - len(stages))]
                stages[above].append(step)
                depth[step.out] = above + 1
            else:
                parts[above].append(step)
                depth.update(dict.fromkeys(step.output, above))
        outside = {name for stage in stages for deform in stage for name in (deform.x, *deform.shifts)}
        outside |= set(self._outputs)
        parts = _quantised_beside_users(parts, outside)
        models = [self._part(index, parts, outside) for index in range(len(parts))]
        return Cut(
            tuple(self._inputs),
            tuple(self._outputs),
            tuple(models),
            tuple(map(tuple, stages)),
            self._layouts(models),
        )

    def _deform(self, node: onnx.NodeProto) -> list[onnx.NodeProto | Deform]:
        """A deformable convolution with what it absorbs, and a cast where others want its answer in FP32."""
        self._check(node)
        x = self._narrow(node.input[0])
        shifts, logits = self._shifts(self._narrow(node.input[2]), self._narrow(node.input[4]))
        weight = self._constant(node, 1)
        bias = self._constant(node, 3) if node.input[3] else np.zeros(len(weight), weight.dtype)
        kind = self._type(x)
        tensor, relu = node.output[0], False
        while tensor not in self._outputs and len(self._users.get(tensor, ())) == 1:
            (user,) = self._users[tensor]
            if user.op_type == "BatchNormalization" and not relu:
                weight, bias = self._normalised(user, weight, bias)
            elif user.op_type == "Relu":
                relu = True
            elif user.op_type != "Cast" or user.attribute[0].i not in (kind, TensorProto.FLOAT):
                break
            self._absorbed.add(id(user))
            tensor = user.output[0]
        steps: list[onnx.NodeProto | Deform] = []
        out = tensor
        if self._type(tensor) != kind:
            out = f"{tensor}.seam"
            self._values[out] = copy_of(self._values[tensor])
            self._values[out].name = out
            self._values[out].type.tensor_type.elem_type = kind
            cast = helper.make_node("Cast", [out], [tensor], f"cast.{tensor}", to=self._type(tensor))
            self._producers[tensor] = cast
            steps.append(cast)
        dtype = _FLOATS[kind]
        deform = Deform(
            name=node.name or node.output[0],
            x=x,
            shifts=shifts,
            out=out,
            weight=pack_weight(torch.from_numpy(weight.astype(np.float32)).to(dtype)),
            bias=torch.from_numpy(bias.astype(np.float32)).to(dtype),
            relu=relu,
            logits=logits,
        )
        return [deform, *steps]

    def _check(self, node: onnx.NodeProto) -> None:
        name = node.name or node.output[0]
        why = unlike_ours(node)
        if why is not None:
            raise self._refused(name, why)
        if self._type(self._narrow(node.input[0])) not in _FLOATS:
            raise self._refused(name, "does not take floating-point images")
        channels, *spatial = self._constant(node, 1).shape[1:]
        if channels % _CHANNELS or spatial != [3, 3]:
            raise self._refused(
                name, f"is {'×'.join(map(str, spatial))} of {channels} channels; 3×3 of a multiple of "
                f"{_CHANNELS} can be had",
            )  # fmt: skip

    def _refused(self, name: str, why: str) -> EngineError:
        return EngineError(
            f"the deformable convolution {name} {why} in an engine in segments: build with --deform lower"
        )

    def _narrow(self, tensor: str) -> str:
        """The tensor before it was cast to FP32."""
        node = self._producers.get(tensor)
        while node is not None and node.op_type == "Cast" and node.attribute[0].i == TensorProto.FLOAT:
            if self._type(node.input[0]) not in _FLOATS:
                break
            tensor = node.input[0]
            node = self._producers.get(tensor)
        return tensor

    def _shifts(self, offset: str, mask: str) -> tuple[tuple[str, ...], bool]:
        """The tensors to take offsets and masks from, one for both where one was split; whether logits."""
        sigmoid = self._producers.get(mask)
        logits = sigmoid is not None and sigmoid.op_type == "Sigmoid"
        if logits:
            assert sigmoid is not None
            mask = self._narrow(sigmoid.input[0])
        split = self._producers.get(offset)
        if split is not None and split.op_type == "Split" and list(split.output) == [offset, mask]:
            both = self._narrow(split.input[0])
            axis = next((each.i for each in split.attribute if each.name == "axis"), 0)
            if axis == 1 and self._shape(both)[1] == 3 * TAPS:
                return (both,), logits
        return (offset, mask), logits

    def _normalised(self, node: onnx.NodeProto, weight: Array, bias: Array) -> tuple[Array, Array]:
        """Weight and bias with the batch normalisation `node` folded into them."""
        gain, shift, mean, variance = (
            self._constant(node, index).astype(np.float64) for index in range(1, 5)
        )
        epsilon = next((each.f for each in node.attribute if each.name == "epsilon"), 1e-5)
        scale = gain / np.sqrt(variance + epsilon)
        return weight * scale[:, None, None, None], bias * scale + shift - mean * scale

    def _constant(self, node: onnx.NodeProto, index: int) -> Array:
        name = node.input[index]
        if name not in self._weights:
            raise self._refused(node.name or node.output[0], f"takes {name}, which is no constant,")
        array: Array = numpy_helper.to_array(self._weights[name])
        return array

    def _needed(self, order: Sequence[onnx.NodeProto | Deform]) -> list[onnx.NodeProto | Deform]:
        """Without what nobody uses any more."""
        used, kept = set(self._outputs), []
        for step in reversed(order):
            if not used.isdisjoint(_given(step)):
                used.update(_taken(step))
                kept.append(step)
        return kept[::-1]

    def _part(
        self, index: int, parts: Sequence[Sequence[onnx.NodeProto]], outside: set[str]
    ) -> onnx.ModelProto | None:
        """One part as a graph of its own; outside: what deformable convolutions and the caller use."""
        nodes = parts[index]
        if not nodes:
            return None
        later = {name for part in parts[index + 1 :] for name in _taken_from_before(part)}
        made = [name for node in nodes for name in node.output]
        taken = dict.fromkeys(name for node in nodes for name in node.input if name)
        inputs = [name for name in taken if name not in self._weights and name not in made]
        outputs = [name for name in made if name in later or name in outside]
        graph = helper.make_graph(
            nodes,
            f"part {index}",
            [self._value(name) for name in inputs],
            [self._value(name) for name in outputs],
            [self._weights[name] for name in taken if name in self._weights],
        )
        model = helper.make_model(
            graph, opset_imports=self._model.opset_import, ir_version=self._model.ir_version
        )
        model.producer_name = self._model.producer_name
        return model

    def _layouts(self, parts: Iterable[onnx.ModelProto | None]) -> dict[str, str]:
        """HWC8 for images in half precision, as convolutions read and write them: what crosses seams, what
        comes in, and answers of so many channels that none are filled up.
        """
        values = [value for part in parts if part for value in (*part.graph.input, *part.graph.output)]
        return {
            value.name: "HWC8"
            for value in values
            if value.type.tensor_type.elem_type in (TensorProto.FLOAT16, TensorProto.BFLOAT16)
            and len(sizes := value.type.tensor_type.shape.dim) == 4
            and (value.name not in self._outputs or sizes[1].dim_value % 8 == 0)
        }

    def _value(self, name: str) -> onnx.ValueInfoProto:
        """What crosses a seam or an end. Raises EngineError for what cannot."""
        sizes = self._shape(name)
        if name not in (*self._inputs, *self._outputs) and (
            self._type(name) not in _FLOATS or not sizes or None in sizes[1:]
        ):
            kind = TensorProto.DataType.Name(self._type(name))
            raise EngineError(
                f"an engine in segments would have to carry {name} ({kind}, {sizes}) from part to part, "
                "which it can with images of known size alone: build with --deform lower"
            )
        value: onnx.ValueInfoProto = self._values[name]
        return value

    def _type(self, name: str) -> int:
        if name in self._weights:
            return int(self._weights[name].data_type)
        kind = self._values[name].type.tensor_type.elem_type if name in self._values else 0
        if not kind:
            raise EngineError(f"nothing tells the type of {name}: export the graph again, or build in fp32")
        return int(kind)

    def _shape(self, name: str) -> tuple[int | None, ...]:
        """None for a size that is open or unknown."""
        dimensions = self._values[name].type.tensor_type.shape.dim
        return tuple(each.dim_value if each.HasField("dim_value") else None for each in dimensions)


def _quantised_beside_users(
    parts: Sequence[Sequence[onnx.NodeProto]], outside: set[str]
) -> list[list[onnx.NodeProto]]:
    """Q and DQ nodes in every part that takes what they give, and nowhere else.

    Seams carry numbers, not integers, and TensorRT makes an integer kernel only of a layer that it sees
    together with the pair before it and the DQ of its weights.
    """
    makers = {
        name: node
        for part in parts
        for node in part
        if node.op_type in ("QuantizeLinear", "DequantizeLinear")
        for name in node.output
    }
    moved: list[list[onnx.NodeProto]] = []
    for part in parts:
        placed: list[onnx.NodeProto] = []
        there: set[str] = set()

        def bring(name: str, placed: list[onnx.NodeProto] = placed, there: set[str] = there) -> None:
            if name in makers and name not in there:
                there.add(name)
                bring(makers[name].input[0])
                placed.append(makers[name])

        for node in part:
            if node.output[0] not in makers:
                for name in node.input:
                    bring(name)
                placed.append(node)
            elif node.output[0] in outside:
                bring(node.output[0])
        moved.append(placed)
    return moved


def _taken_from_before(part: Sequence[onnx.NodeProto]) -> set[str]:
    made = {name for node in part for name in node.output}
    return {name for node in part for name in node.input} - made


def _taken(step: onnx.NodeProto | Deform) -> tuple[str, ...]:
    return (step.x, *step.shifts) if isinstance(step, Deform) else tuple(step.input)


def _given(step: onnx.NodeProto | Deform) -> tuple[str, ...]:
    return (step.out,) if isinstance(step, Deform) else tuple(step.output)


def _smallest() -> onnx.ModelProto:
    """A DeformConv, to see whether a parser takes it."""
    ends = {"x": (1, 16, 8, 8), "offset": (1, 18, 8, 8), "mask": (1, 9, 8, 8)}
    weights = {"weight": np.zeros((16, 16, 3, 3), np.float32), "bias": np.zeros(16, np.float32)}
    node = helper.make_node(
        "DeformConv", ["x", "weight", "offset", "bias", "mask"], ["y"], kernel_shape=(3, 3), pads=(1, 1, 1, 1)
    )
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in ends.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ends["x"])],
        [numpy_helper.from_array(values, name) for name, values in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


_SMALLEST = _smallest()
