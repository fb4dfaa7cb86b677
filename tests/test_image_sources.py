"""Directories, patterns and MOTChallenge sequences of images are videos like any other."""

from __future__ import annotations

import struct
from pathlib import Path

import cv2
import numpy as np
import pytest

from tracker.errors import SourceError
from tracker.sources import ImageFolder, open_source
from tracker.types import Frame, FrameCounts


def images(folder: Path, *names: str, size: tuple[int, int] = (32, 24)) -> Path:
    """Images whose every pixel is their place among the names."""
    folder.mkdir(parents=True, exist_ok=True)
    for grey, name in enumerate(names):
        assert cv2.imwrite(str(folder / name), np.full((size[1], size[0], 3), grey, np.uint8))
    return folder


def greys(frames: list[Frame]) -> list[int]:
    return [int(frame.image.planes[0][0, 0, 0]) for frame in frames if frame.image]


def read(spec: str | Path) -> tuple[list[Frame], FrameCounts]:
    with ImageFolder(spec) as source:
        return list(source), source.counts


@pytest.mark.parametrize(
    "names",
    [
        ["1.png", "2.png", "10.png"],
        ["img2.bmp", "img010.bmp", "img11.bmp"],
        ["a1b10.png", "a2b9.png", "a2b10.tiff"],
        ["000001.PNG", "000002.webp", "000003.tif"],
    ],
)
def test_numbers_in_names_give_the_order(tmp_path: Path, names: list[str]) -> None:
    images(tmp_path / "walk", *names)
    (tmp_path / "walk" / "notes.txt").write_text("no image")
    (tmp_path / "walk" / f"._{names[0]}").write_bytes(b"a resource fork")
    with open_source(tmp_path / "walk", source=2) as source:
        assert (source.name, source.size, source.frame_rate) == ("walk", (32, 24), 30)
        frames = list(source)
    assert greys(frames) == [0, 1, 2]
    assert [(frame.index, frame.source) for frame in frames] == [(0, 2), (1, 2), (2, 2)]
    assert [frame.pts_seconds for frame in frames] == [0, 1 / 30, 2 / 30]
    assert source.counts == FrameCounts(declared=3, decoded=3)


@pytest.mark.parametrize(
    ("spec", "order", "name"),
    [
        ("seq/img1", [0, 1, 2], "seq"),
        ("seq", [0, 1, 2], "seq"),
        ("seq/img1/*.png", [0, 2], "seq"),
        ("seq/img1/[0-2]*", [0, 1], "seq"),
        ("s?q/**/*.bmp", [1], "seq"),
        ("seq/img1/2.bmp", [1], "2"),
    ],
)
def test_directories_patterns_and_single_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, order: list[int], name: str
) -> None:
    images(tmp_path / "seq" / "img1", "1.png", "2.bmp", "3.png")
    monkeypatch.chdir(tmp_path)
    for where in (spec, str(tmp_path / spec)):
        with open_source(where) as source:
            assert greys(list(source)) == order
            assert source.name == name


def test_the_directory_one_is_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(images(tmp_path / "walk", "1.png"))
    assert (ImageFolder(".").name, ImageFolder("*.png").name, ImageFolder("1.png").name) == (
        "walk",
        "walk",
        "1",
    )


def test_a_challenge_sequence_brings_its_frame_rate(tmp_path: Path) -> None:
    images(tmp_path / "MOT17-05" / "img1", "000001.jpg", "000002.jpg")
    (tmp_path / "MOT17-05" / "seqinfo.ini").write_text("[Sequence]\nname=MOT17-05\nframeRate=14\n")
    with ImageFolder(tmp_path / "MOT17-05") as source:
        assert (source.name, source.frame_rate) == ("MOT17-05", 14)
        assert [frame.pts_seconds for frame in source] == [0, 1 / 14]


@pytest.mark.parametrize(
    "content", ["[Sequence]\nframeRate=0", "[Sequence]\nframeRate=fast", "frameRate=30", "\xff"]
)
def test_sequence_information_that_makes_no_sense(tmp_path: Path, content: str) -> None:
    images(tmp_path / "seq" / "img1", "1.png")
    (tmp_path / "seq" / "seqinfo.ini").write_text(content, encoding="latin-1")
    with pytest.raises(SourceError, match=r"seqinfo.ini: ") as error:
        ImageFolder(tmp_path / "seq")
    assert "\n" not in str(error.value)


def test_unreadable_images_keep_their_numbers(tmp_path: Path) -> None:
    folder = images(tmp_path / "walk", *[f"{n}.jpg" for n in range(6)])
    (folder / "0.jpg").write_bytes(b"")
    (folder / "2.jpg").write_bytes(b"no image")
    whole = (folder / "4.jpg").read_bytes()
    (folder / "4.jpg").write_bytes(whole[: len(whole) // 2])
    frames, counts = read(folder)
    assert [frame.index for frame in frames] == [1, 3, 5] == greys(frames)
    assert frames[1].pts_seconds == 3 / 30
    assert counts == FrameCounts(declared=6, decoded=3, corrupt=3)


def test_sizes_may_differ(tmp_path: Path) -> None:
    images(tmp_path, "1.png")
    images(tmp_path, "2.png", size=(40, 50))
    frames, _ = read(tmp_path)
    assert [frame.size for frame in frames] == [(32, 24), (40, 50)]


def test_photographs(data: Path) -> None:
    frames, counts = read(data / "images")
    assert counts == FrameCounts(declared=40, decoded=40)
    for frame in frames[:5]:
        assert frame.image is not None
        (pixels,) = frame.image.planes
        assert (frame.image.format, pixels.dtype, pixels.shape) == ("bgr", np.uint8, (*frame.size[::-1], 3))


@pytest.mark.parametrize(("exif", "size"), [(1, (32, 24)), (6, (24, 32))])
def test_exif_orientation(tmp_path: Path, exif: int, size: tuple[int, int]) -> None:
    path = images(tmp_path, "1.jpg") / "1.jpg"
    tiff = b"II*\0" + struct.pack("<IHHHIII", 8, 1, 0x112, 3, 1, exif, 0)
    jpeg = path.read_bytes()
    path.write_bytes(
        jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(tiff) + 8) + b"Exif\0\0" + tiff + jpeg[2:]
    )
    assert read(path)[0][0].size == size


def test_nothing_to_read_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "1.png").write_bytes(b"no image")
    suffixes = r"no images there; looked for \.bmp, \.jpeg, \.jpg, \.png, \.tif, \.tiff, \.webp"
    for spec, words in [
        (tmp_path / "empty", suffixes),
        (tmp_path / "empty" / "*.jpg", suffixes),
        (tmp_path / "missing.png", "no such file or directory"),
        (tmp_path / "broken", "not one of 1 images could be read"),
    ]:
        with pytest.raises(SourceError, match=words) as error, open_source(str(spec)):
            pass
        assert str(spec) in str(error.value)


def test_images_over_the_limit_are_refused(tmp_path: Path) -> None:
    images(tmp_path, "1.png")
    with ImageFolder(tmp_path, max_pixels=32 * 24) as source:
        assert len(list(source)) == 1
    with (
        pytest.raises(SourceError, match=r"1\.png: 32×24 pictures are over the limit of 767 pixels"),
        ImageFolder(tmp_path, max_pixels=32 * 24 - 1),
    ):
        pass
