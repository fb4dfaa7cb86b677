"""First layers on blocks of 2×2 pixels: what graphs answer, in every precision, and which have none.

Answers come from ONNX Runtime, which computes each node as it stands; parser and builder are TensorRT-RTX's.
"""

from __future__ import annotations

import dataclasses
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from tracker import manifest as manifests
from tracker.deploy import halved as module
from tracker.deploy.build import TOLERANCES, build
from tracker.deploy.export import ExportConfig, export_fairmot, generated_frames
from tracker.deploy.graph import Lowering
from tracker.deploy.halved import halved_stem, with_stem
from tracker.deploy.islands import HalfConfig, copy_of
from tracker.deploy.plan import BuildConfig
from tracker.deploy.precision import to_half
from tracker.deploy.quantise import LEVELS, Quantiser
from tracker.deploy.segments import cut
from tracker.deploy.weakly_typed import adapted
from tracker.errors import ConfigError
from tracker.models.fairmot import FairMOTConfig, random_fairmot

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "engines" / "fairmot_demo.onnx"
RTX = BuildConfig(builder="tensorrt_rtx")
STEM = ("base.base_layer.0", "base.level0.0", "base.level1.0")
LAST_OF_STEM = "base_level1_2"
RANGE = 4.0  # of what is quantised
FRAMES = generated_frames((162, 90), count=1)


def exported(folder: Path, **lowering: Any) -> Path:
    """A random FairMOT with DLA-34's first layers, narrow behind them."""
    model = random_fairmot(FairMOTConfig(max_channels=32, head_channels=8, embedding=8))
    config = ExportConfig(size=(96, 64), heads="raw", batch=None, lowering=Lowering(**lowering))
    export_fairmot(model, folder / "fairmot.onnx", config, FRAMES)
    return folder / "fairmot.onnx"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("halved"), deform="GridSample")


@pytest.fixture(scope="module")
def network(source: Path) -> onnx.ModelProto:
    return onnx.load(source)


@pytest.fixture(scope="module")
def quantised(network: onnx.ModelProto) -> onnx.ModelProto:
    quantiser = Quantiser(network)
    return quantiser.write({**dict.fromkeys(quantiser.tensors, RANGE), "images": 1.0})


def on_blocks(model: onnx.ModelProto) -> onnx.ModelProto:
    found = halved_stem(model)
    assert found is not None
    onnx.checker.check_model(found, full_check=True)
    return found


def with_output(model: onnx.ModelProto, tensor: str) -> onnx.ModelProto:
    shown = copy_of(model)
    shown.graph.output.append(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, None))
    return shown


def answers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """To two images."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).random((2, 3, 64, 96), np.float32)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"images": images}), strict=True))


def constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


class TestOnBlocks:
    def test_the_network_answers_the_same(self, network: onnx.ModelProto) -> None:
        model = on_blocks(network)
        shapes = {name: constants(model)[f"{name}.weight"].shape for name in STEM}
        assert list(shapes.values()) == [(64, 12, 5, 5), (64, 64, 3, 3), (32, 64, 3, 3)]
        expected, found = answers(network), answers(model)
        for name, values in expected.items():
            np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-5)

    def test_nothing_else_is_changed(self, network: onnx.ModelProto) -> None:
        before = network.SerializeToString()
        model = on_blocks(network)
        assert network.SerializeToString() == before
        assert model.graph.input == network.graph.input and model.graph.output == network.graph.output
        assert model.graph.node[0].op_type == "SpaceToDepth"
        old = [node for node in network.graph.node if node.name not in STEM]
        assert [node for node in model.graph.node[1:] if node.name not in STEM] == [*old]
        ours = tuple(f"{name}." for name in STEM)
        for name, values in constants(network).items():
            if not name.startswith(ours):
                np.testing.assert_array_equal(constants(model)[name], values)

    def test_sizes_told_inside_are_told_no_more_where_they_change(self, network: onnx.ModelProto) -> None:
        told = onnx.shape_inference.infer_shapes(network)
        before = {value.name: value for value in told.graph.value_info}
        after = {value.name: value for value in on_blocks(told).graph.value_info}
        changed = {STEM[0], "base_base_layer_2", STEM[1], "base_level0_2"}
        assert changed <= before.keys() - after.keys()
        assert all(before[name] == value for name, value in after.items()) and LAST_OF_STEM in after

    @pytest.mark.parametrize("kind", ["fp16", "bf16"])
    def test_a_cast_and_blocks_go_in_either_order(self, network: onnx.ModelProto, kind: Any) -> None:
        """The same weights; cast last, images are in half precision before they are moved."""
        config = HalfConfig(kind=kind)
        last, first = to_half(on_blocks(network), config), on_blocks(to_half(network, config))
        for name in STEM:
            weight = f"{name}.weight"
            assert constants(last)[weight].tobytes() == constants(first)[weight].tobytes()
        moved = next(node for node in last.graph.node if node.op_type == "SpaceToDepth")
        assert list(moved.input) == [f"images.{kind}"]

    def test_the_network_is_cut_behind_them(self, tmp_path: Path) -> None:
        whole = cut(to_half(on_blocks(onnx.load(exported(tmp_path)))))
        first, *others = whole.parts
        assert first is not None
        assert "SpaceToDepth" in {node.op_type for node in first.graph.node}
        assert len(others) == 8
        assert whole.inputs == ("images",)


class TestQuantised:
    def test_layers_answer_the_same(self, quantised: onnx.ModelProto) -> None:
        """Sums in another order may move a number to the next integer, and hardly ever do."""
        inside = answers(with_output(quantised, LAST_OF_STEM))[LAST_OF_STEM]
        found = answers(with_output(on_blocks(quantised), LAST_OF_STEM))[LAST_OF_STEM]
        assert np.abs(inside).mean() > 0.1
        differences = np.abs(found - inside)
        assert differences.max() < RANGE / LEVELS and (differences > 1e-4).mean() < 0.01

    def test_weights_are_the_same_integers_on_the_same_scales(self, quantised: onnx.ModelProto) -> None:
        old, new = constants(quantised), constants(on_blocks(quantised))
        for name, places in zip(STEM, (4, 4, 1), strict=True):
            before, after = old[f"{name}.weight.int8"], new[f"{name}.weight.int8"]
            assert after.dtype == np.int8
            for place in np.split(after, places):
                for one, other in zip(before, place, strict=True):
                    np.testing.assert_array_equal(np.sort(one[one != 0]), np.sort(other[other != 0]))
            for part in ("scale", "zero"):
                values = old[f"{name}.weight.{part}"]
                np.testing.assert_array_equal(new[f"{name}.weight.{part}"], [*values] * places)
        for name in ("images.scale", "base_base_layer_2.scale"):
            assert new[name] == old[name] and new[name].ndim == 0

    def test_weights_reach_tensorrt_8_as_the_same_integers(self, quantised: onnx.ModelProto) -> None:
        model = on_blocks(quantised)
        written = constants(adapted(to_half(model)))
        for name in STEM:
            values, scales = (written[f"{name}.weight.dq.{part}"] for part in ("fp32", "scale.fp32"))
            found = np.rint(values / scales.reshape(-1, 1, 1, 1))
            np.testing.assert_array_equal(found, constants(model)[f"{name}.weight.int8"])

    @pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
    def test_images_are_quantised_in_fp32_and_moved_as_integers(
        self, quantised: onnx.ModelProto, half: bool
    ) -> None:
        """In FP16 seven of 256 pixels would become another integer."""
        model = on_blocks(quantised)
        model = to_half(model) if half else model
        names = {name: each for each in model.graph.node for name in each.output}
        steps, name = list[str](), next(each for each in model.graph.node if each.name == STEM[0]).input[0]
        while name != "images":
            steps.append(names[name].op_type)
            name = names[name].input[0]
        pair = ["DequantizeLinear", "QuantizeLinear"]
        assert steps == [*pair, "SpaceToDepth", *pair]


class TestBuilt:
    """By TensorRT's own code, as `tools/build.py` does."""

    @pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
    def test_in_its_precision(self, rtx: Any, tmp_path: Path, source: Path, precision: Any) -> None:
        out = tmp_path / "fairmot.engine"
        done = build(source, out, RTX, precision=precision, frames=FRAMES, stem="blocks")
        assert (done.stem, done.manifest.precision) == ("blocks", precision)
        assert all(0 < error < TOLERANCES[precision] for error in done.errors.values())
        assert bool(done.errors) == (precision != "fp32")
        assert done.manifest.onnx_sha256 == manifests.sha256(source)

    @pytest.mark.parametrize("precision", [None, "int8"])
    def test_in_int8(
        self, rtx: Any, tmp_path: Path, source: Path, quantised: onnx.ModelProto, precision: Any
    ) -> None:
        path = tmp_path / "int8.onnx"
        onnx.save(quantised, path)
        digest = manifests.sha256(path)
        like = manifests.read(manifests.beside(source))
        about = dataclasses.replace(like, engine_sha256=digest, onnx_sha256=digest, precision="int8")
        manifests.write(about, manifests.beside(path))
        done = build(path, tmp_path / "int8.engine", RTX, precision=precision, stem="blocks")
        assert (done.stem, done.manifest.precision) == ("blocks", "int8")

    def test_by_the_tool(self, rtx: Any, tmp_path: Path, source: Path, capsys: Any) -> None:
        main = runpy.run_path(str(ROOT / "tools" / "build.py"))["main"]
        command = ["--builder", "tensorrt_rtx", "--out", str(tmp_path / "a.engine"), "--stem"]
        assert main([str(source), *command, "blocks"]) == 0
        assert "first layers on blocks of 2×2 pixels" in capsys.readouterr().out
        assert main([str(source), *command, "pixels"]) == 0
        assert "2×2" not in capsys.readouterr().out
        assert main([str(DEMO), *command, "blocks"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("build: --stem blocks: the graph does not begin with two or more plain conv")
        assert error.count("\n") == 1


def stem_of(
    *nodes: onnx.NodeProto, shape: tuple[int | str, ...] = (1, 3, 8, 12), **weights: Any
) -> onnx.ModelProto:
    """Convolutions "a" (3 → 4 channels) and "y" (of stride 2), or the nodes given instead of these."""
    given = {"w": np.ones((4, 3, 3, 3)), "v": np.ones((5, 4, 3, 3)), "bias": np.ones(4), "s": np.ones(())}
    stored = {
        name: np.asarray(values, np.int8 if name.startswith("i") else np.float32)
        for name, values in {**given, **weights}.items()
    }
    graph = helper.make_graph(
        nodes or [conv("x w bias", "a"), conv("a v", "y", stride=2)],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(values, name) for name, values in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def node(kind: str, inputs: str, name: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs.split(), [name], name, **attributes)


def conv(inputs: str, name: str, *, stride: int = 1, **attributes: Any) -> onnx.NodeProto:
    return node("Conv", inputs, name, **{"strides": [stride] * 2, "pads": [1] * 4, **attributes})


FIRST, LAST = conv("x w bias", "a"), conv("a v", "y", stride=2)
PAIR = (node("QuantizeLinear", "a s iz", "q"), node("DequantizeLinear", "q s iz", "b"))
OTHERS: dict[str, onnx.ModelProto] = {
    "images of odd size": stem_of(shape=(1, 3, 8, 13)),
    "images of open size": stem_of(shape=(1, 3, "H", "W")),
    "one layer": stem_of(conv("x w bias", "y", stride=2)),
    "none of stride 2": stem_of(FIRST, conv("a v", "y")),
    "wide layers": stem_of(w=np.ones((32, 3, 3, 3)), v=np.ones((5, 32, 3, 3)), bias=np.ones(32)),
    "layers that grow": stem_of(conv("x w bias", "a", pads=[2] * 4), LAST),
    "even kernels": stem_of(v=np.ones((5, 4, 2, 2))),
    "dilation": stem_of(FIRST, conv("a v", "y", stride=2, dilations=[2, 2])),
    "groups": stem_of(FIRST, conv("a v", "y", stride=2, group=2), v=np.ones((6, 2, 3, 3))),
    "weights computed": stem_of(node("Neg", "w", "n"), conv("x n bias", "a"), LAST),
    "weights used twice": stem_of(
        FIRST, conv("a v", "b"), conv("b v", "y", stride=2), v=np.ones((4, 4, 3, 3))
    ),
    "biases used twice": stem_of(FIRST, conv("a v bias", "y", stride=2), v=np.ones((4, 4, 3, 3))),
    "a sum beside": stem_of(FIRST, LAST, node("Add", "a a", "z")),
    "something else between": stem_of(FIRST, node("MaxPool", "a", "b", kernel_shape=[3, 3], pads=[1] * 4),
                                      conv("b v", "y", stride=2)),
    "scales by channel between": stem_of(
        FIRST, *PAIR, conv("b v", "y", stride=2), s=np.ones(4), iz=np.zeros(4)
    ),
    "weights around another zero": stem_of(
        FIRST, node("DequantizeLinear", "i8 s iz", "b"), conv("a b", "y", stride=2),
        i8=np.ones((5, 4, 3, 3)), iz=3,
    ),
    "scales by input channel": stem_of(
        FIRST, node("DequantizeLinear", "i8 s iz", "b", axis=1), conv("a b", "y", stride=2),
        i8=np.ones((4, 4, 3, 3)), iz=np.zeros(4), s=np.ones(4),
    ),
}  # fmt: skip


class TestGraphs:
    def test_that_begin_so(self) -> None:
        """What the others differ from; also with one scale for all, and without biases."""
        back = node("DequantizeLinear", "i8 s iz", "w8")
        pair = stem_of(FIRST, *PAIR, back, conv("b w8", "y", stride=2), i8=np.ones((5, 4, 3, 3)), iz=0)
        for model in (stem_of(), pair):
            assert halved_stem(model) is not None

    @pytest.mark.parametrize("name", OTHERS)
    def test_that_do_not_are_left_or_refused(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        model = OTHERS[name]
        monkeypatch.setattr(module, "DEFAULT", "blocks")
        assert with_stem(model, None) == (model, "pixels")
        with pytest.raises(ConfigError, match=r"--stem blocks: the graph does not begin with .*: leave the"):
            with_stem(model, "blocks")

    def test_may_be_asked_for_or_not(self, network: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch) -> None:
        for default in ("pixels", "blocks"):
            monkeypatch.setattr(module, "DEFAULT", default)
            assert with_stem(network, None)[1] == default
            assert with_stem(network, "blocks")[1] == "blocks"
            assert with_stem(network, "pixels") == (network, "pixels")
