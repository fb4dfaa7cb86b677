"""SOLOv2: the official networks' parameters and answers, exports that runtimes take, and what objects become
of what an engine answers.

tests/data/official_solov2.json holds what mmdet 3.3 answers: its networks with the weights of
`official_cases.fill`, and its post-processing (multi-label, all its own thresholds) to
`solov2_cases.raw_outputs`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import torch
from official_cases import filled, images, sample
from solov2_cases import NAMES, SIZE, SOURCE, raw_outputs
from torch import Tensor

from tracker import rle
from tracker.deploy.build import build
from tracker.deploy.calibration.calibrate import CalibrationConfig, calibrate
from tracker.deploy.detectors import DetectorExport, export_detector
from tracker.deploy.export import generated_frames
from tracker.deploy.plan import BuildConfig
from tracker.engine import open_engine
from tracker.errors import ConfigError, EngineError
from tracker.frontends.solov2 import CELLS, Solov2, Solov2Config, points_nms
from tracker.manifest import Manifest
from tracker.models.solov2 import OFFICIAL_NAMES
from tracker.models.zoo import load_detector, network_of, random_detector
from tracker.runtimes.trt import trt_module
from tracker.types import Detections, Frame, Image

pytestmark = pytest.mark.usefixtures("one_thread")

OFFICIAL = json.loads((Path(__file__).parent / "data" / "official_solov2.json").read_text(encoding="utf-8"))
EXPORTED = "solov2-light-r34"
SMALL = {"hidden": 32, "kernel": 32, "mask_hidden": 32}  # of the head; the backbone is whole
Shape = tuple[int | None, ...]


# The network.


@pytest.mark.parametrize("name", OFFICIAL["networks"])
def test_parameters_and_answers_are_those_of_the_official_network(name: str) -> None:
    official, (network, config) = OFFICIAL["networks"][name], network_of(name)
    model = network.build(config, SIZE[::-1])
    state = {key: value for key, value in model.state_dict().items() if "num_batches_tracked" not in key}
    listed = "\n".join(sorted(f"{key} {tuple(value.shape)}" for key, value in state.items()))
    assert len(state) == official["tensors"]
    assert hashlib.sha256(listed.encode()).hexdigest() == official["keys"]
    if "outputs" not in official:  # the largest one, which differs from the next in numbers alone
        return
    with torch.no_grad():
        answers = filled(model)(images())
    assert answers.keys() == official["outputs"].keys()
    for role, expected in official["outputs"].items():
        np.testing.assert_allclose(
            sample(answers[role]), expected, rtol=0, atol=1e-4 * max(map(abs, expected))
        )


def test_checkpoints_of_the_first_repository_are_read_too(tmp_path: Path) -> None:
    """Its names for the head's parts differ from mmdet's."""
    network, config = network_of(EXPORTED)
    state = network.build(config, (64, 64)).state_dict()
    theirs = {}
    for key, value in state.items():
        begin = next((old for old, ours in OFFICIAL_NAMES.items() if key.startswith(ours)), None)
        theirs[key if begin is None else begin + key.removeprefix(OFFICIAL_NAMES[begin])] = value
    assert {"bbox_head.cate_convs.0.conv.weight", "mask_feat_head.conv_pred.0.gn.bias"} <= theirs.keys()
    torch.save({"state_dict": theirs}, tmp_path / "weights.pth")
    loaded = load_detector(EXPORTED, tmp_path / "weights.pth", (64, 64)).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


# The export.


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With random weights and a narrow head, its batch left open."""
    path = tmp_path_factory.mktemp("solov2") / "solov2.onnx"
    model = random_detector(EXPORTED, SIZE, classes=len(NAMES), **SMALL)
    model.mask_head.conv_cls.bias.data -= 4.0  # most cells are empty, as they are with trained weights
    config = DetectorExport(name=EXPORTED, size=SIZE, batch=None, names=NAMES)
    export_detector(model, path, config, generated_frames(SIZE, 2))
    return path


def test_outputs_are_bound_by_name_and_the_batch_is_open(exported: Path) -> None:
    graph = onnx.load(exported).graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes == {
        "images": ["batch", 3, 64, 96],
        "cate_logits": ["batch", CELLS, len(NAMES)],
        "kernel": ["batch", CELLS, 32],
        "seg": ["batch", 32, 16, 24],
    }


def test_coordinates_are_constants_and_levels_share_their_weights(exported: Path) -> None:
    graph = onnx.load(exported).graph
    kinds = {node.op_type for node in graph.node}
    assert not kinds & {"Range", "Expand", "Where", "Gather", "Cast", "Shape", "TopK", "Loop"}
    names = [weight.name for weight in graph.initializer]
    assert names.count("mask_head.cls_convs.0.conv.weight") == 1
    uses = [node for node in graph.node if "mask_head.cls_convs.0.conv.weight" in node.input]
    assert len(uses) == 5
    assert len({name for name in names if name.endswith(".coordinates")}) == 6  # five grids and one map


def test_an_export_finds_objects_with_masks_in_frames_of_any_size(exported: Path) -> None:
    """Two sizes in one batch, odd ones among them."""
    frontend, _ = open_engine(exported, conf=0.05)
    try:
        frames = [noise((161, 91)), *generated_frames((64, 64), 1)]
        found = frontend.submit(frames).result()
        alone = frontend.submit(frames[:1]).result()
        assert frontend.transfers.waits == frontend.transfers.copies == 2, "one each per batch"
    finally:
        frontend.close()
    for frame, detections in zip(frames, found, strict=True):
        assert len(detections) and detections.mask is not None
        assert detections.mask.size == frame.size
        assert_boxes_are_around_masks(detections)
    np.testing.assert_allclose(alone[0].xyxy, found[0].xyxy)


def test_tensorrt_builds_the_export(exported: Path, tmp_path: Path) -> None:
    skip_without_tensorrt()
    config = BuildConfig(builder="tensorrt_rtx", batch=(1, 2, 4))
    build(exported, tmp_path / "x.engine", config)
    assert (tmp_path / "x.engine").stat().st_size > 0


def test_int8_runs_and_is_built(exported: Path, tmp_path: Path) -> None:
    quantised, footage = tmp_path / "int8.onnx", tmp_path / "frames"
    footage.mkdir()
    for each in generated_frames(SIZE, 2):
        assert each.image is not None
        cv2.imwrite(str(footage / f"{each.index}.png"), each.image.planes[0])
    calibrate(exported, quantised, [footage], CalibrationConfig(frames=2))
    frontend, manifest = open_engine(quantised, conf=0.05)
    try:
        (found,) = frontend.submit(generated_frames(SIZE, 1)).result()
    finally:
        frontend.close()
    assert manifest.precision == "int8" and frontend.masks and found.mask is not None
    skip_without_tensorrt()
    build(quantised, tmp_path / "x.engine", BuildConfig(builder="tensorrt_rtx"), precision="int8")


# The front end.


class FakeRuntime:
    """Answers `outputs` whatever it is fed."""

    description, lanes, device = "fake", 1, torch.device("cpu")

    def __init__(self, outputs: Mapping[str, Tensor], size: tuple[int, int] = SIZE) -> None:
        self.inputs: Mapping[str, Shape] = {"images": (1, 3, size[1], size[0])}
        self.answers = dict(outputs)
        self.outputs: Mapping[str, Shape] = {name: tuple(value.shape) for name, value in outputs.items()}

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.answers.items()}


def manifest_of(runtime: FakeRuntime) -> Manifest:
    return Solov2.describe(runtime, onnx_sha256="0" * 64, names=NAMES)


def frame(size: tuple[int, int] = SOURCE) -> Frame:
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    return Frame(index=0, pts_seconds=0.0, size=size, image=Image(format="bgr", planes=(pixels,)))


def noise(size: tuple[int, int]) -> Frame:
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Frame(index=0, pts_seconds=0.0, size=size, image=Image(format="bgr", planes=(pixels,)))


def detected(outputs: Mapping[str, Tensor], size: tuple[int, int] = SOURCE, **config: Any) -> Detections:
    runtime = FakeRuntime(outputs)
    frontend = Solov2(runtime, manifest_of(runtime), Solov2Config(**config))
    try:
        (found,) = frontend.submit([frame(size)]).result()
    finally:
        frontend.close()
    return found


def assert_boxes_are_around_masks(found: Detections) -> None:
    assert found.mask is not None
    for box, pixels in zip(found.xyxy, found.mask.pasted().numpy(), strict=True):
        rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
        assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def skip_without_tensorrt() -> None:
    try:
        trt_module("tensorrt_rtx")
    except EngineError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("seed", range(3))
def test_objects_are_those_of_the_official_post_processing(seed: int) -> None:
    """As sets: same labels, scores within 1e-5, the same boxes, mask IoU above 0.999."""
    found = detected(raw_outputs(seed), conf=0.05, multi_label=True)
    official = OFFICIAL["postprocess"][seed]
    assert len(found) == len(official) and found.mask is not None
    rest = list(zip(found.score, found.label, found.xyxy, found.mask.pasted().numpy(), strict=True))
    for wanted in official:
        mask = rle.decode(wanted["counts"].encode(), SOURCE)
        overlaps = [(mask & own).sum() / (mask | own).sum() for *_, own in rest]
        score, label, box, _ = rest[best := int(np.argmax(overlaps))]
        assert overlaps[best] > 0.999
        assert label == wanted["label"] and box.tolist() == wanted["box"]
        assert score == pytest.approx(wanted["score"], abs=1e-5)
        del rest[best]


def nothing() -> dict[str, Tensor]:
    raw = raw_outputs(0, objects=0)
    raw["cate_logits"].clamp_(max=-5)
    return raw


def one_disc(score: float = 4.0, *, steep: float = 2.0, others: int = 0) -> dict[str, Tensor]:
    """A disc of radius 4 cells around (12, 8) of the 24×16 map; `others`: weaker cells that say the same."""
    raw = nothing()
    for step in range(1 + others):
        cell = 20 * 40 + 20 + 2 * step  # of the finest grid, not one beside the other
        raw["cate_logits"][0, cell, 1] = score - step
        raw["kernel"][0, cell] = steep * torch.tensor((-1.0, 24.0, 16.0, 16.0 - 12**2 - 8**2))
    return raw


def test_a_disc_is_found_where_it_is() -> None:
    """The source is 1.5 times as large as the input, so a cell is six pixels."""
    found = detected(one_disc(), size=(144, 96))
    assert found.label.tolist() == [1] and found.mask is not None
    np.testing.assert_allclose(found.xyxy[0], [48, 24, 96, 72], atol=2)
    (area,) = found.mask.area.tolist()
    assert area == pytest.approx(np.pi * 24**2, rel=0.03)


def test_cells_that_say_the_same_lose_their_score_to_the_best() -> None:
    """Matrix NMS: exp(−2 · IoU²), and the masks are the same."""
    best, *others = detected(one_disc(others=2), conf=0.01).score
    alone = detected(one_disc()).score[0]
    assert best == pytest.approx(alone)
    ratio = torch.tensor([3.0, 2.0]).sigmoid() / torch.tensor(4.0).sigmoid()
    np.testing.assert_allclose(others, best * ratio * np.exp(-2), rtol=1e-4)


def test_a_mask_smaller_than_its_level_s_stride_is_nothing() -> None:
    raw = one_disc()
    raw["kernel"][0, 820, 3] -= 2 * (16 - 1.5**2)  # a radius of 1.5 cells: about 7 of them
    assert len(detected(raw)) == 0


def test_unsure_masks_lower_the_score() -> None:
    """By the mean probability of their pixels."""
    sure, unsure = detected(one_disc(steep=50)), detected(one_disc(steep=0.05))
    assert sure.score[0] == pytest.approx(float(torch.tensor(4.0).sigmoid()), rel=1e-3)
    assert unsure.score[0] < 0.75 * sure.score[0]


def test_a_cell_s_best_class_counts_unless_all_are_asked_for() -> None:
    raw = one_disc()
    raw["cate_logits"][0, 820, 2] = 3.0
    assert detected(raw).label.tolist() == [1]
    assert detected(raw, multi_label=True).label.tolist() == [1, 2]
    assert detected(raw, classes=("dog",)).label.tolist() == [2]


def test_of_neighbouring_cells_the_higher_one_counts() -> None:
    """The three before it in its 2×2 window, not those behind: as the official pooling has it."""
    scores = torch.zeros(1, CELLS, 1)
    scores[0, [820, 821, 860, 861, 1600]] = torch.tensor([[0.5], [0.4], [0.6], [0.6], [0.9]])
    kept = points_nms(scores).squeeze().nonzero().squeeze(1)
    assert kept.tolist() == [820, 860, 861, 1600]


def test_scores_that_an_engine_has_thinned_itself_are_taken_as_they_are() -> None:
    raw = one_disc()
    thinned = points_nms(raw.pop("cate_logits").sigmoid())
    assert_same(detected({"cate": thinned, **raw}), detected(one_disc()))


@pytest.mark.parametrize("seed", range(3))
def test_on_a_gpu_objects_are_the_same(gpu: torch.device, seed: int) -> None:
    """Where every frame takes the same shapes, and a kernel draws the masks."""
    raw = raw_outputs(seed)
    there = detected({role: value.to(gpu) for role, value in raw.items()}, conf=0.05)
    assert there.mask is not None and there.mask.device.type == "cuda"
    assert_same(there, detected(raw, conf=0.05))


def test_no_object_at_all() -> None:
    found = detected(nothing())
    assert len(found) == 0 and found.mask is not None and len(found.mask) == 0


def test_outputs_may_come_in_any_order_and_half_precision() -> None:
    raw = raw_outputs(1)
    shuffled = {role: raw[role] for role in ("seg", "kernel", "cate_logits")}
    assert_same(detected(shuffled), detected(raw))
    half = detected({role: value.half() for role, value in raw.items()})
    assert abs(len(half) - len(detected(raw))) <= 1


@pytest.mark.parametrize("role", ["cate_logits", "kernel", "seg"])
def test_nan_anywhere_is_told(role: str) -> None:
    runtime = FakeRuntime(raw_outputs(0))
    frontend = Solov2(runtime, manifest_of(runtime))
    runtime.answers[role].view(-1)[...] = torch.nan
    with pytest.raises(EngineError, match="NaN or inf"):
        frontend.submit([frame()]).result()
    frontend.close()


def test_engines_that_do_not_fit_are_refused() -> None:
    raw = raw_outputs(0)
    runtime = FakeRuntime({**raw, "kernel": raw["kernel"][:, :100]})
    with pytest.raises(
        EngineError, match=r"output kernel has shape \(1, 100, 4\); SOLOv2's kernel, with a 96×64"
    ):
        Solov2(runtime, manifest_of(runtime))
    with pytest.raises(EngineError, match="a SOLOv2 engine has one input and the outputs cate_logits"):
        manifest_of(FakeRuntime({"masks": raw["seg"]}))
    runtime = FakeRuntime({"cate": raw["cate_logits"], "kernel": raw["kernel"], "seg": raw["seg"]})
    with pytest.raises(EngineError, match=r"are no scores: declare it cate_logits"):
        Solov2(runtime, manifest_of(runtime))
    with pytest.raises(ConfigError, match="candidate is 0; it must be above 0"):
        Solov2Config(candidate=0)


def assert_same(first: Detections, second: Detections) -> None:
    """But for pixels at masks' edges, where probabilities may be rounded to either side of the threshold."""
    assert first.mask is not None and second.mask is not None
    np.testing.assert_array_equal(first.label, second.label)
    np.testing.assert_allclose(first.xyxy, second.xyxy, atol=1)
    np.testing.assert_allclose(first.score, second.score, rtol=1e-4)
    one, other = first.mask.pasted().cpu(), second.mask.pasted().cpu()
    overlap = (one & other).flatten(1).sum(dim=1) / (one | other).flatten(1).sum(dim=1)
    assert (overlap > 0.999).all()
