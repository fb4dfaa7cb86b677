"""The fused deformable convolution inside a TensorRT plan, as an ahead-of-time plugin.

For a TensorRT that takes kernels as PTX (`tensorrt.plugin.aot_impl`, since 10.9; TensorRT-RTX does not).
While it builds it is given our Triton program for each deformable convolution, tries the ways to cut the work
and keeps the fastest; the plan then holds the code, and running it needs neither Triton nor Python. See
samples/python/quickly_deployable_plugins in NVIDIA's repository and, for what is called when,
python/packaging/bindings_wheel/tensorrt/plugin there.

Tensors cross with channels last, as the kernel reads them; offsets and masks in either order. Coordinates and
sums are float32, see `kernels.deform`.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from types import GenericAlias, ModuleType
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper

from tracker.deploy.plan import BuildConfig, Plan, Progress, compile_plan
from tracker.deploy.segments import Cut, cut
from tracker.errors import EngineError
from tracker.kernels.compile import Program, compile_program
from tracker.kernels.deform import TAPS
from tracker.kernels.deform import Plan as Tiles
from tracker.kernels.launch import EXACT
from tracker.runtimes.segments import Deform
from tracker.runtimes.trt import trt_module

NAMESPACE, NAME = "tracker", "deform_conv2d"
TACTICS = (  # numbered from 1; ways that share pixels would need a second kernel
    Tiles(block_o=64),
    Tiles(block_o=128),
    Tiles(block_o=128, warps=8),
    Tiles(4, 8, block_o=64),
    Tiles(4, 16, block_o=64),
    Tiles(block_o=64, block_c=32),
)
_SHARED = 48 * 1024  # bytes of shared memory that a block may have without asking
_LANES = 8  # channels that HWC8 fills a pixel up to a multiple of
_ONNX_TYPES = {
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float32: TensorProto.FLOAT,
}
_WORDS = {"HALF": "FP16", "BF16": "BF16", "FLOAT": "FP32"}  # trt.DataType's names and AutoTuneCombination's
_ELEMENTS = {"HALF": "fp16", "BF16": "bf16", "FLOAT": "fp32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """One deformable convolution as TensorRT has it.

    element, shift_element: types of the features and of the offsets and masks, by `trt.DataType`'s names.
    shifts_last: whether channels of offsets and masks lie together. logits: masks are logits.
    """

    channels: int
    outputs: int
    height: int
    width: int
    element: str
    shift_element: str
    shifts_last: bool
    logits: bool
    relu: bool

    @property
    def tactics(self) -> tuple[int, ...]:
        """Numbers of those in TACTICS that differ here."""
        cuts: dict[object, int] = {}
        for number, tiles in enumerate(TACTICS, 1):
            cuts.setdefault(self._tiles(tiles), number)
        return tuple(cuts.values())

    def grid(self, tactic: int) -> tuple[int, int]:
        """Blocks along x and y; along z there are images."""
        tiles = self._tiles(TACTICS[tactic - 1])
        across, down = -(-self.width // tiles.tile_x), -(-self.height // tiles.tile_y)
        return across * down, -(-self.outputs // tiles.block_o)

    def program(self, tactic: int, capability: int) -> Program:
        """The machine code. Raises EngineError where Triton is missing or fails."""
        return _program(self, tactic, capability)

    def options(self, tactic: int) -> dict[str, object]:
        """Compile-time values of `jit.deform_plugin`, and Triton's own."""
        tiles = self._tiles(TACTICS[tactic - 1])
        pixels = self.height * self.width
        lanes = _lanes(3 * TAPS, self.shift_element) if self.shifts_last else 3 * TAPS
        image = pixels * lanes
        strides = (
            (image, 1, self.width * lanes, lanes) if self.shifts_last else (image, pixels, self.width, 1)
        )
        sides = ("IMAGE", "CHANNEL", "ROW", "COLUMN")
        return {
            "HEIGHT": self.height,
            "WIDTH": self.width,
            "CHANNELS": self.channels,
            "OUTPUTS": self.outputs,
            "X_COLUMN": _lanes(self.channels, self.element),
            "OUT_COLUMN": _lanes(self.outputs, self.element),
            **{f"SHIFTS_{side}": stride for side, stride in zip(sides, strides, strict=True)},
            "LOGITS": self.logits,
            "RELU": self.relu,
            "HALF": self.element == "HALF",
            "TILE_Y": tiles.tile_y,
            "TILE_X": tiles.tile_x,
            "BLOCK_C": tiles.block_c,
            "BLOCK_O": tiles.block_o,
            "num_warps": tiles.warps,
            "num_stages": 1,
            **EXACT,
        }

    def _tiles(self, tiles: Tiles) -> Tiles:
        """Cut to what there is."""
        wide = self.element == "FLOAT"  # twice the registers
        sizes = (size for size in (tiles.block_c, 32, 16) if self.channels % size == 0)
        block_c = next(size for size in sizes if not (wide and size > 32))
        outputs = max(16, 1 << (self.outputs - 1).bit_length())
        return dataclasses.replace(tiles, block_c=block_c, block_o=min(tiles.block_o, outputs))


def compile_fused(model: onnx.ModelProto, config: BuildConfig, progress: Progress | None = None) -> Plan:
    """As `compile_plan`, for a graph with DeformConv nodes, which become one plugin each.

    Raises EngineError where this TensorRT takes none, and as `segments.cut` and `compile_plan`.
    """
    trt = trt_module(config.builder)
    require(trt)
    parts = cut(model)
    graph = with_plugins(model, parts)
    capability = _capability(config.device)
    samplings = {sampling for stage in parts.stages for deform in stage for sampling in _ways(deform, parts)}
    for done, sampling in enumerate(samplings):  # now, when what fails can still say so
        if progress is not None:
            progress("compiling deformable convolutions", done / len(samplings))
        for tactic in sampling.tactics:
            sampling.program(tactic, capability)
    register(trt)
    return compile_plan(graph, config, progress)


def require(trt: ModuleType) -> Any:
    """`tensorrt.plugin`, seen to take kernels ahead of time. Raises EngineError where it does not."""
    try:
        plugin = importlib.import_module(f"{trt.__name__}.plugin")
    except ImportError:
        plugin = None
    if not hasattr(plugin, "aot_impl") or not hasattr(trt, "QuickPluginCreationRequest"):
        raise EngineError(
            f"{trt.__name__.removesuffix('_bindings')} {trt.__version__} takes no kernels ahead of time "
            "(tensorrt.plugin.aot_impl): build with --deform segments, or install TensorRT ≥ 10.9"
        )
    return plugin


def with_plugins(model: onnx.ModelProto, parts: Cut) -> onnx.ModelProto:
    """The graph as one again, with a plugin node for each deformable convolution; `parts` are the model's.

    Raises EngineError for a number of outputs that 8 does not divide.
    """
    nodes: dict[str, onnx.NodeProto] = {}  # by what they give: parts may repeat some
    weights: dict[str, TensorProto] = {}
    for index, part in enumerate(parts.parts):
        if part is not None:
            nodes |= {node.output[0]: node for node in part.graph.node}
            weights |= {tensor.name: tensor for tensor in part.graph.initializer}
        for deform in parts.stages[index] if index < len(parts.stages) else ():
            for node in _plugin_nodes(deform, weights):
                nodes[node.output[0]] = node
    graph = helper.make_graph(
        list(nodes.values()),
        model.graph.name,
        [value for value in model.graph.input if value.name in parts.inputs],
        model.graph.output,
        list(weights.values()),
    )
    opsets = [*model.opset_import, helper.make_opsetid(NAMESPACE, 1)]
    whole = helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version)
    whole.producer_name = model.producer_name
    return whole


@cache
def register(trt: ModuleType) -> None:
    """Tell TensorRT, once in a process, what the plugin gives, takes and runs."""
    plugin = require(trt)

    def describe(x: Any, shifts: Any, weight: Any, bias: Any, logits: Any, relu: Any) -> Any:
        out = x.like()
        out.shape_expr[1] = weight.shape_expr[2]
        return out

    def formats(x: Any, shifts: Any, weight: Any, bias: Any, outputs: Any) -> list[Any]:
        sampling = _sampling(x, shifts, weight)
        word, last = _WORDS[sampling.element], _last(sampling.element)
        types = ", ".join((word, _WORDS[sampling.shift_element], word, word, word))
        return [
            plugin.AutoTuneCombination(types, f"{last}, {layout}, LINEAR, LINEAR, {last}", sampling.tactics)
            for layout in ("LINEAR", _last(sampling.shift_element))
        ]

    def implement(
        x: Any, shifts: Any, weight: Any, bias: Any, logits: Any, relu: Any, outputs: Any, tactic: int
    ) -> tuple[bytes, bytes, Any, Any]:
        sampling = _sampling(
            x,
            shifts,
            weight,
            shifts_last=shifts.format.name != "LINEAR",
            logits=bool(logits),
            relu=bool(relu),
        )
        program = sampling.program(tactic, _capability(torch.cuda.current_device()))
        images = x.shape_expr[0]
        launch = plugin.KernelLaunchParams()
        launch.grid_x, launch.grid_y = sampling.grid(tactic)
        launch.grid_z = images
        launch.block_x = program.threads
        launch.shared_mem = program.shared
        numbers = plugin.SymIntExprs(1)
        numbers[0] = plugin.SymInt32(images)
        return program.name.encode(), portable_ptx(program).encode(), launch, numbers

    # TensorRT reads types from the functions themselves, and takes none as text.
    tensors = dict.fromkeys(("x", "shifts", "weight", "bias", "return"), plugin.TensorDesc)
    code = GenericAlias(tuple, (bytes, bytes, plugin.KernelLaunchParams, plugin.SymIntExprs))
    name = f"{NAMESPACE}::{NAME}"
    plugin.register(name)(_typed(describe, **tensors, logits=bool, relu=bool))
    plugin.autotune(name)(_typed(formats))
    plugin.aot_impl(name)(_typed(implement, **{"return": code}))


def portable_ptx(program: Program) -> str:
    """The program's PTX with the arguments that TensorRT gives, and without where its source lay.

    Triton's own arguments behind them are unused here, and TensorRT knows nothing of them: the driver would
    read what lies behind TensorRT's.
    """
    entry = re.search(rf"\.entry {program.name}\((.*?)\n\)", program.ptx, re.DOTALL)
    assert entry is not None
    given = entry[1].split(",")
    kept, dropped = given[: len(program.kinds)], given[len(program.kinds) :]
    assert len(dropped) == program.scratch
    assert not any(program.ptx.count(each.split()[-1]) > 1 for each in dropped)
    ptx = program.ptx[: entry.start(1)] + ",".join(kept) + program.ptx[entry.end(1) :]
    ptx = re.sub(r"^\t\.section\s+\.debug_\w+\s*\{.*?\}\n?", "", ptx, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"^\t\.(loc|file)\b.*\n", "", ptx, flags=re.MULTILINE).replace(", debug", "")


@cache
def _program(sampling: Sampling, tactic: int, capability: int) -> Program:
    from tracker.kernels.jit.deform_plugin import deform_plugin

    element, shift = _ELEMENTS[sampling.element], _ELEMENTS[sampling.shift_element]
    wide = f"*{element}:16"
    kinds = (wide, f"*{shift}", wide, wide, "i32", wide)
    # The driver translates it where the plan runs, and must know its version: 8.0 is CUDA 12.0's, and 8.7
    # (12.8) the first that knows the GPUs since sm_100.
    options = sampling.options(tactic) | {"ptx_version": 80 if capability < 100 else 87}
    program = compile_program(deform_plugin, kinds, options, capability)
    assert program.shared <= _SHARED
    return program


def _sampling(x: Any, shifts: Any, weight: Any, **flags: bool) -> Sampling:
    """What TensorRT's descriptions of tensors say; what is not given in flags is False."""
    _, channels, height, width = x.shape
    return Sampling(
        channels=channels,
        outputs=weight.shape[2],
        height=height,
        width=width,
        element=x.dtype.name,
        shift_element=shifts.dtype.name,
        **{"shifts_last": False, "logits": False, "relu": False} | flags,
    )


def _typed(function: Callable[..., Any], **types: object) -> Callable[..., Any]:
    function.__annotations__ = types
    return function


def _ways(deform: Deform, parts: Cut) -> Sequence[Sampling]:
    """What TensorRT may ask for, for one deformable convolution."""
    values = {
        value.name: value.type.tensor_type
        for part in parts.parts
        if part is not None
        for value in (*part.graph.input, *part.graph.output)
    }
    _, channels, outputs = deform.weight.shape
    height, width = (side.dim_value for side in values[deform.shifts[0]].shape.dim[2:])
    names = {TensorProto.FLOAT16: "HALF", TensorProto.BFLOAT16: "BF16", TensorProto.FLOAT: "FLOAT"}
    one = Sampling(
        channels=channels,
        outputs=outputs,
        height=height,
        width=width,
        element=names[_ONNX_TYPES[deform.weight.dtype]],
        shift_element=names[values[deform.shifts[0]].elem_type],
        shifts_last=True,
        logits=deform.logits,
        relu=deform.relu,
    )
    return one, dataclasses.replace(one, shifts_last=False)


def _plugin_nodes(deform: Deform, weights: dict[str, TensorProto]) -> list[onnx.NodeProto]:
    """The plugin, and before it what makes one tensor of offsets and masks; its weights are added."""
    outputs = deform.weight.shape[2]
    if outputs % _LANES:
        raise EngineError(
            f"the deformable convolution {deform.name} has {outputs} outputs; as a plugin it can have a "
            f"multiple of {_LANES}: build with --deform segments"
        )
    assert deform.bias is not None  # `cut` gives zeros
    nodes = []
    shifts = deform.shifts[0]
    if len(deform.shifts) > 1:
        shifts = f"{deform.name}.shifts"
        nodes.append(helper.make_node("Concat", deform.shifts, [shifts], shifts, axis=1))
    names = f"{deform.name}.packed_weight", f"{deform.name}.packed_bias"
    for name, values in zip(names, (deform.weight, deform.bias), strict=True):
        weights[name] = TensorProto(
            name=name,
            dims=values.shape,
            data_type=_ONNX_TYPES[values.dtype],
            raw_data=values.contiguous().view(torch.uint8).numpy().tobytes(),
        )
    node = helper.make_node(
        NAME,
        [deform.x, shifts, *names],
        [deform.out],
        deform.name,
        domain=NAMESPACE,
        plugin_namespace=NAMESPACE,
        plugin_version="1",
        aot=1,
        logits=int(deform.logits),
        relu=int(deform.relu),
    )
    return [*nodes, node]


def _lanes(channels: int, element: str) -> int:
    """Values that a pixel fills, channels last."""
    return channels if _last(element) == "HWC" else -(-channels // _LANES) * _LANES


def _last(element: str) -> str:
    """TensorRT's name for channels last, of which it has one per width."""
    return "HWC" if element == "FLOAT" else "HWC8"


def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
