"""YOLOX: rows become objects in source pixels, and rows that are not YOLOX's are refused.

A fake engine answers chosen rows, so that every expected box can be worked out by hand. Its input is 64×64:
8×8 cells of stride 8, then 4×4 of 16 and 2×2 of 32, 84 in all.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch

from tracker import boxes
from tracker.engine import open_engine
from tracker.errors import ConfigError, DetectionsError, EngineError
from tracker.frontends.nms import nms, strongest
from tracker.frontends.worker import start_workers
from tracker.frontends.yolox import Yolox, YoloxConfig
from tracker.manifest import Manifest
from tracker.types import Detections, Frame, Image

NAMES = ("person", "dog", "car")
CELLS = 84
Shape = tuple[int | None, ...]


class FakeRuntime:
    """Answers `rows` (n, A, 5 + C), the first as many as there are images; remembers what it was fed."""

    description, lanes, device = "fake", 1, torch.device("cpu")

    def __init__(self, rows: torch.Tensor, *, batch: int | None = 1, shape: Shape = (3, 64, 64)) -> None:
        self.inputs: Mapping[str, Shape] = {"images": (batch, *shape)}
        self.outputs: Mapping[str, Shape] = {"output": (batch, *rows.shape[1:])}
        self.rows = rows
        self.fed: list[torch.Tensor] = []
        self.begun, self.go = threading.Event(), threading.Event()
        self.go.set()

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.begun.set()
        self.go.wait()
        images = inputs["images"]
        self.fed.append(images.clone())
        return {"output": self.rows[: len(images)].clone()}


def rows(*objects: tuple[int, Sequence[float], float, Sequence[float]], count: int = CELLS) -> torch.Tensor:
    """(1, A, 5 + 3) with (cell, its four box numbers, objectness, class scores) each, elsewhere nothing."""
    answer = torch.zeros(1, count, 5 + len(NAMES))
    for cell, box, objectness, scores in objects:
        answer[0, cell] = torch.tensor([*box, objectness, *scores])
    return answer


def manifest(layout: str = "undecoded", **changes: object) -> Manifest:
    described = Yolox.describe(FakeRuntime(rows()), onnx_sha256="0" * 64, names=NAMES, layout=layout)
    return dataclasses.replace(described, **changes)


def frontend(
    runtime: FakeRuntime, *, layout: str = "undecoded", calm: bool = True, **config: object
) -> Yolox:
    """A front end over the fake; `calm` lets the run at its opening answer nothing remarkable."""
    answer, runtime.rows = runtime.rows, decoded_grid() if layout == "decoded" else torch.zeros(1, CELLS, 8)
    if not calm:
        runtime.rows = answer
    opened = Yolox(runtime, manifest(layout), YoloxConfig(**config))
    runtime.rows = answer
    runtime.fed.clear()
    return opened


def decoded_grid() -> torch.Tensor:
    """(1, A, 8) boxes of the decoded layout that sit in their cells."""
    answer = torch.zeros(1, CELLS, 8)
    centres = [(x + 0.5, y + 0.5, s) for s in (8, 16, 32) for y in range(64 // s) for x in range(64 // s)]
    answer[0, :, :2] = torch.tensor([(x * s, y * s) for x, y, s in centres])
    return answer


def frame(width: int = 64, height: int = 64, value: int = 0, index: int = 0) -> Frame:
    image = Image(format="bgr", planes=(np.full((height, width, 3), value, np.uint8),))
    return Frame(index=index, pts_seconds=0.0, size=(width, height), image=image)


def detect(opened: Yolox, *frames: Frame) -> list[Detections]:
    try:
        return opened.submit(frames or [frame()]).result()
    finally:
        opened.close()


# Cell 9 is column 1, row 1 at stride 8; cell 70 column 2, row 1 at 16; cell 81 column 1, row 0 at 32.
@pytest.mark.parametrize(
    ("layout", "cell", "box", "xyxy"),
    [
        ("undecoded", 9, (0.5, 0.5, np.log(2), 0), (4, 8, 20, 16)),
        ("undecoded", 70, (0, 0, 0, np.log(0.5)), (24, 12, 40, 20)),
        ("undecoded", 81, (0.25, 0.5, 0, 0), (24, 0, 56, 32)),
        ("undecoded", 0, (0, 0, 0, 0), (-4, -4, 4, 4)),  # beyond the image, as objects reach
        ("decoded", 9, (30, 20, 10, 40), (25, 0, 35, 40)),
    ],
)
def test_boxes_come_from_their_cells(
    layout: str, cell: int, box: Sequence[float], xyxy: Sequence[float]
) -> None:
    runtime = FakeRuntime(rows((cell, box, 0.8, (0.5, 0.25, 0))))
    (found,) = detect(frontend(runtime, layout=layout))
    np.testing.assert_allclose(found.xyxy, [xyxy], atol=1e-5)
    np.testing.assert_allclose(found.score, [0.4])
    assert found.label.tolist() == [0]
    assert (found.xyxy.dtype, found.score.dtype, found.label.dtype) == (np.float32, np.float32, np.int64)


@pytest.mark.parametrize(
    ("size", "xyxy"),
    [
        ((64, 64), (8, 16, 40, 48)),
        ((128, 128), (16, 32, 80, 96)),
        ((128, 64), (16, 32, 80, 96)),  # lies in 64×32
        ((32, 64), (8, 16, 40, 48)),  # lies in 32×64, unscaled
        ((99, 50), (8 * 99 / 64, 16 * 50 / 32, 40 * 99 / 64, 48 * 50 / 32)),  # 64×32.3: truncated to 32 rows
    ],
)
def test_boxes_return_to_source_pixels(size: tuple[int, int], xyxy: Sequence[float]) -> None:
    runtime = FakeRuntime(rows((0, (24, 32, 32, 32), 1, (1, 0, 0))))
    (found,) = detect(frontend(runtime, layout="decoded"), frame(*size))
    np.testing.assert_allclose(found.xyxy, [xyxy], atol=1e-4)


A, B, FAR = (20, 20, 10, 10), (21, 20, 10, 10), (50, 50, 10, 10)  # A and B overlap by 9/11


@pytest.mark.parametrize(
    ("story", "objects", "config", "expected"),
    [
        ("nothing", [], {}, []),
        ("strongest first", [(1, A, 0.5, (1, 0, 0)), (2, FAR, 0.9, (1, 0, 0))], {}, [(0.9, 0), (0.5, 0)]),
        ("the weaker of two goes", [(1, A, 0.5, (1, 0, 0)), (2, B, 0.9, (1, 0, 0))], {}, [(0.9, 0)]),
        ("unless overlap is allowed", [(1, A, 0.5, (1, 0, 0)), (2, B, 0.9, (1, 0, 0))],
         {"nms_iou": 0.9}, [(0.9, 0), (0.5, 0)]),
        ("or they are of two classes", [(1, A, 0.5, (1, 0, 0)), (2, B, 0.9, (0, 1, 0))],
         {}, [(0.9, 1), (0.5, 0)]),
        ("the score is a product", [(1, A, 0.5, (0.3, 0.1, 0))], {}, [(0.15, 0)]),
        ("too weak a product", [(1, A, 0.3, (0.3, 0.1, 0))], {}, []),
        ("exactly conf", [(1, A, 0.5, (0.5, 0, 0))], {"conf": 0.25}, [(0.25, 0)]),
        ("of two equals the first", [(1, B, 0.5, (1, 0, 0)), (2, A, 0.5, (1, 0, 0))], {}, [(0.5, 0)]),
        ("only wanted classes", [(1, A, 0.9, (1, 0, 0)), (2, FAR, 0.9, (0, 0, 1))],
         {"classes": ("car",)}, [(0.9, 2)]),
        ("a dog is no person for want of dogs", [(1, A, 0.9, (0.4, 0.5, 0))], {"classes": ("person",)}, []),
        ("an unwanted class hides nobody", [(1, A, 0.9, (0, 1, 0)), (2, B, 0.5, (1, 0, 0))],
         {"classes": ("person",)}, [(0.5, 0)]),
        ("only so many candidates", [(1, A, 0.5, (1, 0, 0)), (2, FAR, 0.9, (1, 0, 0))],
         {"max_candidates": 1}, [(0.9, 0)]),
    ],
)  # fmt: skip
def test_what_counts_as_an_object(
    story: str, objects: list[tuple], config: dict[str, object], expected: list[tuple[float, int]]
) -> None:
    (found,) = detect(frontend(FakeRuntime(rows(*objects)), layout="decoded", **config))
    assert [(round(float(s), 5), int(c)) for s, c in zip(found.score, found.label, strict=True)] == expected


def test_half_precision_rows_are_decoded_in_full() -> None:
    """In FP16, 1000 + 0.5 strides would already be off by half a pixel."""
    runtime = FakeRuntime(rows((9, (0.3, 0.7, 1.1, 0.2), 0.8, (0.5, 0, 0))).half())
    (found,) = detect(frontend(runtime))
    x, y, w, h = np.array((0.3, 0.7, 1.1, 0.2), np.float16).astype(np.float64)
    w, h = np.exp(w) * 8, np.exp(h) * 8
    x, y = (x + 1) * 8, (y + 1) * 8
    np.testing.assert_allclose(found.xyxy, [[x - w / 2, y - h / 2, x + w / 2, y + h / 2]], rtol=1e-6)


def test_frames_of_one_batch_keep_their_own() -> None:
    """Three frames of three sizes: two objects, none, one in the same place as another frame's."""
    two = rows((1, A, 0.9, (1, 0, 0)), (2, FAR, 0.8, (0, 1, 0)))
    answers = torch.cat((two, rows(), rows((5, A, 0.7, (1, 0, 0)))))
    runtime = FakeRuntime(answers, batch=None)
    opened = frontend(runtime, layout="decoded")
    assert (opened.max_batch, opened.usual_batch) == (8, 1)  # on a CPU frames go side by side
    found = detect(opened, frame(64, 64, 10), frame(128, 64, 20), frame(32, 32, 30))
    assert [each.label.tolist() for each in found] == [[0, 1], [], [0]]
    np.testing.assert_allclose(found[0].xyxy[0], (15, 15, 25, 25))
    np.testing.assert_allclose(found[2].xyxy[0], (7.5, 7.5, 12.5, 12.5))
    (fed,) = runtime.fed
    assert fed.shape == (3, 3, 64, 64)
    assert [fed[i, 0, 0, 0].item() for i in range(3)] == [10, 20, 30]
    assert fed[1, :, 32:].unique().item() == 114


def test_a_fixed_batch_may_be_part_full() -> None:
    runtime = FakeRuntime(torch.cat([rows((1, A, 0.9, (1, 0, 0)))] * 4), batch=4)
    opened = frontend(runtime, layout="decoded")
    assert (opened.max_batch, opened.usual_batch) == (4, 4)
    assert len(detect(opened, frame(), frame())) == 2
    assert runtime.fed[0].shape[0] == 4


def test_legacy_engines_get_rgb_and_imagenet_statistics() -> None:
    runtime = FakeRuntime(rows())
    described = Yolox.describe(runtime, onnx_sha256="0" * 64, names=NAMES, legacy=True)
    image = Image(format="bgr", planes=(np.full((64, 64, 3), (10, 20, 30), np.uint8),))
    detect(Yolox(runtime, described), Frame(index=0, pts_seconds=0.0, size=(64, 64), image=image))
    expected = [(30 - 123.675) / 58.395, (20 - 116.28) / 57.12, (10 - 103.53) / 57.375]
    np.testing.assert_allclose(runtime.fed[-1][0, :, 5, 5], expected, rtol=1e-5)


@pytest.mark.parametrize("count", [0, 3])
def test_too_many_frames_or_none(count: int) -> None:
    opened = frontend(FakeRuntime(rows(), batch=2))
    with pytest.raises(EngineError, match=f"{count} frames submitted; this engine takes 1 to 2"):
        opened.submit([frame()] * count)
    opened.close()


def test_work_goes_on_beside_the_caller_and_ends_with_close() -> None:
    runtime = FakeRuntime(rows())
    opened = frontend(runtime)
    runtime.go.clear()
    first, second = opened.submit([frame()]), opened.submit([frame()])
    assert not first.done()  # and yet both calls returned
    threading.Timer(0.05, runtime.go.set).start()
    assert len(first.result()) == len(second.result()) == 1
    runtime.go.clear()
    runtime.begun.clear()
    third, fourth = opened.submit([frame()]), opened.submit([frame()])
    runtime.begun.wait()
    threading.Timer(0.05, runtime.go.set).start()
    opened.close()
    assert third.done()
    with pytest.raises(CancelledError):
        fourth.result()


def test_torch_keeps_its_threads_outside_the_workers() -> None:
    before = torch.get_num_threads()
    workers = start_workers(3)
    together = threading.Barrier(3)
    for each in [workers.submit(lambda: (together.wait(), torch.get_num_threads())[1]) for _ in range(3)]:
        assert each.result() == 1
    assert torch.get_num_threads() == before
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == before
    workers.shutdown()


def test_every_stage_is_timed() -> None:
    opened = frontend(FakeRuntime(rows()))
    assert list(opened.seconds.items()) == [("preprocess", 0), ("inference", 0), ("postprocess", 0)]
    detect(opened)
    assert all(seconds > 0 for seconds in opened.seconds.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", [(40, 4), (1, 0), (1, 3), (1, 7)], ids=str)
def test_numbers_that_are_none_stop_the_run(value: float, place: tuple[int, int]) -> None:
    """An objectness anywhere, and whatever belongs to a candidate."""
    runtime = FakeRuntime(rows((1, A, 0.9, (1, 0, 0))))
    opened = frontend(runtime, layout="decoded")
    runtime.rows[(0, *place)] = value
    with pytest.raises(EngineError, match="NaN or inf"):
        detect(opened)


def test_sums_may_overflow_and_boxes_may_not() -> None:
    huge = rows((1, A, 0.9, (1, -3e38, -3e38)))
    (found,) = detect(frontend(FakeRuntime(huge), layout="decoded"))
    assert len(found) == 1
    with pytest.raises(DetectionsError, match="not a finite number"):
        detect(frontend(FakeRuntime(rows((1, (0, 0, 1000, 0), 1, (1, 0, 0))))))


@pytest.mark.parametrize(
    ("runtime", "words"),
    [
        (FakeRuntime(rows(count=80)), r"\(1, 80, 8\); .* 64×64 input and 3 class names gives \(1, 84, 8\)"),
        (FakeRuntime(torch.zeros(1, CELLS, 85)), r"\(1, 84, 85\).*correct the size or the names"),
        (FakeRuntime(torch.zeros(1, 8, CELLS)), r"\(1, 8, 84\)"),
        (FakeRuntime(torch.zeros(1, 8)), r"shape \(1, 8\)"),
        (FakeRuntime(rows() + float("nan")), "NaN or inf"),
        (FakeRuntime(decoded_grid()), "declared undecoded, but .*: declare it decoded"),
        (FakeRuntime(rows(), shape=(3, 64, 96)), r"images has shape \(1, 3, 64, 96\); 64×64 images need"),
        (FakeRuntime(rows(), shape=(1, 64, 64)), "need .batch, 3, 64, 64."),
        (FakeRuntime(rows(), shape=(10,)), "input images has shape"),
    ],
)  # fmt: skip
def test_engines_that_do_not_fit_are_refused_at_once(runtime: FakeRuntime, words: str) -> None:
    with pytest.raises(EngineError, match=words):
        frontend(runtime, calm=False)


def test_undecoded_rows_declared_decoded_are_refused() -> None:
    with pytest.raises(EngineError, match=r"declared decoded, but .*: declare it undecoded"):
        Yolox(FakeRuntime(rows()), manifest("decoded"))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"outputs": {"boxes": "output"}}, ConfigError, "undecoded or decoded, exactly one; .* has boxes"),
        ({"outputs": {"decoded": "a", "undecoded": "b"}}, ConfigError, "exactly one"),
        ({"outputs": {"decoded": "boxes"}}, EngineError, "no output boxes, only output"),
        ({"name": "input"}, EngineError, "feeds the input input, the engine takes images"),
        ({"size": (64, 72)}, EngineError, "64×72; YOLOX needs multiples of 32"),
    ],
)  # fmt: skip
def test_manifests_that_do_not_fit_are_refused(
    change: dict[str, object], error: type[Exception], words: str
) -> None:
    base = manifest()
    if "outputs" not in change:
        change = {"input": dataclasses.replace(base.input, **change)}
    with pytest.raises(error, match=words):
        Yolox(FakeRuntime(rows()), dataclasses.replace(base, **change))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (lambda: YoloxConfig(conf=0), "conf is 0; it must be above 0 and at most 1"),
        (lambda: YoloxConfig(conf=float("nan")), "conf is nan"),
        (lambda: YoloxConfig(nms_iou=1.5), "nms_iou is 1.5"),
        (lambda: YoloxConfig(max_candidates=0), "max_candidates is 0; it must be at least 1"),
        (lambda: YoloxConfig(max_batch=-1), "max_batch is -1"),
    ],
)
def test_impossible_settings(config: Callable[[], YoloxConfig], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config()


@pytest.mark.parametrize(
    ("name", "words"), [("persn", "near it: person"), ("zeppelin", "near it: person, dog, car")]
)
def test_unknown_classes_are_met_with_near_ones(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"no class '{name}' among the engine's 3; {words}"):
        frontend(FakeRuntime(rows()), classes=("car", name))


def greedy(xyxy: np.ndarray, score: np.ndarray, group: np.ndarray, threshold: float) -> list[int]:
    """The definition: one box after another by falling score, the first of equals first."""
    kept: list[int] = []
    for index in np.argsort(-score, kind="stable"):
        same = [k for k in kept if group[k] == group[index]]
        if not (boxes.iou(xyxy[index], xyxy[same]) > threshold).any():
            kept.append(int(index))
    return kept


@pytest.mark.parametrize("count", [0, 1, 2, 30, 127, 128, 129, 400])
@pytest.mark.parametrize("scores", ["distinct", "tied", "equal"])
def test_nms_is_exactly_the_greedy_loop(count: int, scores: str) -> None:
    rng = np.random.default_rng(count)
    for threshold in (0.3, 0.5, 0.7):
        # On a grid of eighths, so that IoU is the same number however it is computed.
        corner, size = rng.integers(0, 200, (count, 2)) / 8, rng.integers(0, 160, (count, 2)) / 8
        xyxy = np.hstack((corner, corner + size)).astype(np.float32)
        levels = {"distinct": 10**7, "tied": 5, "equal": 1}[scores]
        score = rng.integers(0, levels, count).astype(np.float32)
        group = rng.integers(0, 3, count)
        tensors = torch.from_numpy(xyxy), torch.from_numpy(score), torch.from_numpy(group)
        expected = greedy(xyxy, score, group, threshold)
        for block in (1, 7, 128):
            assert nms(*tensors, iou_threshold=threshold, block=block).tolist() == expected


def test_nms_settles_the_longest_chain() -> None:
    """Each box covers the next: every second one stays, however long the chain."""
    left = torch.arange(100.0)
    xyxy = torch.stack((left, torch.zeros(100), left + 3, torch.ones(100)), dim=1)
    kept = nms(xyxy, -left, torch.zeros(100, dtype=torch.int64), iou_threshold=0.4)
    assert kept.tolist() == list(range(0, 100, 2))


def test_the_strongest_of_each_group() -> None:
    score = torch.tensor([0.5, 0.9, 0.5, 0.7, 0.1, 0.5])
    group = torch.tensor([0, 1, 0, 1, 3, 0])
    assert sorted(strongest(score, group, 2).tolist()) == [0, 1, 2, 3, 4]
    assert sorted(strongest(score, group, 1).tolist()) == [0, 1, 4]


@pytest.fixture(scope="module")
def nano(data: Path) -> Path:
    return data / "models" / "yolox_nano_416x416.onnx"


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("000000000139", {"tv": (5, 166, 155, 265), "person": (427, 164, 468, 295)}),
        ("000000000724", {"stop sign": (120, 71, 254, 228)}),
        ("000000000785", {"person": (277, 54, 492, 385), "skis": (219, 361, 534, 399)}),
    ],
)
def test_photographs(data: Path, nano: Path, image: str, expected: dict[str, Sequence[float]]) -> None:
    opened, _ = open_engine(nano, frontend="yolox", conf=0.4)
    pixels = cv2.imread(str(data / "images" / f"{image}.jpg"))
    size = (pixels.shape[1], pixels.shape[0])
    shot = Frame(index=0, pts_seconds=0.0, size=size, image=Image(format="bgr", planes=(pixels,)))
    (found,) = detect(opened, shot)
    for name, xyxy in expected.items():
        overlap = boxes.iou(found.xyxy[found.label == opened.names.index(name)], np.array(xyxy, np.float32))
        assert overlap.max(initial=0) > 0.9, name


def test_people_in_video(data: Path, nano: Path) -> None:
    """Every person of the first ground-truth frame is found, and nothing but persons."""
    opened, _ = open_engine(nano, frontend="yolox", classes=("person",))
    with av.open(str(data / "pets09" / "video.mp4")) as container:
        decoded = next(container.decode(video=0))
    planes = tuple(np.frombuffer(p, np.uint8).reshape(-1, p.line_size)[:, : p.width] for p in decoded.planes)
    image = Image(format="yuv", planes=planes, matrix="bt709")
    size = (decoded.width, decoded.height)
    (found,) = detect(opened, Frame(index=0, pts_seconds=0.0, size=size, image=image))
    truth = np.loadtxt(data / "pets09" / "gt.txt", delimiter=",")
    people = boxes.xywh_to_xyxy(truth[truth[:, 0] == 1][:, 2:6]) * 0.625
    assert set(found.label.tolist()) == {0}
    assert (boxes.iou(found.xyxy[:, None], people[None]).max(axis=0) > 0.5).all()
