"""Colours are right, pixels land where the fit says, and no call disturbs another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from tracker.boxes import Fit, fit_center, fit_corner
from tracker.pixels import Workspace, network_input, resize_bgr, to_bgr
from tracker.types import Image, YuvMatrix

RNG = np.random.default_rng(7)


def yuv_image(
    width: int, height: int, cut: tuple[int, int] = (2, 2), matrix: YuvMatrix = "bt601", full: bool = False
) -> Image:
    """Noise that stays inside the legal range, chroma `cut` times smaller across and down."""
    chroma = -(-height // cut[1]), -(-width // cut[0])
    planes = (
        RNG.integers(16, 236, (height, width), np.uint8),
        *RNG.integers(40, 216, (2, *chroma), np.uint8),
    )
    return Image(format="yuv", planes=planes, matrix=matrix, full_range=full)


def bgr_image(width: int, height: int) -> Image:
    return Image(format="bgr", planes=(RNG.integers(0, 256, (height, width, 3), np.uint8),))


@pytest.mark.parametrize(
    ("yuv", "matrix", "full", "bgr"),
    [
        ((16, 128, 128), "bt601", False, (0, 0, 0)),
        ((235, 128, 128), "bt709", False, (255, 255, 255)),
        ((0, 128, 128), "bt601", True, (0, 0, 0)),
        ((255, 128, 128), "bt2020", True, (255, 255, 255)),
        ((81, 90, 240), "bt601", False, (0, 0, 255)),
        ((63, 102, 240), "bt709", False, (0, 0, 255)),
        ((74, 97, 240), "bt2020", False, (0, 0, 255)),
        ((41, 240, 110), "bt601", False, (255, 0, 0)),
        ((145, 54, 34), "bt601", False, (0, 255, 0)),
        ((76, 85, 255), "bt601", True, (0, 0, 254)),
    ],
)
def test_known_colours(
    yuv: tuple[int, int, int], matrix: YuvMatrix, full: bool, bgr: tuple[int, int, int]
) -> None:
    planes = tuple(np.full((4, 4), value, np.uint8) for value in yuv)
    result = to_bgr(Image(format="yuv", planes=planes, matrix=matrix, full_range=full))
    np.testing.assert_allclose(result.astype(int), np.broadcast_to(bgr, (4, 4, 3)), atol=2)


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize(
    ("matrix", "swscale_name"), [("bt601", "ITU601"), ("bt709", "ITU709"), ("bt2020", "BT2020")]
)
@pytest.mark.parametrize(
    ("pixel_format", "cut"), [("yuv420p", (2, 2)), ("yuv422p", (2, 1)), ("yuv444p", (1, 1))]
)
def test_agrees_with_swscale(
    pixel_format: str, cut: tuple[int, int], matrix: YuvMatrix, swscale_name: str, full: bool
) -> None:
    image = yuv_image(64, 48, cut, matrix, full)
    frame = av.VideoFrame(64, 48, pixel_format)
    for plane, values in zip(frame.planes, image.planes, strict=True):
        plane.update(np.pad(values, ((0, 0), (0, plane.line_size - values.shape[1]))))
    reference = frame.reformat(
        format="bgr24",
        src_colorspace=swscale_name,
        dst_colorspace=swscale_name,
        src_color_range="JPEG" if full else "MPEG",
        dst_color_range="JPEG",
    ).to_ndarray()
    # swscale's own tables are good to a few levels.
    np.testing.assert_allclose(to_bgr(image).astype(int), reference.astype(int), atol=4)


def test_bgr_comes_back_as_a_copy_of_its_own() -> None:
    image = bgr_image(6, 5)
    result = to_bgr(image)
    assert result.flags.c_contiguous
    result[:] = 0
    assert image.planes[0].any()


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (8, 5), (321, 241)], ids=str)
def test_odd_sizes_repeat_chroma_to_the_last_pixel(size: tuple[int, int]) -> None:
    image = yuv_image(*size)
    y, u, v = image.planes
    whole = [y, *(np.repeat(np.repeat(c, 2, 0), 2, 1)[: size[1], : size[0]] for c in (u, v))]
    np.testing.assert_array_equal(to_bgr(image), to_bgr(Image(format="yuv", planes=tuple(whole))))


def test_rotated_read_only_planes_are_taken_as_they_lie() -> None:
    upright = yuv_image(8, 6)
    for plane in upright.planes:
        plane.setflags(write=False)
    turned = Image(format="yuv", planes=tuple(np.rot90(plane) for plane in upright.planes))
    np.testing.assert_array_equal(to_bgr(turned), np.rot90(to_bgr(upright)))
    resize_bgr(turned, (12, 9), interpolation=cv2.INTER_LINEAR, work=Workspace())


def test_resizing_planes_first_changes_pixels_little(data: Path) -> None:
    with av.open(str(data / "pets09" / "video.mp4")) as container:
        frame = next(container.decode(video=0))
    planes = tuple(np.frombuffer(p, np.uint8).reshape(-1, p.line_size)[:, : p.width] for p in frame.planes)
    image = Image(format="yuv", planes=planes, matrix="bt709")
    first = resize_bgr(image, (416, 312), interpolation=cv2.INTER_LINEAR, work=Workspace())
    after = cv2.resize(frame.to_ndarray(format="bgr24"), (416, 312), interpolation=cv2.INTER_LINEAR)
    difference = np.abs(first.astype(int) - after)
    assert difference.mean() < 1.5
    assert np.percentile(difference, 99) < 8


@pytest.mark.parametrize("rgb", [False, True], ids=["bgr", "rgb"])
@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)), ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))],
    ids=["raw", "normalised"],
)
@pytest.mark.parametrize(
    "fit",
    [
        fit_corner((48, 36), (64, 64)),
        fit_center((48, 36), (64, 32)),
        fit_center((36, 48), (32, 64)),
        fit_corner((48, 36), (48, 36)),
    ],
    ids=["corner", "left and right", "above and below", "no resize"],
)
@pytest.mark.parametrize("make", [bgr_image, yuv_image])
def test_network_input_is_resize_pad_normalise(
    make: Callable[[int, int], Image],
    fit: Fit,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    rgb: bool,
) -> None:
    image = make(*fit.source_size)
    (width, height), (left, top) = fit.resized, fit.offset
    canvas = np.full((*fit.input_size[::-1], 3), 114, np.uint8)
    resized = resize_bgr(image, fit.resized, interpolation=cv2.INTER_LINEAR, work=Workspace())
    canvas[top : top + height, left : left + width] = resized
    canvas = canvas[..., ::-1] if rgb else canvas
    expected = ((canvas.astype(np.float64) - mean) / std).transpose(2, 0, 1)

    out = np.full((3, *fit.input_size[::-1]), np.nan, np.float32)
    network_input(image, fit, out=out, work=Workspace(), rgb=rgb, mean=mean, std=std, pad=114.0)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_bgr_input_is_what_opencv_resizes() -> None:
    image, fit = bgr_image(50, 40), fit_corner((50, 40), (32, 32))
    out = np.empty((3, 32, 32), np.float32)
    network_input(image, fit, out=out, work=Workspace())
    expected = cv2.resize(image.planes[0], fit.resized, interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(out[:, : fit.resized[1]], expected.transpose(2, 0, 1))


def test_a_workspace_carries_nothing_from_frame_to_frame() -> None:
    """Large, small, large again, BGR between YUV: every answer as with fresh memory."""
    work = Workspace()
    for image, size in [
        (yuv_image(64, 48), (40, 30)),
        (bgr_image(10, 10), (6, 6)),
        (yuv_image(9, 7, (1, 1)), (5, 3)),
        (yuv_image(64, 48), (40, 30)),
    ]:
        np.testing.assert_array_equal(to_bgr(image, work=work), to_bgr(image))
        fresh = resize_bgr(image, size, interpolation=cv2.INTER_LINEAR, work=Workspace())
        reused = resize_bgr(image, size, interpolation=cv2.INTER_LINEAR, work=work)
        np.testing.assert_array_equal(reused, fresh)
