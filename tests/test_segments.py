"""Engines in segments: where a graph is cut, what its parts answer together, the file, and the runtime.

The parts run in ONNX Runtime and are built by the real TensorRT-RTX; between them stands the torch reference.
The runtime meets a fake of TensorRT, and on a GPU the real one.
"""

from __future__ import annotations

import dataclasses
import json
import runpy
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from fake_tensorrt import fake_tensorrt, plan, tensor
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

import tracker.deploy.segments
from tracker import manifest as manifests
from tracker.deploy.build import build
from tracker.deploy.export import ExportConfig, export_fairmot, generated_frames
from tracker.deploy.islands import HalfConfig, element_types, precision_of
from tracker.deploy.lower import lowered
from tracker.deploy.plan import BuildConfig, Plan
from tracker.deploy.precision import to_half
from tracker.deploy.quantise import Quantiser
from tracker.deploy.segments import Cut, choose, compile_segments, cut
from tracker.errors import ConfigError, EngineError
from tracker.kernels.deform import TAPS, pack_weight
from tracker.models.deform import DeformConv, deform_conv2d
from tracker.models.fairmot import FairMOTConfig, random_fairmot
from tracker.runtimes.onnx import OnnxRuntime
from tracker.runtimes.segments import MAGIC, Deform, Segments, SegmentsRuntime, in_segments, pack, unpack

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parent.parent
RTX = BuildConfig(builder="tensorrt_rtx")
HALF = TensorProto.FLOAT16


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random FairMOT with an open batch, and its manifest. Its offsets are a pixel or two."""
    model = random_fairmot(FairMOTConfig(width=0.25, max_channels=48, head_channels=8, embedding=8))
    out = tmp_path_factory.mktemp("segments") / "fairmot.onnx"
    export_fairmot(model, out, ExportConfig(size=(96, 64), batch=None), generated_frames((162, 90), 1))
    return out


@pytest.fixture(scope="module")
def network(source: Path) -> onnx.ModelProto:
    return onnx.load(source)


@pytest.fixture(scope="module")
def images() -> dict[str, Tensor]:
    return {"images": torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))}


def answers(model: onnx.ModelProto, inputs: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    onnx.save(model, folder / "answering.onnx")
    names = {value.name for value in model.graph.input}
    runtime = OnnxRuntime(folder / "answering.onnx", device="cpu", lanes=1, threads=1)
    return runtime.run({name: value for name, value in inputs.items() if name in names})


def in_turn(whole: Cut, inputs: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """All tensors at seams and ends, by running part after part."""
    known = dict(inputs)
    for index, part in enumerate(whole.parts):
        known |= answers(part, known, folder) if part is not None else {}
        for deform in whole.stages[index] if index < len(whole.stages) else ():
            known[deform.out] = reference(deform, known)
    return known


def reference(deform: Deform, known: dict[str, Tensor]) -> Tensor:
    x, shifts = known[deform.x], [known[name] for name in deform.shifts]
    offset, mask = shifts if len(shifts) == 2 else (shifts[0][:, :18], shifts[0][:, 18:])
    outputs = deform.weight.shape[2]
    out = torch.empty(len(x), outputs, *x.shape[2:], dtype=x.dtype)
    bias = deform.bias
    torch_kernel(x, offset, mask, deform.weight, bias, deform.logits, deform.relu, out=out)
    return out


def torch_kernel(
    x: Tensor,
    offset: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask_logits: bool,
    relu: bool,
    *,
    out: Tensor,
) -> None:
    """The kernel's promise, in torch: whatever it is given, it computes in FP32."""
    _, channels, outputs = weight.shape
    square = weight.permute(2, 1, 0).reshape(outputs, channels, 3, 3).float()
    mask = mask.float().sigmoid() if mask_logits else mask.float()
    bias = torch.zeros(outputs) if bias is None else bias.float()
    answer = deform_conv2d(x.float(), offset.float(), mask, square, bias)
    out.copy_(answer.relu() if relu else answer)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


class TestCut:
    def test_parts_together_answer_as_the_whole(
        self, network: onnx.ModelProto, images: dict[str, Tensor], tmp_path: Path
    ) -> None:
        expected, found = answers(network, images, tmp_path), in_turn(cut(network), images, tmp_path)
        assert expected.keys() == {"peaks", "wh", "reg", "id"}
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)

    def test_half_precision_is_within_half_a_percent(
        self, network: onnx.ModelProto, images: dict[str, Tensor], tmp_path: Path
    ) -> None:
        expected = answers(network, images, tmp_path)
        found = in_turn(cut(to_half(network)), images, tmp_path)
        for name in ("wh", "reg", "id"):
            assert found[name].dtype == torch.float32
            assert 0 < relative(found[name], expected[name]) < 0.005

    def test_convolutions_of_one_depth_run_together(self, network: onnx.ModelProto) -> None:
        whole = cut(network)
        assert [len(stage) for stage in whole.stages] == [3, 3, 3, 2, 2, 1, 1, 1]
        assert len(whole.parts) == 9 and all(whole.parts)
        names = [deform.name for stage in whole.stages for deform in stage]
        assert names[:3] == [f"dla_up.ida_{k}.proj_1.conv" for k in range(3)]
        assert names[-2:] == ["ida_up.node_1.conv", "ida_up.node_2.conv"]

    def test_what_surrounds_a_convolution_becomes_part_of_it(self, network: onnx.ModelProto) -> None:
        for graph in (network, to_half(network)):
            whole = cut(graph)
            for deform in (deform for stage in whole.stages for deform in stage):
                assert deform.relu and deform.logits
                assert deform.shifts == (f"{deform.name}.conv_offset_mask",)
            left = {node.op_type for part in whole.parts if part for node in part.graph.node}
            assert left.isdisjoint({"DeformConv", "Split"})
            sigmoids = [
                node for part in whole.parts if part for node in part.graph.node if "Sig" in node.op_type
            ]
            assert len(sigmoids) == 1  # of the heat map

    def test_seams_in_half_precision_lie_channels_last(self, network: onnx.ModelProto) -> None:
        assert cut(network).layouts == {}
        whole = cut(to_half(network))
        ends = {"images", "peaks", "wh", "reg", "id"}
        seams = {
            value.name: value.type.tensor_type.elem_type
            for part in whole.parts
            if part
            for value in (*part.graph.input, *part.graph.output)
            if value.name not in ends
        }
        assert set(seams.values()) == {HALF}
        assert whole.layouts == dict.fromkeys(seams, "HWC8")
        weights = {deform.weight.dtype for stage in whole.stages for deform in stage}
        assert weights == {torch.float16}

    def test_so_do_ends_that_are_in_half_precision(self, network: onnx.ModelProto) -> None:
        """But not an answer of a few channels, which would become eight."""
        layouts = cut(to_half(network, HalfConfig(half_io=True))).layouts
        assert {name for name in ("images", "peaks", "wh", "reg", "id") if name in layouts} == {
            "images",
            "id",
        }

    def test_the_given_graph_is_left_alone(self, network: onnx.ModelProto) -> None:
        before = network.SerializeToString(deterministic=True)
        cut(network)
        assert network.SerializeToString(deterministic=True) == before

    def test_offsets_in_half_precision_in_every_block(
        self, network: onnx.ModelProto, images: dict[str, Tensor], tmp_path: Path
    ) -> None:
        """What rounding them changes in each block's answer, with all else exact, at 2 pixels (RMS)."""
        whole = cut(network)
        known = in_turn(whole, images, tmp_path)
        for deform in (deform for stage in whole.stages for deform in stage):
            (shifts,) = deform.shifts
            far = known[shifts].clone()
            far[:, : 2 * TAPS] *= 2 / far[:, : 2 * TAPS].square().mean().sqrt()
            answers_ = [reference(deform, known | {shifts: each}) for each in (far.half().float(), far)]
            assert 0 < relative(*answers_) < 0.001

    def test_offsets_in_half_precision_over_noise(self) -> None:
        """Nothing changes faster from pixel to pixel; offsets up to 4 pixels, 1 on average (RMS)."""
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(shape, generator=generator) for shape in ((1, 16, 40, 60), (16, 16, 3, 3)))
        offset = torch.randn(1, 18, 40, 60, generator=generator)
        mask = torch.rand(1, 9, 40, 60, generator=generator)
        found, exact = (deform_conv2d(x, o, mask, weight, torch.zeros(16)) for o in (offset.half(), offset))
        assert offset.abs().max() > 4
        assert 0.0003 < relative(found, exact) < 0.001


def one_deform(
    constants: dict[str, Any] | None = None, *, after: Iterable[onnx.NodeProto] = (), **attributes: Any
) -> onnx.ModelProto:
    """x (1, 16, 6, 5) through a deformable convolution with offsets and masks of their own, into y."""
    random = np.random.default_rng(0)
    values = {
        "weight": random.normal(size=(8, 16, 3, 3)) / 12,
        "bias": random.normal(size=8),
        "k": random.normal(size=(18, 16, 1, 1)) / 4,
        "m": random.normal(size=(9, 16, 1, 1)) / 4,
    } | (constants or {})
    settings = {"kernel_shape": (3, 3), "pads": (1, 1, 1, 1)} | attributes
    after = list(after)
    end = "y" if not after else "deformed"
    inputs = ["x", "weight", "offset", "bias", "mask"]
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["offset"]),
        helper.make_node("Conv", ["x", "m"], ["mask"]),
        helper.make_node("DeformConv", inputs, [end], "the_one", **settings),
        *after,
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 16, 6, 5))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(v, np.float32), name) for name, v in values.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    return onnx.shape_inference.infer_shapes(model)


X = {"x": torch.randn(1, 16, 6, 5, generator=torch.Generator().manual_seed(1))}


class TestOtherGraphs:
    def test_offsets_and_masks_of_different_origin(self, tmp_path: Path) -> None:
        model = one_deform()
        whole = cut(model)
        assert whole.stages[0][0].shifts == ("offset", "mask") and not whole.stages[0][0].logits
        assert len(whole.parts) == 1  # nothing is left to do after the convolution
        expected = answers(model, X, tmp_path)["y"]
        torch.testing.assert_close(in_turn(whole, X, tmp_path)["y"], expected, rtol=0, atol=1e-5)

    def test_a_normalisation_is_folded(self, tmp_path: Path) -> None:
        norm = helper.make_node(
            "BatchNormalization", ["deformed", "gain", "shift", "mean", "var"], ["normal"]
        )
        relu = helper.make_node("Relu", ["normal"], ["y"])
        random = np.random.default_rng(1)
        values = {name: random.normal(size=8) for name in ("gain", "shift", "mean")}
        model = one_deform(values | {"var": random.uniform(0.5, 2, 8)}, after=(norm, relu))
        whole = cut(model)
        (part,) = whole.parts
        assert part is not None and [node.op_type for node in part.graph.node] == ["Conv", "Conv"]
        expected = answers(model, X, tmp_path)["y"]
        torch.testing.assert_close(in_turn(whole, X, tmp_path)["y"], expected, rtol=0, atol=1e-5)

    def test_an_answer_that_others_use_too_stays(self, tmp_path: Path) -> None:
        nodes = [helper.make_node("Relu", ["deformed"], ["positive"]),
                 helper.make_node("Add", ["deformed", "positive"], ["y"])]  # fmt: skip
        model = one_deform(after=nodes)
        whole = cut(model)
        assert not whole.stages[0][0].relu and len(whole.parts) == 2
        expected = answers(model, X, tmp_path)["y"]
        torch.testing.assert_close(in_turn(whole, X, tmp_path)["y"], expected, rtol=0, atol=1e-5)

    @pytest.mark.parametrize(
        ("attributes", "words"),
        [
            ({"strides": (2, 2)}, r"the_one has strides \[2, 2\]; \[1, 1\] can be had"),
            ({"dilations": (2, 2), "pads": (2, 2, 2, 2)}, r"the_one has pads"),
            ({"group": 2}, "the_one has group 2; 1 can be had"),
        ],
        ids=str,
    )
    def test_other_deformable_convolutions_are_refused(self, attributes: Any, words: str) -> None:
        weight = np.zeros((8, 16 // attributes.get("group", 1), 3, 3))
        model = one_deform({"weight": weight}, **attributes)
        with pytest.raises(EngineError, match=words + ".*: build with --deform lower"):
            cut(model)

    def test_channels_that_fit_no_tensor_core_are_refused(self) -> None:
        model = one_deform()
        model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 24
        for tensor_, kernel in zip(model.graph.initializer, (3, 0, 1, 1), strict=True):
            if kernel:
                wide = np.zeros((tensor_.dims[0], 24, kernel, kernel), np.float32)
                tensor_.CopyFrom(numpy_helper.from_array(wide, tensor_.name))
        del model.graph.value_info[:]
        with pytest.raises(EngineError, match="the_one is 3×3 of 24 channels; 3×3 of a multiple of 16"):
            cut(model)


class TestLowered:
    def test_answers_as_the_whole(
        self, network: onnx.ModelProto, images: dict[str, Tensor], tmp_path: Path
    ) -> None:
        low = lowered(network)
        onnx.checker.check_model(low, full_check=True)
        kinds = [node.op_type for node in low.graph.node]
        assert "DeformConv" not in kinds and kinds.count("GridSample") == 16
        expected, found = answers(network, images, tmp_path), answers(low, images, tmp_path)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5)

    def test_coordinates_stay_in_fp32_when_it_is_cast(self, network: onnx.ModelProto) -> None:
        types = element_types(to_half(lowered(network)))
        grids = [name for name in types if name.endswith(".grid")]
        assert len(grids) == 16 and {types[name] for name in grids} == {TensorProto.FLOAT}

    def test_other_deformable_convolutions_are_refused(self) -> None:
        words = r"the_one has strides \[2, 2\]; \[1, 1\] can be had as GridSample"
        with pytest.raises(EngineError, match=words):
            lowered(one_deform(strides=(2, 2)))

    def test_is_built_when_asked_for(self, rtx: Any, source: Path, tmp_path: Path) -> None:
        done = build(source, tmp_path / "a.engine", RTX, precision="fp16", deform="lower")
        assert (done.deform, done.manifest.precision) == ("lower", "fp16")
        assert not in_segments(tmp_path / "a.engine")


class TestBuild:
    def test_by_itself_where_the_parser_has_no_deform_conv(
        self, rtx: Any, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "a.engine"
        tool = runpy.run_path(str(ROOT / "tools" / "build.py"))["main"]
        command = [str(source), "--out", str(out), "--builder", "tensorrt_rtx", "--precision", "fp16"]
        assert tool([*command, "--no-verify", "--batch", "1,2,4"]) == 0
        said = capsys.readouterr().out
        assert said.count("\n") == 2
        assert "an engine in segments (this TensorRT has no DeformConv): " in said
        manifest = manifests.read(manifests.beside(out))
        manifest.verify(out)
        assert (manifest.precision, manifest.batch, manifest.builder) == ("fp16", (1, 2, 4), "tensorrt_rtx")
        assert in_segments(out) and not in_segments(source)
        parts = unpack(out.read_bytes(), "a")
        assert (parts.library, parts.inputs) == ("tensorrt_rtx", ("images",))
        assert set(parts.outputs) == {"peaks", "wh", "reg", "id"}
        assert [bytes(each[:4]) for each in parts.plans] == [b"vtrt"] * 9

    def test_how_far_it_is(self, rtx: Any) -> None:
        told: list[tuple[str, float | None]] = []
        nodes = [helper.make_node("Neg", ["deformed"], ["y"])]
        compile_segments(one_deform(after=nodes), RTX, lambda what, share: told.append((what, share)))
        shares = [share for _, share in told if share is not None]
        assert shares == sorted(shares) and shares[-1] >= 0.5
        assert {what[:11] for what, _ in told} == {"part 1 of 2", "part 2 of 2"}

    def test_a_part_without_int8_kernels_is_built_in_half_precision_and_noted(
        self, network: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """TensorRT 8.6 refuses to quantise what lies as HWC8 at a seam."""
        asked: list[str] = []

        def compiled(part: onnx.ModelProto, *_: object, **__: object) -> Plan:
            asked.append(precision_of(part))
            seams = {value.name for value in part.graph.input} - {"images"}
            if any(node.op_type == "QuantizeLinear" and node.input[0] in seams for node in part.graph.node):
                raise EngineError("all of the candidates were removed")
            return Plan(part.SerializeToString(), "8.6.1", 90, (1, 2, 4), 0.0)

        monkeypatch.setattr(tracker.deploy.segments, "compile_plan", compiled)
        quantiser = Quantiser(network)
        model = to_half(quantiser.write(dict.fromkeys(quantiser.tensors, 4.0)))
        done = compile_segments(model, BuildConfig())
        parts = [onnx.load_from_string(bytes(each)) for each in unpack(done.content, "a").plans]
        assert [precision_of(part) for part in parts] == ["int8", *["fp16"] * 8]
        assert asked == ["int8", *["fp16"] * 7, "int8", "fp16"]
        (note,) = done.notes
        assert note == "part 9 of 9: not in INT8 but in fp16 (all of the candidates were removed)"

    def test_what_was_asked_for(
        self, rtx: Any, network: onnx.ModelProto, source: Path, tmp_path: Path
    ) -> None:
        assert choose(network, RTX, None) == "segments"
        assert choose(network, RTX, "plugin") == "plugin"
        with pytest.raises(EngineError, match="cannot take the DeformConv dla_up"):
            build(source, tmp_path / "a.engine", RTX, deform="plugin")
        plain = one_deform()
        del plain.graph.node[2]
        assert choose(plain, RTX, None) is None
        with pytest.raises(ConfigError, match="--deform segments: the graph has no DeformConv"):
            choose(plain, RTX, "segments")


def deform(x: str = "a", shifts: tuple[str, ...] = ("s",), out: str = "b", **options: Any) -> Deform:
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(8, 16, 3, 3, generator=generator) / 12
    settings = {"relu": True, "logits": True, "bias": torch.randn(8, generator=generator)} | options
    return Deform(name="the_one", x=x, shifts=shifts, out=out, weight=pack_weight(weight), **settings)


def segments(**changes: Any) -> Segments:
    """x → a = 2x; s = 2z; b from a and s by a deformable convolution; y = 2b."""
    wide = {"shape": (-1, 16, 4, 5)}
    before = plan(
        tensor("x", **wide), tensor("z", (-1, 27, 4, 5)), tensor("a", of="x", **wide),
        tensor("s", (-1, 27, 4, 5), of="z"), memory=5000,
    )  # fmt: skip
    after = plan(tensor("b", (-1, 8, 4, 5)), tensor("y", (-1, 8, 4, 5), of="b"))
    about = {"library": "tensorrt", "inputs": ("x", "z"), "outputs": ("y",)}
    return Segments(**(about | {"plans": [before, after], "stages": [[deform()]]} | changes))


class TestFile:
    def test_comes_back_as_it_went(self) -> None:
        given = segments(stages=[[deform(), deform(x="x", shifts=("o", "m"), out="c", bias=None)]])
        found = unpack(pack(given), "a.engine")
        assert (found.library, found.inputs, found.outputs) == ("tensorrt", ("x", "z"), ("y",))
        assert [bytes(each) for each in found.plans] == given.plans
        for mine, theirs in zip(found.stages[0], given.stages[0], strict=True):
            assert (mine.name, mine.x, mine.shifts, mine.out) == (
                theirs.name,
                theirs.x,
                theirs.shifts,
                theirs.out,
            )
            assert torch.equal(mine.weight, theirs.weight) and mine.weight.dtype == theirs.weight.dtype
        assert found.stages[0][1].bias is None

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_holds_weights_of_every_type(self, dtype: torch.dtype) -> None:
        one = deform(bias=torch.randn(8).to(dtype))
        (found,) = unpack(pack(segments(stages=[[one]])), "a").stages[0]
        assert found.bias is not None and torch.equal(found.bias, one.bias)  # type: ignore[arg-type]

    def test_begins_as_no_plan_and_no_other_engine_does(self) -> None:
        content = pack(segments())
        assert content[:8] == MAGIC and content[:4] not in (b"ftrt", b"ptrt", b"vtrt")
        assert int.from_bytes(content[:4], "little") > 1 << 30  # Ultralytics' engines begin with a length

    def test_damage_has_words(self) -> None:
        content = pack(segments())
        cases = [content[:n] for n in (0, 4, 12, 100, len(content) // 2, len(content) - 1)]
        start = content.index(b"{")
        cases.append(content[:start] + b"[" + content[start + 1 :])
        cases.append(content.replace(b'"float32"', b'"complex"'))
        cases.append(content.replace(b'"plans"', b'"plots"'))
        cases.append(content.replace(b'"shifts": ["s"]', b'"shifts": [   ]'))
        cases.append(MAGIC + (1 << 62).to_bytes(8, "little") + content[16:])
        for bad in cases:
            words = r"a\.engine is damaged, or no engine in segments \(.+\): build it again with tools/build"
            with pytest.raises(EngineError, match=words):
                unpack(bad, "a.engine")

    def test_is_data_alone(self) -> None:
        """Nothing in it is code but the plans: an index in JSON, and bytes."""
        content = pack(segments())
        length = int.from_bytes(content[8:16], "little")
        index = json.loads(content[16 : 16 + length])
        assert index["stages"][0][0]["weight"]["shape"] == [9, 16, 8]
        assert (16 + length) % 64 == 0 and all(begin % 64 == 0 for begin, _ in index["plans"])


@pytest.fixture(params=["8.6.1", "10.3.0"])
def trt(request: pytest.FixtureRequest) -> ModuleType:
    return fake_tensorrt(request.param)


def opened(folder: Path, trt: ModuleType, given: Segments | None = None, **options: Any) -> SegmentsRuntime:
    path = folder / "a.engine"
    path.write_bytes(pack(given or segments()))
    return SegmentsRuntime(path, device="cpu", bindings=trt, kernel=torch_kernel, **options)


def inputs(count: int, seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"x": (count, 16, 4, 5), "z": (count, 27, 4, 5)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def expected(given: dict[str, Tensor]) -> Tensor:
    return 2 * reference(deform(), {"a": 2 * given["x"], "s": 2 * given["z"]})


class TestRuntime:
    def test_says_what_it_takes_and_gives(self, tmp_path: Path, trt: ModuleType) -> None:
        runtime = opened(tmp_path, trt)
        assert runtime.inputs == {"x": (None, 16, 4, 5), "z": (None, 27, 4, 5)}
        assert runtime.outputs == {"y": (None, 8, 4, 5)}
        assert runtime.dtypes == dict.fromkeys("xzy", torch.float32)
        assert (runtime.max_batch, runtime.lanes) == (4, 2)
        assert runtime.description == (
            f"tensorrt {trt.__version__} in 2 parts, 1 deformable convolutions between them on cpu"
        )

    @pytest.mark.parametrize("count", [1, 3, 4])
    def test_parts_and_convolutions_in_turn(self, tmp_path: Path, trt: ModuleType, count: int) -> None:
        runtime = opened(tmp_path, trt)
        given = inputs(count)
        answer = runtime.run(given)["y"]
        runtime.run(inputs(4, seed=4))
        torch.testing.assert_close(answer, expected(given))

    def test_lanes_do_not_touch_each_other(self, tmp_path: Path, trt: ModuleType) -> None:
        runtime = opened(tmp_path, trt)
        one, other = runtime.lane(), runtime.lane()
        for lane, seed in ((one, 5), (other, 6)):
            for name, value in inputs(2, seed).items():
                lane.inputs[name][:2] = value
        first, second = one.enqueue(2)["y"], other.enqueue(2)["y"]
        torch.testing.assert_close(first, expected(inputs(2, 5)))
        torch.testing.assert_close(second, expected(inputs(2, 6)))
        assert one.enqueue(1)["y"].data_ptr() == first.data_ptr()

    def test_half_precision_channels_last(self, tmp_path: Path, trt: ModuleType) -> None:
        half: dict[str, Any] = {"dtype": "HALF", "layout": "HWC8"}
        shapes = {"wide": (-1, 16, 4, 5), "shifts": (-1, 27, 4, 5), "narrow": (-1, 8, 4, 5)}
        before = plan(
            tensor("x", shapes["wide"]), tensor("z", shapes["shifts"]),
            tensor("a", shapes["wide"], of="x", **half), tensor("s", shapes["shifts"], of="z", **half),
        )  # fmt: skip
        after = plan(tensor("b", shapes["narrow"], **half), tensor("y", shapes["narrow"], of="b"))
        one = deform()
        assert one.bias is not None
        narrow = dataclasses.replace(one, weight=one.weight.half(), bias=one.bias.half())
        seen: list[tuple[int, ...]] = []

        def kernel(x: Tensor, offset: Tensor, mask: Tensor, *rest: Any, out: Tensor) -> None:
            seen.extend((x.stride()[1:], offset.stride()[1:], mask.stride()[1:], out.stride()[1:]))
            torch_kernel(x, offset, mask, *rest, out=out)

        path = tmp_path / "half.engine"
        path.write_bytes(pack(segments(plans=[before, after], stages=[[narrow]])))
        runtime = SegmentsRuntime(path, device="cpu", bindings=trt, kernel=kernel)
        given = inputs(2)
        assert relative(runtime.run(given)["y"], expected(given)) < 0.003
        assert seen == [(1, 80, 16), (1, 160, 32), (1, 160, 32), (1, 40, 8)]

    def test_a_convolution_may_come_last(self, tmp_path: Path, trt: ModuleType) -> None:
        given = segments(plans=segments().plans[:1], outputs=("b",))
        runtime = opened(tmp_path, trt, given)
        torch.testing.assert_close(runtime.run(inputs(2))["b"], expected(inputs(2)) / 2)

    @pytest.mark.parametrize("batch", [0, 5])
    def test_a_batch_beyond_the_profile(self, tmp_path: Path, trt: ModuleType, batch: int) -> None:
        with pytest.raises(EngineError, match=f"batch is {batch}; this engine takes 1 to 4 images"):
            opened(tmp_path, trt).lane().enqueue(batch)

    @pytest.mark.parametrize(
        ("changes", "why"),
        [
            ({"stages": [[deform(x="x1")]]}, "the_one does not fit x1"),
            ({"stages": [[deform(shifts=("a",))]]}, "the_one does not fit a"),
            ({"stages": [[deform(out="a")]]}, "its parts disagree about a"),
            ({"outputs": ("y", "w")}, "nothing gives w"),
            (
                {"plans": [segments().plans[0], plan(tensor("b", (-1, 8, 4, 5)), profile=(1, 1, 1))]},
                "its parts differ in their batch",
            ),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_parts_that_do_not_fit(
        self, tmp_path: Path, trt: ModuleType, changes: dict[str, Any], why: str
    ) -> None:
        with pytest.raises(EngineError, match=rf"a\.engine is damaged, .*\({why}\): build it again"):
            opened(tmp_path, trt, segments(**changes))

    def test_faults_of_a_part_name_it(self, tmp_path: Path, trt: ModuleType) -> None:
        broken = plan(
            tensor("b", (-1, 8, 4, 5)), tensor("y", (-1, 8, 4, 5), of="b"), fault="gpu", where="load"
        )
        with pytest.raises(EngineError, match=r"a\.engine, part 1 cannot be loaded: .*another GPU model"):
            opened(tmp_path, trt, segments(plans=[segments().plans[0], broken]))

    def test_the_hash_is_checked_before_anything_is_loaded(self, tmp_path: Path, trt: ModuleType) -> None:
        manifest = manifests.read(ROOT / "engines" / "fairmot_demo.onnx.json")
        with pytest.raises(EngineError, match=r"is not the file its manifest"):
            opened(tmp_path, trt, manifest=manifest)
        assert trt.said == []

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(EngineError, match=r"cannot read .*none\.engine"):
            in_segments(tmp_path / "none.engine")


class TestOnGpu:
    @pytest.mark.parametrize(("half", "limit"), [(False, 1e-3), (True, 5e-3)], ids=["fp32", "fp16"])
    def test_a_real_engine_answers(
        self,
        gpu: torch.device,
        tensorrt: ModuleType,
        network: onnx.ModelProto,
        images: dict[str, Tensor],
        tmp_path: Path,
        half: bool,
        limit: float,
    ) -> None:
        tactics = ("EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS")
        config = BuildConfig(batch=(1, 2, 2), level=0, tf32=False, tactics=tactics)
        graph = to_half(network) if half else network
        path = tmp_path / "a.engine"
        path.write_bytes(compile_segments(graph, config).content)
        runtime = SegmentsRuntime(path)
        assert runtime.uncapturable is None
        for count in (2, 1, 2):
            given = {"images": images["images"][:count]}
            wanted = answers(network, given, tmp_path)
            for _ in range(2):  # captured, then replayed
                found = runtime.run(given)
                for name in ("wh", "reg", "id"):
                    assert relative(found[name].cpu(), wanted[name]) < limit

    @pytest.mark.parametrize(
        ("dtype", "limit"), [(torch.float32, 1e-4), (torch.float16, 2e-3)], ids=["fp32", "fp16"]
    )
    def test_the_layer_is_the_kernel_where_nothing_is_learnt(
        self, gpu: torch.device, dtype: torch.dtype, limit: float
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        layer = DeformConv(32, 24)
        for weight in layer.parameters():
            weight.data = 0.1 * torch.randn(weight.shape, generator=generator)
        x = torch.randn(2, 32, 20, 30, generator=generator)
        with torch.no_grad():
            wanted = layer.double()(x.double())
            found = layer.to(gpu, dtype)(x.to(gpu, dtype))
        assert relative(found.cpu(), wanted) < limit
