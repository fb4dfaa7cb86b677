"""FP32 networks into INT8 and half precision: where Q/DQ goes, ranges, frames, the judge and its search.

The graphs are built by the real TensorRT-RTX, which needs no GPU, and run by ONNX Runtime.
"""

from __future__ import annotations

import dataclasses
import json
import math
import runpy
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_files import detector

from tracker import manifest as manifests
from tracker.deploy.build import build
from tracker.deploy.calibration import observe as observing
from tracker.deploy.calibration.calibrate import CalibrationConfig, calibrate
from tracker.deploy.calibration.frames import choose, chosen, find
from tracker.deploy.calibration.judge import Judge, JudgeConfig, disagreement, refit
from tracker.deploy.calibration.ranges import BINS, METHODS, Histogram
from tracker.deploy.calibration.search import fewest
from tracker.deploy.export import ExportConfig, export_fairmot, generated_frames
from tracker.deploy.islands import precision_of
from tracker.deploy.lower import lowered
from tracker.deploy.parity.detections import Findings
from tracker.deploy.plan import BuildConfig, compile_plan
from tracker.deploy.precision import to_half
from tracker.deploy.quantise import LEVELS, Quantiser, half_scales, unquantised
from tracker.deploy.segments import cut
from tracker.deploy.weakly_typed import scales_in_fp32
from tracker.engine import describe, open_engine
from tracker.errors import ConfigError, EngineError, SourceError
from tracker.frontends.preprocess import Preprocessor
from tracker.models.fairmot import FairMOTConfig, random_fairmot
from tracker.pixels import to_bgr
from tracker.sources import open_source
from tracker.types import Detections

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parent.parent
DEMO, CLIP, TRUTH = (
    ROOT / "engines" / "fairmot_demo.onnx",
    ROOT / "videos" / "demo.mp4",
    ROOT / "videos" / "demo_gt.txt",
)
RTX = BuildConfig(builder="tensorrt_rtx")


@pytest.fixture(scope="module")
def demo() -> Quantiser:
    return Quantiser(onnx.load(DEMO))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random FairMOT with deformable convolutions, a quarter as wide as the full one, with its manifest."""
    torch.manual_seed(0)
    model = random_fairmot(FairMOTConfig(width=0.25, max_channels=32, head_channels=16, embedding=8))
    out = tmp_path_factory.mktemp("deformable") / "fairmot.onnx"
    export_fairmot(model, out, ExportConfig(size=(96, 64)), generated_frames((162, 90), 1))
    return out


@pytest.fixture(scope="module")
def deformable(small: Path) -> Quantiser:
    return Quantiser(onnx.load(small))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight frames of the demo's clip, as images."""
    folder = tmp_path_factory.mktemp("pictures")
    with open_source(CLIP) as source:
        for frame in islice(source, 8):
            assert frame.image is not None
            cv2.imwrite(str(folder / f"{frame.index}.png"), to_bgr(frame.image))
    return folder


@pytest.fixture(scope="module")
def shipped(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped engine in INT8, calibrated and judged on a little of its clip by the tool itself."""
    out = tmp_path_factory.mktemp("shipped") / "demo_int8.onnx"
    command = [str(DEMO), "--data", str(pictures), "--frames", "6", "--out", str(out)]
    command += ["--evaluate", str(CLIP), "--max-frames", "12", "--classes", "person"]
    command += ["--gt", str(TRUTH), "--benchmark", "MOT17"]
    assert tool(*command, "--rank-frames", "0", "--max-hota-loss", "3") == 0
    return out


def tool(*argv: str) -> int:
    """tools/calibrate.py with these arguments; its exit code."""
    code: int = runpy.run_path(str(ROOT / "tools" / "calibrate.py"))["main"](argv)
    return code


def graph_of(
    nodes: Sequence[onnx.NodeProto],
    weights: dict[str, np.ndarray],
    *,
    shape: Sequence[int | str] = (1, 4, 8, 8),
    outputs: Sequence[str] = ("y",),
    opset: int = 19,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(values.astype(np.float32), name) for name, values in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    return onnx.shape_inference.infer_shapes(model)


def conv(name: str, source: str, weight: str = "w", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node("Conv", [source, weight], [name], name=name, **attributes)


def node(kind: str, inputs: Sequence[str], name: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [name], name=name, **attributes)


W = np.random.default_rng(0).normal(size=(4, 4, 1, 1)).astype(np.float32)


def takes_integers(model: onnx.ModelProto) -> dict[str, list[str]]:
    """By node, the tensors that reach it as integers, weights included."""
    dequantised = {each.output[0]: each for each in model.graph.node if each.op_type == "DequantizeLinear"}
    return {
        each.name: [name.removesuffix(".dq") for name in each.input if name in dequantised]
        for each in model.graph.node
        if any(name in dequantised for name in each.input)
    }


def run(model: onnx.ModelProto, **inputs: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    answers: list[np.ndarray] = session.run(None, inputs)
    return answers


def reduced(quantiser: Quantiser, reach: float = 4.0, **options: Any) -> onnx.ModelProto:
    return quantiser.write(dict.fromkeys(quantiser.tensors, reach), **options)


class TestWhereIntegersGo:
    """As TensorRT fuses them."""

    def test_a_layer_takes_integers_and_has_weights_by_channel(self) -> None:
        quantiser = Quantiser(graph_of([conv("a", "x"), conv("y", "a")], {"w": W}))
        model = reduced(quantiser)
        assert takes_integers(model) == {"a": ["x", "w"]}
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        assert stored["w.int8"].dtype == np.int8 and np.abs(stored["w.int8"]).max() == 127
        assert stored["w.scale"].shape == stored["w.zero"].shape == (4,)
        error = np.abs(stored["w.int8"] * stored["w.scale"][:, None, None, None] - W)
        assert (error <= stored["w.scale"][:, None, None, None] / 2 + 1e-7).all()

    def test_the_last_layers_before_outputs_stay(self, demo: Quantiser) -> None:
        last = {name for name, why in demo.high.items() if why == "gives an output"}
        assert last == {"hm.2", "wh.2", "reg.2", "id.2"}

    def test_the_other_input_of_a_residual_sum_is_integers(self) -> None:
        """a → b → (b + a): the sum becomes part of b, which has to be fed a as integers."""
        nodes = [conv("a", "x"), node("Relu", ["a"], "r"), conv("b", "r"), node("Add", ["b", "r"], "s"),
                 node("Relu", ["s"], "t"), conv("y", "t")]  # fmt: skip
        assert takes_integers(reduced(Quantiser(graph_of(nodes, {"w": W}))))["s"] == ["r"]

    def test_of_two_convolutions_summed_the_earlier_one_is_the_other_input(self) -> None:
        nodes = [conv("a", "x"), conv("b", "x"), node("Add", ["b", "a"], "s"), conv("y", "s")]
        quantiser = Quantiser(graph_of(nodes, {"w": W}))
        assert takes_integers(reduced(quantiser))["s"] == ["a"]
        assert takes_integers(reduced(quantiser, keep=["b"]))["s"] == ["b"]
        assert "s" not in takes_integers(reduced(quantiser, keep=["a", "b"]))

    def test_what_only_moves_numbers_has_one_scale(self) -> None:
        nodes = [conv("a", "x"), node("Relu", ["a"], "b"), node("MaxPool", ["b"], "p", kernel_shape=[1, 1]),
                 node("Concat", ["p", "b"], "c", axis=1), conv("d", "c", "w8"), conv("y", "d")]  # fmt: skip
        quantiser = Quantiser(graph_of(nodes, {"w": W, "w8": np.tile(W, (1, 2, 1, 1))}))
        model = quantiser.write({"x": 1.0, "b": 2.0, "p": 1.5, "c": 3.0})
        integers = takes_integers(model)
        assert integers["p"] == ["b"] and integers["c"] == ["p", "b"] and "b" not in integers
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        assert len({float(stored[f"{name}.scale"]) for name in "bpc"}) == 1
        assert stored["c.scale"] == pytest.approx(3 / 127, rel=1e-3) and stored["x.scale"] < stored["c.scale"]

    def test_deformable_convolutions_are_left_alone(self, deformable: Quantiser) -> None:
        model = reduced(deformable)
        shifts = {name for name, why in deformable.high.items() if why == "gives coordinates"}
        assert len(shifts) == 16 and all(name.endswith("conv_offset_mask") for name in shifts)
        integers = takes_integers(model)
        assert not shifts & integers.keys()
        kinds = {each.name: each.op_type for each in model.graph.node}
        assert {kinds[name] for name in integers} == {"Conv", "MaxPool", "Concat", "Add"}

    def test_so_are_lowered_ones(self, deformable: Quantiser) -> None:
        quantiser = Quantiser(lowered(deformable.model))
        assert Counter(quantiser.high.values())["gives coordinates"] == 16
        columns = [name for name in quantiser.tensors if name.endswith(".columns")]
        assert len(columns) == 16  # what was sampled is fed as integers, where it was not

    def test_upsampling_channels_by_themselves_stays_as_it_is_however_it_is_written(
        self, demo: Quantiser, deformable: Quantiser
    ) -> None:
        for each in (demo, deformable):  # in groups, and dense with zeros
            assert Counter(each.high.values())["upsamples channels by themselves"] == 8

    def test_upsampling_that_mixes_channels_is_along_its_own_axis(self) -> None:
        weight = np.random.default_rng(0).normal(size=(4, 4, 2, 2)).astype(np.float32)
        nodes = [helper.make_node("ConvTranspose", ["x", "w"], ["a"], "up", strides=(2, 2)), conv("y", "a")]
        quantiser = Quantiser(graph_of(nodes, {"w": weight}))
        assert quantiser.layers["up"].axis == 1

    def test_a_convolution_with_a_constant_for_every_place_stays_as_it_is(self) -> None:
        """SOLOv2's coordinates. One number per channel is a bias like any other."""
        nodes = [conv("a", "x"), node("Add", ["a", "map"], "b"), conv("c", "b"),
                 node("Mul", ["gain", "c"], "d"), conv("y", "d")]  # fmt: skip
        weights = {"w": W, "map": np.ones((1, 1, 8, 8)), "gain": np.ones((1, 1, 1, 1))}
        quantiser = Quantiser(graph_of(nodes, weights))
        assert (set(quantiser.layers), set(quantiser.high)) == ({"c"}, {"a", "y"})

    def test_what_no_image_reaches_stays_as_it_is(self) -> None:
        """DETR's first look at its queries, which TensorRT computes while it builds."""
        nodes = [node("MatMul", ["queries", "w2"], "asked"), conv("a", "x"), node("Max", ["a", "asked"], "b"),
                 conv("y", "b")]  # fmt: skip
        weights = {"w": W, "queries": np.ones((8, 8)), "w2": np.ones((8, 8))}
        assert set(Quantiser(graph_of(nodes, weights)).layers) == {"a"}

    def test_layers_with_the_same_weights_share_the_integers_but_no_node(self) -> None:
        model = graph_of([conv("a", "x"), conv("b", "a"), conv("y", "b")], {"w": W})
        quantised = reduced(Quantiser(model))
        integers = takes_integers(quantised)
        assert (integers["a"], integers["b"]) == (["x", "w"], ["a", "w.1"])
        back = [each for each in quantised.graph.node if each.input[0] == "w.int8"]
        assert len(back) == 2 and list(back[0].input) == list(back[1].input)
        assert sum(tensor.name == "w.int8" for tensor in quantised.graph.initializer) == 1
        plain = unquantised(quantised)
        assert {each.input[1] for each in plain.graph.node if each.name != "y"} == {"w.dq"}

    def test_taken_back_the_graph_is_in_its_own_type_with_weights_as_the_integers_say(
        self, demo: Quantiser, tmp_path: Path
    ) -> None:
        quantised = demo.write(dict.fromkeys(demo.tensors, 4.0))
        plain = unquantised(quantised)
        assert not any(
            "Quantize" in node.op_type or "Dequantize" in node.op_type for node in plain.graph.node
        )
        assert [node.name for node in plain.graph.node] == [node.name for node in demo.model.graph.node]
        before = {tensor.name: numpy_helper.to_array(tensor) for tensor in demo.model.graph.initializer}
        after = {tensor.name: numpy_helper.to_array(tensor) for tensor in plain.graph.initializer}
        for layer in demo.layers.values():
            weight = before[layer.weight]
            step = np.abs(weight).max(axis=(1, 2, 3), keepdims=True) / LEVELS
            assert (np.abs(after[f"{layer.weight}.dq"] - weight) <= 0.51 * step + 1e-7).all()

    def test_taken_back_a_pair_between_two_types_is_a_cast(self, demo: Quantiser) -> None:
        """In half precision the images are quantised from FP32 and come back in FP16."""
        plain = unquantised(to_half(demo.write(dict.fromkeys(demo.tensors, 4.0))))
        onnx.checker.check_model(plain, full_check=True)
        (cast,) = [node for node in plain.graph.node if "images" in node.input]
        assert (cast.op_type, cast.attribute[0].i) == ("Cast", TensorProto.FLOAT16)

    def test_older_graphs_are_brought_to_opset_19(self) -> None:
        model = reduced(Quantiser(graph_of([conv("a", "x"), conv("y", "a")], {"w": W}, opset=11)))
        assert model.opset_import[0].version == 19

    def test_answers_are_those_of_rounding_by_hand(self) -> None:
        model = graph_of([conv("a", "x"), conv("y", "a")], {"w": W})
        x = np.random.default_rng(1).normal(size=(1, 4, 8, 8)).astype(np.float32)
        (answer,) = run(reduced(Quantiser(model), reach=2.0), x=x)
        scale, by_channel = half_scales(2.0), half_scales(np.abs(W).max(axis=(1, 2, 3)))[:, None]
        taken = np.clip(np.rint(x[0].reshape(4, 64) / scale), -128, 127) * scale
        weight = np.rint(W[:, :, 0, 0] / by_channel) * by_channel
        expected = W[:, :, 0, 0] @ (weight @ taken)
        np.testing.assert_allclose(answer.reshape(4, 64), expected, atol=0.03)
        assert (
            np.abs(answer.reshape(4, 64) - W[:, :, 0, 0] @ (W[:, :, 0, 0] @ x[0].reshape(4, 64))).max() > 0.1
        )

    def test_scales_are_numbers_of_fp16(self) -> None:
        limits = np.array([0.0, 1e-12, 1e-5, 0.3, 1.0, 77.7, 6e6])
        scales = half_scales(limits)
        np.testing.assert_array_equal(scales.astype(np.float16).astype(np.float32), scales)
        assert scales[0] == 1 and (scales * 127 >= limits * (1 - 1e-6)).all()
        assert (scales[3:] * 127 <= limits[3:] * 1.002).all()
        with pytest.raises(
            EngineError, match=r"a range reaches 1e\+08, more than INT8 with FP16 scales holds"
        ):
            half_scales(1e8)


class TestRanges:
    def filled(self, values: np.ndarray, pieces: int = 1) -> Histogram:
        histogram = Histogram()
        for piece in np.array_split(values.astype(np.float32), pieces):
            histogram.add(torch.from_numpy(piece))
        return histogram

    def test_each_method_on_a_normal_distribution_with_an_outlier(self) -> None:
        values = np.append(np.random.default_rng(0).normal(size=200_000), 8.0)
        limits = {method: self.filled(values).limit(method) for method in METHODS}
        assert limits["max"] == 8
        assert limits["percentile"] == pytest.approx(np.percentile(np.abs(values), 99.99), abs=0.02)
        # For a normal distribution in 8 bits the best clipping lies at 3.9 σ (Banner et al., NeurIPS 2019).
        assert 3.5 < limits["mse"] < 4.6
        assert 3.0 < limits["entropy"] < 5.5

    def test_mse_is_the_least_error(self) -> None:
        values = np.random.default_rng(1).laplace(size=100_000)

        def error(limit: float) -> float:
            scale = limit / 127
            return float(((np.clip(np.rint(values / scale), -127, 127) * scale - values) ** 2).mean())

        best = min(error(limit) for limit in np.linspace(2, np.abs(values).max(), 200))
        assert error(self.filled(values).limit("mse")) < 1.05 * best

    def test_growing_values_change_nothing(self) -> None:
        """In rising order the bins are merged often; the same values at once need that once."""
        values = np.sort(np.random.default_rng(2).exponential(size=50_000))
        together, rising = self.filled(values), self.filled(values, pieces=20)
        assert together.counts.sum() == rising.counts.sum() == len(values)
        for method in ("max", "percentile", "mse"):
            assert rising.limit(method) == pytest.approx(together.limit(method), rel=0.02)

    def test_zeros_do_not_count(self) -> None:
        values = np.abs(np.random.default_rng(3).normal(size=10_000))
        for method in METHODS:
            with_zeros = self.filled(np.append(values, np.zeros(90_000))).limit(method)
            assert with_zeros == pytest.approx(self.filled(values).limit(method), rel=1e-6)
        assert self.filled(np.zeros(10)).limit("entropy") == 0

    def test_what_is_no_number_is_refused(self) -> None:
        with pytest.raises(EngineError, match="the network computes NaN or inf"):
            self.filled(np.array([1.0, np.inf]))


class TestFrames:
    @pytest.fixture
    def pictures(self, tmp_path: Path) -> Path:
        """Forty grey pictures, and one red one among them."""
        for index in range(40):
            grey = np.full((36, 64, 3), 100 + index % 3, np.uint8)
            if index == 17:
                grey[:] = (0, 0, 255)
            cv2.imwrite(str(tmp_path / f"{index:03}.png"), grey)
        return tmp_path

    def test_are_spread_and_different(self, pictures: Path) -> None:
        choice = choose([pictures], 8, seed=0)
        indices = [index for _, index in choice.places]
        assert len(set(indices)) == 8 and indices == sorted(indices) and choice.seen == 40
        assert 17 in indices  # only one of forty, but unlike all others
        assert indices[0] < 15 and indices[-1] >= 25

    def test_the_seed_decides(self, pictures: Path) -> None:
        assert choose([pictures], 8, seed=3) == choose([pictures], 8, seed=3)
        assert len({choose([pictures], 8, seed=seed).places for seed in range(4)}) > 1

    def test_come_back_as_chosen(self, pictures: Path) -> None:
        choice = choose([pictures, pictures / "017.png"], 10, seed=0)
        frames = list(chosen([pictures, pictures / "017.png"], choice.places))
        assert [(frame.source, frame.index) for frame in frames] == list(choice.places)

    def test_of_lists_directories_and_videos(self, pictures: Path, tmp_path: Path) -> None:
        listed = tmp_path / "list.txt"
        listed.write_text("# two\n000.png\n\n017.png\n")
        assert find([listed, pictures]) == [tmp_path / "000.png", tmp_path / "017.png", pictures]
        videos = tmp_path / "videos"
        videos.mkdir()
        (videos / "b.mp4").write_bytes(CLIP.read_bytes())
        (videos / "notes.md").touch()
        assert find([videos]) == [videos / "b.mp4"]

    def test_unreadable_ones_are_skipped_and_counted(self, pictures: Path) -> None:
        for index in (3, 4):
            (pictures / f"{index:03}.png").write_bytes(b"no picture")
        choice = choose([pictures], 100, seed=0)
        assert (choice.seen, choice.unreadable, len(choice.places)) == (38, 2, 38)
        for index in range(5, 8):
            (pictures / f"{index:03}.png").write_bytes(b"no picture")
        with pytest.raises(SourceError, match=r"5 of 40 frames cannot be read, more than 10%"):
            choose([pictures], 8, seed=0)

    def test_none_at_all(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match=r"no frames to calibrate with: .*missing"):
            choose([tmp_path / "missing.mp4"], 8, seed=0)
        with pytest.raises(SourceError, match="no images and no videos there; looked for"):
            find([tmp_path])
        (tmp_path / "list.txt").write_text("\n")
        with pytest.raises(SourceError, match="an empty list"):
            find([tmp_path / "list.txt"])


class TestSearch:
    """The judge here is a sum: keeping the right layers is what it takes."""

    @pytest.mark.parametrize("needed", [0, 1, 2, 7, 30, 64])
    def test_finds_the_fewest(self, needed: int) -> None:
        layers = [f"layer{index}" for index in range(64)]
        found = fewest(layers, lambda kept: (len(kept), len(kept) >= needed))
        assert found is not None
        assert found.kept == tuple(layers[:needed]) and found.verdict == needed
        assert len(found.tries) <= 2 + math.ceil(math.log2(64)) + 5
        assert [each.good for each in found.tries] == [each.kept >= needed for each in found.tries]

    def test_says_when_nothing_helps(self) -> None:
        assert fewest(["a", "b"], lambda kept: (kept, False)) is None


class TestThresholds:
    def findings(self, scores: np.ndarray) -> Findings:
        count = len(scores)
        found = Detections(xyxy=np.tile(np.array([0.0, 0, 9, 9]), (count, 1)), score=scores,
                           label=np.zeros(count, np.int64))  # fmt: skip
        return Findings(numbers=(0,), detections=(found,), frame_rate=30.0, names=("person",))

    def test_follow_the_scores(self) -> None:
        """Scores squeezed to 0.8 of what they were: so are thresholds, and as many are above."""
        scores = np.random.default_rng(0).uniform(0.1, 1, 5000)
        fitted = refit(self.findings(scores), self.findings(0.8 * scores))
        assert fitted.keys() == {"byte"}
        assert fitted["byte"]["high"] == pytest.approx(0.48, abs=0.002)
        assert fitted["byte"]["birth"] == pytest.approx(0.56, abs=0.002)
        assert (0.8 * scores > fitted["byte"]["high"]).sum() == pytest.approx((scores > 0.6).sum(), abs=1)

    def test_stay_where_nothing_tells(self) -> None:
        none = self.findings(np.empty(0))
        assert refit(none, none)["byte"] == {"high": 0.6, "birth": 0.7}


def test_disagreement_counts_what_is_lost_moved_and_scored_otherwise() -> None:
    def of(xyxy: Any, score: Any) -> list[Detections]:
        boxes = np.array(xyxy, float).reshape(-1, 4)
        return [Detections(xyxy=boxes, score=np.array(score, float), label=np.zeros(len(boxes), np.int64))]

    one = of([[0, 0, 10, 10], [50, 50, 60, 60]], [0.5, 0.5])
    assert disagreement(one, one) == 0
    assert disagreement(one, of([[0, 0, 10, 10]], [0.5])) == pytest.approx(0.5)
    assert disagreement(one, of([[0, 0, 10, 8], [50, 50, 60, 60]], [0.5, 0.4])) == pytest.approx(0.1 + 0.1)
    assert disagreement(of([], []), one) == 0


class TestTheShippedEngine:
    """Calibrated and judged by the tool, then built, tracked with, and refused where it makes no sense."""

    def test_is_small_and_says_how_it_came_about(self, shipped: Path) -> None:
        manifest = manifests.read(manifests.beside(shipped))
        manifest.verify(shipped)
        assert manifest.precision == "int8" == precision_of(onnx.load(shipped))
        assert shipped.stat().st_size < 0.3 * DEMO.stat().st_size
        about = manifest.calibration
        assert about is not None
        assert (about.method, about.frames, about.seed, about.kept) == ("mse", 6, 0, ())
        assert manifest.input == manifests.read(manifests.beside(DEMO)).input

    def test_tracks_as_well(self, shipped: Path) -> None:
        report = json.loads(shipped.with_name("demo_int8.calibration.json").read_text())
        judged = report["judged"]
        assert (judged["truth"], judged["tracker"], judged["frames"]) == ("ground truth", "jde", 12)
        assert judged["hota_loss"] < 3 and judged["fp32"]["HOTA"] > 50
        found = judged["detections"]
        assert found["equal"]["recall"] > found["equal"]["reference_recall"] - 0.03
        assert found["box"]["mean"] < 1 and found["cosine"]["mean"] < 0.01
        assert sum(found["histogram"][0]) > 100

    def test_has_a_page(self, shipped: Path) -> None:
        page = shipped.with_name("demo_int8.calibration.html").read_text()
        for words in ("fairmot_demo.onnx in INT8", "<svg", "may be lost", "1 − cosine", "6 of 8 frames"):
            assert words in page
        assert "<script" not in page and "http" not in page

    def test_is_an_engine_like_any_other(self, shipped: Path) -> None:
        frontend, manifest = open_engine(shipped, device="cpu")
        frontend.close()
        assert manifest.precision == "int8"

    @pytest.mark.parametrize("precision", [None, "int8"])
    def test_is_built_by_tensorrt(self, rtx: Any, shipped: Path, tmp_path: Path, precision: Any) -> None:
        """With None what is left stays in FP32, with int8 it becomes FP16."""
        done = build(shipped, tmp_path / "demo.engine", RTX, precision=precision)
        assert (done.manifest.precision, done.manifest.calibration) == (
            "int8",
            manifests.read(manifests.beside(shipped)).calibration,
        )

    def test_is_not_calibrated_twice(self, shipped: Path, tmp_path: Path, capsys: Any) -> None:
        assert tool(str(shipped), "--data", str(CLIP), "--out", str(tmp_path / "a.onnx")) == 1
        assert "is in int8 already: start from the one in fp32" in capsys.readouterr().err

    def test_thresholds_reach_the_tracker(self, shipped: Path, tmp_path: Path) -> None:
        from tracker.session import Session, options_from

        engine = tmp_path / "demo.onnx"
        engine.write_bytes(shipped.read_bytes())
        manifest = manifests.read(manifests.beside(shipped))
        assert manifest.calibration is not None
        fitted = dataclasses.replace(manifest.calibration, thresholds={"jde": {"high": 0.35}})
        manifests.write(dataclasses.replace(manifest, calibration=fitted), manifests.beside(engine))

        def high(**options: Any) -> float:
            about = {"sources": [str(CLIP)], "engine": str(engine), "save": (), "device": "cpu"}
            with Session(options_from(about | options)) as session:
                return float(session.streams[0].config.high)

        assert high() == 0.35
        assert high(conf=0.5) == 0.5  # what the user says wins
        assert high(compat="fairmot") == 0.4  # as published


class TestGraphsOfOurs:
    """Parsed and built by TensorRT's own code, as `build` hands them over."""

    def test_with_deformable_convolutions_in_segments(self, rtx: Any, deformable: Quantiser) -> None:
        half = to_half(reduced(deformable))
        parts = [part for part in cut(half).parts if part is not None]
        assert len(parts) == 9
        quantised = 0
        for part in parts:
            onnx.checker.check_model(part, full_check=True)
            compile_plan(part, RTX)
            names = {value.name for value in (*part.graph.input, *part.graph.output)}
            assert not any(name.endswith((".q", ".dq")) for name in names)  # seams carry numbers
            quantised += sum(each.op_type == "QuantizeLinear" for each in part.graph.node)
        assert quantised == sum(each.op_type == "QuantizeLinear" for each in half.graph.node)

    def test_with_lowered_ones(self, rtx: Any, deformable: Quantiser) -> None:
        compile_plan(to_half(lowered(reduced(deformable))), RTX)

    def test_tensorrt_8_6_is_given_scales_in_fp32(self, deformable: Quantiser) -> None:
        half = to_half(reduced(deformable))
        told = scales_in_fp32(half)
        before, after = ({t.name: t for t in model.graph.initializer} for model in (half, told))
        scales = {each.input[1] for each in half.graph.node if each.op_type == "DequantizeLinear"}
        assert {before[name].data_type for name in scales} == {TensorProto.FLOAT16}
        assert {after[name].data_type for name in scales} == {TensorProto.FLOAT}
        for name in scales:
            np.testing.assert_array_equal(*(numpy_helper.to_array(each[name]) for each in (before, after)))
        assert scales_in_fp32(told) is told


def test_yolox_keeps_what_it_must(rtx: Any, data: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "yolox.onnx", tmp_path / "int8.onnx"
    source.write_bytes((data / "models" / "yolox_nano_416x416.onnx").read_bytes())
    manifests.write(describe(source, frontend="yolox"), manifests.beside(source))
    photographs = sorted((data / "images").iterdir())[:4]
    config = CalibrationConfig(frames=4, keep=("Conv_4[14]",), rank_frames=0, max_hota_loss=100)
    clip = data / "pets09" / "video.mp4"
    done = calibrate(source, out, photographs, config, JudgeConfig(clip=clip, max_frames=8))
    assert done.kept == ("Conv_41", "Conv_44") and len(done.layers) == 104
    assert done.judged is not None and not done.judged.truth
    integers = takes_integers(onnx.load(out))
    assert "Conv_41" not in integers and "Conv_47" in integers
    build(out, tmp_path / "int8.engine", RTX, precision="int8")


class TestHalfPrecision:
    """The same search, for layers that must stay in FP32."""

    @pytest.fixture
    def overflowing(self, tmp_path: Path) -> Path:
        """A YOLOX whose body goes beyond FP16 in one layer, and back in the next; it always sees a dog."""
        rows = np.zeros((84, 8))
        rows[9] = (0.5, 0.5, np.log(2), 0, 0.8, 0, 1, 0)
        path = detector(tmp_path / "large.onnx", rows)
        model = onnx.load(path)
        weights = {"k0": np.full((4, 3, 8, 8), 1e-4), "k1": np.full((4, 4, 1, 1), 6e4),
                   "k2": np.full((4, 4, 1, 1), 1e-4)}  # fmt: skip
        body = [conv("first", "images", "k0", strides=(8, 8)), conv("large", "first", "k1"),
                conv("small", "large", "k2")]  # fmt: skip
        rest = [onnx.NodeProto.FromString(each.SerializeToString()) for each in model.graph.node]
        rest[0].input[0] = "small"
        del model.graph.node[:]
        model.graph.node.extend([*body, *rest])
        model.graph.initializer.extend(
            numpy_helper.from_array(values.astype(np.float32), name) for name, values in weights.items()
        )
        onnx.save(model, path)
        about = describe(path, frontend="yolox", names=("person", "dog", "car"), size=(64, 64))
        manifests.write(about, manifests.beside(path))
        return path

    def test_what_overflows_is_kept(self, overflowing: Path, tmp_path: Path) -> None:
        out = tmp_path / "half.onnx"
        judging = JudgeConfig(clip=CLIP, max_frames=4)
        done = calibrate(overflowing, out, [], CalibrationConfig(precision="fp16"), judging)
        assert set(done.kept) == {"large", "small"}  # and "first", which could be, is in FP16
        assert done.judged is not None and done.judged.verdict.loss <= 0.5
        assert not done.judged.tries[0].good and done.judged.tries[0].verdict is None
        assert precision_of(onnx.load(out)) == "fp16"
        assert manifests.read(manifests.beside(out)).precision == "fp16"

    def test_bfloat16_reaches_that_far(self, overflowing: Path, tmp_path: Path) -> None:
        config = CalibrationConfig(precision="bf16", rank_frames=0)
        done = calibrate(
            overflowing, tmp_path / "half.onnx", [], config, JudgeConfig(clip=CLIP, max_frames=4)
        )
        assert done.kept == ()


class TestGoingOn:
    def test_after_an_interruption(self, small: Path, pictures: Path, tmp_path: Path) -> None:
        """Ctrl-C after five frames of eight; the second run looks at three, and the result is the same."""
        seen: list[int] = []
        stop = 5

        def told(what: str, done: int, total: int | None) -> None:
            if what == "calibrating":
                seen.append(done)
                if done == stop:
                    raise KeyboardInterrupt

        config = CalibrationConfig(frames=8)
        out, whole = tmp_path / "a.onnx", tmp_path / "b.onnx"
        calibrate(small, whole, [pictures], config)
        with pytest.raises(KeyboardInterrupt):
            calibrate(small, out, [pictures], config, progress=told)
        assert not out.exists()
        stop = 0
        seen.clear()
        assert calibrate(small, out, [pictures], config, progress=told).resumed == 5
        assert seen == [6, 7, 8]
        assert out.read_bytes() == whole.read_bytes()

    def test_but_not_with_other_footage(self, small: Path, pictures: Path, tmp_path: Path) -> None:
        out = tmp_path / "a.onnx"
        calibrate(small, out, [pictures], CalibrationConfig(frames=2))
        assert calibrate(small, out, [pictures], CalibrationConfig(frames=2, method="max")).resumed == 2
        assert calibrate(small, out, [pictures], CalibrationConfig(frames=3)).resumed == 0
        state = out.with_name("a.calibration.npz")
        state.write_bytes(state.read_bytes()[:100])
        assert calibrate(small, out, [pictures], CalibrationConfig(frames=2)).resumed == 0


class TestPixels:
    def test_are_those_the_front_end_feeds(self, small: Path, pictures: Path, tmp_path: Path) -> None:
        """What is observed of the input is the front end's own tensor: range, letterbox and colours."""
        observed = {}
        original = Histogram.add

        def spy(self: Histogram, values: torch.Tensor) -> None:
            observed.setdefault(id(self), []).append(values.clone())
            original(self, values)

        manifest = manifests.read(manifests.beside(small))
        quantiser = Quantiser(onnx.load(small))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Histogram, "add", spy)
            seen = observing.observe(
                quantiser.model, manifest, quantiser.tensors, [pictures], count=2, seed=0,
                state=tmp_path / "a.npz",
            )  # fmt: skip
        fed = observed[id(seen.histograms["images"])]
        frames = list(chosen([pictures], seen.choice.places))
        preprocess = Preprocessor(manifest.input, 1)
        for values, frame in zip(fed, frames, strict=True):
            torch.testing.assert_close(values, preprocess([frame])[0], rtol=0, atol=0)
        assert seen.histograms["images"].counts.shape == (BINS,)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"frames": -1}, r"calibration\.frames is -1; it must be a whole number from 0"),
        ({"method": 3}, r"calibration\.method is 3; it must be text or null"),
        ({"kept": "conv"}, r"calibration\.kept is 'conv'; it must be a list of layers' names"),
        ({"thresholds": {"jde": {"high": 2}}}, r"calibration\.thresholds is .*: 0 to 1"),
        ({"wobble": 1}, r"unknown key calibration\.wobble; known: method, frames, seed, kept, thresholds"),
    ],
    ids=str,
)
def test_a_manifest_says_nothing_impossible(
    shipped: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    path = tmp_path / "changed.json"
    about = json.loads(manifests.beside(shipped).read_text())
    assert manifests.read(manifests.beside(shipped)).calibration is not None
    about["calibration"] |= change
    path.write_text(json.dumps(about))
    with pytest.raises(ConfigError, match=words):
        manifests.read(path)


class TestWhatIsRefused:
    def refused(self, error: type[Exception], words: str, source: Path, **options: Any) -> None:
        out = options.pop("out", source.with_name("out.onnx"))
        config = options.pop("config", CalibrationConfig(frames=2))
        with pytest.raises(error, match=words):
            calibrate(source, out, options.pop("data", [CLIP]), config, **options)
        assert not manifests.beside(out).exists() or out == source

    @pytest.fixture
    def changed(self, tmp_path: Path) -> Callable[..., Path]:
        """The shipped network, changed, with a manifest that fits the file."""

        def write(change: Callable[[onnx.ModelProto], object], **about: Any) -> Path:
            path, model = tmp_path / "changed.onnx", onnx.load(DEMO)
            change(model)
            onnx.save(model, path)
            manifest = manifests.read(manifests.beside(DEMO))
            digest = manifests.sha256(path)
            manifest = dataclasses.replace(manifest, onnx_sha256=digest, engine_sha256=digest)
            spec = dataclasses.replace(manifest.input, **about)
            manifests.write(dataclasses.replace(manifest, input=spec), manifests.beside(path))
            return path

        return write

    def test_open_sizes(self, changed: Callable[..., Path]) -> None:
        def open_height(model: onnx.ModelProto) -> None:
            model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "H"

        words = r"takes 1×3×H×576 images, of open size: only the batch may be open"
        self.refused(EngineError, words, changed(open_height))

    def test_another_models_manifest(self, changed: Callable[..., Path]) -> None:
        words = r"takes 1×3×320×576 images, its manifest says 416×416: it is of another model"
        self.refused(ConfigError, words, changed(lambda model: None, size=(416, 416)))

    def test_half_precision_already(self, changed: Callable[..., Path]) -> None:
        path = changed(lambda model: model.CopyFrom(to_half(model)))
        self.refused(ConfigError, "is in fp16 already: start from the one in fp32", path)

    def test_networks_without_layers(self) -> None:
        with pytest.raises(EngineError, match="the graph has no layer to quantise"):
            Quantiser(graph_of([node("Relu", ["x"], "y")], {}))

    def test_names(self, tmp_path: Path) -> None:
        self.refused(ConfigError, "is no name for an ONNX file", DEMO, out=tmp_path / "a.engine")
        self.refused(ConfigError, "is the FP32 network: write to another file", DEMO, out=DEMO)

    def test_layers_that_are_not_there(self, tmp_path: Path) -> None:
        config = CalibrationConfig(frames=1, keep=("nothing.*",))
        words = r"no layer is called 'nothing\.\*': layers are called base\.base_layer\.0, "
        self.refused(ConfigError, words, DEMO, config=config, out=tmp_path / "a.onnx")

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (("--precision", "fp16"), "--precision fp16 needs a clip to judge by: name one with --evaluate"),
            (("--method", "best", "--data", str(CLIP)), "--method best needs a clip to judge by"),
            ((), "INT8 is calibrated with footage: name some with --data"),
            (("--data", str(CLIP), "--gt", "gt.txt"), "--gt gt.txt is of a clip: name that with --evaluate"),
            (("--data", "missing.mp4", "--frames", "2"), "no frames to calibrate with: missing.mp4"),
            (("--data", str(CLIP), "--evaluate", "missing.mp4"), "missing.mp4: no such file"),
            (("--data", str(CLIP), "--evaluate", str(CLIP), "--gt", "no.txt"), "no.txt is missing"),
            (("--data", str(CLIP), "--frames", "0"), "frames is 0; it must be at least 1"),
            (("--data", str(CLIP), "--max-hota-loss", "-1"), "max_hota_loss is -1.0; it must be 0 to 100"),
        ],
        ids=lambda value: "-".join(value[:1]) if isinstance(value, tuple) else "",
    )
    def test_options(self, options: Sequence[str], words: str, tmp_path: Path, capsys: Any) -> None:
        assert tool(str(DEMO), "--out", str(tmp_path / "a.onnx"), *options) == 1
        assert words in capsys.readouterr().err

    def test_a_clip_without_anything_in_it(self, tmp_path: Path) -> None:
        picture = tmp_path / "grey.png"
        cv2.imwrite(str(picture), np.full((320, 576, 3), 128, np.uint8))
        with pytest.raises(ConfigError, match=r"finds nothing to track in .* in fp32"):
            Judge.of(onnx.load(DEMO), manifests.read(manifests.beside(DEMO)), JudgeConfig(clip=picture))
