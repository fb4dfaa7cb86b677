"""Frames to network inputs by the GPU kernel: OpenCV's values, for every layout of pixels and every fit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
import torch
from conftest import ROOT
from kernel_runs import PLACES, Run, run_at
from numpy.typing import NDArray
from torch import Tensor

from tracker.boxes import Fit, fit_center, fit_corner, fit_stretch
from tracker.errors import EngineError, SourceError
from tracker.kernels.heads import decode_heads
from tracker.kernels.letterbox import FrameTable, Plane, letterbox, planes_of
from tracker.manifest import Interpolation
from tracker.pixels import Workspace, network_input
from tracker.sources.planes import image_of
from tracker.types import Image, YuvMatrix

RNG = np.random.default_rng(11)
FLAGS: dict[Interpolation, int] = {"linear": cv2.INTER_LINEAR, "area": cv2.INTER_AREA}
FAIRMOT = {"std": (255.0, 255.0, 255.0), "pad": 128.0}
UPRIGHT = {"turned": False, "mirrored": False, "flipped": False}


@pytest.fixture(params=PLACES)
def run(request: pytest.FixtureRequest) -> Run:
    return run_at(request)


def yuv(width: int, height: int, cut: tuple[int, int] = (2, 2), **colours: Any) -> Image:
    """Noise: every rounding shows."""
    chroma = -(-height // cut[1]), -(-width // cut[0])
    planes = (
        RNG.integers(0, 256, (height, width), np.uint8),
        *RNG.integers(0, 256, (2, *chroma), np.uint8),
    )
    return Image(format="yuv", planes=planes, **colours)


def bgr(width: int, height: int) -> Image:
    return Image(format="bgr", planes=(RNG.integers(0, 256, (height, width, 3), np.uint8),))


def surface(image: Image, pitch: int) -> list[Tensor]:
    """A 4:2:0 image as decoders have it: U and V side by side below Y, lines `pitch` bytes apart."""
    y, u, v = image.planes
    nv12 = np.zeros((len(y) + len(u), pitch), np.uint8)
    nv12[: len(y), : y.shape[1]] = y
    nv12[len(y) :, : 2 * u.shape[1]] = np.stack((u, v), axis=2).reshape(len(u), -1)
    whole = torch.from_numpy(nv12)
    chroma = whole[len(y) :, : 2 * u.shape[1]].unflatten(1, (-1, 2))
    return [whole[: len(y), : y.shape[1]], chroma[..., 0], chroma[..., 1]]


def filled(
    planes: Sequence[Sequence[Tensor]],
    images: Sequence[Image],
    fits: Sequence[Fit],
    *,
    interpolation: Interpolation = "linear",
    rgb: bool = True,
    half: bool = False,
    channels_last: bool = False,
    turn: dict[str, bool] | None = None,
    **normalise: Any,
) -> Tensor:
    """The kernel's answer, on the planes' device; images say all but the planes."""
    device, (width, height) = planes[0][0].device, fits[0].input_size
    table = FrameTable(len(images) + 1, device, interpolation=interpolation, rgb=rgb)  # one row stays empty
    for index, (image, where, fit) in enumerate(zip(images, planes, fits, strict=True)):
        table.put(index, replace(image, planes=tuple(where)), fit, **(turn or UPRIGHT))
    table.upload()
    out = torch.full((len(images), 3, height, width), torch.nan, device=device)
    out = out.to(torch.float16 if half else torch.float32)
    if channels_last:
        out = out.contiguous(memory_format=torch.channels_last)
    letterbox(table, out, **normalise)
    return out


def kernel_input(run: Run, image: Image, fit: Fit, **options: Any) -> NDArray[np.float32]:
    planes = [torch.from_numpy(np.ascontiguousarray(plane)) for plane in image.planes]
    answer: Tensor = run(filled, [planes], [replace(image, planes=())], [fit], **options)
    return answer[0].numpy()


def opencv_input(
    image: Image, fit: Fit, *, interpolation: Interpolation = "linear", rgb: bool = True, **normalise: Any
) -> NDArray[np.float32]:
    out = np.empty((3, *fit.input_size[::-1]), np.float32)
    network_input(
        image, fit, out=out, work=Workspace(), rgb=rgb, interpolation=FLAGS[interpolation], **normalise
    )
    return out


def assert_same_picture(got: NDArray[np.float32], expected: NDArray[np.float32], level: float = 1.0) -> None:
    """At most one grey level apart, and that in one value of a hundred. level: what a grey level is."""
    apart = np.abs(got - expected) / level
    assert apart.max() <= 1.001
    assert (apart < 1e-3).mean() >= 0.99


@pytest.mark.parametrize("interpolation", FLAGS)
@pytest.mark.parametrize(
    ("image", "fit"),
    [
        (yuv(193, 109), fit_center((193, 109), (80, 48))),
        (yuv(31, 20), fit_corner((31, 20), (66, 45))),
        (yuv(150, 20), fit_stretch((150, 20), (64, 32))),
        (yuv(96, 64), fit_corner((96, 64), (48, 32))),
        (yuv(99, 66), fit_corner((99, 66), (33, 32))),
        (yuv(64, 32), fit_center((64, 32), (64, 48))),
        (yuv(97, 63, (2, 1)), fit_center((97, 63), (64, 40))),
        (yuv(97, 63, (1, 1)), fit_center((97, 63), (64, 40))),
        (yuv(97, 63, (4, 4)), fit_center((97, 63), (64, 40))),
        (bgr(97, 63), fit_center((97, 63), (64, 40))),
        (yuv(1, 1), fit_center((1, 1), (16, 16))),
        (yuv(300, 3), fit_center((300, 3), (32, 32))),
    ],
    ids=[
        "smaller",
        "larger",
        "wider than high",
        "half",
        "a third",
        "as it is",
        "4:2:2",
        "4:4:4",
        "4:1:0",
        "bgr",
        "one pixel",
        "a strip",
    ],
)
def test_a_noise_image_becomes_what_opencv_makes_of_it(
    run: Run, image: Image, fit: Fit, interpolation: Interpolation
) -> None:
    got = kernel_input(run, image, fit, interpolation=interpolation, pad=114.0)
    assert_same_picture(got, opencv_input(image, fit, interpolation=interpolation, pad=114.0))


@pytest.mark.parametrize(
    ("clip", "interpolation"),
    [
        ("intel_car-detection.mp4", "area"),
        ("testsrc2_odd_height_and_width_444.mp4", "area"),
        ("video_90.mov", "linear"),
        ("h264_10bits.mp4", "linear"),
    ],
)
def test_real_frames_become_what_opencv_makes_of_them(
    run: Run, data: Path, clip: str, interpolation: Interpolation
) -> None:
    with av.open(str(data / "clips" / clip)) as container:
        image = image_of(next(container.decode(video=0)))
    height, width = image.planes[0].shape[:2]
    fit = fit_center((width, height), (64, 40))
    got = kernel_input(run, image, fit, interpolation=interpolation, **FAIRMOT)
    expected = opencv_input(image, fit, interpolation=interpolation, **FAIRMOT)
    assert_same_picture(got, expected, level=1 / 255)


def test_the_demo_as_a_decoder_on_the_gpu_would_have_it(run: Run) -> None:
    with av.open(str(ROOT / "videos" / "demo.mp4")) as container:
        image = image_of(next(container.decode(video=0)))
    fit = fit_center((640, 360), (128, 80))
    got = run(
        filled, [surface(image, 768)], [replace(image, planes=())], [fit], interpolation="area", **FAIRMOT
    )
    expected = opencv_input(image, fit, interpolation="area", **FAIRMOT)
    assert_same_picture(got[0].numpy(), expected, level=1 / 255)


@pytest.mark.parametrize(
    ("matrix", "full", "rgb"), [*product(("bt601", "bt709", "bt2020"), (False, True), (False, True))]
)
def test_colours(run: Run, matrix: YuvMatrix, full: bool, rgb: bool) -> None:
    image, fit = yuv(32, 24, matrix=matrix, full_range=full), fit_corner((32, 24), (32, 32))
    assert_same_picture(kernel_input(run, image, fit, rgb=rgb), opencv_input(image, fit, rgb=rgb))


def test_images_of_all_sizes_and_formats_in_one_batch(run: Run) -> None:
    images = [yuv(100, 80), bgr(30, 50), yuv(64, 64, (1, 1), full_range=True), yuv(99, 33, matrix="bt709")]
    fits = [fit_center((i.planes[0].shape[1], i.planes[0].shape[0]), (64, 48)) for i in images]
    planes = [[torch.from_numpy(plane) for plane in image.planes] for image in images]
    got = run(filled, planes, [replace(image, planes=()) for image in images], fits, pad=7.0)
    for mine, image, fit in zip(got.numpy(), images, fits, strict=True):
        assert_same_picture(mine, opencv_input(image, fit, pad=7.0))


def test_normalised_per_channel_around_a_normalised_border(run: Run) -> None:
    image, fit = yuv(60, 40), fit_center((60, 40), (64, 64))
    how = {"mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375), "pad": 114.0}
    assert_same_picture(kernel_input(run, image, fit, **how), opencv_input(image, fit, **how), level=1 / 57)


def test_half_precision_is_rounded_once(run: Run) -> None:
    image, fit = yuv(60, 40), fit_center((60, 40), (64, 64))
    whole = kernel_input(run, image, fit, **FAIRMOT)
    half = kernel_input(run, image, fit, half=True, **FAIRMOT)
    np.testing.assert_array_equal(half, whole.astype(np.float16))


def test_an_input_with_channels_last_is_filled_in_place(run: Run) -> None:
    image, fit = yuv(60, 40), fit_center((60, 40), (64, 64))
    expected = kernel_input(run, image, fit)
    np.testing.assert_array_equal(kernel_input(run, image, fit, channels_last=True), expected)


@pytest.mark.parametrize(("turned", "mirrored", "flipped"), [*product((False, True), repeat=3)])
def test_pictures_stored_on_their_side_come_out_upright(
    run: Run, turned: bool, mirrored: bool, flipped: bool
) -> None:
    """All eight ways a display matrix can turn and mirror, on an NV12 surface that stays as it is."""
    stored = yuv(48, 30)
    steps = slice(None, None, -1 if flipped else 1), slice(None, None, -1 if mirrored else 1)
    planes = tuple(np.ascontiguousarray((plane.T if turned else plane)[steps]) for plane in stored.planes)
    upright = replace(stored, planes=planes)
    fit = fit_center((planes[0].shape[1], planes[0].shape[0]), (32, 32))
    turn = {"turned": turned, "mirrored": mirrored, "flipped": flipped}
    got = run(filled, [surface(stored, 64)], [replace(stored, planes=())], [fit], turn=turn)
    assert_same_picture(got[0].numpy(), opencv_input(upright, fit))


def test_what_cannot_be_a_plane_is_refused() -> None:
    table, fit = FrameTable(1, torch.device("cpu")), fit_corner((8, 8), (8, 8))
    deep = torch.zeros(8, 8, dtype=torch.int16)
    with pytest.raises(SourceError, match=r"8-bit and \(H, W\), not torch.int16 \(8, 8\)"):
        table.put(0, Image(format="yuv", planes=(deep, deep, deep)), fit)
    plane = torch.zeros(6, 8, dtype=torch.uint8)
    with pytest.raises(SourceError, match=r"\(8, 6\), but was to be fitted as \(8, 8\)"):
        table.put(0, Image(format="yuv", planes=(plane, plane, plane)), fit)
    with pytest.raises(SourceError, match="lies on meta, but cpu is to read it"):
        elsewhere = plane.to("meta")
        table.put(0, Image(format="yuv", planes=(elsewhere, elsewhere, elsewhere)), fit)


def test_cpu_tensors_are_refused_in_words() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    with pytest.raises(EngineError, match="take CUDA tensors, not cpu"):
        letterbox(FrameTable(1, torch.device("cpu")), torch.empty(1, 3, 8, 8))


def test_without_triton_everything_imports_and_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from tracker.kernels import best, deform, heads, launch, letterbox, nms\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    monkeypatch.setitem(sys.modules, "triton", None)
    head = torch.zeros(1, 4, 8, 8)
    with pytest.raises(EngineError, match="need Triton, which comes with torch's CUDA builds"):
        decode_heads(head[:, :1], head, head[:, :2], head, logits=True, limit=5)


def test_on_a_gpu_a_graph_reads_whatever_the_table_says_next(gpu: torch.device) -> None:
    images = [yuv(1920, 1080, matrix="bt709"), bgr(640, 480)]
    fits = [fit_center((1920, 1080), (1088, 608)), fit_center((640, 480), (1088, 608))]
    there = [
        replace(image, planes=tuple(torch.from_numpy(plane).to(gpu) for plane in image.planes))
        for image in images
    ]
    table = FrameTable(1, gpu, interpolation="area", rgb=True)
    out = torch.empty(1, 3, 608, 1088, device=gpu)
    table.put(0, there[0], fits[0])
    table.upload()
    letterbox(table, out, **FAIRMOT)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        letterbox(table, out, **FAIRMOT)
    for image, on_gpu, fit in zip(images, there, fits, strict=True):
        torch.cuda.synchronize()
        table.put(0, on_gpu, fit)
        table.upload()
        graph.replay()
        expected = opencv_input(image, fit, interpolation="area", **FAIRMOT)
        assert_same_picture(out[0].cpu().numpy(), expected, level=1 / 255)


def test_a_surface_of_nv12_is_read_where_its_planes_lie() -> None:
    nv12 = torch.zeros(8 * 3 // 2, 32, dtype=torch.uint8)[:, :16]  # rows are padded, as NVDEC's are
    luma, chroma = nv12[:8], nv12[8:]
    found = planes_of(Image(format="nv12", planes=(nv12,)), torch.device("cpu"))
    assert [plane[:5] for plane in found] == [
        Plane.of(plane)[:5] for plane in (luma, chroma[:, ::2], chroma[:, 1::2])
    ]
    assert all(plane.owner is nv12 for plane in found)
