"""ONNX files into engines: the real parser and builder of TensorRT-RTX, which need no GPU, and their words.

Of what needs a GPU, how TensorRT 8.6 is told about precision is tested on a fake of its network.
"""

from __future__ import annotations

import dataclasses
import functools
import runpy
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from fake_tensorrt import fake_tensorrt
from onnx import TensorProto, helper, numpy_helper
from onnx_files import detector, save

from tracker import manifest as manifests
from tracker.deploy import plan
from tracker.deploy.build import TOLERANCES, build
from tracker.deploy.export import ExportConfig, export_fairmot, frames_of, generated_frames
from tracker.deploy.graph import Lowering
from tracker.deploy.islands import HalfConfig
from tracker.deploy.plan import BuildConfig, builder_held, compile_plan, mark_precision
from tracker.deploy.precision import to_half
from tracker.engine import describe
from tracker.errors import ConfigError, EngineError, SinkError
from tracker.models.fairmot import FairMOTConfig, random_fairmot
from tracker.runtimes import trt as trt_runtime
from tracker.runtimes.trt import collector, reason, remedy, trt_module
from tracker.types import Frame

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "engines" / "fairmot_demo.onnx"
RTX = BuildConfig(builder="tensorrt_rtx")


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    return generated_frames((162, 90), count=1)


@pytest.fixture(scope="module")
def exported(frames: list[Frame], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A random FairMOT, an eighth as wide as the full one."""

    @functools.cache
    def write(deform: str = "GridSample", heads: str = "peaks", batch: int | None = 1) -> Path:
        model = random_fairmot(FairMOTConfig(width=0.125, max_channels=24, head_channels=8, embedding=8))
        config = ExportConfig(size=(96, 64), lowering=Lowering(deform=deform), heads=heads, batch=batch)
        out = tmp_path_factory.mktemp("exported") / "fairmot.onnx"
        export_fairmot(model, out, config, frames)
        return out

    return write


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A YOLOX of 64×64 pixels that always sees one dog, with its manifest."""
    rows = np.zeros((84, 8))
    rows[9] = (0.5, 0.5, np.log(2), 0, 0.8, 0, 0.5, 0)
    path = detector(tmp_path / "small.onnx", rows)
    model = onnx.load(path)
    body = helper.make_node("Conv", ["images", "kernel"], ["body"], name="body", strides=(8, 8))
    kernel = np.random.default_rng(0).normal(size=(4, 3, 8, 8)).astype(np.float32)
    model.graph.node.insert(0, body)
    model.graph.node[1].input[0] = "body"
    model.graph.initializer.append(numpy_helper.from_array(kernel, "kernel"))
    onnx.save(model, path)
    manifest = describe(path, frontend="yolox", names=("person", "dog", "car"), size=(64, 64))
    manifests.write(manifest, manifests.beside(path))
    return path


def one_node(kind: str, *, opset: int = 19, **attributes: Any) -> onnx.ModelProto:
    node = helper.make_node(kind, ["x"], ["y"], name="the_node", **attributes)
    graph = helper.make_graph(
        [node],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 4, 8, 8))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


class TestEveryGraphOfOurs:
    """Parsed and built by TensorRT's own code."""

    @pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
    def test_the_shipped_engine(self, rtx: Any, tmp_path: Path, precision: Any) -> None:
        real = frames_of(str(ROOT / "videos" / "demo.mp4"), 1)
        done = build(DEMO, tmp_path / "demo.engine", RTX, precision=precision, frames=real)
        assert done.manifest.precision == precision
        assert done.bytes == (tmp_path / "demo.engine").stat().st_size
        limit = {"fp32": 0, "fp16": 0.005, "bf16": 0.02}[precision]
        assert all(0 < error < limit for error in done.errors.values())
        assert done.errors.keys() == ({"peaks", "wh", "reg", "id"} if limit else set())

    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    @pytest.mark.parametrize("heads", ["peaks", "raw"])
    def test_lowered_deformable_convolutions(
        self,
        rtx: Any,
        tmp_path: Path,
        exported: Callable[..., Path],
        frames: list[Frame],
        heads: str,
        precision: Any,
    ) -> None:
        done = build(exported(heads=heads), tmp_path / "a.engine", RTX, precision=precision, frames=frames)
        assert done.manifest.precision == precision

    @pytest.mark.parametrize("precision", ["fp32", "fp16"])
    def test_yolox(self, rtx: Any, tmp_path: Path, data: Path, precision: Any) -> None:
        source = tmp_path / "yolox.onnx"
        source.write_bytes((data / "models" / "yolox_nano_416x416.onnx").read_bytes())
        manifests.write(describe(source, frontend="yolox"), manifests.beside(source))
        real = frames_of(str(data / "pets09" / "video.mp4"), 1)
        done = build(source, tmp_path / "yolox.engine", RTX, precision=precision, frames=real)
        assert (done.manifest.frontend, done.manifest.precision) == ("yolox", precision)

    def test_an_open_batch(self, rtx: Any, tmp_path: Path, exported: Callable[..., Path]) -> None:
        source, out = exported(batch=None), tmp_path / "a.engine"
        assert build(source, out, RTX, precision="fp16").manifest.batch == (1, 4, 8)
        config = dataclasses.replace(RTX, batch=(2, 2, 3))
        assert build(source, out, config).manifest.batch == (2, 2, 3)

    def test_quantised_and_half(self, rtx: Any) -> None:
        model = one_node("Conv")
        scale, zero = np.float32(0.05), np.int8(0)
        model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], name="dq"))
        model.graph.node.insert(0, helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="q"))
        model.graph.node.insert(0, helper.make_node("DequantizeLinear", ["w8", "s", "z"], ["w"], name="wdq"))
        model.graph.node[3].input[:] = ["d", "w"]
        weights = {"s": scale, "z": zero, "w8": np.ones((4, 4, 3, 3), np.int8)}
        model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items())
        model = onnx.shape_inference.infer_shapes(model)
        for graph in (model, to_half(model)):
            assert compile_plan(graph, RTX).batch == (1, 1, 1)


class TestManifest:
    def test_says_what_the_engine_is(self, rtx: Any, tmp_path: Path, small: Path) -> None:
        out = tmp_path / "engines" / "small.engine"
        done = build(small, out, dataclasses.replace(RTX, sm=89), precision="fp16")
        manifest, before = manifests.read(manifests.beside(out)), manifests.read(manifests.beside(small))
        assert manifest == done.manifest
        manifest.verify(out)
        assert manifest.onnx_sha256 == manifests.sha256(small)
        assert (manifest.builder, manifest.tensorrt_version) == ("tensorrt_rtx", rtx.__version__)
        assert (manifest.sm, manifest.batch, manifest.precision) == (89, (1, 1, 1), "fp16")
        for key in ("frontend", "input", "outputs", "names"):
            assert getattr(manifest, key) == getattr(before, key)
        assert sorted(path.name for path in out.parent.iterdir()) == ["small.engine", "small.engine.json"]

    def test_is_bound_to_no_gpu_unless_told(self, rtx: Any, tmp_path: Path, small: Path) -> None:
        assert build(small, tmp_path / "a.engine", RTX).manifest.sm is None

    def test_image_size_comes_from_it_where_the_graph_leaves_it_open(self, rtx: Any, tmp_path: Path) -> None:
        path = save(
            tmp_path / "open.onnx",
            [helper.make_node("Relu", ["images"], ["output"])],
            {"images": (1, 3, "H", "W")},
            {"output": (1, 3, "H", "W")},
        )
        like = manifests.read(manifests.beside(DEMO))
        digest = manifests.sha256(path)
        like = dataclasses.replace(like, engine_sha256=digest, onnx_sha256=digest)
        manifests.write(like, manifests.beside(path))
        assert build(path, tmp_path / "a.engine", RTX).manifest.input == like.input


class TestWhatIsRefused:
    """In words that say what to do; an engine that was there stays."""

    def refused(self, error: type[Exception], words: str, source: Path, **options: Any) -> None:
        out = options.pop("out", source.with_name("old.engine"))
        config = options.pop("config", RTX)
        if out.parent.is_dir():
            out.write_bytes(b"the old one")
        with pytest.raises(error, match=words):
            build(source, out, config, **options)
        if out.parent.is_dir():
            assert out.read_bytes() == b"the old one"
            assert not list(out.parent.glob("*partial*"))
            assert not manifests.beside(out).exists()

    def test_deformable_convolutions(self, rtx: Any, exported: Callable[..., Path]) -> None:
        words = (
            r"TensorRT-RTX \S+ cannot take the DeformConv dla_up\.ida_0\.proj_1\.conv \(Plugin not "
            r"found.*\): it comes with TensorRT 10\.15; elsewhere build with --deform segments, or export "
            r"with --lower-deform"
        )
        self.refused(EngineError, words, exported(deform="DeformConv"), deform="plugin")

    def test_other_operators(self, rtx: Any) -> None:
        words = "cannot take the Wobble the_node .*: this TensorRT lacks an operator or its plugin"
        with pytest.raises(EngineError, match=words):
            compile_plan(one_node("Wobble"), RTX)

    def test_what_parses_but_cannot_be_built(self, rtx: Any) -> None:
        model = one_node("TopK", largest=1)
        node = model.graph.node[0]
        node.input.append("k")
        node.output.append("places")
        model.graph.initializer.append(numpy_helper.from_array(np.array([4000], np.int64), "k"))
        model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 5000
        with pytest.raises(EngineError, match=r"cannot build the graph \(.*K exceeds the maximum.*3840"):
            compile_plan(model, RTX)

    def test_a_batch_the_graph_does_not_have(self, rtx: Any, small: Path) -> None:
        words = "the graph takes 1 image per run, --batch asks for 1,4,8: leave the option out, or export"
        self.refused(ConfigError, words, small, config=dataclasses.replace(RTX, batch=(1, 4, 8)))

    def test_precision_that_cannot_be_had(self, rtx: Any, small: Path, tmp_path: Path) -> None:
        words = "the graph is in fp32: quantise it first with tools/calibrate.py"
        self.refused(ConfigError, words, small, precision="int8")
        half = tmp_path / "half.onnx"
        onnx.save(to_half(onnx.load(small)), half)
        digest = manifests.sha256(half)
        like = manifests.read(manifests.beside(small))
        about = dataclasses.replace(like, engine_sha256=digest, onnx_sha256=digest)
        manifests.write(about, manifests.beside(half))
        for other in ("fp32", "bf16"):
            words = f"the graph is in fp16 already: leave out --precision {other}, or start from fp32"
            self.refused(ConfigError, words, half, precision=other)
        assert build(half, tmp_path / "half.engine", RTX).manifest.precision == "fp16"

    def test_half_precision_that_answers_otherwise(
        self, rtx: Any, exported: Callable[..., Path], frames: list[Frame], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(TOLERANCES, "fp16", 1e-6)
        words = r"in fp16 the output \w+ differs by 0\.\d+% from fp32, more than 0%: keep more nodes"
        self.refused(EngineError, words, exported(), precision="fp16", frames=frames)

    def test_half_precision_of_nothing(self, rtx: Any, small: Path, tmp_path: Path) -> None:
        words = "nothing in the graph can be in fp16: leave out --precision"
        self.refused(ConfigError, words, small, precision="fp16", half=HalfConfig(keep=("body",)))

    def test_files_that_are_no_such_thing(self, rtx: Any, small: Path, tmp_path: Path) -> None:
        out = tmp_path / "engine.onnx"
        self.refused(
            ConfigError, r"engine\.onnx is no name for an engine: end it in \.engine", small, out=out
        )
        alone = tmp_path / "alone.onnx"
        alone.write_bytes(small.read_bytes())
        self.refused(EngineError, r"has no manifest alone\.onnx\.json beside it: write one with", alone)
        small.write_bytes(b"another")
        self.refused(EngineError, r"is not the file its manifest .* describes", small)
        like = manifests.read(manifests.beside(small))
        about = dataclasses.replace(like, engine_sha256=manifests.sha256(small))
        manifests.write(about, manifests.beside(small))
        self.refused(EngineError, "is no ONNX file or is cut short: export or copy it again", small)

    def test_nowhere_to_write(self, rtx: Any, small: Path, tmp_path: Path) -> None:
        with pytest.raises(SinkError, match=r"cannot write .*small\.onnx"):
            build(small, small / "a.engine", RTX)

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            (
                {"tactics": ("CUBLAS_OF_OLD",)},
                "no tactic source CUBLAS_OF_OLD in this TensorRT; there is .*JIT",
            ),
            ({"sm": 90}, "no sm SM90 in this TensorRT; there is .*SM89"),
        ],
        ids=str,
    )
    def test_names_this_tensorrt_does_not_know(
        self, rtx: Any, small: Path, config: dict[str, Any], words: str
    ) -> None:
        self.refused(ConfigError, words, small, config=dataclasses.replace(RTX, **config))

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            ({"batch": (4, 1, 8)}, "batch is 4,1,8; it must be MIN,OPT,MAX, rising"),
            ({"batch": (0, 1, 1)}, "batch is 0,1,1"),
            ({"workspace_mib": 0}, "workspace_mib is 0; it must be at least 1"),
            ({"sm": 89}, "--sm is for --builder tensorrt_rtx"),
        ],
        ids=str,
    )
    def test_impossible_options(self, config: dict[str, Any], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            BuildConfig(**config)

    def test_tensorrt_that_is_not_there(
        self, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", None)  # type: ignore[arg-type]
        words = r"tensorrt cannot be used here .*: install it with `pip install 'tracker\[tensorrt\]'`"
        self.refused(EngineError, words, small, config=BuildConfig())

    def test_tensorrt_without_a_gpu(
        self, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", sys)
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
        words = r"TensorRT builds on the GPU it builds for; cuda:0 is asked for and torch sees 0"
        self.refused(EngineError, words, small, config=BuildConfig())


def test_one_builder_serves_all_graphs_of_a_build(
    rtx: Any, tmp_path: Path, exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernels are loaded once, and let go of when the engine is written."""
    monkeypatch.setattr(plan, "_held", {})
    made, builder = [], rtx.Builder
    monkeypatch.setattr(rtx, "Builder", lambda messages: made.append(messages) or builder(messages))
    with builder_held(RTX):
        for name in ("a.engine", "b.engine"):
            build(exported(), tmp_path / name, RTX)
    assert len(made) == 1
    build(exported(), tmp_path / "c.engine", RTX)
    assert len(made) == 2


class TestWhileItWorks:
    def test_tells_how_far_it_is(
        self, rtx: Any, exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(plan, "TICK_SECONDS", 0.01)
        told: list[tuple[str, float | None]] = []
        compile_plan(onnx.load(exported()), RTX, lambda what, share: told.append((what, share)))
        shares = [share for _, share in told if share is not None]
        assert len(shares) > 3 and 0 <= min(shares) <= max(shares) <= 1
        assert len({what for what, _ in told}) > 1

    def test_stops_when_interrupted(
        self, rtx: Any, tmp_path: Path, exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(plan, "TICK_SECONDS", 0.01)

        def interrupt(what: str, share: float | None) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            build(exported(), tmp_path / "a.engine", RTX, progress=interrupt)
        assert list(tmp_path.iterdir()) == []


class TestTimingCache:
    @pytest.mark.parametrize("refuses", [False, True])
    def test_keeps_what_was_measured_whatever_came_of_it(self, tmp_path: Path, refuses: bool) -> None:
        """A TensorRT that adds to what it is given, and may then find no kernel."""
        trt: Any = fake_tensorrt("8.6.1")
        trt.NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=0)
        options = SimpleNamespace(create_timing_cache=bytearray)
        options.set_timing_cache = lambda cache, mismatch: setattr(options, "cache", cache) or True
        options.get_timing_cache = lambda: SimpleNamespace(serialize=lambda: options.cache)

        def measured(network: Any, options: Any) -> bytes | None:
            options.cache += b" and more"
            return None if refuses else b"plan"

        images = SimpleNamespace(name="x", shape=(1, 3, 8, 8))
        network = SimpleNamespace(num_inputs=1, num_outputs=0, get_input=lambda place: images)
        trt.Builder = lambda messages: SimpleNamespace(
            create_network=lambda flags: network,
            create_builder_config=lambda: options,
            build_serialized_network=measured,
        )
        trt.OnnxParser = lambda network, messages: SimpleNamespace(parse=lambda text: True)
        cache = tmp_path / "timing.cache"
        cache.write_bytes(b"known")
        work = plan._Compilation(trt, onnx.load(DEMO), BuildConfig(timing_cache=cache), {})
        with pytest.raises(EngineError, match="cannot build the graph") if refuses else nullcontext():
            assert work._run() == b"plan"
        assert cache.read_bytes() == b"known and more"


class TestPrecisionByFlags:
    """TensorRT 8.6, which takes types for suggestions unless it is told otherwise."""

    kinds = Enum(
        "LayerType",
        "CONVOLUTION CAST CONSTANT SHUFFLE GRID_SAMPLE ELEMENTWISE QUANTIZE DEQUANTIZE RESIZE",
    )

    class Layer:
        """Takes and gives tensors of these names; everything is free until it is pinned."""

        def __init__(self, kind: Any, inputs: list[str], outputs: list[str]) -> None:
            self.type, self.precision = kind, None
            self.output_types: dict[int, Any] = {}
            self._ends = inputs, outputs
            self.num_inputs, self.num_outputs = len(inputs), len(outputs)

        def get_input(self, place: int) -> Any:
            return SimpleNamespace(name=self._ends[0][place])

        def get_output(self, place: int) -> Any:
            return SimpleNamespace(name=self._ends[1][place])

        def set_output_type(self, place: int, kind: Any) -> None:
            self.output_types[place] = kind

    def marked(self, model: onnx.ModelProto, *flags: str) -> tuple[set[str], dict[str, Any]]:
        """The flags that were set, and the layers by the tensor they give."""
        by_kind = {
            "Conv": "CONVOLUTION", "Cast": "CAST", "GridSample": "GRID_SAMPLE", "Add": "ELEMENTWISE",
            "QuantizeLinear": "QUANTIZE", "DequantizeLinear": "DEQUANTIZE", "Resize": "RESIZE",
        }  # fmt: skip
        layers = [
            self.Layer(self.kinds[by_kind.get(node.op_type, "SHUFFLE")], [*node.input[:2]], [node.output[0]])
            for node in model.graph.node
        ]
        layers.append(self.Layer(self.kinds.CONSTANT, [], ["(Unnamed Layer* 7) [Constant]_output"]))
        network = SimpleNamespace(num_layers=len(layers), get_layer=layers.__getitem__)
        trt = SimpleNamespace(
            BuilderFlag=SimpleNamespace(**{flag: flag for flag in flags}),
            LayerType=self.kinds,
            float32="float32",
            float16="float16",
            __version__="8.6.1",
        )
        found: set[str] = set()
        mark_precision(trt, network, SimpleNamespace(set_flag=found.add), model)
        return found, {layer.get_output(0).name: layer for layer in layers}

    def test_islands_are_pinned_and_nothing_else(self, exported: Callable[..., Path]) -> None:
        half = to_half(onnx.load(exported()))
        flags, layers = self.marked(half, "FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS")
        assert flags == {"FP16", "OBEY_PRECISION_CONSTRAINTS"}
        pinned = {name for name, layer in layers.items() if layer.precision == "float32"}
        block = "dla_up.ida_0.proj_1.conv"
        assert {f"{block}.grid", f"{block}.samples", "peaks", "sigmoid"} <= pinned
        assert len(pinned) == 2 * 16 + 5  # grids and samplers, and what the peak test is made of
        assert layers[f"{block}.grid"].output_types == {0: "float32"}
        free = {f"{block}.conv_offset_mask", f"{block}.masked_samples", "wh.fp16", "cast.wh"}
        assert not free & pinned

    def quantised(self) -> onnx.ModelProto:
        """An image, resized and then quantised for the first of two convolutions."""
        names = {"scales": np.array([1, 1, 0.5, 0.5], np.float32), "s": np.float32(0.25), "z": np.int8(0),
                 "w8": np.ones((4, 4, 3, 3), np.int8), "w": np.ones((4, 4, 3, 3), np.float32)}  # fmt: skip
        steps = [
            ("Conv", ["x", "w"], "first"), ("Resize", ["first", "", "scales"], "small"),
            ("QuantizeLinear", ["small", "s", "z"], "q"), ("DequantizeLinear", ["q", "s", "z"], "dq"),
            ("DequantizeLinear", ["w8", "s", "z"], "taken_back"), ("Conv", ["dq", "taken_back"], "second"),
            ("Exp", ["second"], "y"),
        ]  # fmt: skip
        model = one_node("Conv")
        del model.graph.node[:]
        model.graph.node.extend(helper.make_node(kind, ins, [out], out) for kind, ins, out in steps)
        model.graph.node[1].attribute.append(helper.make_attribute("mode", "linear"))
        model.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in names.items())
        return onnx.shape_inference.infer_shapes(model)

    def test_what_quantises_is_left_alone(self) -> None:
        """TensorRT 8.6: "A DequantizeLayer can only run in DataType::kINT8 or DataType::kFP8 precision"."""
        model = to_half(self.quantised(), HalfConfig(keep=("second",)))
        flags, layers = self.marked(model, "FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS")
        assert flags == {"FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS"}
        assert layers["second"].precision == "float32" == layers["y"].precision
        assert not any(layers[name].precision for name in ("q", "dq", "taken_back"))

    def test_fp32_graphs_need_no_word(self, exported: Callable[..., Path]) -> None:
        flags, layers = self.marked(onnx.load(exported()), "FP16", "INT8", "OBEY_PRECISION_CONSTRAINTS")
        assert flags == set()
        assert all(layer.precision is None for layer in layers.values())

    def test_bfloat16_it_does_not_know(self, exported: Callable[..., Path]) -> None:
        half = to_half(onnx.load(exported()), HalfConfig(kind="bf16"))
        with pytest.raises(EngineError, match=r"TensorRT 8\.6\.1 knows no BF16: build with --precision fp16"):
            self.marked(half, "FP16", "INT8")


class TestWords:
    """What TensorRT 8.6 and TensorRT-RTX 1.7 really say."""

    @pytest.mark.parametrize(
        ("said", "why", "what"),
        [
            (
                "6: The engine plan file is generated on an incompatible device, expecting compute 9.0 got "
                "compute 8.9, please rebuild.",
                "The engine plan file is generated on an incompatible device, expecting compute 9.0",
                "another GPU model: build it again on this machine",
            ),
            (
                "1: [stdArchiveReader.cpp::StdArchiveReader::32] Error Code 1: Serialization (Serialization "
                "assertion stdVersionRead == serializationVersion failed.Version tag does not match. Note: "
                "Current Version: 232, Serialized Engine Version: 213)",
                "Serialization (Serialization assertion stdVersionRead",
                "another version of TensorRT: build it again",
            ),
            (
                "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion "
                "header.magicTag == kEXPECTED_MAGIC_TAG failed.Trying to load an engine created with "
                "incompatible serialization version (2021161080 != 1953657974). Check that the engine was "
                "not created using safety runtime. In throwUnlessHeaderOk at /_src/runtime.cpp:48)",
                "Serialization (Serialization assertion header.magicTag",
                "damaged, or no engine of this TensorRT",
            ),
            (
                "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In catchCudaError at "
                "/_src/common/dispatch/checkMacros.cpp:250 (cudaError 35: CUDA driver version is "
                "insufficient for CUDA runtime version))",
                "Cuda Runtime (cudaError 35: CUDA driver version is insufficient",
                "install an NVIDIA driver",
            ),
            (
                "(deserializeOnnxModel): MODEL_DESERIALIZE_FAILED: Assertion failed: "
                "model->ParseFromCodedStream(&codedInput): Failed to parse the ONNX model.",
                "Assertion failed: model->ParseFromCodedStream",
                "the file is no ONNX model or is cut short",
            ),
            (
                "3: API Usage Error (Parameter check failed at: runtime/myelin/runner.cpp::execute::732, "
                "condition: !isCapturing || isCapturable. The CUDA stream is in capturing mode, but this TRT "
                "engine is not stream capturable! )",
                "API Usage Error (Parameter check failed",
                "it runs without one",
            ),
            (
                'ModelImporter.cpp:140: While parsing node number 0 [Foo -> "y"]:',
                'While parsing node number 0 [Foo -> "y"]:',
                "build it again with tools/build.py on this machine, or use the .onnx file",
            ),
        ],
        ids=["gpu", "version", "damaged", "driver", "onnx", "capture", "unknown"],
    )
    def test_become_reasons_and_remedies(self, said: str, why: str, what: str) -> None:
        assert reason([said, "and its consequences"]).startswith(why)
        assert what in remedy([said])

    def test_silence_is_admitted(self) -> None:
        assert reason([]) == "TensorRT gives no reason"

    def test_are_collected_by_one_logger(self, rtx: Any) -> None:
        messages = collector(rtx)
        messages.log(rtx.ILogger.Severity.ERROR, "wrong")  # type: ignore[attr-defined]
        messages.log(rtx.ILogger.Severity.WARNING, "doubtful")  # type: ignore[attr-defined]
        messages.log(rtx.ILogger.Severity.INFO, "chatter")  # type: ignore[attr-defined]
        assert (messages.errors, messages.warnings) == (["wrong"], ["doubtful"])
        again = collector(rtx)
        assert again is messages and again.errors == []
        for _ in range(1000):
            messages.log(rtx.ILogger.Severity.ERROR, "again")  # type: ignore[attr-defined]
        assert len(messages.errors) < 1000

    def test_a_broken_installation(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(name: str) -> Any:
            raise ImportError("libnvinfer.so.10: cannot open shared object file")

        monkeypatch.setattr(trt_runtime.importlib, "import_module", broken)
        with pytest.raises(EngineError, match=r"tensorrt_rtx cannot be used here \(libnvinfer\.so\.10"):
            trt_module("tensorrt_rtx")


class TestTool:
    @pytest.fixture
    def tool(self) -> Callable[[Sequence[str]], int]:
        return runpy.run_path(str(ROOT / "tools" / "build.py"))["main"]

    def test_builds_and_says_what(
        self, rtx: Any, small: Path, tool: Callable[[Sequence[str]], int], capsys: Any
    ) -> None:
        out = small.with_name("small.engine")
        command = [str(small), "--out", str(out), "--builder", "tensorrt_rtx", "--precision", "fp16"]
        assert tool([*command, "--level", "2", "--workspace", "512", "--keep", "neck"]) == 1
        assert "no node is called" in capsys.readouterr().err
        assert tool([*command, "--level", "2", "--workspace", "512", "--no-tf32"]) == 0
        said = capsys.readouterr().out
        assert f"{out}: " in said and "MB, fp16, batch 1, tensorrt_rtx" in said
        assert "fp16 against fp32, relative: output 0." in said
        manifests.read(manifests.beside(out)).verify(out)

    def test_errors_are_one_line(
        self, tmp_path: Path, tool: Callable[[Sequence[str]], int], capsys: Any
    ) -> None:
        command = [str(tmp_path / "none.onnx"), "--out", str(tmp_path / "a.engine")]
        assert tool([*command, "--builder", "tensorrt_rtx"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("build: ") and error.count("\n") == 1

    @pytest.mark.parametrize(
        "options",
        [
            ["--batch", "1,4"],
            ["--precision", "fp8"],
            ["--builder", "onnx"],
            ["--level", "9"],
            ["--device", "cpu"],
        ],
        ids=lambda options: options[0],
    )
    def test_wrong_usage(self, tool: Callable[[Sequence[str]], int], options: list[str]) -> None:
        with pytest.raises(SystemExit) as stop:
            tool(["a.onnx", "--out", "a.engine", *options])
        assert stop.value.code == 2
