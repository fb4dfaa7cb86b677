"""Tracks drawn onto their frames, as an H.264 MP4.

Drawing and encoding run in a thread of their own, a few frames behind the pipeline. The file keeps the
source's intervals (variable frame rate included) but starts at 0, and the size of the first frame.
Knows no detector and no tracker; how tracks look is `drawing`'s matter.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Self

import av
import cv2
import numpy as np
from av.error import FFmpegError
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from tracker.boxes import fit_center
from tracker.errors import SinkError
from tracker.pixels import Workspace, to_bgr
from tracker.sinks.drawing import Painter, Pixels
from tracker.sinks.output import PartialFile
from tracker.types import Frame, Image, Tracks

FRAMES_BEHIND = 8  # how far the encoder may lag before `write` waits for it
TICKS = 120_000  # per second: whole numbers for 24, 25, 30, 50, 60 and their n·1000/1001 relatives
MAX_SIDE = 16384  # pixels; x264's limit
MAX_INTERVAL_SECONDS = 3600  # x264 garbles intervals of 2**31 ticks, which is 5 hours
KEY_FRAME_SECONDS = 5  # how finely players can seek; 2 makes a still camera's file half as large again
BT709 = 1  # code point of ITU-R BT.709 for matrix, primaries and transfer in ITU-T H.273

# While it grows, the file is a chain of one-second fragments, each flushed when done, so that a killed run
# leaves a film that plays; finishing turns the same bytes into an ordinary, seekable MP4 in place.
CONTAINER_OPTIONS = {"movflags": "hybrid_fragmented", "frag_duration": "1000000", "flush_packets": "1"}
# No B-frames: decoding order is display order, so times are exact in fragments too, for 10 % more bytes.
# Four threads, because x264 holds back a frame per thread and the detector needs the other cores.
ENCODER_OPTIONS = {"preset": "veryfast", "crf": "23", "bf": "0", "threads": "4"}


class Clock:
    """A film's times in ticks: from 0, at the source's intervals, always rising.

    Where the source's time stands still, falls back or leaps by more than MAX_INTERVAL_SECONDS, its clock
    was set anew: one nominal frame passes, and time runs on from there.
    """

    def __init__(self, *, frame_rate: float) -> None:
        self._longest = MAX_INTERVAL_SECONDS * TICKS
        self.frame_ticks = min(max(1, round(TICKS / frame_rate)), self._longest)
        self._source = self._film = 0
        self._started = False

    def ticks(self, pts_seconds: float) -> int:
        source = round(pts_seconds * TICKS)
        if self._started:
            interval = source - self._source
            self._film += interval if 0 < interval <= self._longest else self.frame_ticks
        self._source, self._started = source, True
        return self._film


class _Film:
    """Pictures in, MP4 out. The size is that of the first picture, made even as 4:2:0 wants it."""

    def __init__(self, file: PartialFile, picture: Pixels, *, frame_rate: float) -> None:
        height, width = picture.shape[:2]
        if max(width, height) > MAX_SIDE:
            raise SinkError(
                f"cannot make a video of {width}×{height} frames: H.264 ends at {MAX_SIDE} pixels a side; "
                "leave video out of what is saved"
            )
        self._first = (width, height)
        self._size = (width + width % 2, height + height % 2)
        self._clock = Clock(frame_rate=frame_rate)
        self._to_yuv = VideoReformatter()
        self._container = av.open(file, "w", format="mp4", options=CONTAINER_OPTIONS)
        hint = max(1, round(frame_rate))  # the rate control's first guess; the times are what counts
        self._stream = self._container.add_stream("libx264", rate=hint, options=ENCODER_OPTIONS)
        self._stream.width, self._stream.height = self._size
        self._stream.pix_fmt = "yuv420p"
        codec = self._stream.codec_context
        codec.time_base = Fraction(1, TICKS)
        codec.gop_size = round(min(250, max(1, KEY_FRAME_SECONDS * frame_rate)))
        codec.colorspace = codec.color_primaries = codec.color_trc = BT709
        codec.color_range = ColorRange.MPEG

    def add(self, picture: Pixels, pts_seconds: float) -> None:
        """One (H, W, 3) BGR picture; of another size than the first, it is fitted inside."""
        yuv = self._to_yuv.reformat(
            av.VideoFrame.from_ndarray(self._place(picture), format="bgr24"),
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
        )
        yuv.pts = self._clock.ticks(pts_seconds)
        yuv.time_base = Fraction(1, TICKS)
        self._container.mux(self._stream.encode(yuv))

    def finish(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def abandon(self) -> None:
        """After a failure: let go of the muxer now, while the file refuses its last words. Left to the
        garbage collector, it would try to write them then (and older PyAV would crash).
        """
        with suppress(SinkError, FFmpegError):
            self._container.close()

    def _place(self, picture: Pixels) -> Pixels:
        height, width = picture.shape[:2]
        if (width, height) == self._size:
            return picture
        if (width, height) == self._first:  # one odd side: its last row or column once more
            return np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        fit = fit_center((width, height), self._size)
        (left, top), (width, height) = fit.offset, fit.resized
        canvas = np.zeros((*self._size[::-1], 3), np.uint8)
        inside = canvas[top : top + height, left : left + width]
        inside[:] = cv2.resize(picture, fit.resized, interpolation=cv2.INTER_AREA)
        return canvas


class VideoSink:
    """Writes `<stem>.mp4`; nothing at all where there was no frame.

    Raises SinkError when the encoder or the disk fails: at the next `write` that finds out, at the latest
    from `close`.
    """

    def __init__(self, directory: Path, stem: str, *, frame_rate: float) -> None:
        self._file = PartialFile(directory, stem, ".mp4")
        self._frame_rate = frame_rate
        self._painter = Painter(frame_rate=frame_rate)
        self._work = Workspace()
        self._film: _Film | None = None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="video-sink")
        self._under_way: deque[Future[None]] = deque()

    def write(self, frame: Frame, tracks: Tracks) -> None:
        """Hand one frame over; waits only when the encoder is FRAMES_BEHIND."""
        if frame.image is None:
            raise SinkError(
                f"frame {frame.index + 1} has no picture to draw on: detections replayed without their video "
                "can be saved as mot or jsonl only"
            )
        self._surface(at_most=FRAMES_BEHIND - 1)
        self._under_way.append(self._worker.submit(self._add, frame, frame.image, tracks))

    def close(self, *, complete: bool) -> None:
        """Wait for the frames under way and finish the film. Closing again changes nothing."""
        try:
            if not self._file.closed:
                self._under_way.append(self._worker.submit(self._finish))
                self._surface(at_most=0)
        except BaseException:
            complete = False
            raise
        finally:
            self._worker.shutdown(cancel_futures=True)
            if self._file.empty:
                self._file.discard()
            self._file.close(complete=complete)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close(complete=kind is None)

    def _surface(self, *, at_most: int) -> None:
        """Raise what went wrong in frames that are done; wait until at most so many are under way."""
        while self._under_way and (len(self._under_way) > at_most or self._under_way[0].done()):
            try:
                self._under_way[0].result()  # an interrupt here leaves it under way
            except Exception:
                self._under_way.clear()  # those behind can only repeat it
                raise
            self._under_way.popleft()

    def _add(self, frame: Frame, image: Image, tracks: Tracks) -> None:
        """The worker's job, one frame at a time."""
        width, height = frame.size
        picture = to_bgr(image, out=self._work.array("picture", height, width, 3), work=self._work)
        self._painter.draw(picture, tracks)
        with self._file.step(), _encoding(f"frame {frame.index + 1} ({width}×{height})"):
            if self._film is None:
                self._film = _Film(self._file, picture, frame_rate=self._frame_rate)
            self._film.add(picture, frame.pts_seconds)

    def _finish(self) -> None:
        """The worker's last job: in its thread, so that nothing can still be writing."""
        if self._film is None:
            return
        try:
            if self._file.failure is None:
                with self._file.step(), _encoding("the last frames"):
                    self._film.finish()
        finally:
            if self._file.failure is not None:
                self._film.abandon()
            self._film = None


@contextmanager
def _encoding(what: str) -> Iterator[None]:
    try:
        yield
    except FFmpegError as error:
        raise SinkError(
            f"cannot encode {what} as H.264: {error.strerror}; leave video out of what is saved"
        ) from error
