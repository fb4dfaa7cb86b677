"""Detectors that a spec describes: what their outputs mean, as official code has it, and what is refused.

tests/data/official_postprocess.json holds what official code (ultralytics, yolov5, YOLOv6, yolov7, mmdet,
Paddle, DETR, RT-DETR) makes of `official_cases.raw_outputs`, in input pixels.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_runs import PLACES, Run, run_at
from official_cases import CELLS, SIZE, raw_outputs
from onnx_files import detector
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tracker import boxes
from tracker.engine import describe
from tracker.errors import ConfigError, EngineError
from tracker.frontends import FRONTENDS
from tracker.frontends.coco import COCO_NAMES
from tracker.frontends.dense import DenseConfig, DenseDetector
from tracker.frontends.detr import COCO_IDS
from tracker.frontends.layout import cells, dimensions
from tracker.kernels import nms as kernels
from tracker.manifest import Manifest
from tracker.types import Detections, Frame, Image

OFFICIAL = json.loads(
    (Path(__file__).parent / "data" / "official_postprocess.json").read_text(encoding="utf-8")
)
DENSE = {name: kind for name, kind in FRONTENDS.items() if issubclass(kind, DenseDetector)}
Shape = tuple[int | None, ...]


class FakeRuntime:
    """Answers `outputs` whatever it is fed, the first as many as there are images."""

    description, lanes, device = "fake", 1, torch.device("cpu")

    def __init__(self, outputs: Mapping[str, Tensor], *, batch: int | None = 1) -> None:
        self.inputs: Mapping[str, Shape] = {"images": (batch, 3, SIZE[1], SIZE[0])}
        self.answers = dict(outputs)
        self.outputs: Mapping[str, Shape] = {
            name: (batch, *value.shape[1:]) for name, value in outputs.items()
        }

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        count = len(inputs["images"])
        return {name: value[:count].clone() for name, value in self.answers.items()}


def layout_of(name: str, layout: str) -> dict[str, Tensor]:
    """Zeros in the shape of a layout, by role."""
    spec = DENSE[name].spec
    shape = spec.layouts[layout].outputs
    places = spec.anchors * CELLS
    return {
        role: torch.zeros(
            1, *(20 if size is None else size for size in dimensions(dims, places, len(spec.names)))
        )
        for role, dims in shape.items()
    }


def opened(
    name: str,
    outputs: Mapping[str, Tensor],
    *,
    layout: str | None = None,
    batch: int | None = 1,
    **config: Any,
) -> tuple[DenseDetector, FakeRuntime]:
    runtime = FakeRuntime(outputs, batch=batch)
    kind = DENSE[name]
    manifest = kind.describe(runtime, onnx_sha256="0" * 64, layout=layout)
    return kind(runtime, manifest, DenseConfig(**config)), runtime


def frame(width: int = SIZE[0], height: int = SIZE[1]) -> Frame:
    image = Image(format="bgr", planes=(np.zeros((height, width, 3), np.uint8),))
    return Frame(index=0, pts_seconds=0.0, size=(width, height), image=image)


def detect(name: str, outputs: Mapping[str, Tensor], **options: Any) -> Detections:
    frontend, _ = opened(name, outputs, **options)
    try:
        return frontend.submit([frame()]).result()[0]
    finally:
        frontend.close()


def assert_same_set(found: Detections, rows: np.ndarray) -> None:
    """Each of found is one of rows (N, 6), and each of these is found; rows are rounded to 1e-4 pixels."""
    assert len(found) == len(rows)
    close = boxes.iou(found.xyxy[:, None].astype(float), rows[None, :, :4]) > 0.999
    close |= np.abs(found.xyxy[:, None] - rows[None, :, :4]).max(axis=2) < 2e-4
    close &= np.abs(found.score[:, None] - rows[:, 4]) < 1e-4
    close &= found.label[:, None] == rows[:, 5]
    assert close.any(axis=0).all() and close.any(axis=1).all()


@pytest.mark.parametrize("case", OFFICIAL)
def test_finds_what_official_post_processing_finds(case: str) -> None:
    name, _, labels = case.partition(" ")
    found = detect(name, raw_outputs(name, 7), conf=0.25, multi_label=bool(labels))
    assert_same_set(found, np.array(OFFICIAL[case]).reshape(-1, 6))


# Place 13 is column 5, row 1 at stride 8. Each story puts one object of class 2 with score 0.75 there.
HALF = np.log(0.75 / 0.25)
STORIES: dict[str, tuple[str, str, dict[str, Any], tuple[float, ...]]] = {
    "v5": ("yolov5", "decoded", {"decoded": [30, 40, 20, 10, 1.0, 0, 0, 0.75]}, (20, 35, 40, 45)),
    "v6": ("yolov6", "decoded", {"decoded": [30, 40, 20, 10, 1.0, 0, 0, 0.75]}, (20, 35, 40, 45)),
    "v8": ("yolov8", "decoded", {"decoded": [30, 40, 20, 10, 0, 0, 0.75]}, (20, 35, 40, 45)),
    "11": ("yolo11", "decoded", {"decoded": [30, 40, 20, 10, 0, 0, 0.75]}, (20, 35, 40, 45)),
    "26": ("yolo26", "final", {"final": [20, 35, 40, 45, 0.75, 2]}, (20, 35, 40, 45)),
    "+": ("ppyoloe_plus", "decoded", {"decoded": [20, 35, 40, 45, 0, 0, 0.75]}, (20, 35, 40, 45)),
    "linear": ("rtmdet", "linear", {"distances": [1, 0.5, 2, 3], "logits": [-9, -9, HALF]}, (32, 4, 56, 32)),
    "exponential": (
        "rtmdet", "exponential",
        {"log_distances": list(np.log([1, 0.5, 2, 3])), "logits": [-9, -9, HALF]}, (32, 4, 56, 32),
    ),
    "mmdeploy": ("rtmdet", "dets", {"dets": [20, 35, 40, 45, 0.75], "labels": 2}, (20, 35, 40, 45)),
    "rt-detr": (
        "rtdetr", "sigmoid",
        {"logits": [-9, -9, HALF], "boxes": [0.5, 0.5, 0.5, 0.25]}, (16, 36, 48, 60),
    ),
    "rt-detr rows": ("rtdetr", "rows", {"rows": [0.5, 0.5, 0.5, 0.25, 0, 0, 0.75]}, (16, 36, 48, 60)),
}  # fmt: skip


@pytest.mark.parametrize("story", STORIES)
def test_one_object(story: str) -> None:
    name, layout, values, xyxy = STORIES[story]
    outputs = layout_of(name, layout)
    transposed = {role for role, dims in DENSE[name].spec.layouts[layout].outputs.items() if dims[-1] == "A"}
    if "logits" in outputs:
        outputs["logits"] -= 9
    for role, numbers in values.items():
        target = outputs[role][0].T if role in transposed else outputs[role][0]
        if isinstance(numbers, list):
            target[13, : len(numbers)] = torch.tensor(numbers, dtype=torch.float32)
        else:
            target[13] = numbers
    found = detect(name, outputs, layout=layout)
    np.testing.assert_allclose(found.xyxy, [xyxy], rtol=1e-5)
    np.testing.assert_allclose(found.score, [0.75], rtol=1e-5)
    assert found.label.tolist() == [2]


def test_the_expected_distance_of_many_bins() -> None:
    """Half 1, half 2 strides to every side of the middle of the cell."""
    outputs = layout_of("ppyoloe_plus", "heads")
    outputs["bins"] -= 50
    outputs["logits"] -= 9
    outputs["logits"][0, 4, 13] = HALF
    for side in range(4):
        outputs["bins"][0, 17 * side + 1 : 17 * side + 3, 13] = 0
    found = detect("ppyoloe_plus", outputs)
    np.testing.assert_allclose(
        found.xyxy, [(5.5 * 8 - 12, 1.5 * 8 - 12, 5.5 * 8 + 12, 1.5 * 8 + 12)], rtol=1e-5
    )
    assert found.label.tolist() == [4]


def test_a_yolov7_of_one_class_scores_by_objectness() -> None:
    outputs = {"decoded": torch.zeros(1, 3 * CELLS, 6)}
    outputs["decoded"][0, 5] = torch.tensor([30, 40, 20, 10, 0.8, 0.5])
    runtime = FakeRuntime(outputs)
    manifest = DENSE["yolov7"].describe(runtime, onnx_sha256="0" * 64, names=("person",))
    frontend = DENSE["yolov7"](runtime, manifest)
    (found,) = frontend.submit([frame()]).result()
    frontend.close()
    np.testing.assert_allclose(found.score, [0.8])


@pytest.mark.parametrize("place", PLACES)
def test_boxes_inside_out_are_nothing_and_suppress_nothing(
    request: pytest.FixtureRequest, place: str
) -> None:
    """RTMDet may answer sides that lie the wrong way round; the strongest such box has an area below 0."""
    request.param = place
    run: Run = run_at(request)
    outputs = layout_of("rtmdet", "linear")
    outputs["logits"] -= 9
    outputs["distances"] += 1
    outputs["distances"][0, 0, 13] = -2  # its left side is to the right of its right side
    outputs["logits"][0, 2, 13], outputs["logits"][0, 2, 60] = 3.0, HALF
    (found,) = run(decoded, "rtmdet", outputs, {"conf": 0.25})
    np.testing.assert_allclose(found[found[:, 4] > 0][:, 4], [0.75], rtol=1e-5)
    np.testing.assert_allclose(detect("rtmdet", outputs, conf=0.25).score, [0.75], rtol=1e-5)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("multi_label", [False, True])
def test_boxes_inside_out_take_no_room(request: pytest.FixtureRequest, place: str, multi_label: bool) -> None:
    """Three of them score higher than the one real box, and there is room for two: on no device may they
    push it out. A network with random weights answers so in most places."""
    request.param = place
    run: Run = run_at(request)
    outputs = layout_of("rtmdet", "linear")
    outputs["logits"] -= 9
    outputs["distances"] += 1
    outputs["distances"][0, 0, 13:16] = -2
    outputs["logits"][0, 2, 13:16], outputs["logits"][0, 2, 60] = 3.0, HALF
    config = {"conf": 0.25, "max_candidates": 2, "multi_label": multi_label}
    (found,) = run(decoded, "rtmdet", outputs, config)
    np.testing.assert_allclose(found[found[:, 4] > 0][:, 4], [0.75], rtol=1e-5)
    np.testing.assert_allclose(detect("rtmdet", outputs, **config).score, [0.75], rtol=1e-5)


@pytest.mark.parametrize("names", [("num_dets", "boxes", "scores", "labels"),
                                   ("num_dets", "det_boxes", "det_scores", "det_classes")])  # fmt: skip
@pytest.mark.parametrize("frontend", ["yolov6", "yolox-end2end"])
def test_end_to_end_rows_beyond_their_count_are_nothing(names: tuple[str, ...], frontend: str) -> None:
    """EfficientNMS leaves old rows there; mmyolo's graph appends one of label −1."""
    counts, box, score, label = names
    outputs = {
        counts: torch.tensor([[2]], dtype=torch.int32),
        box: torch.tensor([[[1, 2, 3, 4], [5, 6, 9, 9], [0, 0, 5, 5], [0, 0, 0, 0]]]).float(),
        score: torch.tensor([[0.9, 0.8, 0.7, 0.0]]),
        label: torch.tensor([[0, 79, 1, -1]], dtype=torch.int32),
    }
    found = detect(frontend, outputs)
    np.testing.assert_allclose(found.score, [0.9, 0.8])
    assert found.label.tolist() == [0, 79]
    np.testing.assert_allclose(found.xyxy, [(1, 2, 3, 4), (5, 6, 9, 9)])


def test_detr_numbers_classes_as_coco_does() -> None:
    assert len(COCO_IDS) == 91 and [COCO_IDS[k] for k in (1, 3, 13, 90)] == [
        "person",
        "car",
        "stop sign",
        "toothbrush",
    ]
    assert set(COCO_NAMES) < set(COCO_IDS)


def decoded(name: str, outputs: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    frontend, _ = opened(name, {role: value.cpu() for role, value in outputs.items()}, **config)
    frontend.close()
    device = next(iter(outputs.values())).device
    frontend._grid, frontend._wanted = frontend._grid.to(device), frontend._wanted.to(device)
    return decode(frontend, outputs)


def decode(frontend: DenseDetector, outputs: dict[str, Tensor]) -> Tensor:
    """As on a GPU, every place in fixed shapes; wherever the tensors lie."""
    return frontend._decode_all(frontend._layout.split(outputs, SIZE))


class Watching(TorchDispatchMode):
    """Notes what no CUDA graph can capture: numbers that come from the host, more than one, or go there."""

    waits = ("_local_scalar_dense", "nonzero", "item")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.waits or (name == "lift_fresh" and args[0].numel() > 1):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for name, kind in DENSE.items() for layout in kind.spec.layouts]
)
def test_what_is_done_on_a_gpu_asks_nothing_of_the_host(
    name: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second time on: constants may be kept. Suppression is kernels'."""
    for kernel in ("nms", "rotated_nms"):
        monkeypatch.setattr(kernels, kernel, lambda rows, **_: rows)
    outputs = layout_of(name, layout)
    frontend, _ = opened(name, outputs, layout=layout)
    frontend.close()
    decode(frontend, outputs)
    with Watching() as watching:
        decode(frontend, outputs)
    assert watching.seen == []


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", ["yolov5", "yolov8 multi-label", "ppyoloe_plus", "rtmdet", "detr", "rtdetr"])
def test_fixed_shapes_hold_the_same(request: pytest.FixtureRequest, place: str, case: str) -> None:
    """Two images at once by the GPU's way, against each by the host's."""
    request.param = place
    run: Run = run_at(request)
    name, _, labels = case.partition(" ")
    config = {
        "conf": 0.25,
        "multi_label": bool(labels),
        "classes": () if name == "detr" else ("person", "bicycle"),
    }
    images = [raw_outputs(name, seed) for seed in (1, 2)]
    both = {role: torch.cat([image[role] for image in images]) for role in images[0]}
    packed = run(decoded, name, both, config)
    frontend, runtime = opened(name, images[0], **config)
    for rows, image in zip(packed, images, strict=True):
        runtime.answers = image
        (expected,) = frontend.submit([frame()]).result()
        kept = rows[rows[:, 4] > 0].numpy()
        assert_same_set(expected, kept.astype(np.float64))
    frontend.close()


def test_boxes_return_to_the_pixels_of_each_frame() -> None:
    outputs = {"decoded": torch.zeros(2, 84, CELLS)}
    outputs["decoded"][:, :5, 13] = torch.tensor([32.0, 48, 16, 32, 0.9])
    frontend, _ = opened("yolov8", outputs, batch=None)
    first, second = frontend.submit([frame(), frame(128, 128)]).result()
    frontend.close()
    np.testing.assert_allclose(first.xyxy, [(24, 32, 40, 64)])
    np.testing.assert_allclose(second.xyxy, [(48, 32, 80, 96)])  # 64×64 in the middle of 64×96


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", [0, 4 + 17])
def test_numbers_that_are_none_stop_the_run(value: float, row: int) -> None:
    outputs = raw_outputs("yolov8", 7)
    frontend, runtime = opened("yolov8", outputs)
    place = int(outputs["decoded"][0, 4:].amax(dim=0).argmax())
    runtime.answers["decoded"][0, row, place] = value
    with pytest.raises(EngineError, match="NaN or inf"):
        frontend.submit([frame()]).result()
    frontend.close()


@pytest.mark.parametrize(
    ("name", "outputs", "words"),
    [
        ("yolov8", {"o": torch.zeros(1, 3 * CELLS, 85)}, r"\(1, 378, 85\); YOLOv8 .* gives \(1, 84, 126\)"),
        ("yolov5", {"o": torch.zeros(1, 84, CELLS)}, r"gives \(1, 378, 85\): correct .* or name another"),
        ("yolov8", {"o": torch.zeros(1, 10, CELLS)}, r"80 class names gives \(1, 84, 126\)"),
        ("yolov8", {"o": torch.full((1, 84, CELLS), torch.nan)}, "NaN or inf"),
        ("yolov8", {"a": torch.zeros(1), "b": torch.zeros(1)}, "as one of .* the engine gives a, b"),
        ("rtmdet", {"o": torch.zeros(1, 84, CELLS)}, "has outputs as one of linear: logits, distances"),
        ("detr", {"logits": torch.zeros(1, 9, 81), "boxes": torch.zeros(1, 9, 4)}, r"gives \(1, any, 92\)"),
    ],
)  # fmt: skip
def test_engines_that_do_not_fit_are_refused(name: str, outputs: dict[str, Tensor], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        opened(name, outputs)


def test_inputs_beside_the_images_are_refused() -> None:
    runtime = FakeRuntime(layout_of("rtdetr", "sigmoid"))
    runtime.inputs = {**runtime.inputs, "orig_target_sizes": (1, 2)}
    with pytest.raises(EngineError, match="takes images, orig_target_sizes: export it without"):
        DENSE["rtdetr"].describe(runtime, onnx_sha256="0" * 64)


def test_manifests_with_other_roles_are_refused() -> None:
    runtime = FakeRuntime(layout_of("yolov8", "decoded"))
    manifest: Manifest = DENSE["yolov8"].describe(runtime, onnx_sha256="0" * 64)
    with pytest.raises(ConfigError, match=r"YOLOv8 outputs are one of decoded: .* the manifest has boxes"):
        DENSE["yolov8"](runtime, dataclasses.replace(manifest, outputs={"boxes": "decoded"}))


def test_sizes_off_the_grid_are_refused() -> None:
    runtime = FakeRuntime(layout_of("yolov8", "decoded"))
    runtime.inputs = {"images": (1, 3, 96, 70)}
    manifest = DENSE["yolov8"].describe(runtime, onnx_sha256="0" * 64)
    with pytest.raises(EngineError, match="input size is 70×96; YOLOv8 needs multiples of 32"):
        DENSE["yolov8"](runtime, manifest)


def test_of_two_ways_to_export_the_one_whose_shapes_fit_is_described() -> None:
    """A YOLO26 exported without its one-to-one head answers as YOLOv8 does."""
    places = FakeRuntime({"o": torch.zeros(1, 84, CELLS)})
    rows = FakeRuntime({"o": torch.zeros(1, 300, 6)})
    roles = [dict(DENSE["yolo26"].describe(each, onnx_sha256="0" * 64).outputs) for each in (places, rows)]
    assert roles == [{"decoded": "o"}, {"final": "o"}]


def test_networks_with_another_pyramid_are_known_by_their_count() -> None:
    """YOLOv8 with a P2 head on 64×96: 16×24 more cells; the grid follows."""
    places = len(cells(SIZE, (4, 8, 16, 32)))
    frontend, _ = opened("yolov8", {"o": torch.zeros(1, 84, places)})
    frontend.close()
    assert places == CELLS + 16 * 24


def test_a_manifest_is_written_for_a_users_file(tmp_path: Path) -> None:
    path = detector(tmp_path / "mine.onnx", np.zeros((3 * CELLS, 85)), size=SIZE)
    manifest = describe(path, frontend="yolov5")
    assert (manifest.frontend, dict(manifest.outputs)) == ("yolov5", {"decoded": "output"})
    assert (manifest.input.colour, manifest.input.resize, manifest.input.pad) == ("rgb", "center", 114.0)
    with pytest.raises(ConfigError, match="layout is 'raw'; for yolov5 there is decoded, end2end, final"):
        describe(path, frontend="yolov5", layout="raw")
    with pytest.raises(EngineError, match="name another layout or front end"):
        describe(path, frontend="yolov8")


@pytest.mark.parametrize("config", [{"nms_iou": 0}, {"max_candidates": 0}, {"conf": 2}])
def test_impossible_settings(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(config))):
        DenseConfig(**config)
