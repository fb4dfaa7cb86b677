"""Graphs as TensorRT 8.6 is given them: the same answers in words it has, and its refusals in ours.

Answers come from ONNX Runtime; parser and builder are TensorRT-RTX's, which need no GPU.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from fake_tensorrt import fake_tensorrt
from onnx import TensorProto, helper, numpy_helper

from tracker.deploy.islands import precision_of
from tracker.deploy.plan import BuildConfig, _Compilation, compile_plan
from tracker.deploy.precision import to_half
from tracker.deploy.quantise import Quantiser
from tracker.deploy.refusals import quantised_near, refused
from tracker.deploy.weakly_typed import adapted, scales_in_fp32
from tracker.errors import EngineError

pytestmark = pytest.mark.usefixtures("one_thread")

DEMO = Path(__file__).resolve().parent.parent / "engines" / "fairmot_demo.onnx"
RTX = BuildConfig(builder="tensorrt_rtx")


@pytest.fixture(scope="module")
def shipped() -> onnx.ModelProto:
    """The shipped network in INT8."""
    quantiser = Quantiser(onnx.load(DEMO))
    return quantiser.write(dict.fromkeys(quantiser.tensors, 4.0))


def graph(
    nodes: list[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    shape: tuple[int | str, ...],
    *,
    opset: int = 19,
    kind: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """x of this shape to y."""
    built = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in weights.items()],
    )
    model = helper.make_model(built, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    return onnx.shape_inference.infer_shapes(model)


def node(kind: str, inputs: list[str], name: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [name], name=name, **attributes)


def answer(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: np.ndarray = session.run(None, {"x": x})[0]
    return found


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class TestNormalisation:
    @pytest.mark.parametrize("shape", [(2, 6, 40), (1, 6, 8, 12)], ids=["groups", "channels"])
    @pytest.mark.parametrize("opset", [11, 19])
    def test_in_sums_and_roots_answers_the_same(self, rtx: Any, shape: tuple[int, ...], opset: int) -> None:
        weights = {"scale": numbers(6, seed=1), "bias": numbers(6, seed=2)}
        step = node("InstanceNormalization", ["x", "scale", "bias"], "y", epsilon=1e-3)
        model = graph([step], weights, shape, opset=opset)
        written = adapted(model)
        assert "InstanceNormalization" not in {each.op_type for each in written.graph.node}
        onnx.checker.check_model(written, full_check=True)
        x = 3 * numbers(*shape) + 100  # a mean far from 0, as sums of squares would not survive it
        np.testing.assert_allclose(answer(written, x), answer(model, x), rtol=1e-3, atol=2e-4)
        compile_plan(written, RTX)

    def test_of_groups_needs_no_scale(self) -> None:
        """As the export writes GroupNorm: ones and zeros here, the real ones after it."""
        weights = {"scale": np.ones(6, np.float32), "bias": np.zeros(6, np.float32)}
        model = graph([node("InstanceNormalization", ["x", "scale", "bias"], "y")], weights, (1, 6, 40))
        written = adapted(model)
        assert [each.op_type for each in written.graph.node] == [
            "GlobalAveragePool", "Sub", "Mul", "GlobalAveragePool", "Add", "Sqrt", "Div",
        ]  # fmt: skip
        assert [each.name for each in written.graph.output] == ["y"]

    def test_in_half_precision_is_computed_in_fp32(self) -> None:
        weights = {"scale": np.ones(2, np.float16), "bias": np.zeros(2, np.float16)}
        step = node("InstanceNormalization", ["x", "scale", "bias"], "y")
        written = adapted(graph([step], weights, (1, 2, 64), kind=TensorProto.FLOAT16))
        onnx.checker.check_model(written, full_check=True)
        x = (1000 * numbers(1, 2, 64)).astype(np.float16)  # whose squares FP16 does not hold
        expected = (x - x.mean(-1, keepdims=True, dtype=np.float32)) / x.astype(np.float32).std(
            -1, keepdims=True
        )
        found = answer(written, x)
        assert found.dtype == np.float16
        np.testing.assert_allclose(found, expected, atol=2e-3)

    @pytest.mark.parametrize(
        ("shape", "scale", "words"),
        [((1, 2, 8), "x", "the values of x are not known beforehand, which the normalisation y takes"),
         (None, "scale", "the axes of x are not known beforehand")],
        ids=["weights", "size"],
    )  # fmt: skip
    def test_of_unknown_size_or_weights_is_refused(self, shape: Any, scale: str, words: str) -> None:
        weights = {"scale": np.ones(2, np.float32), "bias": np.zeros(2, np.float32)}
        model = graph([node("InstanceNormalization", ["x", scale, "bias"], "y")], weights, shape)
        with pytest.raises(EngineError, match=words):
            adapted(model)


class TestWeights:
    """INT8 constants as FP32 ones that QuantizeLinear brings back to the same integers."""

    def test_of_the_shipped_network_are_the_same_integers(self, shipped: onnx.ModelProto) -> None:
        written = adapted(to_half(shipped))
        onnx.checker.check_model(written, full_check=True)
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in written.graph.initializer}
        integers = {tensor.name: numpy_helper.to_array(tensor) for tensor in shipped.graph.initializer}
        assert not any(values.dtype == np.int8 and values.ndim > 1 for values in stored.values())
        checked = 0
        for step in written.graph.node:
            if step.op_type == "QuantizeLinear" and step.input[0] in stored:
                values, scales = (stored[name] for name in step.input[:2])
                assert values.dtype == scales.dtype == np.float32
                found = np.rint(values / scales.reshape(-1, *(1,) * (values.ndim - 1)))
                np.testing.assert_array_equal(found, integers[step.output[0].replace(".dq.q", ".int8")])
                checked += 1
        assert checked == sum(name.endswith(".int8") for name in integers) > 30

    @pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
    def test_of_the_shipped_network_are_built_by_tensorrt(
        self, rtx: Any, shipped: onnx.ModelProto, half: bool
    ) -> None:
        written = adapted(to_half(shipped) if half else shipped)
        assert precision_of(written) == "int8"
        compile_plan(written, RTX)

    @pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
    @pytest.mark.parametrize("kind", ["MatMul", "Gemm", "Conv"])
    def test_of_each_kind_of_layer(self, rtx: Any, kind: str, half: bool) -> None:
        """Scales by output channel; a matrix is turned so that they are by its first axis."""
        rows, square, transposed = (1, 5, 8), (8, 16), {"transB": 1} if kind == "Gemm" else {}
        shape = {"MatMul": rows, "Gemm": (5, 8), "Conv": (1, 8, 6, 6)}[kind]
        first, second = {"MatMul": (square, (16, 4)), "Gemm": ((16, 8), (4, 16)),
                         "Conv": ((16, 8, 3, 3), (4, 16, 1, 1))}[kind]  # fmt: skip
        nodes = [node(kind, ["x", "w"], "a", **transposed), node("Relu", ["a"], "b"),
                 node(kind, ["b", "v"], "y", **transposed)]  # fmt: skip
        quantiser = Quantiser(graph(nodes, {"w": numbers(*first), "v": numbers(*second, seed=1)}, shape))
        model = quantiser.write(dict.fromkeys(quantiser.tensors, 4.0))
        model = to_half(model) if half else model
        written = adapted(model)
        onnx.checker.check_model(written, full_check=True)
        kinds = Counter(each.op_type for each in written.graph.node)
        assert kinds["Transpose"] == (kind == "MatMul")
        by_first = [
            each
            for each in written.graph.node
            if each.op_type == "QuantizeLinear" and each.attribute and each.attribute[0].i == 0
        ]
        assert len(by_first) == 1
        x = numbers(*shape, seed=2)
        near = 0.02 if half else 1e-5  # ONNX Runtime leaves out other casts
        np.testing.assert_allclose(answer(written, x), answer(model, x), rtol=1e-3, atol=near)
        compile_plan(written, RTX)

    def test_reach_the_parser_of_a_tensorrt_without_strong_typing(self, shipped: onnx.ModelProto) -> None:
        """8.6's, which has no flag for it and is asked for nothing but to read the graph."""
        read: list[bytes] = []
        trt: Any = fake_tensorrt("8.6.1")
        trt.NetworkDefinitionCreationFlag = SimpleNamespace(EXPLICIT_BATCH=0)
        trt.Builder = lambda messages: SimpleNamespace(create_network=lambda flags: flags)
        trt.OnnxParser = lambda network, messages: SimpleNamespace(
            parse=lambda text: read.append(text) or True
        )
        _Compilation(trt, to_half(shipped), BuildConfig(), {})._parsed()
        (given,) = map(onnx.load_from_string, read)
        stored = {tensor.name: tensor.data_type for tensor in given.graph.initializer}
        steps = [each for each in given.graph.node if "Quantize" in each.op_type or "Dequant" in each.op_type]
        assert {stored[each.input[1]] for each in steps} == {TensorProto.FLOAT}
        assert not any(stored.get(each.input[0]) == TensorProto.INT8 for each in steps)

    def test_nothing_to_write_is_nothing_written(self) -> None:
        model = onnx.load(DEMO)
        assert adapted(model) is model and scales_in_fp32(model) is model


class TestResizing:
    @pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
    def test_comes_before_the_quantisation_behind_it(self, rtx: Any, half: bool) -> None:
        model, written = self.quantised(self.enlarged("nearest"), half)
        makers = {name: each for each in written.graph.node for name in each.output}
        (barrier,) = (each for each in written.graph.node if each.op_type == "Max")
        assert makers[barrier.input[0]].op_type == "Resize"
        assert makers[makers["finer"].input[0]].op_type == "DequantizeLinear"
        self.compare(model, written, half)

    @pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
    def test_between_pixels_is_convolved_as_it_is(self, rtx: Any, half: bool) -> None:
        """The weights stay what they were rounded to."""
        model, written = self.quantised(self.enlarged("linear"), half)
        makers = {name: each for each in written.graph.node for name in each.output}
        stored = {each.name: each.data_type for each in written.graph.initializer}
        assert makers["finer"].input[0] == "enlarged"
        assert stored[makers["finer"].input[1]] == (TensorProto.FLOAT16 if half else TensorProto.FLOAT)
        assert not {"Max"} & {each.op_type for each in written.graph.node}
        self.compare(model, written, half, atol=0.1)

    @pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
    def test_of_a_feature_pyramid_is_added_as_it_is(self, rtx: Any, half: bool) -> None:
        """Coarse features, enlarged and added to finer ones; both are quantised where they are convolved."""
        nodes = [
            node("MaxPool", ["x"], "small", kernel_shape=[2, 2], strides=[2, 2]),
            node("Conv", ["small", "w"], "coarse", pads=[1, 1, 1, 1]),
            node("Resize", ["coarse", "", "twice"], "enlarged", mode="nearest"),
            node("Conv", ["x", "w"], "fine", pads=[1, 1, 1, 1]),
            node("Add", ["fine", "enlarged"], "sum"),
            node("Conv", ["sum", "w"], "y", pads=[1, 1, 1, 1]),
        ]
        model, written = self.quantised(nodes, half)
        added = {name: each for each in written.graph.node for name in each.output}["sum"]
        assert list(added.input) == ["fine", "enlarged"]
        kinds = Counter(each.op_type for each in written.graph.node)
        before = Counter(each.op_type for each in model.graph.node)
        assert before["DequantizeLinear"] - kinds["DequantizeLinear"] == 1  # and its Q; weights have one more
        assert "Max" not in kinds
        self.compare(model, written, half, atol=0.1)  # the sum is finer now than its half was

    def enlarged(self, mode: str) -> list[onnx.NodeProto]:
        return [
            node("Conv", ["x", "w"], "coarse", pads=[1, 1, 1, 1]),
            node("Resize", ["coarse", "", "twice"], "enlarged", mode=mode),
            node("Conv", ["enlarged", "w"], "finer", pads=[1, 1, 1, 1]),
            node("Conv", ["finer", "w"], "y", pads=[1, 1, 1, 1]),
        ]

    def quantised(self, nodes: list[onnx.NodeProto], half: bool) -> tuple[onnx.ModelProto, onnx.ModelProto]:
        weights = {"w": numbers(4, 4, 3, 3), "twice": np.array([1, 1, 2, 2], np.float32)}
        quantiser = Quantiser(graph(nodes, weights, (1, 4, 8, 8)))
        model = quantiser.write(dict.fromkeys(quantiser.tensors, 40.0))
        model = to_half(model) if half else model
        return model, adapted(model)

    def compare(self, model: onnx.ModelProto, written: onnx.ModelProto, half: bool, atol: float = 0) -> None:
        x = numbers(1, 4, 8, 8)  # in half precision the two write weights with other scales
        given, expected = answer(written, x), answer(model, x)
        assert np.abs(given - expected).max() <= max(atol, 0.05 if half else 0) * np.abs(expected).max()
        compile_plan(written, RTX)


class TestRefusals:
    """TensorRT's words about a quantised graph, and which layers they mean."""

    @pytest.fixture
    def model(self) -> onnx.ModelProto:
        nodes = [
            node("Conv", ["x", "w"], "body.conv", pads=[1, 1, 1, 1]),
            node("Resize", ["body.conv", "", "half"], "coarser", mode="linear"),
            node("Relu", ["coarser"], "Relu[3]"),
            node("Conv", ["Relu[3]", "w"], "head/conv", pads=[1, 1, 1, 1]),
            node("Conv", ["head/conv", "w"], "y"),
        ]
        weights = {"w": numbers(4, 4, 3, 3), "half": np.array([1, 1, 0.5, 0.5], np.float32)}
        quantiser = Quantiser(graph(nodes, weights, (1, 4, 8, 8)))
        return adapted(quantiser.write(dict.fromkeys(quantiser.tensors, 4.0)))

    @pytest.mark.parametrize(
        ("said", "layers"),
        [
            ("Could not find any implementation for node w + w.dq.q + body.conv + Relu_2.", ["body.conv"]),
            ("Could not find any implementation for node coarser.", ["head/conv"]),
            ("no implementation for node {ForeignNode[Relu[3]...y]}", ["head/conv"]),
            ("Could not find any implementation for node y.", ["head/conv"]),
            ("Assertion dt1 == DataType::kFLOAT || dt1 == DataType::kHALF failed.", []),
            ("head/conv.1 is another", []),
        ],
        ids=["merged", "after", "part", "before", "nothing", "a longer name"],
    )
    def test_name_layers(self, model: onnx.ModelProto, said: str, layers: list[str]) -> None:
        assert quantised_near(model, said) == layers

    def test_become_an_option_of_calibration(self, model: onnx.ModelProto) -> None:
        error = refused(model, "Could not find any implementation for node coarser.", "no engine")
        assert error is not None and error.keep == ("head/conv",)
        assert str(error).startswith(
            "no engine: leave out what it names with tools/calibrate.py … --keep head/conv, or build"
        )
        error = refused(model, "Assertion dt1 == DataType::kFLOAT failed", "no engine")
        assert error is not None and error.keep == ()
        assert str(error).startswith(
            "no engine: it names no layer: leave some out with --keep of tools/calibrate.py, half of"
        )

    def test_of_something_else_stay_what_they_are(self, rtx: Any) -> None:
        nodes = [
            node("Conv", ["x", "w"], "body"),
            node("Conv", ["body", "w"], "last"),
            node("Reshape", ["last", "row"], "flat"),
            helper.make_node("TopK", ["flat", "k"], ["y", "places"], "best"),
        ]
        weights = {"w": numbers(4, 4, 1, 1), "row": np.array([1, -1]), "k": np.array([4000])}
        quantiser = Quantiser(graph(nodes, weights, (1, 4, 40, 40)))
        with pytest.raises(EngineError, match=r"cannot build the graph \(.*3840.*\): (?!leave)"):
            compile_plan(quantiser.write(dict.fromkeys(quantiser.tensors, 4.0)), RTX)
