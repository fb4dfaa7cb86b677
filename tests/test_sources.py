"""Every file gives its frames: all of them, in order, upright, with their own times, colours and sizes."""

from __future__ import annotations

import gc
import struct
import threading
import zlib
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import cv2
import numpy as np
import pytest
from clips import picture, write_clip

from tracker.errors import SourceError
from tracker.pixels import to_bgr
from tracker.sources import ImageFolder, VideoFile, open_source
from tracker.sources.file import nominal_rate
from tracker.sources.planes import image_of
from tracker.types import Frame, FrameCounts


def read(path: Path, **options: int) -> tuple[list[Frame], FrameCounts]:
    with VideoFile(path, **options) as source:
        return list(source), source.counts


def bgr(frame: Frame) -> np.ndarray:
    assert frame.image is not None
    return to_bgr(frame.image)


@pytest.mark.parametrize(
    ("name", "count", "size", "chroma", "matrix", "first_seconds", "rate"),
    [
        ("clips/av1_video.mkv", 125, (640, 360), (180, 320), "bt709", 0, 25),
        ("clips/h264_10bits.mp4", 30, (200, 200), (100, 100), "bt601", 0, 30),
        ("clips/h265_video.mp4", 10, (128, 128), (64, 64), "bt601", 0, 10),
        ("clips/intel_car-detection.mp4", 377, (768, 432), (216, 384), "bt601", 0, 12.5),
        ("clips/nasa_13013.mp4", 390, (480, 270), (135, 240), "bt709", 0, 30000 / 1001),  # larger of two
        ("clips/test_non_zero_start.mp4", 12, (200, 112), (56, 100), "bt601", 8.333, 30),
        ("clips/testsrc2_odd_height_and_width_444.mp4", 25, (321, 241), (241, 321), "bt601", 0, 25),
        ("clips/testsrc2_vp9.webm", 30, (1280, 720), (360, 640), "bt601", 0, 30),
        ("clips/unordered.mov", 4, (50, 50), (25, 25), "bt601", 0, 32),
        ("clips/video_90.mov", 3, (320, 568), (284, 160), "bt709", 0, 30),  # stored lying on its side
        ("pets09/video.mp4", 795, (480, 360), (180, 240), "bt709", 0, 10),
    ],
)
def test_real_clips(
    data: Path,
    name: str,
    count: int,
    size: tuple[int, int],
    chroma: tuple[int, int],
    matrix: str,
    first_seconds: float,
    rate: float,
) -> None:
    with open_source(data / name, source=3) as source:
        assert (source.size, source.name) == (size, Path(name).stem)
        assert source.frame_rate == pytest.approx(rate)
        times = []
        for index, frame in enumerate(source):
            assert (frame.index, frame.size, frame.source) == (index, size, 3)
            assert frame.image is not None
            shapes = [plane.shape for plane in frame.image.planes]
            assert shapes == [size[::-1], chroma, chroma]
            assert (frame.image.matrix, frame.image.full_range) == (matrix, False)
            times.append(frame.pts_seconds)
    assert source.counts == FrameCounts(declared=count, decoded=count)
    np.testing.assert_allclose(times, first_seconds + np.arange(count) / rate, atol=0.002)


def test_planes_are_what_the_decoder_made(data: Path) -> None:
    path = data / "clips" / "testsrc2_odd_height_and_width_444.mp4"
    frames, _ = read(path)
    with av.open(path) as container:
        for frame, expected in zip(frames, container.decode(video=0), strict=True):
            assert frame.image is not None
            np.testing.assert_array_equal(frame.image.planes, expected.to_ndarray())
            difference = bgr(frame).astype(int) - expected.to_ndarray(format="bgr24")
            assert np.abs(difference).max() <= 3


def test_ten_bits_become_eight(data: Path) -> None:
    path = data / "clips" / "h264_10bits.mp4"
    frames, _ = read(path)
    with av.open(path) as container:
        for frame, expected in zip(frames, container.decode(video=0), strict=True):
            assert frame.image is not None
            luma = np.frombuffer(expected.planes[0], np.uint16).reshape(200, -1)[:, :200]
            np.testing.assert_allclose(frame.image.planes[0], luma / 4, atol=1.01)


@pytest.mark.parametrize("size", [(96, 64), (97, 63)], ids=["even", "odd"])
@pytest.mark.parametrize(
    ("pix_fmt", "shape"),
    [
        *[(name, (2, 2)) for name in ("yuv420p", "yuvj420p", "yuva420p", "nv12", "yuv420p10le", "p010le")],
        *[(name, (2, 1)) for name in ("yuv422p", "yuvj422p", "yuyv422", "yuv422p12le", "nv16")],
        *[(name, (1, 1)) for name in ("yuv444p", "yuvj444p", "yuv444p16le")],
        *[("yuv440p", (1, 2)), ("yuv411p", (4, 1)), ("yuv410p", (4, 4))],
        *[(name, None) for name in ("rgb24", "bgra", "gbrp", "rgb48le", "rgb565le", "xyz12le")],
        *[(name, None) for name in ("gray", "gray10le", "ya8")],
    ],
)
def test_every_pixel_format(pix_fmt: str, shape: tuple[int, int] | None, size: tuple[int, int]) -> None:
    width, height = size
    smooth = np.repeat(np.linspace(40, 200, width * height).reshape(height, width, 1), 3, axis=2)
    decoded = av.VideoFrame.from_ndarray(smooth.astype(np.uint8), format="rgb24")
    decoded = decoded.reformat(format=pix_fmt, threads=1)
    image = image_of(decoded)
    if shape is None:
        assert image.format == "bgr"
        assert image.planes[0].shape == (height, width, 3)
    else:
        chroma = -(-height // shape[1]), -(-width // shape[0])
        assert [plane.shape for plane in image.planes] == [(height, width), chroma, chroma]
        assert image.full_range == pix_fmt.startswith("yuvj")
    assert {plane.dtype for plane in image.planes} == {np.dtype(np.uint8)}
    np.testing.assert_allclose(to_bgr(image), smooth, atol=12 if pix_fmt == "rgb565le" else 4)


@pytest.mark.parametrize(
    ("colorspace", "color_range", "matrix", "full"),
    [
        (2, 0, "bt601", False),  # untagged
        (1, 1, "bt709", False),
        (5, 1, "bt601", False),
        (6, 2, "bt601", True),
        (7, 1, "bt709", False),
        (9, 2, "bt2020", True),
    ],
)
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuv420p10le"])
def test_colour_tags(colorspace: int, color_range: int, matrix: str, full: bool, pix_fmt: str) -> None:
    decoded = av.VideoFrame(64, 48, pix_fmt)
    decoded.colorspace, decoded.color_range = colorspace, color_range
    for plane in decoded.planes:
        np.frombuffer(plane, np.uint16 if "10" in pix_fmt else np.uint8)[:] = 200
    image = image_of(decoded)
    assert (image.matrix, image.full_range) == (matrix, full)
    assert image.planes[0][0, 0] == (50 if "10" in pix_fmt else 200)  # no range is stretched


@pytest.mark.parametrize(
    ("degrees", "mirrored", "flipped", "upright"),
    [
        (0, False, False, lambda plane: plane),
        (90, False, False, lambda plane: np.rot90(plane, 1)),
        (180, False, False, lambda plane: np.rot90(plane, 2)),
        (270, False, False, lambda plane: np.rot90(plane, 3)),
        (0, True, False, np.fliplr),
        (0, False, True, np.flipud),
        (90, True, False, lambda plane: np.fliplr(np.rot90(plane, 1))),
        (90, False, True, lambda plane: np.flipud(np.rot90(plane, 1))),
    ],
)
def test_turned_and_mirrored_videos_stand_upright(
    tmp_path: Path, degrees: int, mirrored: bool, flipped: bool, upright: object
) -> None:
    (plain,), _ = read(write_clip(tmp_path / "plain.mp4", frames=1, size=(97, 63), pix_fmt="yuv444p"))
    path = write_clip(
        tmp_path / "turned.mp4",
        frames=1,
        size=(97, 63),
        pix_fmt="yuv444p",
        prepare=lambda stream: stream.set_display_rotation(degrees, hflip=mirrored, vflip=flipped),
    )
    (frame,), _ = read(path)
    assert frame.size == ((63, 97) if degrees in (90, 270) else (97, 63))
    assert frame.image is not None and plain.image is not None and callable(upright)
    for plane, before in zip(frame.image.planes, plain.image.planes, strict=True):
        np.testing.assert_array_equal(plane, upright(before))


def test_rotation_agrees_with_opencv(data: Path) -> None:
    capture = cv2.VideoCapture(str(data / "clips" / "video_90.mov"))
    for frame in read(data / "clips" / "video_90.mov")[0]:
        _, expected = capture.read()
        assert expected.shape == (568, 320, 3)
        assert np.abs(bgr(frame).astype(int) - expected).mean() < 2
    capture.release()


@pytest.mark.parametrize(("exif", "size"), [(1, (96, 64)), (3, (96, 64)), (6, (64, 96)), (8, (64, 96))])
def test_motion_jpeg_turned_by_exif(tmp_path: Path, exif: int, size: tuple[int, int]) -> None:
    """PyAV cannot list a picture's side data when Exif is among it, and yet the picture must be turned."""
    _, jpeg = cv2.imencode(".jpg", picture(0, 96, 64), [cv2.IMWRITE_JPEG_QUALITY, 98])
    tiff = b"II*\0" + struct.pack("<IHHHIII", 8, 1, 0x112, 3, 1, exif, 0)
    tagged = b"\xff\xd8\xff\xe1" + struct.pack(">H", len(tiff) + 8) + b"Exif\0\0" + tiff + jpeg.tobytes()[2:]
    with av.open(tmp_path / "exif.mkv", "w") as output:
        stream = output.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj420p"
        packet = av.Packet(tagged)
        packet.pts = packet.dts = 0
        packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 25), stream, True
        output.mux(packet)
    (frame,), _ = read(tmp_path / "exif.mkv")
    expected = cv2.imdecode(np.frombuffer(tagged, np.uint8), cv2.IMREAD_COLOR)
    assert frame.size == size
    assert np.abs(bgr(frame).astype(int) - expected).mean() < 2


def test_pictures_stored_from_the_bottom_up() -> None:
    graph = av.filter.Graph()
    source = graph.add_buffer(width=96, height=64, format="yuv420p", time_base=Fraction(1, 25))
    flip, sink = graph.add("vflip"), graph.add("buffersink")
    source.link_to(flip)
    flip.link_to(sink)
    graph.configure()
    decoded = av.VideoFrame.from_ndarray(picture(0, 96, 64), format="rgb24").reformat(format="yuv420p")
    decoded.pts = 0
    graph.push(decoded)
    flipped = graph.pull()
    assert flipped.planes[0].line_size < 0
    np.testing.assert_array_equal(to_bgr(image_of(flipped)), to_bgr(image_of(decoded))[::-1])


def test_a_name_is_a_path_and_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("concat:a.mkv|b.mkv", "subfile,,start,0,end,9,,:a.mkv", "file:a.mkv", "a%03d.mkv"):
        Path(name).write_bytes(write_clip(tmp_path / "plain.mkv").read_bytes())
        assert len(read(Path(name))[0]) == 24


SQUARES_MS = [n * n for n in range(24)]


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_frame_rate_keeps_its_times(tmp_path: Path, suffix: str) -> None:
    frames, counts = read(write_clip(tmp_path / f"vfr.{suffix}", pts_ms=SQUARES_MS))
    np.testing.assert_allclose(
        [frame.pts_seconds for frame in frames], np.array(SQUARES_MS) / 1000, atol=1e-3
    )
    assert (counts.decoded, counts.lost) == (24, 0)


@pytest.mark.parametrize(
    ("name", "first_seconds"),
    [("raw.h264", 0), ("b_frames.avi", 0.08), ("start.ts", 0.08)],  # without times; without usable ones
)
def test_times_are_made_up_where_a_file_has_none(tmp_path: Path, name: str, first_seconds: float) -> None:
    frames, _ = read(write_clip(tmp_path / name))
    times = [frame.pts_seconds for frame in frames]
    np.testing.assert_allclose(times, first_seconds + np.arange(24) / 25, atol=1e-3)


def test_resolution_changes_in_mid_stream(tmp_path: Path) -> None:
    small, large = write_clip(tmp_path / "1.ts"), write_clip(tmp_path / "2.ts", size=(160, 120))
    both = tmp_path / "both.ts"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    frames, counts = read(both)
    assert [frame.size for frame in frames] == [(96, 64)] * 24 + [(160, 120)] * 24
    assert [frame.index for frame in frames] == list(range(48))
    assert counts == FrameCounts(decoded=48)
    alone = read(large)[0]
    np.testing.assert_array_equal(bgr(frames[30]), bgr(alone[6]))


@pytest.mark.parametrize(
    ("average", "guessed", "rate"),
    [(Fraction(25, 2), 12, 12.5), (None, 24, 24), (0, None, 30), (90000, None, 30), (90000, 50, 50)],
)
def test_a_frame_rate_is_always_to_be_had(average: Fraction | None, guessed: int | None, rate: float) -> None:
    stream: Any = SimpleNamespace(average_rate=average, guessed_rate=guessed)
    assert nominal_rate(stream) == rate


def digests(frames: list[Frame]) -> list[int]:
    return [zlib.crc32(np.ascontiguousarray(plane)) for f in frames if f.image for plane in f.image.planes]


def test_frames_outlive_their_source(data: Path) -> None:
    """Planes are views of the decoder's memory: it must not be used again while somebody holds them."""
    path = data / "clips" / "intel_car-detection.mp4"
    with VideoFile(path) as source:
        held, seen = [], []
        for frame in source:
            held.append(frame)
            seen += digests([frame])
            if frame.index == 150:
                break
    assert not any(plane.flags.owndata for f in held if f.image for plane in f.image.planes)  # no copies
    for _ in range(2):
        read(data / "clips" / "testsrc2_vp9.webm")
    gc.collect()
    assert digests(held) == seen


def test_a_source_can_be_left_at_any_moment(tmp_path: Path) -> None:
    source = VideoFile(write_clip(tmp_path / "clip.mp4"))
    with pytest.raises(SourceError, match="clip is not open: iterate inside a `with` block"):
        list(source)
    with source:
        pass
    assert list(source) == []
    source = VideoFile(tmp_path / "clip.mp4")
    with source:
        rest: Iterator[Frame] = iter(source)
        next(rest)
    assert list(rest) == []
    assert source.counts == FrameCounts(declared=24, decoded=1)
    descriptors = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").is_dir() else 0
    for _ in range(10):
        with VideoFile(tmp_path / "clip.mp4") as source:
            next(iter(source))
    if descriptors:
        assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


def test_leaving_while_another_thread_reads(data: Path) -> None:
    for _ in range(5):
        source = VideoFile(data / "clips" / "intel_car-detection.mp4")
        started, taken = threading.Event(), []

        def take(source: VideoFile = source, started: threading.Event = started) -> None:
            for frame in source:
                taken.append(digests([frame]))  # noqa: B023, joined below
                started.set()

        with source:
            reader = threading.Thread(target=take)
            reader.start()
            assert started.wait(10)
        reader.join(10)
        assert not reader.is_alive()
        assert len(taken) == source.counts.decoded < 377


def no_decoder(path: Path) -> Path:
    write_clip(path)
    path.write_bytes(path.read_bytes().replace(b"V_MPEG4/ISO/AVC", b"V_MPEG9/ISO/AVC"))
    return path


def text(path: Path, content: str = "not a video\n" * 50) -> Path:
    path.write_text(content)
    return path


def sound_only(path: Path, *, cover: bool) -> Path:
    with av.open(path, "w") as output:
        sound = output.add_stream("libmp3lame", rate=44100)
        if cover:
            image = output.add_stream("mjpeg", rate=1)
            image.width, image.height, image.pix_fmt = 96, 64, "yuvj420p"
            image.disposition = av.stream.Disposition.attached_pic
            output.mux(image.encode(av.VideoFrame(96, 64, "yuvj420p")))
            output.mux(image.encode(None))
        for block in range(20):
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1152), np.float32), "fltp", "mono")
            samples.rate, samples.pts = 44100, block * 1152
            output.mux(sound.encode(samples))
        output.mux(sound.encode(None))
    return path


def no_pixels(path: Path) -> Path:
    """Motion JPEG whose pictures say 0×0."""
    data = bytearray(write_clip(path, codec="mjpeg", pix_fmt="yuvj420p", frames=2).read_bytes())
    start_of_frame = b"\xff\xc0\x00\x11\x08"
    data = data.replace(start_of_frame + struct.pack(">HH", 64, 96), start_of_frame + bytes(4))
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda d: d / "missing.mp4", "no such file"),
        (lambda d: f"concat:{write_clip(d / 'a.mkv')}|{d / 'a.mkv'}", "no such file"),
        (lambda d: f"subfile,,start,0,end,9,,:{write_clip(d / 'a.mkv')}", "no such file"),
        (lambda d: d, "is a directory"),
        (lambda d: text(d / "empty.mp4", ""), "not a video that FFmpeg can read"),
        (lambda d: text(d / "text.mp4"), "not a video that FFmpeg can read"),
        (lambda d: text(d / "text.txt"), "not a video that FFmpeg can read"),  # FFmpeg would draw it
        (
            lambda d: text(d / "list.mp4", f"ffconcat version 1.0\nfile {write_clip(d / 'a.mkv').name}\n"),
            "not a",
        ),
        (lambda d: sound_only(d / "sound.mp3", cover=False), "no video stream"),
        (lambda d: sound_only(d / "cover.mp3", cover=True), "no video stream"),
        (lambda d: no_decoder(d / "unknown.mkv"), "no decoder"),
        (lambda d: no_pixels(d / "0x0.mkv"), r"no picture could be decoded \(2 damaged"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path: Path, make: object, words: str) -> None:
    assert callable(make)
    spec = make(tmp_path)
    with pytest.raises(SourceError, match=words) as error, VideoFile(spec):
        pass
    assert "\n" not in str(error.value)
    assert str(spec) in str(error.value)


@pytest.mark.parametrize(
    "spec",
    [
        "rtsp://admin:secret@camera/stream",
        Path("rtsp://admin:secret@camera/stream"),
        "http://user:secret@host/video.mp4",
        "HTTPS://user:secret@host/video.mp4",
        "webcam:0",
    ],
)
def test_live_sources_are_no_files(spec: str | Path) -> None:
    with pytest.raises(SourceError, match="live sources run by themselves") as error:
        open_source(spec)
    assert "secret" not in str(error.value) and "\n" not in str(error.value)


def test_pictures_over_the_limit_are_refused_on_opening(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "clip.mp4", size=(160, 120))
    assert len(read(path, max_pixels=160 * 120)[0]) == 24
    with pytest.raises(SourceError, match="160×120 pictures are over the limit of 19199 pixels"):
        read(path, max_pixels=160 * 120 - 1)


def test_pictures_over_the_limit_are_refused_in_mid_stream(tmp_path: Path) -> None:
    small, large = write_clip(tmp_path / "1.ts"), write_clip(tmp_path / "2.ts", size=(160, 120))
    (tmp_path / "both.ts").write_bytes(small.read_bytes() + large.read_bytes())
    with (
        VideoFile(tmp_path / "both.ts", max_pixels=96 * 64) as source,
        pytest.raises(SourceError, match="160×120 pictures are over the limit of 6144 pixels") as error,
    ):
        list(source)
    assert isinstance(error.value.__context__, av.FFmpegError)  # the decoder refused: no memory was taken


def exp_golomb(value: int) -> str:
    binary = f"{value + 1:b}"
    return "0" * (len(binary) - 1) + binary


def h264_header(side: int) -> bytes:
    """A sequence parameter set (H.264, 7.3.2.1.1): High profile, level 5.1, 4:2:0, side × side pixels."""
    bits = "01100100" + "00000000" + "00110011" + exp_golomb(0)
    bits += exp_golomb(1) + exp_golomb(0) * 2 + "00"  # 4:2:0, 8 bits, no scaling matrix
    bits += exp_golomb(0) + exp_golomb(2) + exp_golomb(1) + "0"  # frame numbers, order type, references
    bits += exp_golomb(side // 16 - 1) * 2 + "11001"  # frames only, no cropping, the end
    bits += "0" * (-len(bits) % 8)
    return bytes.fromhex("0000000167") + int(bits, 2).to_bytes(len(bits) // 8, "big")


@pytest.mark.parametrize(
    ("side", "words"),
    [
        (16000, "16000×16000 pictures are over the limit of 40000000 pixels"),
        (20000, "no picture .* its pictures are over the limit of 40000000 pixels"),  # too much for FFmpeg
    ],
)
def test_bombs_are_refused(tmp_path: Path, side: int, words: str) -> None:
    small = write_clip(tmp_path / "small.h264", frames=1).read_bytes()
    rest = small[small.index(bytes.fromhex("0000000168")) :]
    (tmp_path / "bomb.h264").write_bytes(h264_header(side) + rest)
    with pytest.raises(SourceError, match=words):
        read(tmp_path / "bomb.h264")


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ("clip.mp4", VideoFile),
        ("images", ImageFolder),
        ("images/*.png", ImageFolder),
        ("images/1.png", ImageFolder),
        ("odd[1].mp4", VideoFile),  # exists, so not a pattern
        ("missing.mp4", VideoFile),
    ],
)
def test_the_kind_of_source_follows_from_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, kind: type
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("images").mkdir()
    cv2.imwrite("images/1.png", picture(0, 32, 24))
    Path("odd[1].mp4").touch()
    assert type(open_source(spec)) is kind
