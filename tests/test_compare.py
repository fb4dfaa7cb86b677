"""Two engines compared: what is alike is called alike, and every planted fault is caught and located.

The networks are a small random FairMOT, as a checkpoint and as its export, and the one that ships; the clip
is the one that ships.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT
from onnx import helper, numpy_helper
from torch import nn

from tracker import manifest as manifests
from tracker.deploy.calibration.calibrate import CalibrationConfig, calibrate
from tracker.deploy.export import ExportConfig, export_fairmot, generated_frames
from tracker.deploy.graph import Lowering
from tracker.deploy.islands import precision_of
from tracker.deploy.lower import lowered
from tracker.deploy.onnx_weights import fairmot_of_onnx
from tracker.deploy.parity.compare import CompareConfig, compare_sides, outputs_of, sample
from tracker.deploy.parity.detections import Findings, MatchConfig, compare_detections, equal_precision
from tracker.deploy.parity.layers import Layers, layers_of_onnx, layers_of_torch, trace
from tracker.deploy.parity.locate import Output, locate
from tracker.deploy.parity.pairs import pair_layers
from tracker.deploy.parity.probe import EngineProbe, OnnxProbe, TorchProbe
from tracker.deploy.parity.receipt import Receipt
from tracker.deploy.parity.sides import open_sides
from tracker.deploy.parity.tensors import Comparison, compare, explain
from tracker.deploy.parity.tracks import Followed, compare_tracks, follow, score, truth_of
from tracker.deploy.precision import to_half
from tracker.errors import ConfigError, EngineError, SourceError
from tracker.models.checkpoint import save_fairmot
from tracker.models.fairmot import FairMOT, FairMOTConfig, random_fairmot
from tracker.runtimes.onnx import OnnxRuntime
from tracker.types import Detections

pytestmark = pytest.mark.usefixtures("one_thread")

DEMO, CLIP, TRUTH = (
    ROOT / "engines" / "fairmot_demo.onnx",
    ROOT / "videos" / "demo.mp4",
    ROOT / "videos" / "demo_gt.txt",
)
SMALL = FairMOTConfig(width=0.125, max_channels=24, levels=(1, 1, 1, 1, 1, 1), head_channels=8, embedding=8)
HEADS = ("hm", "wh", "reg", "id")
OUTPUTS = [Output(role=role, a=role, b=role) for role in HEADS]
Change = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="module")
def network() -> FairMOT:
    return random_fairmot(SMALL)


@pytest.fixture(scope="module")
def files(network: FairMOT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the network as a checkpoint and as its export."""
    folder = tmp_path_factory.mktemp("compared")
    save_fairmot(network, folder / "small.pth", epoch=1)
    export_fairmot(
        network,
        folder / "small.onnx",
        ExportConfig(size=(96, 64), heads="raw", lowering=Lowering()),
        generated_frames((162, 90), 1),
    )
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped network as a checkpoint."""
    path = tmp_path_factory.mktemp("shipped") / "fairmot_demo.pth"
    save_fairmot(unfolded(DEMO), path, epoch=0)
    return path


@pytest.fixture(scope="module")
def graph(files: Path) -> onnx.ModelProto:
    return onnx.load(files / "small.onnx")


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    return [np.random.default_rng(0).random((1, 3, 64, 96), np.float32)]


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], int]:
    return runpy.run_path(str(ROOT / "tools" / "compare.py"))["main"]


def unfolded(path: Path) -> FairMOT:
    """The shipped network as it was before its export: each normalisation takes part of its convolution."""
    folded = fairmot_of_onnx(path)
    model = FairMOT(folded.config).eval()
    random = torch.Generator().manual_seed(0)
    weights = dict(folded.state_dict())
    behind: nn.Module | None = None
    with torch.no_grad():
        for name, layer in model.named_modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                layer.weight.copy_(weights[f"{name}.weight"])
                if layer.bias is not None:
                    layer.bias.copy_(weights[f"{name}.bias"])
                behind, bias = layer, weights.get(f"{name}.bias")
            elif isinstance(layer, nn.BatchNorm2d):
                assert behind is not None
                assert bias is not None
                factor = torch.empty(len(bias)).uniform_(0.5, 2, generator=random)
                layer.running_var.uniform_(0.5, 2, generator=random)
                layer.running_mean.uniform_(-1, 1, generator=random)
                layer.weight.copy_(factor * (layer.running_var + layer.eps).sqrt())
                behind.weight.div_(factor.view(-1, 1, 1, 1))
                if behind.bias is not None:
                    behind.bias.zero_()
                layer.bias.copy_(bias + layer.running_mean * factor)
    return model


def changed(graph: onnx.ModelProto, *changes: Change) -> onnx.ModelProto:
    graph = copy.deepcopy(graph)
    for change in changes:
        change(graph)
    return graph


def weight(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    """One constant made into another."""

    def apply(model: onnx.ModelProto) -> None:
        (tensor,) = (each for each in model.graph.initializer if each.name == name)
        values = np.ascontiguousarray(change(numpy_helper.to_array(tensor)))
        tensor.CopyFrom(numpy_helper.from_array(values, name))

    return apply


def scaled(name: str, factor: float) -> Change:
    return weight(name, lambda values: values * np.float32(factor))


def permuted(output: str, order: list[int]) -> Change:
    """A node that puts an output's channels into another order."""

    def apply(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            node.output[:] = [f"{output}.before" if name == output else name for name in node.output]
        model.graph.initializer.append(numpy_helper.from_array(np.array(order), "order"))
        model.graph.node.append(
            helper.make_node("Gather", [f"{output}.before", "order"], [output], "shuffle", axis=1)
        )

    return apply


def renamed(model: onnx.ModelProto) -> None:
    """No node has a name, and tensors have numbers, as some exporters write them."""
    kept = {value.name for value in (*model.graph.input, *model.graph.output)}
    numbers: dict[str, str] = {}

    def other(name: str) -> str:
        return name if name in kept or not name else numbers.setdefault(name, f"tensor_{len(numbers)}")

    for node in model.graph.node:
        node.name = ""
        node.input[:] = map(other, node.input)
        node.output[:] = map(other, node.output)
    for tensor in model.graph.initializer:
        tensor.name = other(tensor.name)


def beside(model: onnx.ModelProto, path: Path, like: Path, **differences: Any) -> Path:
    """The graph as a file, with a manifest like that of another but for these keys of its input."""
    onnx.save(model, path)
    digest = manifests.sha256(path)
    manifest = manifests.read(manifests.beside(like))
    manifests.write(
        dataclasses.replace(
            manifest,
            input=dataclasses.replace(manifest.input, **differences),
            onnx_sha256=digest,
            engine_sha256=digest,
        ),
        manifests.beside(path),
    )
    return path


class TestTensors:
    def test_what_is_equal(self) -> None:
        values = np.random.default_rng(1).normal(size=(1, 3, 4, 4))
        parity = compare(values, values)
        assert (parity.max, parity.mean, parity.relative) == (0, 0, 0)
        assert parity.cosine == pytest.approx(1)
        assert compare(np.zeros(3), np.zeros(3)).cosine == 1

    def test_errors_over_several_images(self) -> None:
        comparison = Comparison()
        comparison.add(np.array([3.0, 0.0]), np.array([3.0, 0.0]))
        comparison.add(np.array([4.0, 0.0]), np.array([4.0, 2.0]))
        parity = comparison.result()
        assert (parity.max, parity.mean) == (2.0, 0.5)
        assert parity.relative == pytest.approx(2 / 5)
        assert parity.cosine == pytest.approx(25 / (5 * 29**0.5))

    @pytest.mark.parametrize("spoilt", [np.nan, np.inf])
    def test_what_is_no_number_is_as_far_apart_as_can_be(self, spoilt: float) -> None:
        assert compare(np.ones(2), np.array([1, spoilt])).relative == np.inf
        assert explain(np.ones((1, 2)), np.array([[1, spoilt]])) == "it holds NaN or inf"

    def test_of_two_peaks_that_tie_either_will_do(self) -> None:
        a, b, c = (np.zeros((1, 1, 6, 6)) for _ in range(3))
        a[0, 0, 2, 2], b[0, 0, 2, 3], c[0, 0, 2, 5] = 0.80, 0.79, 0.79
        for other, expected in ((b, 0.01), (c, 0.80)):
            comparison = Comparison(peaks=True)
            comparison.add(a, other)
            assert comparison.result().max == pytest.approx(expected)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda x: x[:, [2, 0, 1, 3]], "its channels are those of A in the order 2, 0, 1, 3"),
            (lambda x: 1.5 * x, "it is 1.5 times A's"),
            (lambda x: -x, "it is -1 times A's"),
            (
                lambda x: x + np.arange(4)[:, None, None],
                "it is A's and a constant for each channel, 3 at most",
            ),
            (
                lambda x: 2 * x + np.arange(4)[:, None, None],
                "it varies 2 times as much as A's, and is shifted",
            ),
            (lambda x: np.zeros_like(x), "it is all zeros"),
            (
                lambda x: x * np.array([1, 1, 9, 1])[:, None, None] ** np.sign(x),
                "of its 4 channels only 2 differ much",
            ),
            (lambda x: x + np.random.default_rng(3).normal(size=x.shape), None),
            (lambda x: x, None),
        ],
    )
    def test_simple_faults_are_named(self, change: Any, words: str | None) -> None:
        values = np.random.default_rng(2).normal(size=(1, 4, 8, 8))
        assert explain(values, change(values)) == words


class TestPairs:
    """Layers of one network, written in two ways."""

    def pairs(self, a: Layers, b: Layers) -> dict[str, str]:
        return dict(pair_layers(a, b, [(role, role) for role in HEADS]).pairs)

    def test_a_checkpoint_and_its_export(self, network: FairMOT, graph: onnx.ModelProto) -> None:
        a, b = layers_of_torch(trace(network)), layers_of_onnx(graph)
        pairs = self.pairs(a, b)
        assert len(pairs) == len(a.by_name) > 120
        for one, other in pairs.items():
            if a.by_name[one].weight is not None:  # exports keep the names of layers with weights
                assert one == other
                assert np.allclose(a.by_name[one].weight, b.by_name[other].weight, atol=1e-6)

    def test_names_that_mean_nothing(self, graph: onnx.ModelProto) -> None:
        other = changed(graph, renamed)
        places = [node.output[0] for node in graph.graph.node]
        same_place = dict(zip(places, (node.output[0] for node in other.graph.node), strict=True))
        a, b = layers_of_onnx(graph), layers_of_onnx(other)
        pairs = self.pairs(a, b)
        assert len(pairs) == len(a.by_name)
        for one, another in pairs.items():
            if a.by_name[one].tensor in same_place:
                assert b.by_name[another].tensor == same_place[a.by_name[one].tensor]

    def test_half_precision_and_its_casts(self, graph: onnx.ModelProto) -> None:
        a = layers_of_onnx(graph)
        assert self.pairs(a, layers_of_onnx(to_half(graph))) == {name: name for name in a.by_name}

    def test_deformable_convolutions_as_samples(self, graph: onnx.ModelProto) -> None:
        a, b = layers_of_onnx(graph), layers_of_onnx(lowered(graph))
        pairs = self.pairs(a, b)
        assert pairs == {name: name for name in a.by_name}
        assert {b.by_name[name].kind for name in a.by_name if a.by_name[name].kind == "DeformConv"} == {
            "Conv"
        }

    def test_weights_tell_layers_apart_that_stand_alike(self, graph: onnx.ModelProto) -> None:
        """Two heads whose names were exchanged."""

        def exchange(model: onnx.ModelProto) -> None:
            names = {"wh.0": "reg.0", "reg.0": "wh.0"}
            for node in model.graph.node:
                node.name = names.get(node.name, node.name)

        a, b = layers_of_onnx(graph), layers_of_onnx(changed(graph, exchange))
        pairs = self.pairs(a, b)
        assert (pairs["wh.0"], pairs["reg.0"]) == ("reg.0", "wh.0")


class TestLocating:
    """The layer where it begins, and nothing else."""

    def found(self, a: Any, b: Any, tolerance: float = 1e-3) -> list[tuple[str | None, tuple[str, ...], str]]:
        search = locate(a, b, OUTPUTS, tolerance)
        return [(each.layer, each.outputs, each.words()) for each in search.locations]

    def test_nothing_where_nothing_differs(
        self, network: FairMOT, graph: onnx.ModelProto, images: list[np.ndarray]
    ) -> None:
        for other in (graph, changed(graph, renamed), lowered(graph)):
            assert self.found(TorchProbe(trace(network), images), OnnxProbe(other, images)) == []

    @pytest.mark.parametrize(
        "layer",
        [
            "base.base_layer.0",
            "base.level3.tree2.conv2",
            "dla_up.ida_1.proj_1.conv",
            "ida_up.node_2.conv.conv_offset_mask",
            "id.0",
        ],
    )
    def test_one_layer_with_scaled_weights(
        self, network: FairMOT, graph: onnx.ModelProto, images: list[np.ndarray], layer: str
    ) -> None:
        faulty = changed(graph, scaled(f"{layer}.weight", 1.5), renamed)
        roles = ("id",) if layer == "id.0" else HEADS
        ((where, outputs, words),) = self.found(TorchProbe(trace(network), images), OnnxProbe(faulty, images))
        assert where == layer
        assert outputs == roles
        assert "its weights differ by 0.5, relatively: it is 1.5 times A's" in words

    def test_in_few_looks(self, graph: onnx.ModelProto, images: list[np.ndarray]) -> None:
        """Bisected, not one after another."""
        faulty = changed(graph, scaled("base.level4.tree2.conv1.weight", 1.5))
        search = locate(OnnxProbe(graph, images), OnnxProbe(faulty, images), OUTPUTS, 1e-3)
        assert [each.layer for each in search.locations] == ["base.level4.tree2.conv1"]
        assert search.measured < search.paired / 4

    def test_two_faults_on_two_ways(self, graph: onnx.ModelProto, images: list[np.ndarray]) -> None:
        faulty = changed(graph, scaled("wh.0.weight", 1.2), scaled("id.2.weight", 0.5))
        found = self.found(OnnxProbe(graph, images), OnnxProbe(faulty, images))
        assert [(layer, outputs) for layer, outputs, _ in found] == [("wh.0", ("wh",)), ("id.2", ("id",))]

    def test_a_layer_that_gives_other_channels(
        self, network: FairMOT, graph: onnx.ModelProto, images: list[np.ndarray]
    ) -> None:
        order = [2, 0, 1, 3]
        inside = changed(graph, *(weight(f"wh.2.{each}", lambda v: v[order]) for each in ("weight", "bias")))
        behind = changed(graph, permuted("wh", order))
        ((layer, outputs, words),) = self.found(TorchProbe(trace(network), images), OnnxProbe(inside, images))
        assert (layer, outputs) == ("wh.2", ("wh",))
        assert "its channels are those of A in the order 2, 0, 1, 3" in words
        ((layer, outputs, words),) = self.found(TorchProbe(trace(network), images), OnnxProbe(behind, images))
        assert (layer, outputs) == (None, ("wh",))
        assert "every layer before it is within tolerance" in words
        assert "B alone has Gather shuffle" in words
        assert "its channels are those of A in the order 2, 0, 1, 3" in words

    def test_colours_exchanged_in_the_first_layer(
        self, network: FairMOT, graph: onnx.ModelProto, images: list[np.ndarray]
    ) -> None:
        faulty = changed(graph, weight("base.base_layer.0.weight", lambda values: values[:, ::-1]))
        ((layer, outputs, words),) = self.found(TorchProbe(trace(network), images), OnnxProbe(faulty, images))
        assert (layer, outputs) == ("base.base_layer.0", HEADS)
        assert "its channels are those of A in the order 2, 1, 0" in words

    def test_a_range_that_is_too_narrow(self, graph: onnx.ModelProto, images: list[np.ndarray]) -> None:
        """Quantised and taken back before one layer, but cut off at a tenth of what comes."""
        name = "base.level4.tree1.conv2"

        def quantise(model: onnx.ModelProto) -> None:
            place, node = next((k, n) for k, n in enumerate(model.graph.node) if n.name == name)
            model.graph.initializer.append(numpy_helper.from_array(np.float32(0.05 / 127), "scale"))
            model.graph.initializer.append(numpy_helper.from_array(np.int8(0), "zero"))
            pair = (
                helper.make_node("QuantizeLinear", [node.input[0], "scale", "zero"], ["in_bits"], "q"),
                helper.make_node("DequantizeLinear", ["in_bits", "scale", "zero"], ["back"], "dq"),
            )
            node.input[0] = "back"
            for one in reversed(pair):
                model.graph.node.insert(place, one)

        ((layer, _, words),) = self.found(
            OnnxProbe(graph, images), OnnxProbe(changed(graph, quantise), images), 0.05
        )
        assert layer == name
        assert "is stored with a relative error of" in words
        assert "its weights" not in words

    def test_an_engine_in_pieces(
        self, files: Path, graph: onnx.ModelProto, images: list[np.ndarray], tmp_path: Path
    ) -> None:
        """Its ONNX file is cast as the engine was, and cut; ONNX Runtime stands in for TensorRT."""
        faulty = changed(graph, scaled("base.level3.tree1.conv1.weight", 1.5))
        path = beside(faulty, tmp_path / "a.onnx", files / "small.onnx")
        engine = dataclasses.replace(
            manifests.read(manifests.beside(path)), precision="fp16", builder="tensorrt"
        )
        pieces = []

        def opened(piece: Path, manifest: manifests.Manifest) -> OnnxRuntime:
            manifest.verify(piece)
            pieces.append(onnx.load(piece))
            return OnnxRuntime(piece, device="cpu")

        probe = EngineProbe(path, engine, images, opened)
        ((layer, _, words),) = self.found(OnnxProbe(graph, images), probe, 0.05)
        assert layer == "base.level3.tree1.conv1"
        assert "it is 1.5 times A's" in words
        assert len(pieces) <= 5
        assert {precision_of(piece) for piece in pieces} == {"fp16"}

    def test_half_precision_is_within_its_own_bounds(
        self, graph: onnx.ModelProto, images: list[np.ndarray]
    ) -> None:
        half = OnnxProbe(to_half(graph), images)
        assert self.found(OnnxProbe(graph, images), half, 0.05) == []
        ((layer, _, _),) = self.found(OnnxProbe(graph, images), half, 1e-4)[:1]
        assert layer == "base.base_layer.0"


def detections(*rows: tuple[float, float, float, float, float], label: int = 0) -> Detections:
    """x, y, width, height and score of each."""
    array = np.array(rows, np.float32).reshape(-1, 5)
    xyxy = np.concatenate((array[:, :2], array[:, :2] + array[:, 2:4]), axis=1)
    return Detections(xyxy=xyxy, score=array[:, 4], label=np.full(len(array), label))


def clip_of(*frames: Detections, names: tuple[str, ...] = ("person", "car")) -> Findings:
    return Findings(numbers=tuple(range(len(frames))), detections=tuple(frames), frame_rate=30.0, names=names)


class TestDetectionsAsSets:
    def test_order_does_not_matter(self) -> None:
        here, there = (10, 10, 20, 40, 0.9), (50, 10, 20, 40, 0.8)
        parity = compare_detections(clip_of(detections(here, there)), clip_of(detections(there, here)))
        assert (parity.same, parity.missing, parity.extra, parity.first_difference) == (1.0, 0, 0, None)
        assert parity.box.max == parity.score.max == 0

    def test_equal_boxes_are_told_by_their_scores(self) -> None:
        """SOLOv2 with random weights finds many masks that reach from edge to edge: one box, many scores."""
        place = (0, 0, 1920, 1080)
        one = detections((*place, 0.9), (*place, 0.6), (*place, 0.7), (*place, 0.8))
        other = detections((*place, 0.6), (*place, 0.9), (*place, 0.8), (*place, 0.7))
        parity = compare_detections(clip_of(one), clip_of(other))
        assert (parity.same, parity.score.max) == (1.0, 0.0)

    def test_an_equal_box_with_another_score_is_another_detection(self) -> None:
        place = (0, 0, 1920, 1080)
        parity = compare_detections(
            clip_of(detections((*place, 0.9), (*place, 0.8))),
            clip_of(detections((*place, 0.8), (*place, 0.5))),
        )
        assert (parity.missing, parity.extra) == (1, 1)

    @pytest.mark.parametrize(
        ("other", "missing", "extra"),
        [
            ((10.5, 10, 20, 40, 0.9), 0, 0),  # IoU 0.95
            ((12, 10, 20, 40, 0.9), 1, 1),  # IoU 0.82
            ((10, 10, 20, 40, 0.885), 0, 0),
            ((10, 10, 20, 40, 0.85), 1, 1),
            ((10, 10, 20, 40, 0.1), 1, 0),
        ],
    )
    def test_within_tolerance_or_not(self, other: Any, missing: int, extra: int) -> None:
        one = clip_of(detections(), detections((10, 10, 20, 40, 0.9)))
        parity = compare_detections(one, clip_of(detections(), detections(other)))
        assert (parity.missing, parity.extra) == (missing, extra)
        assert parity.first_difference == (1 if missing or extra else None)

    def test_a_score_that_ties_with_the_threshold(self) -> None:
        """Just above it on one side, just below on the other: both saw the same."""
        above, below = (10, 10, 20, 40, 0.405), (10, 10, 20, 40, 0.395)
        parity = compare_detections(clip_of(detections(above)), clip_of(detections(below)))
        assert (parity.reference, parity.candidate, parity.same) == (1, 0, 1.0)

    def test_another_class_is_another_detection(self) -> None:
        one, other = (detections((10, 10, 20, 40, 0.9), label=label) for label in (0, 1))
        assert compare_detections(clip_of(one), clip_of(other)).same == 0

    @pytest.mark.parametrize(("by", "same"), [(0.0, 1.0), (np.pi, 1.0), (0.5, 0.0)])
    def test_rotated_boxes_overlap_as_they_lie(self, by: float, same: float) -> None:
        """80×10 pixels, turned by 0.3 radians and a little more; the second is below the threshold."""
        upright = detections((10, 10, 80, 10, 0.9), (10, 90, 80, 10, 0.2))
        one, other = (
            dataclasses.replace(upright, angle=np.array([angle, 0.0], np.float32))
            for angle in (0.3, 0.3 + by)
        )
        parity = compare_detections(clip_of(one), clip_of(other))
        assert (parity.same, parity.reference) == (same, 1)

    def test_nothing_at_all(self) -> None:
        parity = compare_detections(clip_of(detections()), clip_of(detections()))
        assert (parity.same, parity.reference, parity.equal.recall) == (1.0, 0, 0.0)

    def test_recall_at_equal_precision(self) -> None:
        """The reference finds two of three and is always right; the candidate's best wrong one scores 0.6."""
        objects = [detections((10, 10, 20, 40, 1), (50, 10, 20, 40, 1), (90, 10, 20, 40, 1))]
        one = clip_of(detections((10, 10, 20, 40, 0.9), (50, 10, 20, 40, 0.8)))
        other = clip_of(detections((10, 10, 20, 40, 0.7), (300, 10, 20, 40, 0.6), (50, 10, 20, 40, 0.5)))
        equal = equal_precision(one, other, conf=0.4, truth=objects)
        assert (equal.precision, equal.reference_recall) == (1.0, pytest.approx(2 / 3))
        assert (equal.recall, equal.threshold) == (pytest.approx(1 / 3), pytest.approx(0.7))

    def test_embeddings(self) -> None:
        one = detections((10, 10, 20, 40, 0.9))
        first, second = (
            clip_of(dataclasses.replace(one, embedding=np.array([values], np.float32)))
            for values in ((1, 0), (0.6, 0.8))
        )
        parity = compare_detections(first, second)
        assert parity.cosine is not None
        assert parity.cosine.max == pytest.approx(0.4)

    def test_other_frames_are_refused(self) -> None:
        with pytest.raises(
            ConfigError, match="the same frames are needed on both sides: one has 1, the other 2"
        ):
            compare_detections(clip_of(detections()), clip_of(detections(), detections()))


def walk(*starts: float, frames: int = 10, step: float = 3.0) -> list[Detections]:
    """Objects side by side, each walking down its own column."""
    return [
        detections(*((x, 10 + step * t, 30, 60, 0.9 - 0.1 * k) for k, x in enumerate(starts)))
        for t in range(frames)
    ]


class TestTracksAsSets:
    def tracked(self, frames: list[Detections]) -> Followed:
        return follow(clip_of(*frames))

    def test_other_ids_are_the_same_tracks(self) -> None:
        one = self.tracked(walk(10, 100))
        other = dataclasses.replace(
            one, tracks=tuple(dataclasses.replace(each, id=7 - each.id) for each in one.tracks)
        )
        parity = compare_tracks(one, other)
        assert (parity.row_share, parity.track_share, parity.first_difference) == (1.0, 1.0, None)
        assert (parity.reference, parity.candidate) == (2, 2)

    def test_ids_that_change_places(self) -> None:
        one = self.tracked(walk(10, 100))
        swapped = [
            dataclasses.replace(each, id=each.id[::-1].copy()) if number >= 6 else each
            for number, each in zip(one.numbers, one.tracks, strict=True)
        ]
        parity = compare_tracks(one, dataclasses.replace(one, tracks=tuple(swapped)))
        assert (parity.first_difference, parity.same_tracks) == (6, 0)
        assert parity.row_share == 0.6

    def test_tracks_of_equal_boxes_stay_with_each_other(self) -> None:
        """Two that never leave one place; on one side they are listed the other way round."""
        one = self.tracked([detections((10, 10, 30, 60, 0.9), (10, 10, 30, 60, 0.9))] * 6)
        assert {len(each) for each in one.tracks} == {2}
        rows = [slice(None, None, -1 if number % 2 else 1) for number in one.numbers]
        turned = tuple(
            dataclasses.replace(each, id=each.id[row].copy())
            for each, row in zip(one.tracks, rows, strict=True)
        )
        parity = compare_tracks(one, dataclasses.replace(one, tracks=turned))
        assert (parity.row_share, parity.track_share) == (1.0, 1.0)

    def test_a_track_that_ends_early(self) -> None:
        whole, cut = walk(10, 100), walk(10, 100)
        cut[5:] = walk(10)[5:]
        parity = compare_tracks(self.tracked(whole), self.tracked(cut))
        assert parity.first_difference == 5
        assert (parity.track_share, parity.same_tracks) == (0.5, 1)

    def test_scores_of_one_against_the_other(self) -> None:
        one, less = self.tracked(walk(10, 100)), self.tracked(walk(10))
        same, half = score(one, one), score(less, one)
        assert same is not None
        assert half is not None
        assert (same["HOTA"], same["IDF1"], same["IDSW"]) == (100.0, 100.0, 0)
        assert half["FN"] == 10
        assert half["MOTA"] == pytest.approx(50)

    def test_where_nobody_has_a_row(self) -> None:
        nothing = self.tracked([detections()] * 3)
        assert score(nothing, nothing) is None
        assert compare_tracks(nothing, nothing).row_share == 1

    def test_only_the_frames_that_were_followed_count(self, tmp_path: Path) -> None:
        truth = tmp_path / "gt.txt"
        rows = [f"{t + 1},1,10,{10 + 3 * t},30,60,1,1,1" for t in range(10)]
        truth.write_text("\n".join([*rows, "11,2,300,300,30,60,1,1,1", "3,3,200,9,9,9,0,1,1"]))
        scores = score(self.tracked(walk(10)), truth)
        assert scores is not None
        assert (scores["HOTA"], scores["FN"]) == (pytest.approx(100), 0)
        objects = truth_of(truth, range(10))
        assert [len(each) for each in objects] == [1] * 10  # a flag of 0 does not count
        assert objects[2].xyxy.tolist() == [[10, 16, 40, 76]]


class TestReceipt:
    """The small network on the shipped clip."""

    def receipt(self, a: Path, b: Path, **options: Any) -> Receipt:
        settings = {"frames": 1, "max_frames": 2, "locate": True, **options}
        return compare_sides(*open_sides(a, b), str(CLIP), CompareConfig(**settings))

    def test_a_checkpoint_and_its_export_are_alike(self, files: Path) -> None:
        receipt = self.receipt(files / "small.pth", files / "small.onnx")
        assert receipt.outputs.keys() == set(HEADS)
        assert max(parity.relative for parity in receipt.outputs.values()) < 1e-5
        measured = receipt.measures()
        assert measured["pixels"] == measured["detections"] == measured["tracks"] == measured["hota"] == 0
        assert (receipt.first, receipt.search, receipt.notes) == ([], None, [])

    def test_trackeval_is_asked_for_before_the_work(
        self, files: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "trackeval", None)
        sides = open_sides(files / "small.pth", files / "small.onnx")
        steps: list[str] = []
        with pytest.raises(ConfigError, match=r"needs TrackEval .*pip install 'tracker\[eval\]'"):
            compare_sides(*sides, str(CLIP), on_step=lambda what, share: steps.append(what))
        assert steps == []

    def test_logits_and_peaks(self, checkpoint: Path, tmp_path: Path) -> None:
        """A checkpoint gives logits, the shipped export peaks: a fault before them is found all the same."""
        faulty = changed(onnx.load(DEMO), scaled("hm.2.weight", 1.5))
        receipt = self.receipt(checkpoint, beside(faulty, tmp_path / "a.onnx", DEMO), max_frames=1)
        assert receipt.beyond() == ["peaks"]
        assert [words.partition(";")[0] for words in receipt.first] == ["Conv hm.2"]

    def test_a_scaled_layer(self, files: Path, graph: onnx.ModelProto, tmp_path: Path) -> None:
        faulty = changed(graph, scaled("base.level2.tree1.conv2.weight", 1.5))
        receipt = self.receipt(files / "small.pth", beside(faulty, tmp_path / "a.onnx", files / "small.onnx"))
        assert receipt.beyond() == list(HEADS)
        assert [words.partition(";")[0] for words in receipt.first] == ["Conv base.level2.tree1.conv2"]

    def test_colours_exchanged_before_the_network(self, tmp_path: Path) -> None:
        """On the same pixels the networks are alike; each on its own manifest's pixels they are not."""
        path = beside(onnx.load(DEMO), tmp_path / "bgr.onnx", DEMO, colour="bgr")
        receipt = self.receipt(DEMO, path)
        assert receipt.beyond() == []
        assert receipt.measures()["pixels"] > 0.1
        assert receipt.first == [
            "before the network, in its pixels (colour: rgb and bgr): its channels are those of A in the "
            "order 2, 1, 0"
        ]
        assert receipt.measures()["detections"] > 0.02

    def test_one_output_permuted(self, tmp_path: Path) -> None:
        """Left, top, right, bottom become top, left, bottom, right."""
        faulty = changed(onnx.load(DEMO), permuted("wh", [1, 0, 3, 2]))
        receipt = self.receipt(DEMO, beside(faulty, tmp_path / "a.onnx", DEMO))
        assert receipt.beyond() == ["wh"]
        (words,) = receipt.first
        assert words.startswith("the output wh itself")
        assert "its channels are those of A in the order 1, 0, 3, 2" in words
        assert receipt.measures()["detections"] > 0.5

    def test_a_network_that_overflows(self, files: Path, graph: onnx.ModelProto, tmp_path: Path) -> None:
        """It cannot be tracked with; where it breaks is said."""
        faulty = changed(graph, weight("id.2.weight", lambda values: np.full_like(values, np.inf)))
        path = beside(faulty, tmp_path / "a.onnx", files / "small.onnx")
        receipt = self.receipt(files / "small.onnx", path)
        assert receipt.measures()["error"] == np.inf
        assert receipt.first[0].startswith("Conv id.2; gives a relative error of inf")
        assert "its weights differ by inf, relatively: it holds NaN or inf" in receipt.first[0]
        (note,) = receipt.notes
        assert note.startswith("detections and tracks: not compared, B does not run: the engine answers NaN")
        assert receipt.detections is None
        assert receipt.measures()["tracks"] == np.inf

    def test_a_program_of_torch_export(self, tmp_path: Path) -> None:
        plain = random_fairmot(dataclasses.replace(SMALL, deformable=False))
        config = ExportConfig(size=(96, 64), heads="raw")
        export_fairmot(plain, tmp_path / "a.onnx", config, generated_frames((162, 90), 1))
        plain.get_parameter("base.level2.tree1.conv1.weight").data *= 1.5
        path = tmp_path / "a.pt2"
        torch.export.save(torch.export.export(plain, (torch.zeros(1, 3, 64, 96),)), path)
        digest = manifests.sha256(path)
        manifest = manifests.read(manifests.beside(tmp_path / "a.onnx"))
        manifests.write(
            dataclasses.replace(manifest, onnx_sha256=digest, engine_sha256=digest), manifests.beside(path)
        )
        receipt = self.receipt(tmp_path / "a.onnx", path)
        assert receipt.search is not None
        assert receipt.search.alone == (0, 0)
        assert [words.partition(";")[0] for words in receipt.first] == ["Conv base.level2.tree1.conv1"]

    def test_inputs_of_different_sizes(self, files: Path, graph: onnx.ModelProto, tmp_path: Path) -> None:
        def widen(model: onnx.ModelProto) -> None:
            for value in (*model.graph.input, *model.graph.output):
                width = value.type.tensor_type.shape.dim[3]
                width.dim_value = width.dim_value * 4 // 3

        path = beside(changed(graph, widen), tmp_path / "wide.onnx", files / "small.onnx", size=(128, 64))
        receipt = self.receipt(files / "small.onnx", path)
        assert receipt.notes[0] == "tensors: not compared, the inputs are 96×64 and 128×64"
        assert receipt.outputs == {}
        assert receipt.detections is not None


class TestFrames:
    @pytest.mark.parametrize(("limit", "count"), [(1, 1), (3, 3), (40, 4), (41, 4)])
    def test_are_spread_evenly(self, limit: int, count: int) -> None:
        numbers = [frame.index for frame in sample(str(CLIP), 4, max_frames=limit)]
        assert len(numbers) == count
        assert numbers[0] == 0
        assert numbers[-1] > limit // 2 or limit == 1
        gaps = np.diff(numbers)
        assert not len(gaps) or gaps.max() <= 2 * gaps.min()


class TestTheShippedModel:
    """PyTorch, ONNX and INT8 ONNX on the shipped clip, by the command."""

    def test_pytorch_and_onnx(
        self,
        main: Callable[[list[str]], int],
        checkpoint: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        out = tmp_path / "receipt.json"
        limits = "error=1e-3,pixels=0,detections=0,tracks=0,hota=0"
        arguments = [str(checkpoint), str(DEMO), "--data", str(CLIP), "--max-frames", "8", "--frames", "1"]
        truth = ["--gt", str(TRUTH), "--benchmark", "MOT17", "--classes", "person"]
        code = main([*arguments, *truth, "--locate", "--json", str(out), "--fail-above", limits])
        told = json.loads(out.read_text())
        assert code == 0, told["measures"]
        assert told["outputs"].keys() == {"peaks", "wh", "reg", "id"}
        assert told["detections"]["reference"] == told["detections"]["candidate"] > 50
        assert told["scores"]["b_against_a"]["HOTA"] == 100
        for key in ("HOTA", "MOTA", "IDF1", "IDSW"):
            assert told["scores"]["a"][key] == pytest.approx(told["scores"]["b"][key])
        assert told["scores"]["a"]["HOTA"] > 60
        shown = capsys.readouterr().out
        assert "100.00% of detections are the same" in shown
        assert "100.00% of tracks are the same" in shown

    def test_onnx_and_int8(
        self, main: Callable[[list[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        quantised = tmp_path / "int8.onnx"
        calibrate(DEMO, quantised, [CLIP], CalibrationConfig(frames=2))
        arguments = [str(DEMO), str(quantised), "--data", str(CLIP), "--frames", "1", "--locate"]
        limits = "error=0.3,pixels=0,hota=5"
        assert main([*arguments, "--max-frames", "6", "--fail-above", limits]) == 0
        assert "the difference begins" not in capsys.readouterr().out

    def test_beyond_a_limit(
        self,
        main: Callable[[list[str]], int],
        files: Path,
        graph: onnx.ModelProto,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        path = beside(changed(graph, scaled("reg.0.weight", 2)), tmp_path / "a.onnx", files / "small.onnx")
        arguments = [str(files / "small.onnx"), str(path), "--data", str(CLIP), "--max-frames", "1"]
        assert main([*arguments, "--locate", "--fail-above", "error=0.01,pixels=0"]) == 3
        streams = capsys.readouterr()
        assert "the difference begins in Conv reg.0; gives a relative error of" in streams.out
        assert "compare: error is 0." in streams.err
        assert "pixels" not in streams.err


class TestRefusals:
    def refused(self, error: type[Exception], words: str, a: Path, b: Path, **options: Any) -> None:
        with pytest.raises(error, match=words):
            compare_sides(*open_sides(a, b), str(options.pop("clip", CLIP)), CompareConfig(**options))

    def test_files_of_another_kind(self, files: Path) -> None:
        self.refused(EngineError, "clip.mp4 is nothing that can be compared", Path("clip.mp4"), DEMO)

    def test_an_engine_without_a_manifest(self, graph: onnx.ModelProto, tmp_path: Path) -> None:
        onnx.save(graph, tmp_path / "a.onnx")
        self.refused(EngineError, "has no manifest a.onnx.json beside it", tmp_path / "a.onnx", DEMO)

    def test_other_classes(self, files: Path) -> None:
        words = "the classes differ: person and person, car; correct a manifest"
        self.refused(ConfigError, words, files / "small.onnx", DEMO)
        words = "small.pth has 1 classes, the other 2 .*: one is not made of the other"
        self.refused(EngineError, words, files / "small.pth", DEMO)

    def test_a_clip_that_is_not_there(self, files: Path) -> None:
        both = files / "small.onnx", files / "small.onnx"
        self.refused(SourceError, "nowhere.mp4", *both, clip="nowhere.mp4")
        self.refused(
            SourceError, "gt.txt is missing: name one gt.txt", *both, truth=Path("gt.txt"), max_frames=1
        )

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"frames": -1}, "frames is -1"),
            ({"frames": 0, "locate": True}, "--locate needs tensors"),
            ({"tolerance": 0.0}, "tolerance is 0.0; it must be above 0"),
            ({"max_frames": 0}, "max_frames is 0"),
            ({"track_iou": 2.0}, "track_iou is 2.0"),
        ],
    )
    def test_impossible_settings(self, options: dict[str, Any], words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            CompareConfig(**options)

    @pytest.mark.parametrize("options", [{"conf": 1.0}, {"score": 0.5}, {"iou": 0.3}])
    def test_impossible_tolerances(self, options: dict[str, float]) -> None:
        with pytest.raises(ConfigError):
            MatchConfig(**options)

    def test_limits_of_something_else(
        self, main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit, match="2"):
            main([str(DEMO), str(DEMO), "--data", str(CLIP), "--fail-above", "speed=1"])
        assert "'speed' is not measured: there is error, pixels, detections" in capsys.readouterr().err

    def test_in_one_line(self, main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["a.onnx", "b.onnx", "--data", str(CLIP)]) == 1
        assert capsys.readouterr().err == "compare: a.onnx is missing: name an engine file\n"


def test_the_command_knows_every_measure(main: Any) -> None:
    about = runpy.run_path(str(ROOT / "tools" / "compare.py"))
    empty = Receipt(a=None, b=None, clip="", tolerance=1.0)  # type: ignore[arg-type]
    assert tuple(empty.measures()) == about["MEASURES"]


def test_roles_that_only_one_side_has(files: Path) -> None:
    manifest = manifests.read(manifests.beside(files / "small.onnx"))
    other = dataclasses.replace(manifest, outputs={"decoded": "output"})
    assert outputs_of(manifest, other) == []
