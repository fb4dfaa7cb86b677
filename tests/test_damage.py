"""What is lost is counted, what is good is delivered under its own number, and good files raise no alarm."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import cut, with_an_empty_packet, without_first_packets, write_clip

from tracker.errors import SourceError
from tracker.sources import VideoFile
from tracker.sources.accounting import Ledger
from tracker.types import Frame, FrameCounts


def read(path: Path) -> tuple[list[Frame], FrameCounts]:
    with VideoFile(path) as source:
        return list(source), source.counts


def flip_bits(source: Path, path: Path, seed: int, count: int, span: tuple[float, float]) -> Path:
    data, chance = bytearray(source.read_bytes()), random.Random(seed)
    for _ in range(count):
        place = chance.randrange(int(span[0] * len(data)), int(span[1] * len(data)))
        data[place] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    return path


def assert_numbers_fit_times(frames: list[Frame], rate: float, start_seconds: float = 0) -> None:
    """At a constant rate a frame's time tells its number, however many before it were lost."""
    numbers = [round((frame.pts_seconds - start_seconds) * rate) for frame in frames]
    assert [frame.index for frame in frames] == numbers


def test_a_corrupted_clip(data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    frames, counts = read(data / "clips" / "corrupted.mp4")
    assert capfd.readouterr() == ("", "")  # FFmpeg has a lot to say about it
    assert counts == FrameCounts(declared=50, decoded=48, corrupt=2)
    assert_numbers_fit_times(frames, rate=10)


@pytest.mark.parametrize("seed", [1, 2])
def test_flipped_bits_give_the_same_answer_every_time(data: Path, tmp_path: Path, seed: int) -> None:
    clip = data / "clips" / "intel_car-detection.mp4"
    path = flip_bits(clip, tmp_path / "flip.mp4", seed, 30, (0.05, 0.9))
    frames, counts = read(path)
    assert 0 < counts.corrupt < 100
    assert counts == FrameCounts(declared=377, decoded=377 - counts.corrupt, corrupt=counts.corrupt)
    assert_numbers_fit_times(frames, rate=12.5)

    def digests(frames: list[Frame]) -> list[int]:
        return [zlib.crc32(np.ascontiguousarray(f.image.planes[0])) for f in frames if f.image]

    again, counts_again = read(path)
    assert (digests(again), counts_again) == (digests(frames), counts)


FRAGMENTED = {"movflags": "frag_keyframe+empty_moov"}


@pytest.mark.parametrize(
    ("name", "options", "declared", "missing"),
    [
        ("clip.mp4", {"container": {"movflags": "faststart"}}, 60, True),
        ("clip.mkv", {}, 60, True),
        (
            "clip.webm",
            {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}},
            60,
            True,
        ),
        ("sound.mkv", {"audio_seconds": 2.4}, 60, True),
        ("clip.flv", {}, 60, True),
        ("clip.avi", {"codec": "mpeg4"}, 60, True),
        ("clip.mxf", {"codec": "mpeg2video"}, 60, True),
        ("fragmented.mp4", {"container": FRAGMENTED}, None, False),  # lists but what it holds: one is cut
    ],
)
def test_files_cut_short(
    tmp_path: Path, name: str, options: dict[str, Any], declared: int | None, missing: bool
) -> None:
    path = cut(write_clip(tmp_path / name, frames=60, **options), tmp_path / f"cut_{name}", 0.6)
    frames, counts = read(path)
    assert 15 <= len(frames) == counts.decoded < 55
    assert [frame.index for frame in frames] == list(range(len(frames)))  # all before the cut
    if missing:
        assert (counts.declared, counts.decoded + counts.lost) == (declared, declared)
    assert (counts.missing > 0, counts.corrupt <= 1) == (missing, True)
    assert counts.lost > 0


def test_real_matroska_cut_short(data: Path, tmp_path: Path) -> None:
    _, counts = read(cut(data / "clips" / "av1_video.mkv", tmp_path / "cut.mkv", 0.6))
    assert counts.decoded < 100
    assert (counts.declared, counts.decoded + counts.lost) == (125, 125)


def test_an_mp4_without_its_index_cannot_be_read(data: Path, tmp_path: Path) -> None:
    path = cut(write_clip(tmp_path / "clip.mp4"), tmp_path / "cut.mp4", 0.9)
    with pytest.raises(SourceError, match="an mp4 that was cut short has lost its index"):
        read(path)


def joined(folder: Path, audio_seconds: float = 0) -> Path:
    """Times start again in the middle, and so does the transport stream's packet counter."""
    first, second = write_clip(folder / "1.ts"), write_clip(folder / "2.ts", audio_seconds=audio_seconds)
    (folder / "joined.ts").write_bytes(first.read_bytes() + second.read_bytes())
    return folder / "joined.ts"


def trimmed(folder: Path) -> Path:
    """An edit list that shows 24 of 60 pictures, from the middle of a GOP on."""
    data = bytearray(write_clip(folder / "whole.mp4", frames=60).read_bytes())
    place = data.index(b"elst") + 12
    media_time = int.from_bytes(data[place + 4 : place + 8], "big")
    data[place : place + 4] = (24 * 40).to_bytes(4, "big")  # milliseconds
    data[place + 4 : place + 8] = (media_time + 18 * 512).to_bytes(4, "big")
    (folder / "trimmed.mp4").write_bytes(data)
    return folder / "trimmed.mp4"


def odd_tag(folder: Path) -> Path:
    data = write_clip(folder / "tagged.mkv").read_bytes()
    assert b"00:00:00.960000000" in data
    (folder / "odd_tag.mkv").write_bytes(data.replace(b"00:00:00.960000000", b"nan:inf:-1.0000000"))
    return folder / "odd_tag.mkv"


OPEN_GOP = {"x264-params": "keyint=12:min-keyint=12:open-gop=1:bframes=3:scenecut=0"}
OPEN_GOP_HEVC = {"x265-params": "keyint=12:min-keyint=12:open-gop=1:bframes=3:scenecut=0:log-level=none"}


@pytest.mark.parametrize(
    ("make", "delivered"),
    [
        (lambda d: write_clip(d / "vfr.mkv", pts_ms=[n * n for n in range(24)]), 24),
        (lambda d: write_clip(d / "long_sound.mkv", audio_seconds=4), 24),
        (lambda d: write_clip(d / "long_sound.mp4", audio_seconds=4), 24),
        (lambda d: write_clip(d / "no_duration.mkv", container={"live": "1"}), 24),
        (lambda d: write_clip(d / "no_duration.flv", container={"flvflags": "no_duration_filesize"}), 24),
        (lambda d: write_clip(d / "fragmented.mp4", container=FRAGMENTED), 24),
        (lambda d: write_clip(d / "half_fragmented.mp4", container={"movflags": "frag_keyframe"}), 24),
        (lambda d: write_clip(d / "b_frames.avi"), 24),
        (lambda d: write_clip(d / "gaps.avi", codec="mpeg4", pts_ms=[n * 80 for n in range(24)]), 24),
        (lambda d: write_clip(d / "vp8.webm", codec="libvpx", options={"auto-alt-ref": "1"}), 24),
        (lambda d: write_clip(d / "interlaced.ts", options={"x264-params": "interlaced=1"}), 24),
        (lambda d: with_an_empty_packet(write_clip(d / "a.mkv", options={"bf": "0"}), d / "empty.nut"), 23),
        (trimmed, 24),
        (odd_tag, 24),
        (joined, 48),
        (lambda d: joined(d, audio_seconds=1), 48),  # a stream that begins in mid-file
        (lambda d: without_first_packets(write_clip(d / "a.mkv"), d / "late.ts", 5), None),
        (lambda d: without_first_packets(write_clip(d / "a.mkv"), d / "late.mkv", 5), None),
        (
            lambda d: without_first_packets(write_clip(d / "a.mkv", options=OPEN_GOP), d / "open.mkv", 10),
            None,
        ),
        (lambda d: without_first_packets(write_clip(d / "a.ts", options=OPEN_GOP), d / "open.ts", 5), None),
        (
            lambda d: without_first_packets(
                write_clip(d / "a.mkv", codec="libx265", options=OPEN_GOP_HEVC), d / "open_hevc.mkv", 9
            ),
            None,
        ),
    ],
)
def test_good_files_raise_no_alarm(
    tmp_path: Path, make: Callable[[Path], Path], delivered: int | None
) -> None:
    frames, counts = read(make(tmp_path))
    assert (counts.corrupt, counts.missing) == (0, 0)
    assert len(frames) == delivered or (delivered is None and 10 <= len(frames) < 20)
    assert [frame.index for frame in frames] == list(range(len(frames)))


def test_a_damaged_first_picture_keeps_its_number(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", codec="mjpeg", pix_fmt="yuvj420p", frames=6)
    data = path.read_bytes()
    first, second = data.index(b"\xff\xd8\xff"), data.index(b"\xff\xd9\xff\xd8\xff")
    path.write_bytes(data[:first] + bytes(second - first) + data[second:])
    frames, counts = read(path)
    assert [frame.index for frame in frames] == [1, 2, 3, 4, 5]
    assert counts == FrameCounts(declared=6, decoded=5, corrupt=1)


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("a.mkv", "libx264"),
        ("a.ts", "mpeg2video"),
        ("a.flv", "libx264"),
        ("a.avi", "mpeg4"),
    ],
)
def test_no_damage_is_worse_than_an_error(tmp_path: Path, name: str, codec: str) -> None:
    clean = write_clip(tmp_path / name, codec=codec, frames=30)
    for seed in range(25):
        path = flip_bits(clean, tmp_path / f"flip_{name}", seed, 1 + seed, (0.02, 1))
        try:
            frames, counts = read(path)
        except SourceError as error:
            assert "\n" not in str(error)
            continue
        indices = [frame.index for frame in frames]
        assert indices == sorted(set(indices))
        assert counts.decoded == len(frames) <= 31


@dataclass
class Packet:
    pts: int | None
    is_keyframe: bool = False
    is_discard: bool = False
    size: int = 1
    dts: int | None = None
    duration: int = 1
    time_base: Fraction = Fraction(1, 25)


@dataclass
class Picture:
    pts: int | None
    is_corrupt: bool = False
    interlaced_frame: bool = False


def book(codec: str, events: list[tuple[str, Any]]) -> tuple[list[int], int]:
    """Indices of the pictures that came out, and how many were lost."""
    counts, indices = FrameCounts(), []
    ledger: Any = Ledger(counts, codec)
    for what, item in events:
        if what == "in":
            ledger.packet_in(item)
        elif what == "fail":
            ledger.packet_in(item)
            ledger.undecodable(item)
        else:
            indices.append(ledger.picture_out(item))
    ledger.close()
    return indices, counts.corrupt


def clean(count: int) -> list[tuple[str, Any]]:
    return [event for n in range(count) for event in (("in", Packet(n, n == 0)), ("out", Picture(n)))]


@pytest.mark.parametrize(
    ("story", "codec", "events", "indices", "lost"),
    [
        ("all come", "h264", clean(5), [0, 1, 2, 3, 4], 0),
        (
            "an error in the middle",
            "h264",
            [*clean(2), ("fail", Packet(2)), ("in", Packet(3)), ("out", Picture(3))],
            [0, 1, 3],
            1,
        ),
        (
            "an error among reordered pictures takes its place in time",
            "h264",
            [*clean(1), ("in", Packet(4)), ("in", Packet(2)), ("fail", Packet(1)), ("in", Packet(3))]
            + [("out", Picture(n)) for n in (2, 3, 4)],
            [0, 2, 3, 4],
            1,
        ),
        (
            "dropped in silence, noticed once it is too old to come",
            "hevc",
            [*clean(2), ("in", Packet(2)), *[e for n in range(3, 40) for e in clean(40)[2 * n : 2 * n + 2]]],
            [0, 1, *range(2, 33), *range(34, 40)],
            1,
        ),
        ("dropped in silence at the end", "av1", [*clean(3), ("in", Packet(3))], [0, 1, 2], 1),
        ("VP8 packets need not be pictures", "vp8", [*clean(3), ("in", Packet(3))], [0, 1, 2], 0),
        (
            "nor those of interlaced H.264",
            "h264",
            [("in", Packet(0, True)), ("in", Packet(1)), ("out", Picture(0, interlaced_frame=True))],
            [0],
            0,
        ),
        (
            "before the first key frame nothing is owed",
            "h264",
            [("in", Packet(0)), ("in", Packet(3, True)), ("in", Packet(2)), ("out", Picture(3))],
            [0],
            0,
        ),
        (
            "nor what an edit list cuts away",
            "h264",
            [("in", Packet(-1, True, is_discard=True)), *clean(2)],
            [0, 1],
            0,
        ),
        (
            "pictures under other times than their packets were not lost",
            "h264",
            [event for n in range(40) for event in (("in", Packet(n, n == 0)), ("out", Picture(n + 1000)))],
            list(range(40)),
            0,
        ),
        (
            "without times the order is that of events",
            "h264",
            [
                ("in", Packet(None, True)),
                ("out", Picture(None)),
                ("fail", Packet(None)),
                ("out", Picture(None)),
            ],
            [0, 2],
            1,
        ),
        (
            "a corrupt picture has a number",
            "h264",
            [*clean(1), ("in", Packet(1)), ("out", Picture(1, is_corrupt=True)), *clean(3)[4:]],
            [0, 1, 2],
            1,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_the_ledger(
    story: str, codec: str, events: list[tuple[str, Any]], indices: list[int], lost: int
) -> None:
    assert book(codec, events) == (indices, lost), story
