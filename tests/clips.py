"""Videos for the tests: made on the spot, each quirk on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

RATE = 25


def picture(number: int, width: int, height: int) -> np.ndarray:
    """(H, W, 3) RGB: a gradient that shifts, and a square that moves, with the picture's number."""
    y, x = np.mgrid[:height, :width]
    rgb = np.stack([x * 2 + number * 3, y * 2 + number * 5, x + y + number * 7], axis=-1).astype(np.uint8)
    side = min(width, height) // 4
    left = number * 5 % (width - side)
    rgb[height // 3 : height // 3 + side, left : left + side] = (255, 0, 0)
    return rgb


def write_clip(
    path: Path,
    *,
    frames: int = 24,
    size: tuple[int, int] = (96, 64),
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    pts_ms: Sequence[int] | None = None,
    gop: int = 12,
    options: Mapping[str, str] | None = None,
    container: Mapping[str, str] | None = None,
    audio_seconds: float = 0,
    prepare: Callable[[av.VideoStream], object] = lambda stream: None,
) -> Path:
    """pts_ms: presentation times; else 25 pictures a second."""
    with av.open(path, "w", options=dict(container or {})) as output:
        stream = output.add_stream(codec, rate=RATE, options={"threads": "1", **(options or {})})
        stream.width, stream.height = size
        stream.pix_fmt, stream.gop_size = pix_fmt, gop
        time_base = Fraction(1, 1000) if pts_ms else Fraction(1, RATE)
        stream.codec_context.time_base = time_base
        prepare(stream)
        sound = output.add_stream("aac", rate=16000) if audio_seconds else None
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, *size), format="rgb24")
            frame = frame.reformat(format=pix_fmt, threads=1)
            frame.pts, frame.time_base = pts_ms[number] if pts_ms else number, time_base
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
        if sound:
            for block in range(int(audio_seconds * 16000 / 1024)):
                samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
                samples.rate, samples.pts = 16000, block * 1024
                output.mux(sound.encode(samples))
            output.mux(sound.encode(None))
    return path


def without_first_packets(source: Path, path: Path, count: int) -> Path:
    """The same video as a recorder saw it that was switched on `count` packets later."""
    with av.open(source) as clip, av.open(path, "w") as output:
        stream = output.add_stream_from_template(clip.streams.video[0])
        packets = [packet for packet in clip.demux(video=0) if packet.size]
        for packet in packets[count:]:
            packet.stream = stream
            output.mux(packet)
    return path


def with_an_empty_packet(source: Path, path: Path) -> Path:
    """The same video with its fourth packet emptied: nothing has changed since the third."""
    with av.open(source) as clip, av.open(path, "w") as output:
        stream = output.add_stream_from_template(clip.streams.video[0])
        for number, packet in enumerate(packet for packet in clip.demux(video=0) if packet.size):
            written = av.Packet(b"") if number == 3 else packet
            written.pts, written.dts, written.time_base = packet.pts, packet.dts, packet.time_base
            written.stream = stream
            output.mux(written)
    return path


def cut(source: Path, path: Path, fraction: float) -> Path:
    """The first part of a file, as a broken download leaves it."""
    data = source.read_bytes()
    path.write_bytes(data[: int(len(data) * fraction)])
    return path
