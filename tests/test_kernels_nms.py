"""Suppression by GPU kernels: what the greedy loop keeps, in its order, and YOLOX's rows up to it."""

from __future__ import annotations

import math
from pathlib import Path

import av
import pytest
import torch
from kernel_runs import PLACES, Run, run_at
from torch import Tensor

from tracker.errors import EngineError
from tracker.frontends import nms as greedy
from tracker.frontends.coco import COCO_NAMES
from tracker.frontends.preprocess import Preprocessor
from tracker.frontends.yolox import Yolox
from tracker.kernels.nms import decode_yolox, nms
from tracker.runtimes.onnx import OnnxRuntime
from tracker.sources.planes import image_of
from tracker.types import Frame


@pytest.fixture(params=PLACES)
def run(request: pytest.FixtureRequest) -> Run:
    return run_at(request)


def random_rows(count: int, classes: int = 1, batch: int = 1, levels: int = 0) -> Tensor:
    """(B, N, 6) boxes that overlap a lot. levels: how many different scores there are, 0 for no limit."""
    torch.manual_seed(count + classes)
    corner, size = torch.rand(batch, count, 2) * 60, torch.rand(batch, count, 2) * 40 + 5
    score = torch.rand(batch, count, 1)
    if levels:
        score = (score * levels).round() / levels
    label = torch.randint(0, classes, (batch, count, 1)).float()
    return torch.cat((corner, corner + size, score, label), dim=2)


def kept(rows: Tensor, iou_threshold: float) -> Tensor:
    """(K, 6) of one image's rows (N, 6), by the front end's own function on the CPU."""
    rows = rows[rows[:, 4] > 0]
    return rows[greedy.nms(rows[:, :4], rows[:, 4], rows[:, 5].long(), iou_threshold=iou_threshold)]


def assert_packed(packed: Tensor, expected: list[Tensor]) -> None:
    for mine, wanted in zip(packed, expected, strict=True):
        assert (mine[:, 4] > 0).sum() == len(wanted)
        torch.testing.assert_close(mine[: len(wanted)], wanted, rtol=0, atol=0)
        assert not mine[len(wanted) :].any()


@pytest.mark.parametrize(
    ("rows", "iou_threshold"),
    [
        (random_rows(40, classes=2, batch=3), 0.5),
        (random_rows(300), 0.7),
        (random_rows(300, classes=3, levels=5), 0.3),
        (random_rows(130, classes=80, levels=20), 0.45),
        (random_rows(1), 0.5),
        (random_rows(20) * torch.tensor([1, 1, 1, 1, 0, 1]), 0.5),
        (torch.tensor([10.0, 10, 20, 30, 0.5, 0]).repeat(1, 150, 1), 0.9),
        (torch.tensor([10.0, 10, 10, 30, 0.5, 0]).repeat(1, 40, 1), 0.1),
    ],
    ids=["batch", "two blocks", "ties", "classes", "one", "none", "all the same", "without area"],
)
def test_keeps_what_the_greedy_loop_keeps(run: Run, rows: Tensor, iou_threshold: float) -> None:
    packed = run(nms, rows, iou_threshold=iou_threshold)
    assert packed.shape == rows.shape
    assert_packed(packed, [kept(image, iou_threshold) for image in rows])


def test_a_chain_in_which_each_covers_only_the_next(run: Run) -> None:
    """The longest way for suppression to travel: every second box stays."""
    step = torch.arange(200.0)
    rows = torch.stack((step * 4, step * 0, step * 4 + 10, step * 0 + 10, 1 - step / 400, step * 0), dim=1)
    packed = run(nms, rows[None], iou_threshold=0.4)
    assert_packed(packed, [rows[::2]])


def test_only_the_strongest_take_part(run: Run) -> None:
    rows = random_rows(90, classes=2)
    strongest = rows[0][rows[0, :, 4].argsort(descending=True)[:30]]
    packed = run(nms, rows, iou_threshold=0.5, limit=30)
    assert packed.shape == (1, 30, 6)
    assert_packed(packed, [kept(strongest, 0.5)])


def test_answers_are_written_where_asked(gpu: torch.device) -> None:
    rows = random_rows(50).to(gpu)
    out = torch.full((1, 50, 6), torch.nan, device=gpu)
    assert nms(rows, iou_threshold=0.5, out=out) is out
    assert_packed(out.cpu(), [kept(rows[0].cpu(), 0.5)])


def test_limits_are_said(run: Run) -> None:
    with pytest.raises(EngineError, match="9999 candidates per image wanted; on a GPU, 1 to 4096"):
        run(nms, random_rows(9), iou_threshold=0.5, limit=9999)


# YOLOX. Cells of a 32×32 input: 4×4 of stride 8, 2×2 of 16 and one of 32.
CELLS = torch.tensor(
    [
        (column, row, stride)
        for stride, side in ((8, 4), (16, 2), (32, 1))
        for row in range(side)
        for column in range(side)
    ],
    dtype=torch.float32,
)


def raw_rows(*objects: tuple[int, list[float], float, list[float]], classes: int = 3) -> Tensor:
    """(1, 21, 5 + C): box, objectness and class scores of some cells; the others are empty."""
    raw = torch.zeros(1, len(CELLS), 5 + classes)
    for cell, box, objectness, scores in objects:
        raw[0, cell] = torch.tensor([*box, objectness, *scores])
    return raw


def decoded(run: Run, raw: Tensor, **options: object) -> list[list[float]]:
    """Rows with a score, of the first image."""
    options = {"wanted": torch.ones(raw.shape[2] - 5, dtype=torch.bool), "layout": "undecoded"} | options
    packed = run(decode_yolox, raw, CELLS, conf=0.1, iou_threshold=0.7, **options)
    return [[round(value, 4) for value in row] for row in packed[0].tolist() if row[4] > 0]


def test_boxes_are_offsets_to_their_cells_in_strides(run: Run) -> None:
    # Cell 5 is column 1, row 1 of stride 8; cell 17 is column 1, row 0 of stride 16.
    raw = raw_rows(
        (5, [0.5, 0.25, math.log(2), 0.0], 0.8, [0.1, 0.5, 0.2]), (17, [0, 0, 0, 0], 0.5, [0.4, 0, 0])
    )
    assert decoded(run, raw) == [[4, 6, 20, 14, 0.4, 1], [8, -8, 24, 8, 0.2, 0]]


def test_boxes_that_the_engine_decoded(run: Run) -> None:
    raw = raw_rows((5, [12.0, 10.0, 16.0, 8.0], 0.8, [0.1, 0.5, 0.2]))
    assert decoded(run, raw, layout="decoded") == [[4, 6, 20, 14, 0.4, 1]]


def test_classes_that_nobody_wants_and_low_scores_are_left_out(run: Run) -> None:
    raw = raw_rows((0, [0, 0, 0, 0], 0.9, [0, 0.9, 0.8]), (3, [0, 0, 0, 0], 0.3, [0.3, 0, 0]))
    assert decoded(run, raw, wanted=torch.tensor([True, False, True])) == []


def test_of_a_cells_equal_classes_the_first_wins(run: Run) -> None:
    assert decoded(run, raw_rows((0, [0, 0, 0, 0], 1.0, [0.5, 0.9, 0.9])))[0][5] == 1


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("place", [2, 4, 6], ids=["box", "objectness", "class"])
def test_what_is_not_finite_shows_as_a_nan_score(run: Run, place: int, value: float) -> None:
    raw = raw_rows((4, [0, 0, 0, 0], 0.9, [0.9, 0, 0])).repeat(2, 1, 1)
    raw[1, 4, place] = value
    packed = run(
        decode_yolox,
        raw,
        CELLS,
        torch.ones(3, dtype=torch.bool),
        layout="undecoded",
        conf=0.1,
        iou_threshold=0.7,
    )
    assert not packed[0].isnan().any()
    assert packed[1, 0, 4].isnan()


def test_a_real_frame_gives_the_front_ends_detections(run: Run, data: Path) -> None:
    engine = data / "models" / "yolox_nano_416x416.onnx"
    with av.open(str(data / "pets09" / "video.mp4")) as container:
        picture = next(container.decode(video=0))
    frame = Frame(index=0, pts_seconds=0.0, size=(picture.width, picture.height), image=image_of(picture))
    runtime = OnnxRuntime(engine, device="cpu", lanes=1)
    manifest = Yolox.describe(runtime, onnx_sha256="0" * 64)
    frontend = Yolox(runtime, manifest)
    try:
        (expected,) = frontend.submit([frame]).result()
    finally:
        frontend.close()
    assert len(expected) >= 5  # given people on a pavement

    tensor, (fit,) = Preprocessor(manifest.input, 1)([frame])
    (raw,) = runtime.run({manifest.input.name: tensor}).values()
    levels = [
        (column, row, stride)
        for stride in (8, 16, 32)
        for row in range(416 // stride)
        for column in range(416 // stride)
    ]
    packed = run(
        decode_yolox,
        raw,
        torch.tensor(levels, dtype=torch.float32),
        torch.ones(len(COCO_NAMES), dtype=torch.bool),
        layout="undecoded",
        conf=0.1,
        iou_threshold=0.7,
    )[0]

    found = packed[packed[:, 4] > 0].numpy()
    assert found[:, 5].tolist() == expected.label.tolist()
    torch.testing.assert_close(torch.tensor(found[:, 4]), torch.tensor(expected.score), rtol=1e-6, atol=1e-6)
    xyxy = fit.to_source(found[:, :4])
    torch.testing.assert_close(torch.tensor(xyxy), torch.tensor(expected.xyxy).double(), rtol=0, atol=1e-2)


def test_on_a_gpu_it_never_waits_and_can_be_captured(gpu: torch.device) -> None:
    rows = random_rows(1000, classes=3, batch=2).to(gpu)
    out = nms(rows, iou_threshold=0.6)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        nms(rows, iou_threshold=0.6)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        nms(rows, iou_threshold=0.6, out=out)
    rows.copy_(rows.flip(1).clone())  # other rows at the same addresses
    graph.replay()
    assert_packed(out.cpu(), [kept(image, 0.6) for image in rows.cpu()])
