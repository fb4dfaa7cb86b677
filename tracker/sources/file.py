"""Video files, through PyAV: every container and codec it has, decoded on the CPU.

Knows FFmpeg's containers and decoders and what can be wrong with a file. Does not know what pictures are
for, and opens nothing but the one file it was given.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
from av.error import FFmpegError

from tracker.errors import SourceError
from tracker.sources.accounting import Ledger, promise_of
from tracker.sources.limits import MAX_PIXELS, check_size
from tracker.sources.planes import image_of
from tracker.sources.reader import Reader
from tracker.types import Frame, FrameCounts

if TYPE_CHECKING:
    from av.container import InputContainer

_FALLBACK_RATE = 30.0  # for raw streams and still pictures, which have no rate
_RATE_LIMIT = 1000.0  # above it a "rate" is only the unit of the time stamps
# Playlists name further files to open, and tty draws any text file as a video.
_NOT_FOR_US = frozenset({"concat", "dash", "hls", "imf", "sdp", "tty", "webm_dash_manifest"})


class VideoFile(Reader):
    """One local video file as a `Source`.

    Decodes in one thread, so that a damaged file gives the same frames and counts on every run. With
    FFmpeg's frame threads the pixels that follow damaged H.264, HEVC or MPEG-4 depend on timing, error
    flags get lost (6 flipped bits in 1080p H.264: 4 to 6 corrupt pictures reported) and an error at the
    end costs good pictures; slice threads drop the flags altogether. What it costs: 1080p H.264 on two
    busy cores at 170 instead of 220 fps, for 6 instead of 7.5 ms of CPU time per frame. Several sources
    decode in parallel.

    decoder: for people, where its owner knows more than that it is the CPU.

    Raises SourceError on entering: no such file, no video in it, no decoder, not one good picture; and
    there or while reading: pictures of more than max_pixels.
    """

    def __init__(
        self, path: str | Path, *, source: int = 0, max_pixels: int = MAX_PIXELS, decoder: str = "CPU"
    ) -> None:
        self._path = Path(path)
        super().__init__(self._path.stem, decoder)
        self._source = source
        self._max_pixels = max_pixels
        self.frame_rate = _FALLBACK_RATE

    def first_picture(self) -> tuple[av.VideoFrame, str, str]:
        """The first good one, its codec and its container. Raises SourceError as entering does."""
        with self._open() as container:
            stream = self._video_stream(container)
            codec = stream.codec_context.codec.canonical_name
            for picture in self._pictures(container, stream, Ledger(FrameCounts(), codec)):
                check_size(self._path, picture.width, picture.height, self._max_pixels)
                if not picture.is_corrupt:
                    return picture, codec, container.format.name
        raise SourceError(f"{self._path}: no picture could be decoded: the file is broken or incomplete")

    def _read(self) -> Generator[Frame]:
        with self._open() as container:
            stream = self._video_stream(container)
            self.frame_rate = nominal_rate(stream)
            promise = promise_of(container, stream, self.frame_rate)
            self.counts.declared = promise.frames
            ledger = Ledger(self.counts, stream.codec_context.codec.canonical_name)
            clock = _Clock(container, stream, self.frame_rate)
            good = 0
            for picture in self._pictures(container, stream, ledger):
                check_size(self._path, picture.width, picture.height, self._max_pixels)
                index, pts_seconds = ledger.picture_out(picture), clock.time_of(picture)
                if not picture.is_corrupt:
                    good += 1
                    yield self._frame(picture, index, pts_seconds)
            ledger.close()
            self.counts.missing = max(self.counts.missing, promise.missing(ledger, self.frame_rate))
        if not good:
            raise SourceError(
                f"{self._path}: no picture could be decoded ({self.counts.corrupt} damaged, "
                f"{self.counts.missing} missing): the file is broken, incomplete or without a key frame, or "
                f"its pictures are over the limit of {self._max_pixels} pixels"
            )

    def _frame(self, picture: av.VideoFrame, index: int, pts_seconds: float) -> Frame:
        image = image_of(picture)
        height, width = image.planes[0].shape[:2]
        return Frame(
            index=index, pts_seconds=pts_seconds, size=(width, height), image=image, source=self._source
        )

    def _open(self) -> InputContainer:
        if not self._path.is_file():
            kind = "is a directory, not a video file" if self._path.is_dir() else "no such file"
            raise SourceError(f"{self._path}: {kind}")
        options = {
            "protocol_whitelist": "file",
            "format_whitelist": _allowed_formats(),
            **self._decoder_limit(),
        }
        try:
            # The prefix makes all that follows a path: without it "concat:a|b" would be a protocol.
            return av.open(f"file:{self._path}", options=options, metadata_errors="replace")
        except FFmpegError as error:
            raise SourceError(
                f"{self._path}: not a video that FFmpeg can read ({error.strerror}): it is something else, "
                "or incomplete (an mp4 that was cut short has lost its index)"
            ) from error

    def _video_stream(self, container: InputContainer) -> av.VideoStream:
        stream = container.streams.best("video")
        if not isinstance(stream, av.VideoStream) or stream.disposition & stream.disposition.attached_pic:
            raise SourceError(f"{self._path}: no video stream in it")
        if stream.codec_context is None:
            raise SourceError(f"{self._path}: FFmpeg has no decoder for its video: convert it, to H.264 say")
        decoder = stream.codec_context
        check_size(self._path, decoder.width, decoder.height, self._max_pixels)
        decoder.thread_type, decoder.thread_count = "NONE", 1
        decoder.options = self._decoder_limit()
        return stream

    def _decoder_limit(self) -> dict[str, str]:
        """Keeps FFmpeg from allocating what we would refuse a moment later. Twice: it counts padding."""
        return {"max_pixels": str(2 * self._max_pixels)}

    def _pictures(
        self, container: InputContainer, stream: av.VideoStream, ledger: Ledger
    ) -> Iterator[av.VideoFrame]:
        """All that the decoder gives, corrupt ones too, in order of presentation."""
        try:
            for packet in _packets(container):
                ledger.saw(packet)
                if packet.stream_index == stream.index:
                    ledger.packet_in(packet)
                    if packet.size:  # empty means "no change" in a container, but "the end" to a decoder
                        yield from self._decode(stream, packet, ledger)
        except FFmpegError:
            self.counts.missing = 1  # unreadable from here on, where more was to come: one at least
        yield from self._decode(stream, None, ledger)

    def _decode(
        self, stream: av.VideoStream, packet: av.Packet[Any] | None, ledger: Ledger
    ) -> Iterable[av.VideoFrame]:
        decoder = stream.codec_context
        try:
            return decoder.decode(packet)
        except FFmpegError:
            check_size(self._path, decoder.width, decoder.height, self._max_pixels)
            ledger.undecodable(packet)
            return []


def _packets(container: InputContainer) -> Iterator[av.Packet[Any]]:
    """All packets of all streams."""
    try:
        for packet in container.demux():
            if packet.size or packet.pts is not None or packet.dts is not None:  # else PyAV's end mark
                yield packet
    except IndexError:
        return  # PyAV's end marks, again: it stumbles over streams that began in the middle of the file


class _Clock:
    """Presentation times in seconds, as the file gives them; else the end of the picture before."""

    def __init__(self, container: InputContainer, stream: av.VideoStream, frame_rate: float) -> None:
        self._tick_seconds = float(stream.time_base or 0)
        self._nominal_seconds = 1 / frame_rate
        # AVI has no presentation times: what FFmpeg makes of B-frames is out of order. Decoding times are
        # not, and a picture carries that of the packet which brought it out.
        self._decoding_times = container.format.name == "avi"
        self._next_seconds = 0.0

    def time_of(self, picture: av.VideoFrame) -> float:
        ticks = picture.dts if self._decoding_times else picture.pts
        seconds = self._next_seconds if ticks is None else ticks * self._tick_seconds
        self._next_seconds = seconds + (picture.duration * self._tick_seconds or self._nominal_seconds)
        return seconds


def nominal_rate(stream: av.VideoStream) -> float:
    """Frames per second, above 0."""
    for rate in (stream.average_rate, stream.guessed_rate):
        if rate and 0 < rate <= _RATE_LIMIT:
            return float(rate)
    return _FALLBACK_RATE


@lru_cache
def _allowed_formats() -> str:
    return ",".join(sorted(av.formats_available - _NOT_FOR_US))
