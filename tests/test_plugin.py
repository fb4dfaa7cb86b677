"""The fused deformable convolution as TensorRT's plugin: its program, what TensorRT is told, and the graph.

A stand-in for `tensorrt.plugin` checks functions as NVIDIA's does (`_validate.py`, `_plugin_class.py`); the
real one compiles them on a GPU with a TensorRT that takes kernels ahead of time.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
import typing
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from kernel_runs import PLACES, Run, run_at
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun
from torch import Tensor

from tracker.deploy.plan import BuildConfig
from tracker.deploy.plugin import (
    TACTICS,
    Sampling,
    compile_fused,
    portable_ptx,
    register,
    require,
    with_plugins,
)
from tracker.deploy.precision import to_half
from tracker.deploy.segments import cut
from tracker.errors import EngineError
from tracker.kernels.deform import pack_weight
from tracker.kernels.deform_reference import deform_conv2d as reference

pytestmark = pytest.mark.usefixtures("one_thread")

FAIRMOT = Sampling(
    channels=64,
    outputs=64,
    height=152,
    width=272,
    element="HALF",
    shift_element="HALF",
    shifts_last=True,
    logits=True,
    relu=True,
)
BIT16 = TensorProto.FLOAT16


# ------------------------------------------------------------------------------------------ the program


@pytest.fixture(params=PLACES)
def run(request: pytest.FixtureRequest) -> Run:
    return run_at(request)


def sampled(
    sampling: Sampling, tactic: int, x: Tensor, shifts: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """What TensorRT would launch, on tensors that lie as it would lay them: (B, H, W, O)."""
    from tracker.kernels.jit.deform_plugin import deform_plugin
    from tracker.kernels.launch import launch, on_device_of

    out = torch.zeros(*x.shape[:3], sampling.outputs, dtype=x.dtype, device=x.device)
    grid = (*sampling.grid(tactic), len(x))
    with on_device_of(x):
        launch(deform_plugin, grid, x, shifts, weight, bias, len(x), out, **sampling.options(tactic))
    return out


@pytest.mark.parametrize(
    ("element", "shifts_last", "tactic"), [("HALF", True, 1), ("HALF", False, 4), ("FLOAT", True, 5)]
)
def test_the_program_samples_as_the_reference_does(
    run: Run, element: str, shifts_last: bool, tactic: int
) -> None:
    sampling = Sampling(
        channels=32,
        outputs=24,
        height=5,
        width=9,
        element=element,
        shift_element=element,
        shifts_last=shifts_last,
        logits=True,
        relu=True,
    )
    dtype = {"HALF": torch.float16, "FLOAT": torch.float32}[element]
    generator = torch.Generator().manual_seed(0)
    x, shifts = (torch.randn(2, count, 5, 9, generator=generator).to(dtype) for count in (32, 27))
    weight = (torch.randn(24, 32, 3, 3, generator=generator) / 17).to(dtype)
    bias = torch.randn(24, generator=generator).to(dtype)
    # HWC8 fills 27 channels up to 32; HWC, which FP32 has, does not.
    filled = torch.nn.functional.pad(shifts, (0, 0, 0, 0, 0, 5)) if element == "HALF" else shifts
    lying = filled.permute(0, 2, 3, 1).contiguous() if shifts_last else shifts
    upright = x.permute(0, 2, 3, 1).contiguous()
    found = run(sampled, sampling, tactic, upright, lying, pack_weight(weight), bias)
    wide = [each.float() for each in (x, shifts[:, :18], shifts[:, 18:].sigmoid(), weight, bias)]
    expected = reference(*wide).relu()
    error = (found.permute(0, 3, 1, 2).float() - expected).norm() / expected.norm()
    assert error < (2e-3 if element == "HALF" else 1e-5)


def test_ways_that_come_to_the_same_are_tried_once() -> None:
    assert FAIRMOT.tactics == (1, 3, 4, 5, 6)  # 64 outputs leave nothing for 128
    assert dataclasses.replace(FAIRMOT, outputs=256).tactics == tuple(range(1, len(TACTICS) + 1))
    assert FAIRMOT.grid(1) == (19 * 34, 1)


@pytest.mark.parametrize("capability", [80, 90])
def test_ptx_takes_what_tensorrt_gives_and_assembles(capability: int, tmp_path: Path) -> None:
    """And wants no newer driver than TensorRT does, nor tells where it was made."""
    triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    ptx = portable_ptx(FAIRMOT.program(1, capability))
    (entry,) = re.findall(r"\.entry deform_plugin\((.*?)\)", ptx, re.DOTALL)
    kinds = [words.split()[1] for words in entry.split(",")]
    assert kinds == [".u64"] * 4 + [".u32", ".u64"]
    assert ".version 8.0\n" in ptx
    assert "deform_plugin.py" not in ptx and ".debug" not in ptx
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    (tmp_path / "kernel.ptx").write_text(ptx)
    target = re.findall(r"\.target (\w+)", ptx)[0]
    subprocess.run(
        [tool, f"-arch={target}", tmp_path / "kernel.ptx", "-o", tmp_path / "kernel.cubin"], check=True
    )
    assert (tmp_path / "kernel.cubin").read_bytes().startswith(b"\x7fELF")


# -------------------------------------------------------------------------------- what TensorRT is told


class TensorDesc:
    """`tensorrt.plugin.TensorDesc`: sizes that are open are −1 in `shape`, and letters in `shape_expr`."""

    def __init__(self, shape: tuple[Any, ...], dtype: str = "HALF", layout: str = "LINEAR") -> None:
        self.shape_expr: list[Any] = list(shape)
        self.shape = tuple(-1 if isinstance(side, str) else side for side in shape)
        self.dtype, self.format = SimpleNamespace(name=dtype), SimpleNamespace(name=layout)

    def like(self) -> TensorDesc:
        return TensorDesc(tuple(self.shape_expr), self.dtype.name, self.format.name)


class KernelLaunchParams:
    grid_x = grid_y = grid_z = block_x = block_y = block_z = 1
    shared_mem = 0


class SymIntExprs(list[Any]):
    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class Plugins(ModuleType):
    """`tensorrt.plugin`: three decorators that look at what they are given, and what they have seen."""

    TensorDesc, KernelLaunchParams, SymIntExprs = TensorDesc, KernelLaunchParams, SymIntExprs

    @staticmethod
    def SymInt32(value: object) -> tuple[str, object]:  # noqa: N802 (NVIDIA's name)
        return ("int32", value)

    @staticmethod
    def AutoTuneCombination(types: str, layouts: str, tactics: list[int]) -> tuple[Any, ...]:  # noqa: N802
        return types, layouts, list(tactics)

    def register(self, name: str) -> Any:
        def look(function: Any) -> None:
            signature = inspect.signature(function)
            kinds = [each.annotation for each in signature.parameters.values()]
            assert kinds == [TensorDesc] * 4 + [bool] * 2 and signature.return_annotation is TensorDesc
            self.name, self.describe = name, function

        return look

    def autotune(self, name: str) -> Any:
        def look(function: Any) -> None:
            assert name == self.name and not function.__annotations__
            assert list(inspect.signature(function).parameters) == [
                "x",
                "shifts",
                "weight",
                "bias",
                "outputs",
            ]
            self.formats = function

        return look

    def aot_impl(self, name: str) -> Any:
        def look(function: Any) -> None:
            signature = inspect.signature(function)
            taken = [*inspect.signature(self.describe).parameters, "outputs", "tactic"]
            assert name == self.name and list(signature.parameters) == taken
            code = signature.return_annotation
            assert typing.get_origin(code) is tuple
            assert typing.get_args(code) == (bytes, bytes, KernelLaunchParams, SymIntExprs)
            self.implement = function

        return look


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A TensorRT that takes kernels ahead of time, and an sm_90 to compile for."""
    trt: Any = ModuleType("tensorrt_that_takes_kernels")
    trt.__version__, trt.QuickPluginCreationRequest = "11.1", object
    trt.plugin = Plugins(f"{trt.__name__}.plugin")
    monkeypatch.setitem(sys.modules, f"{trt.__name__}.plugin", trt.plugin)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return trt


def test_it_is_registered_once_and_under_its_name(library: Any) -> None:
    register(library)
    library.plugin.register = None  # a second time would be refused
    register(library)
    assert library.plugin.name == "tracker::deform_conv2d"


X = TensorDesc(("B", 64, 152, 272), layout="HWC8")
WEIGHT, BIAS = TensorDesc((9, 64, 128)), TensorDesc((128,))


def test_the_output_has_as_many_channels_as_the_weight(library: Any) -> None:
    register(library)
    out = library.plugin.describe(X, TensorDesc(("B", 27, 152, 272)), WEIGHT, BIAS, True, True)
    assert out.shape_expr == ["B", 128, 152, 272]
    assert X.shape_expr == ["B", 64, 152, 272]


@pytest.mark.parametrize(
    ("element", "shift_element", "types", "layouts"),
    [
        ("HALF", "HALF", "FP16, FP16, FP16, FP16, FP16", ("LINEAR", "HWC8")),
        ("HALF", "FLOAT", "FP16, FP32, FP16, FP16, FP16", ("LINEAR", "HWC")),
        ("BF16", "BF16", "BF16, BF16, BF16, BF16, BF16", ("LINEAR", "HWC8")),
        ("FLOAT", "FLOAT", "FP32, FP32, FP32, FP32, FP32", ("LINEAR", "HWC")),
    ],
)
def test_features_cross_channels_last_and_shifts_either_way(
    library: Any, element: str, shift_element: str, types: str, layouts: tuple[str, str]
) -> None:
    register(library)
    x, shifts = TensorDesc(("B", 64, 152, 272), element), TensorDesc(("B", 27, 152, 272), shift_element)
    offered = library.plugin.formats(x, shifts, WEIGHT, BIAS, (x.like(),))
    last = "HWC" if element == "FLOAT" else "HWC8"
    assert [(kinds, layout) for kinds, layout, _ in offered] == [
        (types, f"{last}, {layout}, LINEAR, LINEAR, {last}") for layout in layouts
    ]
    assert all(tactics and set(tactics) <= set(range(1, 7)) for _, _, tactics in offered)


def test_a_tactic_becomes_code_and_the_way_to_start_it(library: Any) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    register(library)
    shifts = TensorDesc(("B", 27, 152, 272), layout="HWC8")
    out = (TensorDesc(("B", 128, 152, 272), layout="HWC8"),)
    name, ptx, launch, numbers = library.plugin.implement(X, shifts, WEIGHT, BIAS, True, True, out, 4)
    assert name == b"deform_plugin" and b".entry deform_plugin(" in ptx and b".target sm_90a" in ptx
    assert (launch.grid_x, launch.grid_y, launch.grid_z) == (38 * 34, 2, "B")  # of 4 × 8 pixels, 64 outputs
    assert (launch.block_x, launch.block_y, launch.block_z) == (128, 1, 1)
    assert 0 < launch.shared_mem <= 48 * 1024
    assert numbers == [("int32", "B")]


def test_a_tensorrt_without_such_plugins_names_the_other_way() -> None:
    trt: Any = ModuleType("tensorrt_of_old")
    trt.__version__ = "8.6.1"
    with pytest.raises(EngineError, match=r"8\.6\.1 takes no kernels ahead of time .+ --deform segments"):
        require(trt)


def test_tensorrt_rtx_takes_none_and_says_so() -> None:
    """Its parser finds such a node's plugin, and refuses all but those of a compiled library (1.7.1)."""
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT-RTX has no libraries for this platform")
    with pytest.raises(EngineError, match=r"tensorrt_rtx [\d.]+ takes no kernels ahead of time"):
        compile_fused(graph(), BuildConfig(builder="tensorrt_rtx"))


# ---------------------------------------------------------------------------------------------- the graph


def graph(outputs: int = 16, relu: bool = True) -> onnx.ModelProto:
    """x (1, 16, 6, 5) → a convolution → one for offsets and masks, a deformable one → y."""
    random = np.random.default_rng(0)
    values = {
        "weight": random.normal(size=(outputs, 16, 3, 3)) / 12,
        "bias": random.normal(size=outputs),
        "stem": random.normal(size=(16, 16, 1, 1)) / 4,
        "k": random.normal(size=(27, 16, 1, 1)) / 4,
    }
    weights = [numpy_helper.from_array(value.astype(np.float32), name) for name, value in values.items()]
    weights.append(numpy_helper.from_array(np.array([18, 9], np.int64), "sizes"))
    inputs = ["features", "weight", "offset", "bias", "mask"]
    nodes = [
        helper.make_node("Conv", ["x", "stem"], ["features"]),
        helper.make_node("Conv", ["features", "k"], ["shifts"]),
        helper.make_node("Split", ["shifts", "sizes"], ["offset", "logits"], axis=1),
        helper.make_node("Sigmoid", ["logits"], ["mask"]),
        helper.make_node("DeformConv", inputs, ["deformed"], "one", kernel_shape=(3, 3), pads=(1, 1, 1, 1)),
        helper.make_node("Relu" if relu else "Identity", ["deformed"], ["clean"]),
        helper.make_node("Abs", ["clean"], ["y"]),
    ]
    x, y = (
        helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, c, 6, 5))
        for n, c in (("x", 16), ("y", outputs))
    )
    made = helper.make_graph(nodes, "graph", [x], [y], weights)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    return onnx.shape_inference.infer_shapes(model)


IMAGE = np.random.default_rng(1).normal(size=(1, 16, 6, 5)).astype(np.float32)


def answer(model: onnx.ModelProto) -> Any:
    """What ONNX Runtime answers, which has deformable convolutions of its own."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": IMAGE})[0]


class deform_conv2d(OpRun):  # noqa: N801 (found by this name)
    """The plugin's promise, for ONNX's own evaluator."""

    op_domain = "tracker"

    def _run(self, x: Any, shifts: Any, weight: Any, bias: Any, **about: Any) -> tuple[Any]:
        assert about["plugin_namespace"] == "tracker" and about["plugin_version"] == "1" and about["aot"] == 1
        x, shifts, weight, bias = map(torch.tensor, (x, shifts, weight, bias))
        square = weight.permute(2, 1, 0).unflatten(2, (3, 3))
        mask = shifts[:, 18:].sigmoid() if about["logits"] else shifts[:, 18:]
        answer = reference(x, shifts[:, :18], mask, square, bias)
        return ((answer.relu() if about["relu"] else answer).numpy(),)


@pytest.mark.parametrize("relu", [True, False])
def test_the_graph_with_plugins_answers_as_before(relu: bool) -> None:
    model = graph(relu=relu)
    whole = with_plugins(model, cut(model))
    assert [node.op_type for node in whole.graph.node if node.domain == "tracker"] == ["deform_conv2d"]
    assert not {"DeformConv", "Split", "Sigmoid"} & {node.op_type for node in whole.graph.node}
    (found,) = ReferenceEvaluator(whole, new_ops=[deform_conv2d]).run(None, {"x": IMAGE})
    np.testing.assert_allclose(found, answer(model), rtol=0, atol=1e-5)


def test_offsets_and_masks_of_different_origin_are_put_together() -> None:
    model = graph()
    model.graph.node[3].CopyFrom(helper.make_node("HardSigmoid", ["logits"], ["mask"]))
    whole = with_plugins(model, cut(model))
    (plugin,) = (node for node in whole.graph.node if node.domain == "tracker")
    (concat,) = (node for node in whole.graph.node if node.op_type == "Concat")
    assert plugin.input[1] == concat.output[0]
    (found,) = ReferenceEvaluator(whole, new_ops=[deform_conv2d]).run(None, {"x": IMAGE})
    np.testing.assert_allclose(found, answer(model), rtol=0, atol=1e-5)


def test_in_half_precision_all_that_the_plugin_takes_is_half() -> None:
    model = to_half(graph())
    whole = with_plugins(model, cut(model))
    (plugin,) = (node for node in whole.graph.node if node.domain == "tracker")
    weights = {tensor.name: tensor for tensor in whole.graph.initializer}
    packed = [weights[name] for name in plugin.input[2:]]
    assert [(list(each.dims), each.data_type) for each in packed] == [([9, 16, 16], BIT16), ([16], BIT16)]
    makers = {name: node for node in whole.graph.node for name in node.output}
    assert [makers[name].op_type for name in plugin.input[:2]] == ["Conv", "Conv"]  # no cast between


def test_outputs_that_fill_no_lanes_are_refused() -> None:
    model = graph(outputs=12)
    with pytest.raises(EngineError, match="one has 12 outputs; as a plugin it can have a multiple of 8"):
        with_plugins(model, cut(model))


def test_tensorrt_builds_and_runs_it(gpu: torch.device, tensorrt: ModuleType, tmp_path: Path) -> None:
    """The real thing, where TensorRT takes kernels ahead of time."""
    try:
        require(tensorrt)
    except EngineError as error:
        pytest.skip(str(error))
    from tracker.runtimes.tensorrt import TensorRTRuntime

    model = to_half(graph())
    (tmp_path / "a.engine").write_bytes(compile_fused(model, BuildConfig()).content)
    runtime = TensorRTRuntime(tmp_path / "a.engine", device=gpu)
    found = runtime.run({"x": torch.tensor(IMAGE, device=gpu)})["y"].cpu().numpy()
    expected = answer(graph())
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 3e-3
