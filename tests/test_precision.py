"""Half precision: what becomes it, what must not, and what that changes in a network's answers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tracker import manifest as manifests
from tracker.deploy.export import ExportConfig, export_fairmot, frames_of, generated_frames
from tracker.deploy.graph import Lowering
from tracker.deploy.islands import HalfConfig, Islands, element_types, precision_of
from tracker.deploy.precision import dense_upsampling, relative_errors, rounded, to_half
from tracker.errors import ConfigError, EngineError
from tracker.frontends.preprocess import Preprocessor
from tracker.models.fairmot import FairMOTConfig, random_fairmot
from tracker.runtimes.onnx import OnnxRuntime
from tracker.types import Frame

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "engines" / "fairmot_demo.onnx"
FLOAT, FLOAT16, BFLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16

Array = NDArray[Any]


@pytest.fixture(scope="module")
def demo() -> onnx.ModelProto:
    return onnx.load(DEMO)


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    return random_network(tmp_path_factory.mktemp("lowered"), Lowering(deform="GridSample"))


@pytest.fixture(scope="module")
def real_frame() -> Frame:
    """The first of the shipped video."""
    return frames_of(str(ROOT / "videos" / "demo.mp4"), 1)[0]


def random_network(folder: Path, lowering: Lowering, size: tuple[int, int] = (96, 64)) -> onnx.ModelProto:
    """Everything the full-size network is made of, an eighth as wide; offsets of several pixels."""
    model = random_fairmot(FairMOTConfig(width=0.125, max_channels=24, head_channels=8, embedding=8))
    out = folder / "random.onnx"
    export_fairmot(model, out, ExportConfig(size=size, lowering=lowering), generated_frames((162, 90), 1))
    return onnx.load(out)


def small(
    nodes: list[onnx.NodeProto],
    constants: dict[str, Array],
    *,
    inputs: dict[str, tuple[int, ...]],
    outputs: tuple[str, ...],
) -> onnx.ModelProto:
    """A graph of a few nodes, each called as its first output."""
    for node in nodes:
        node.name = node.output[0]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in constants.items()],
    )
    opsets = [helper.make_opsetid("", 19), helper.make_opsetid("somebody", 1)]
    return onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=opsets, ir_version=9))


def conv(source: str, target: str, weight: str = "weight") -> onnx.NodeProto:
    return helper.make_node("Conv", [source, weight], [target])


def weights(*shape: int) -> Array:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def answers(model: onnx.ModelProto, inputs: dict[str, Array], folder: Path) -> dict[str, Array]:
    onnx.save(model, folder / "answering.onnx")
    runtime = OnnxRuntime(folder / "answering.onnx", device="cpu", lanes=1, threads=1)
    found = runtime.run({name: torch.from_numpy(value) for name, value in inputs.items()})
    return {name: value.numpy() for name, value in found.items()}


def demo_image(frame: Frame) -> dict[str, Array]:
    spec = manifests.read(manifests.beside(DEMO)).input
    images, _ = Preprocessor(spec, 1)([frame])
    return {spec.name: images.numpy().copy()}


def with_outputs(model: onnx.ModelProto, *names: str) -> onnx.ModelProto:
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    shown.graph.output.extend(helper.make_tensor_value_info(name, FLOAT, None) for name in names)
    return shown


def types_at(model: onnx.ModelProto) -> dict[str, tuple[set[int], set[int]]]:
    """By node, the element types it takes and gives, as far as they are floating."""
    types, floats = element_types(model), {FLOAT, FLOAT16, BFLOAT16}
    return {
        node.name: ({types[n] for n in node.input if n} & floats, {types[n] for n in node.output} & floats)
        for node in model.graph.node
    }


class TestAnswers:
    """On real frames, every value rounded as a GPU would store it."""

    def test_heads_are_within_half_a_percent(self, demo: onnx.ModelProto, real_frame: Frame) -> None:
        image = demo_image(real_frame)
        errors = relative_errors(with_outputs(demo, "hm.2"), HalfConfig(), image)
        assert errors.keys() == {"peaks", "wh", "reg", "id", "hm.2"}
        assert all(0 < error < 0.005 for error in errors.values())

    def test_bfloat16_is_coarser(self, demo: onnx.ModelProto, real_frame: Frame) -> None:
        image = demo_image(real_frame)
        errors = relative_errors(demo, HalfConfig(kind="bf16"), image)
        assert all(0 < error < 0.02 for error in errors.values())
        assert errors["id"] > 0.005

    def test_no_object_becomes_two(self, demo: onnx.ModelProto, data: Path, tmp_path: Path) -> None:
        for frame in frames_of(str(data / "pets09" / "video.mp4"), 3):
            image = demo_image(frame)
            exact, half = answers(demo, image, tmp_path), answers(rounded(demo), image, tmp_path)
            assert (exact["peaks"] > 0.3).sum() > 3
            assert np.array_equal(half["peaks"] > 0.3, exact["peaks"] > 0.3)

    def test_neighbours_nearly_as_high_are_no_peaks(self, tmp_path: Path) -> None:
        """Their logits are one number in FP16, so that both would count."""
        model = small(
            [conv("x", "logits"), helper.make_node("Sigmoid", ["logits"], ["scores"]),
             helper.make_node("MaxPool", ["scores"], ["around"], kernel_shape=(3, 3), pads=(1, 1, 1, 1)),
             helper.make_node("Greater", ["around", "scores"], ["lower"]),
             helper.make_node("Where", ["lower", "zero", "scores"], ["peaks"])],
            {"weight": np.array([1, 1], np.float32).reshape(1, 2, 1, 1), "zero": np.float32(0)},
            inputs={"x": (1, 2, 8, 8)},
            outputs=("peaks",),
        )  # fmt: skip
        image = np.full((1, 2, 8, 8), -4, np.float32)
        image[0, :, 3, 3:5] = [[1, 1], [2**-12, 2**-13]]  # each a number of FP16; their sums are both 1 there
        peaks = answers(rounded(model), {"x": image}, tmp_path)["peaks"]
        assert np.argwhere(peaks > 0.5).tolist() == [[0, 0, 3, 3]]

    def test_the_file_itself_answers(self, demo: onnx.ModelProto, real_frame: Frame, tmp_path: Path) -> None:
        image = demo_image(real_frame)
        exact, half = answers(demo, image, tmp_path), answers(to_half(demo), image, tmp_path)
        for name in ("wh", "reg", "id"):
            assert half[name].dtype == np.float32
            error = np.linalg.norm(half[name] - exact[name]) / np.linalg.norm(exact[name])
            assert 0 < error < 0.005

    def test_sampling_positions_in_every_block(self, tmp_path: Path) -> None:
        """Where each deformable convolution samples, in pixels, far from the origin too."""
        model = random_network(tmp_path, Lowering(deform="GridSample"), size=(1088, 64))
        grids = [node.input[1] for node in model.graph.node if node.op_type == "GridSample"]
        assert len(grids) == 16
        shown = with_outputs(model, *grids)
        image = {"images": np.random.default_rng(0).random((1, 3, 64, 1088), np.float32)}
        exact, half = answers(shown, image, tmp_path), answers(rounded(shown), image, tmp_path)
        for grid in grids:
            columns = exact[grid].shape[2]
            shift = np.abs(half[grid] - exact[grid])[..., 0].max() * columns / 2
            steps = np.abs(exact[grid].astype(np.float16) - exact[grid])[..., 0].max() * columns / 2
            assert shift < 0.01
            if columns == 272:
                assert steps > 5 * shift  # what FP16 coordinates would do, to say nothing of adding them


class TestIslands:
    def test_the_peak_test_and_what_it_compares(self, demo: onnx.ModelProto) -> None:
        types = types_at(to_half(demo))
        for node in ("hm.2", "sigmoid", "max_pool2d", "gt", "where"):
            assert types[node][0] == {FLOAT}
        assert types["hm.0"] == types["wh.2"] == types["dla_up.ida_0.up_1"] == ({FLOAT16}, {FLOAT16})
        outside = {"hm.2", "sigmoid", "max_pool2d", "gt", "where"}
        assert Islands(demo, HalfConfig()).wide == outside

    def test_raw_heat_maps_when_said_to_be_compared(self, tmp_path: Path) -> None:
        model = small(
            [conv("x", "body"), conv("body", "hm"), conv("body", "wh")],
            {"weight": weights(4, 4, 1, 1)},
            inputs={"x": (1, 4, 8, 8)},
            outputs=("hm", "wh"),
        )
        assert Islands(model, HalfConfig()).wide == set()
        assert Islands(model, HalfConfig(compared=("hm",))).wide == {"hm"}

    def test_coordinates_of_a_lowered_deformable_convolution(self, lowered: onnx.ModelProto) -> None:
        half = to_half(lowered)
        types = types_at(half)
        samplers = [node for node in half.graph.node if node.op_type == "GridSample"]
        assert len(samplers) == 16
        for node in samplers:
            block = node.name.removesuffix(".samples")
            assert types[f"{block}.grid"] == types[node.name] == ({FLOAT}, {FLOAT})
            halves = ("", ".conv_offset_mask", ".offset_by_axis", ".offset_xy", ".mask", ".masked_samples")
            for part in halves:
                assert types[f"{block}{part}"][1] == {FLOAT16}

    def test_deformable_convolutions_whole(self, tmp_path: Path) -> None:
        types = types_at(to_half(random_network(tmp_path, Lowering())))
        assert types["dla_up.ida_0.proj_1.conv"] == ({FLOAT}, {FLOAT})
        assert types["dla_up.ida_0.proj_1.conv.conv_offset_mask"] == ({FLOAT16}, {FLOAT16})

    def test_box_decoding(self, tmp_path: Path) -> None:
        """YOLOX's: pixels up to 1280, which FP16 knows to the nearest one only."""
        cells = np.arange(128, dtype=np.float32).reshape(1, 1, 128)
        model = small(
            [
                conv("x", "head"),
                helper.make_node("Split", ["head"], ["xy", "wh", "logits"], axis=1, num_outputs=3),
                helper.make_node("Add", ["xy", "cells"], ["moved"]),
                helper.make_node("Mul", ["moved", "stride"], ["centre"]),
                helper.make_node("Exp", ["wh"], ["factor"]),
                helper.make_node("Mul", ["factor", "stride"], ["size"]),
                helper.make_node("Sigmoid", ["logits"], ["score"]),
                helper.make_node("Concat", ["centre", "size", "score"], ["rows"], axis=1),
            ],
            {"weight": weights(6, 6, 1), "cells": cells, "stride": np.float32(10)},
            inputs={"x": (1, 6, 128)},
            outputs=("rows",),
        )
        image = {"x": np.random.default_rng(1).normal(size=(1, 6, 128)).astype(np.float32)}
        exact, half = answers(model, image, tmp_path), answers(rounded(model), image, tmp_path)
        error = np.abs(half["rows"] - exact["rows"])[:, :2]
        assert exact["rows"][:, :2].max() > 1024
        assert 0 < error.max() < 0.05  # pixels
        types = types_at(to_half(model))
        assert all(types[name] == ({FLOAT}, {FLOAT}) for name in ("moved", "centre", "factor", "size"))

    @pytest.mark.parametrize(
        ("kind", "attributes"), [("ReduceL2", {}), ("Softmax", {"axis": 1}), ("Exp", {}), ("Sqrt", {})]
    )
    def test_ranges(self, kind: str, attributes: dict[str, Any]) -> None:
        model = small(
            [conv("x", "a"), helper.make_node(kind, ["a"], ["b"], **attributes),
             helper.make_node("Mul", ["a", "b"], ["c"]), conv("c", "y")],
            {"weight": weights(4, 4, 1, 1)},
            inputs={"x": (1, 4, 8, 8)},
            outputs=("y",),
        )  # fmt: skip
        assert Islands(model, HalfConfig()).wide == {"b"}

    def test_what_is_between_islands_is_no_bridge(self) -> None:
        """Movement and light arithmetic between FP32 nodes stay there, so that nothing is cast twice."""
        model = small(
            [conv("x", "a"), helper.make_node("Exp", ["a"], ["b"]),
             helper.make_node("Transpose", ["b"], ["c"], perm=(0, 1, 3, 2)),
             helper.make_node("Add", ["c", "one"], ["d"]), helper.make_node("Log", ["d"], ["e"]),
             conv("e", "y")],
            {"weight": weights(4, 4, 1, 1), "one": np.float32(1)},
            inputs={"x": (1, 4, 8, 8)},
            outputs=("y",),
        )  # fmt: skip
        assert Islands(model, HalfConfig()).wide == {"b", "c", "d", "e"}

    def test_what_depends_on_shapes_alone(self) -> None:
        model = small(
            [helper.make_node("Shape", ["x"], ["shape"]),
             helper.make_node("Cast", ["shape"], ["float"], to=FLOAT),
             helper.make_node("Mul", ["float", "scales"], ["sizes"]),
             helper.make_node("Cast", ["sizes"], ["whole"], to=TensorProto.INT64),
             helper.make_node("Resize", ["x", "", "", "whole"], ["big"]), conv("big", "y")],
            {"weight": weights(4, 4, 1, 1), "scales": np.array([1, 1, 512.5, 512.5], np.float32)},
            inputs={"x": (1, 4, 8, 8)},
            outputs=("y",),
        )  # fmt: skip
        half = to_half(model)
        types = types_at(half)
        assert types["sizes"] == ({FLOAT}, {FLOAT})
        assert types["y"] == ({FLOAT16}, {FLOAT16})

    def test_constants_that_do_not_fit(self) -> None:
        model = small(
            [helper.make_node("Mul", ["x", "huge"], ["a"]), helper.make_node("Mul", ["a", "tiny"], ["b"]),
             helper.make_node("Clip", ["b", "", "limit"], ["c"]), conv("c", "y")],
            {"weight": weights(4, 4, 1, 1), "huge": np.float32(1e6), "tiny": np.float32(1e-6),
             "limit": np.float32(3e38)},
            inputs={"x": (1, 4, 8, 8)},
            outputs=("y",),
        )  # fmt: skip
        assert Islands(model, HalfConfig()).wide == {"a", "b"}
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in to_half(model).graph.initializer}
        assert stored["limit"] == np.float16(65504)
        assert Islands(model, HalfConfig(kind="bf16")).wide == set()

    def test_quantised_as_precisely_as_what_is_around_it(self) -> None:
        """No cast comes between a layer and its integers: TensorRT would not see that it takes them."""

        def pair(tensor: str, scale: str) -> list[onnx.NodeProto]:
            return [
                helper.make_node("QuantizeLinear", [tensor, scale, "zero"], [f"{tensor}.q"]),
                helper.make_node("DequantizeLinear", [f"{tensor}.q", scale, "zero"], [f"{tensor}.dq"]),
            ]

        taken_back = helper.make_node("DequantizeLinear", ["integers", "tiny", "zero"], ["weight.dq"])
        model = small(
            [taken_back, *pair("x", "step"), conv("x.dq", "a", "weight.dq"),
             helper.make_node("Exp", ["a"], ["b"]), *pair("b", "step"), conv("b.dq", "c", "weight.dq"),
             conv("c", "y", "large")],
            {"integers": np.ones((4, 4, 1, 1), np.int8), "zero": np.int8(0), "step": np.float32(0.25),
             "tiny": np.float32(2.0**-20), "large": 1e6 * weights(4, 4, 1, 1)},
            inputs={"x": (1, 4, 8, 8)},
            outputs=("y",),
        )  # fmt: skip
        types = types_at(to_half(model))
        assert types["x.q"] == types["b.q"] == ({FLOAT}, set())  # the image, and an exponential
        assert types["x.dq"] == types["b.dq"] == types["weight.dq"] == ({FLOAT16}, {FLOAT16})
        assert types["c"] == ({FLOAT16}, {FLOAT16}) and types["y"] == ({FLOAT}, {FLOAT})
        casts = {node.input[0] for node in to_half(model).graph.node if node.op_type == "Cast"}
        assert casts == {"a", "c"}

    def test_names_kept_on_demand(self, demo: onnx.ModelProto) -> None:
        kept = HalfConfig(keep=(r"base\.level[01].*", "wh.2"))
        wide = Islands(demo, kept).wide
        assert {"base.level0.0", "base.level1.0", "wh.2"} <= wide
        assert "base.level2.tree1.conv1" not in wide
        types = types_at(to_half(demo, kept))
        assert types["base.level0.0"] == ({FLOAT}, {FLOAT})

    @pytest.mark.parametrize(
        ("pattern", "words"),
        [
            ("neck.*", r"no node is called 'neck\.\*': nodes are called base\.base_layer\.0, .*, …, id\.2"),
            ("(", r"'\(' is no regular expression of node names"),
        ],
    )
    def test_names_of_nothing(self, demo: onnx.ModelProto, pattern: str, words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            to_half(demo, HalfConfig(keep=(pattern,)))


class TestGraph:
    def casts(self, model: onnx.ModelProto) -> list[onnx.NodeProto]:
        return [node for node in model.graph.node if node.op_type == "Cast"]

    def test_casts_are_few(self, demo: onnx.ModelProto, lowered: onnx.ModelProto) -> None:
        ends = ("images.fp16", "wh", "reg", "id", "hm_1.fp32")
        assert {node.name for node in self.casts(to_half(demo))} == {f"cast.{end}" for end in ends}
        # Each block: the shifts and what is sampled to FP32, the samples back; some blocks share an input.
        assert len(self.casts(to_half(lowered))) <= 5 + 3 * 16

    def test_no_cast_feeds_another_or_takes_a_constant(self, lowered: onnx.ModelProto) -> None:
        half = to_half(lowered)
        cast = {node.output[0] for node in self.casts(half)}
        constant = {tensor.name for tensor in half.graph.initializer}
        sources = [node.input[0] for node in self.casts(half)]
        assert not cast & set(sources) and not constant & set(sources)
        assert len(set(sources)) == len(sources)

    def test_names_stay(self, demo: onnx.ModelProto) -> None:
        half = to_half(demo)
        assert {node.name for node in demo.graph.node} <= {node.name for node in half.graph.node}
        assert {t.name for t in half.graph.initializer} == {t.name for t in demo.graph.initializer}
        for values in ("input", "output"):
            assert list(getattr(half.graph, values)) == list(getattr(demo.graph, values))
        assert half.ByteSize() < 0.52 * demo.ByteSize()

    def test_the_given_graph_is_left_alone(self, demo: onnx.ModelProto) -> None:
        before = demo.SerializeToString(deterministic=True)
        to_half(demo), rounded(demo), dense_upsampling(demo)
        assert demo.SerializeToString(deterministic=True) == before

    @pytest.mark.parametrize(("kind", "element"), [("fp16", FLOAT16), ("bf16", BFLOAT16)])
    def test_inputs_and_outputs_too(self, demo: onnx.ModelProto, kind: Any, element: int) -> None:
        half = to_half(demo, HalfConfig(kind=kind, half_io=True))
        ends = (*half.graph.input, *half.graph.output)
        assert {value.type.tensor_type.elem_type for value in ends} == {element}
        assert types_at(half)["gt"][0] == {FLOAT}
        assert precision_of(half) == kind

    def test_a_weight_of_both_kinds_is_stored_twice(self) -> None:
        model = small(
            [conv("x", "a"), conv("a", "b")],
            {"weight": weights(4, 4, 1, 1)},
            inputs={"x": (1, 4, 8, 8)},
            outputs=("b",),
        )
        half = to_half(model, HalfConfig(keep=("a",)))
        stored = {tensor.name: tensor.data_type for tensor in half.graph.initializer}
        assert stored == {"weight": FLOAT, "weight.fp16": FLOAT16}

    def test_quantised_graphs(self) -> None:
        """What quantises stays as it is; what is between becomes half precision."""
        scale, zero = np.float32(0.05), np.int8(0)
        model = small(
            [conv("x", "a"),
             helper.make_node("QuantizeLinear", ["a", "scale", "zero"], ["q"]),
             helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
             helper.make_node("DequantizeLinear", ["whole", "scale", "zero"], ["w"]),
             conv("d", "y", "w")],
            {"weight": weights(4, 4, 1, 1), "scale": scale, "zero": zero,
             "whole": np.ones((4, 4, 1, 1), np.int8)},
            inputs={"x": (1, 4, 8, 8)},
            outputs=("y",),
        )  # fmt: skip
        assert precision_of(model) == "int8"
        half = to_half(model)
        assert precision_of(half) == "int8"
        assert types_at(half)["y"] == ({FLOAT16}, {FLOAT16})
        assert {tensor.data_type for tensor in half.graph.initializer} == {FLOAT16, TensorProto.INT8}

    def test_constants_as_nodes(self) -> None:
        value = numpy_helper.from_array(np.float32(0.5))
        nodes = [helper.make_node("Constant", [], ["half"], value=value),
                 helper.make_node("Mul", ["x", "half"], ["a"]), conv("a", "y")]  # fmt: skip
        model = small(nodes, {"weight": weights(4, 4, 1, 1)}, inputs={"x": (1, 4, 8, 8)}, outputs=("y",))
        assert {t.name for t in to_half(model).graph.initializer} == {"half", "weight"}

    def test_twice_is_refused(self, demo: onnx.ModelProto) -> None:
        with pytest.raises(ConfigError, match="the graph is in fp16 already: start from the one in fp32"):
            to_half(to_half(demo))

    def test_graphs_within_nodes_are_refused(self) -> None:
        branch = helper.make_graph([], "branch", [], [])
        choice = helper.make_node("If", ["flag"], ["y"], then_branch=branch, else_branch=branch)
        model = small([choice], {}, inputs={"flag": ()}, outputs=("y",))
        with pytest.raises(EngineError, match="y is a If with graphs of its own"):
            to_half(model)

    def test_unknown_operators_are_refused(self) -> None:
        own = helper.make_node("Wobble", ["x"], ["a"], domain="somebody")
        model = small(
            [own, conv("a", "y")], {"weight": weights(4, 4, 1, 1)}, inputs={"x": (1, 4, 8, 8)}, outputs=("y",)
        )
        with pytest.raises(EngineError, match=r"the type of a, from Wobble a: cast the graph before"):
            to_half(model)


class TestDenseUpsampling:
    def test_answers_the_same(self, tmp_path: Path) -> None:
        depthwise = random_network(tmp_path, Lowering(dense_upsampling=False))
        dense = dense_upsampling(depthwise)
        groups = {
            attribute.i
            for node in dense.graph.node
            if node.op_type == "ConvTranspose"
            for attribute in node.attribute
            if attribute.name == "group"
        }
        assert groups == {1}
        onnx.checker.check_model(dense, full_check=True)
        image = {"images": np.random.default_rng(0).random((1, 3, 64, 96), np.float32)}
        before, after = answers(depthwise, image, tmp_path), answers(dense, image, tmp_path)
        for name, value in before.items():
            np.testing.assert_allclose(after[name], value, rtol=0, atol=1e-5)
        used = {name for node in dense.graph.node for name in node.input}
        assert {tensor.name for tensor in dense.graph.initializer} <= used

    def test_has_nothing_to_do_twice(self, demo: onnx.ModelProto) -> None:
        once = dense_upsampling(demo)
        assert dense_upsampling(once).SerializeToString() == once.SerializeToString()

    def test_names_say_what_was_done(self, tmp_path: Path) -> None:
        dense = dense_upsampling(random_network(tmp_path, Lowering(dense_upsampling=False)))
        names = [tensor.name for tensor in dense.graph.initializer if tensor.name.endswith(".dense")]
        assert len(names) == 8 and all(re.search(r"up_\d\.weight\.dense$", name) for name in names)
