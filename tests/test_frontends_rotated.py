"""RTMDet-R as a front end: one box by hand, official post-processing, and the GPU's way beside the host's.

tests/data/official_rotated.json holds what mmrotate's own head makes of `official_cases.raw_outputs`; its
CUDA suppression stood in for by the definition: box after box, by clipped polygons.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_runs import PLACES, Run, run_at
from official_cases import CELLS, SIZE, raw_outputs
from test_frontends_dense import decoded, detect, frame, layout_of, opened
from torch import Tensor

from tracker import boxes
from tracker.errors import EngineError
from tracker.frontends.nms import nms, rotated_nms
from tracker.kernels import nms as kernels
from tracker.types import Detections

OFFICIAL = json.loads((Path(__file__).parent / "data" / "official_rotated.json").read_text(encoding="utf-8"))


@pytest.fixture(params=PLACES)
def run(request: pytest.FixtureRequest) -> Run:
    return run_at(request)


def turned(found: Detections) -> np.ndarray:
    """(N, 5) cxcywhr."""
    assert found.angle is not None
    return boxes.turned(found.xyxy.astype(np.float64), found.angle.astype(np.float64))


def assert_same_set(found: Detections, rows: np.ndarray) -> None:
    """Each of found is one of rows (N, 7), and each of these is found."""
    assert len(found) == len(rows)
    close = boxes.rotated_iou(turned(found)[:, None], rows[None, :, :5]) > 0.999
    close &= np.abs(found.score[:, None] - rows[:, 5]) < 1e-4
    close &= found.label[:, None] == rows[:, 6]
    assert close.any(axis=0).all() and close.any(axis=1).all()


def test_finds_what_official_post_processing_finds() -> None:
    found = detect("rtmdet-r", raw_outputs("rtmdet-r", 7), conf=0.25, multi_label=True)
    assert_same_set(found, np.array(OFFICIAL["rtmdet-r multi-label"]))
    assert len(found) == 20


@pytest.mark.parametrize("layout", ["linear", "exponential"])
@pytest.mark.parametrize(
    ("angle", "said"),
    [(0.0, 0.0), (1.0, 1.0), (-2.0, math.pi - 2), (1.6, 1.6 - math.pi)],
)
def test_one_box_by_hand(layout: str, angle: float, said: float) -> None:
    """At column 5, row 1 of stride 8, whose point is (40, 8): 1.25 and 2.25 strides left and right of it,
    0.25 and 2.75 above and below, in the box's own directions. So its centre is 4 and 10 pixels off in these.
    """
    outputs = layout_of("rtmdet-r", layout)
    distances = torch.tensor([1.25, 0.25, 2.25, 2.75])
    outputs["logits"] -= 9
    outputs["logits"][0, 6, 13] = math.log(3)
    role = "distances" if layout == "linear" else "log_distances"
    outputs[role][0, :, 13] = distances if layout == "linear" else distances.log()
    outputs["angle"][0, 0, 13] = angle
    found = detect("rtmdet-r", outputs, layout=layout)
    cos, sin = math.cos(angle), math.sin(angle)
    expected = (40 + 4 * cos - 10 * sin, 8 + 4 * sin + 10 * cos, 28, 24, said)
    np.testing.assert_allclose(turned(found), [expected], atol=1e-5)
    np.testing.assert_allclose(found.score, [0.75], rtol=1e-5)
    assert found.label.tolist() == [6]


def test_the_longer_side_comes_first() -> None:
    outputs = layout_of("rtmdet-r", "linear")
    outputs["logits"] -= 9
    outputs["logits"][0, 0, 13] = 3
    outputs["distances"][0, :, 13] = torch.tensor([0.5, 2, 0.5, 2])
    outputs["angle"][0, 0, 13] = 0.25
    np.testing.assert_allclose(
        turned(detect("rtmdet-r", outputs)), [(40, 8, 32, 8, 0.25 - math.pi / 2)], atol=1e-5
    )


def test_boxes_without_area_are_nothing() -> None:
    outputs = layout_of("rtmdet-r", "linear")
    outputs["logits"] -= 9
    outputs["logits"][0, 0, 13:15] = 3
    outputs["distances"][0, :, 13] = torch.tensor([0.5, 1, 0.5, -2])
    outputs["distances"][0, :, 14] = torch.tensor([0.5, 1, 0.5, 1])
    assert len(detect("rtmdet-r", outputs)) == 1


def test_boxes_return_to_the_pixels_of_the_frame() -> None:
    outputs = layout_of("rtmdet-r", "linear")
    outputs["logits"] -= 9
    outputs["logits"][0, 0, 13] = 3
    outputs["distances"][0, :, 13] = torch.tensor([2, 0.5, 2, 0.5])
    outputs["angle"][0, 0, 13] = 0.5
    frontend, _ = opened("rtmdet-r", outputs)
    (found,) = frontend.submit([frame(192, 100)]).result()  # a third as large in the network
    frontend.close()
    np.testing.assert_allclose(turned(found), [(120, 24, 96, 24, 0.5)], rtol=0.02)


@pytest.mark.parametrize(
    ("role", "value"),
    [
        ("angle", math.nan),
        ("angle", math.inf),
        ("distances", math.nan),
        ("distances", math.inf),
        ("logits", math.nan),
    ],
)
def test_numbers_that_are_none_stop_the_run(role: str, value: float) -> None:
    frontend, runtime = opened("rtmdet-r", raw_outputs("rtmdet-r", 7))
    place = int(runtime.answers["logits"][0].amax(dim=0).argmax())
    runtime.answers[role][0, 0, place] = value
    with pytest.raises(EngineError, match="NaN or inf"):
        frontend.submit([frame()]).result()
    frontend.close()


def test_engines_without_angles_are_another_front_ends() -> None:
    with pytest.raises(
        EngineError, match=r"linear: logits, distances, angle; .* the engine gives logits, dis"
    ):
        opened("rtmdet-r", layout_of("rtmdet", "linear"))


# Suppression.


def random_rows(count: int, classes: int = 1, batch: int = 1, levels: int = 0) -> Tensor:
    """(B, N, 7) rotated boxes that overlap a lot. levels: as many different scores, 0 for no limit."""
    generator = torch.Generator().manual_seed(count + classes)
    place = torch.rand(batch, count, 2, generator=generator) * 80
    size = torch.rand(batch, count, 2, generator=generator) * torch.tensor([50, 15]) + 4
    angle = torch.rand(batch, count, 1, generator=generator) * 6 - 3
    score = torch.rand(batch, count, 1, generator=generator)
    if levels:
        score = (score * levels).round() / levels
    label = torch.randint(0, classes, (batch, count, 1), generator=generator).float()
    return torch.cat((place, size, angle, score, label), dim=2)


def kept(rows: Tensor, iou_threshold: float) -> Tensor:
    """(K, 7) of one image's rows (N, 7), box by box."""
    rows = rows[rows[:, 5] > 0]
    chosen: list[int] = []
    numbers = rows.double().numpy()
    for row in rows[:, 5].argsort(descending=True, stable=True).tolist():
        shared = boxes.rotated_iou(numbers[row, :5], numbers[chosen, :5])
        if not ((shared > iou_threshold) & (numbers[chosen, 6] == numbers[row, 6])).any():
            chosen.append(row)
    return rows[chosen]


CASES = [
    (random_rows(40, classes=2, batch=2), 0.5),
    (random_rows(170), 0.1),
    (random_rows(140, classes=3, levels=5), 0.3),
    (random_rows(1), 0.5),
    (random_rows(20) * torch.tensor([1.0, 1, 1, 1, 1, 0, 1]), 0.5),
    (torch.tensor([10.0, 10, 20, 30, 0.7, 0.5, 0]).repeat(1, 150, 1), 0.9),
    (torch.tensor([10.0, 10, 0, 30, 0.7, 0.5, 0]).repeat(1, 40, 1), 0.1),
]
NAMES = ["batch", "two blocks", "ties", "one", "none", "all the same", "without area"]


@pytest.mark.parametrize(("rows", "iou_threshold"), CASES, ids=NAMES)
def test_the_host_keeps_what_the_greedy_loop_keeps(rows: Tensor, iou_threshold: float) -> None:
    for image in rows:
        there = image[image[:, 5] > 0]
        chosen = rotated_nms(there[:, :5], there[:, 5], there[:, 6].long(), iou_threshold=iou_threshold)
        assert torch.equal(there[chosen], kept(image, iou_threshold))


@pytest.mark.parametrize(("rows", "iou_threshold"), CASES, ids=NAMES)
def test_the_gpu_keeps_what_the_greedy_loop_keeps(run: Run, rows: Tensor, iou_threshold: float) -> None:
    packed = run(kernels.rotated_nms, rows, iou_threshold=iou_threshold)
    assert packed.shape == rows.shape
    for mine, image in zip(packed, rows, strict=True):
        expected = kept(image, iou_threshold)
        assert torch.equal(mine[: len(expected)], expected)
        assert not mine[len(expected) :].any()


def test_without_angles_it_is_the_plain_suppression() -> None:
    rows = random_rows(300, classes=2)[0]
    rows[:, 4] = 0
    corners = torch.from_numpy(boxes.unturned(rows[:, :5].numpy()))
    plain = nms(corners, rows[:, 5], rows[:, 6].long(), iou_threshold=0.3)
    assert torch.equal(rotated_nms(rows[:, :5], rows[:, 5], rows[:, 6].long(), iou_threshold=0.3), plain)


def test_only_the_strongest_take_part(run: Run) -> None:
    rows = random_rows(90, classes=2)
    strongest = rows[0][rows[0, :, 5].argsort(descending=True)[:30]]
    packed = run(kernels.rotated_nms, rows, iou_threshold=0.2, limit=30)
    assert packed.shape == (1, 30, 7)
    expected = kept(strongest, 0.2)
    assert torch.equal(packed[0, : len(expected)], expected)


@pytest.mark.parametrize("turn", [0.0, 1e-6, 1e-4, math.pi / 2, math.pi])
def test_next_to_parallel_edges_are_measured_as_others(run: Run, turn: float) -> None:
    """Where what is divided by is next to nothing: in float32, two boxes of IoU 0.6 far from the origin."""
    box = torch.tensor([4000.0, 3000, 80, 20, 0.3, 0.9, 0])
    other = box.clone()
    other[:2] += 20 * torch.tensor([math.cos(0.3), math.sin(0.3)])  # a quarter along: IoU 0.6
    other[4] += turn
    if turn == math.pi / 2:
        other[2:4] = torch.tensor([20.0, 80])
    other[5] = 0.8
    rows = torch.stack((box, other))[None]
    for threshold, count in ((0.59, 1), (0.61, 2)):
        packed = run(kernels.rotated_nms, rows, iou_threshold=threshold)
        assert (packed[0, :, 5] > 0).sum() == count


def test_fixed_shapes_hold_the_same(run: Run) -> None:
    """Two images at once by the GPU's way, against each by the host's."""
    config = {"conf": 0.25, "classes": ("plane", "bridge", "baseball-diamond")}
    images = [raw_outputs("rtmdet-r", seed) for seed in (1, 2)]
    both = {role: torch.cat([image[role] for image in images]) for role in images[0]}
    packed = run(decoded, "rtmdet-r", both, config)
    assert packed.shape == (2, CELLS, 7)
    frontend, runtime = opened("rtmdet-r", images[0], **config)
    for rows, image in zip(packed, images, strict=True):
        runtime.answers = image
        (expected,) = frontend.submit([frame(*SIZE)]).result()
        assert len(expected) > 5
        assert_same_set(expected, rows[rows[:, 5] > 0].numpy().astype(np.float64))
    frontend.close()


def test_nan_in_a_box_shows_as_a_nan_score(run: Run) -> None:
    rows = random_rows(30, batch=2)
    rows[1, 4, 5] = math.nan
    packed = run(kernels.rotated_nms, rows, iou_threshold=0.5)
    assert packed[1, 0, 5].isnan() and not packed[0].isnan().any()


def test_on_a_gpu_it_never_waits_and_can_be_captured(gpu: torch.device) -> None:
    rows = random_rows(1000, classes=3, batch=2).to(gpu)
    out = kernels.rotated_nms(rows, iou_threshold=0.3)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.rotated_nms(rows, iou_threshold=0.3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.rotated_nms(rows, iou_threshold=0.3, out=out)
    rows.copy_(rows.flip(1).clone())  # other rows at the same addresses
    graph.replay()
    for mine, image in zip(out.cpu(), rows.cpu(), strict=True):
        expected = kept(image, 0.3)
        assert torch.equal(mine[: len(expected)], expected)
