"""NVDEC's side of the seam played by FFmpeg: what reaches the decoder, and what is made of what comes back.

The fake decodes the very stream it is fed, so start codes, parameter sets, time stamps and order are real.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import cut, write_clip
from fake_nvdec import CPU, FakeLibrary

from tracker.errors import ConfigError, EngineError, SourceError
from tracker.pixels import to_bgr
from tracker.sources import VideoFile, nvdec, open_source
from tracker.types import Frame


def read(source: VideoFile) -> list[Frame]:
    with source:
        return list(source)


def opened(path: Path) -> nvdec.NvdecFile:
    look = nvdec.examine(path, CPU)
    assert isinstance(look, nvdec.Look), look
    return nvdec.NvdecFile(path, look, device=CPU)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("b-frames.mp4", {"options": {"bf": "3"}}),
        ("varying.mp4", {"pts_ms": [0, 40, 95, 100, 260, 300, 333, 380, 400, 470, 520, 600], "frames": 12}),
        ("annex-b.ts", {"gop": 5}),
        ("hevc.mkv", {"codec": "libx265", "options": {"x265-params": "log-level=error"}}),
        ("vp9.webm", {"codec": "libvpx-vp9", "gop": 8}),
        ("mpeg2.mpg", {"codec": "mpeg2video"}),
    ],
)
def test_frames_times_and_counts_are_those_of_the_cpu(
    library: FakeLibrary, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    path = write_clip(tmp_path / name, **options)
    on_cpu, on_gpu = VideoFile(path), opened(path)
    expected, frames = read(on_cpu), read(on_gpu)
    assert [(f.index, f.pts_seconds, f.size) for f in frames] == [
        (f.index, f.pts_seconds, f.size) for f in expected
    ]
    assert on_gpu.counts == on_cpu.counts
    for frame, wanted in zip(frames, expected, strict=True):
        assert frame.image and wanted.image and torch.is_tensor(frame.image.planes[0])
        np.testing.assert_array_equal(to_bgr(frame.image), to_bgr(wanted.image))


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_turned_videos_come_out_upright(library: FakeLibrary, tmp_path: Path, degrees: int) -> None:
    path = write_clip(tmp_path / "turned.mp4", prepare=lambda stream: stream.set_display_rotation(degrees))
    for frame, wanted in zip(read(opened(path)), read(VideoFile(path)), strict=True):
        assert frame.size == wanted.size
        assert frame.image and wanted.image
        np.testing.assert_array_equal(to_bgr(frame.image), to_bgr(wanted.image))


def test_a_truncated_file_is_as_short_as_on_the_cpu(library: FakeLibrary, tmp_path: Path) -> None:
    path = cut(write_clip(tmp_path / "whole.mkv", frames=60), tmp_path / "cut.mkv", 0.5)
    on_cpu, on_gpu = VideoFile(path), opened(path)
    assert len(read(on_gpu)) == len(read(on_cpu))
    assert on_gpu.counts.missing == on_cpu.counts.missing > 0


def test_a_decoder_that_gives_up_says_so_after_the_good_frames(library: FakeLibrary, tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", options={"bf": "0"})
    library.breaks_at = 10
    frames = []
    with opened(path) as source, pytest.raises(SourceError, match=r"gave up after 10 frames.*--decode cpu"):
        frames.extend(source)
    assert source.counts.decoded == 10


@pytest.mark.parametrize(
    ("options", "limits", "words"),
    [
        ({"codec": "mpeg4"}, {}, "its codec is mpeg4"),
        ({"suffix": ".avi"}, {}, "AVI files hold no presentation times"),
        ({"pix_fmt": "yuv444p"}, {}, "its pixels are yuv444p"),
        ({"pix_fmt": "yuv420p10le"}, {}, "its pixels are yuv420p10le"),
        ({}, {"num_decoder_engines": 0}, "this GPU does not decode h264"),
        ({}, {"width_max": 64}, "from 48×16 to 64×4096 only"),
        ({"size": (95, 63), "pix_fmt": "yuv420p", "codec": "libvpx"}, {}, "its size is odd, 95×63"),
    ],
)
def test_what_nvdec_cannot_decode_is_said_in_words(
    library: FakeLibrary, tmp_path: Path, options: dict[str, Any], limits: dict[str, int], words: str
) -> None:
    path = write_clip(tmp_path / f"a{options.pop('suffix', '.mkv')}", **options)
    library.caps |= limits
    why = nvdec.examine(path, CPU)
    assert isinstance(why, str)
    assert words in why


def test_auto_takes_nvdec_where_it_can_and_else_says_why_not(library: FakeLibrary, tmp_path: Path) -> None:
    good, deep = write_clip(tmp_path / "a.mp4"), write_clip(tmp_path / "b.mp4", pix_fmt="yuv420p10le")
    assert open_source(good, gpu=CPU).decoder == "NVDEC"
    assert open_source(good, gpu=CPU, decode="cpu").decoder == "CPU"
    assert open_source(good).decoder == "CPU"
    assert open_source(deep, gpu=CPU).decoder == "CPU, because its pixels are yuv420p10le"
    with pytest.raises(SourceError, match="NVDEC cannot decode it, because its pixels are yuv420p10le"):
        open_source(deep, gpu=CPU, decode="gpu")
    with pytest.raises(ConfigError, match="needs an engine that runs on a GPU"):
        open_source(good, decode="gpu")


def test_without_the_library_it_says_what_to_install(tmp_path: Path) -> None:
    try:
        import PyNvVideoCodec  # noqa: F401
    except (ImportError, RuntimeError):
        with pytest.raises(EngineError, match=r"tracker\[gpu\]|no NVIDIA driver"):
            nvdec.examine(write_clip(tmp_path / "a.mp4"), CPU)
    else:
        pytest.skip("PyNvVideoCodec is installed here")
