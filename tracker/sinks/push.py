"""Annotated video to a media server, as RTSP. A server that is slow or gone holds up nobody.

Knows encoding and one connection; how tracks look is `drawing`'s matter.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from fractions import Fraction

import av
import numpy as np
from av.error import FFmpegError

from tracker.addresses import Address, redacted
from tracker.pixels import Workspace, to_bgr
from tracker.sinks.drawing import Painter, Pixels
from tracker.types import Frame, Image, Tracks

_TICKS = 90_000  # per second, of RTP's video clock
_ENCODER = {"preset": "veryfast", "tune": "zerolatency", "crf": "25", "bf": "0", "threads": "1"}
_KEY_FRAME_SECONDS = 2
_LEAST_DELAY, _MOST_DELAY = 0.5, 30.0
_TIMEOUT_SECONDS = 4.0
_JOIN_SECONDS = 1.0


class RtspPush:
    """One stream's picture with its tracks, pushed to `<address>/<name>`. Implements `types.Sink`.

    A thread of its own draws, encodes and sends the newest frame; what comes meanwhile replaces it. A lost
    connection, or another picture size, starts a new one, with 0.5 to 30 s in between while it fails.

    undelivered: frames that were not sent. problem: why, in words, while it lasts.
    """

    def __init__(self, address: Address, name: str, *, frame_rate: float) -> None:
        self._address = address
        self._url = f"{address.secret.rstrip('/')}/{name}"
        self._frame_rate = frame_rate
        self.undelivered = 0
        self.problem = ""
        self._changed = threading.Condition()
        self._waiting: tuple[Frame, Image, Tracks] | None = None
        self._closed = threading.Event()
        self._painter, self._work = Painter(frame_rate=frame_rate), Workspace()
        self._thread = threading.Thread(target=self._run, name=f"push {name}", daemon=True)
        self._thread.start()

    def write(self, frame: Frame, tracks: Tracks) -> None:
        """Hand over the newest frame. Never waits."""
        if frame.image is None:
            return
        with self._changed:
            self.undelivered += self._waiting is not None
            self._waiting = (frame, frame.image, tracks)
            self._changed.notify()

    def close(self, *, complete: bool) -> None:
        """A thread that hangs in a dead connection ends with the process."""
        self._closed.set()
        with self._changed:
            self._changed.notify()
        self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        delay = _LEAST_DELAY
        while not self._closed.is_set():
            sent = 0
            try:
                for sent in self._connection():  # noqa: B007  (counted, even when it breaks)
                    delay, self.problem = _LEAST_DELAY, ""
            except FFmpegError as error:
                self.problem = redacted(f"{self._address}: {error.strerror or type(error).__name__}")
                self.undelivered += 1
                until = time.monotonic() + delay
                while not self._closed.is_set() and time.monotonic() < until:
                    self._closed.wait(0.1)
                delay = min(_MOST_DELAY, 2 * delay)

    def _connection(self) -> Iterator[int]:
        """Send until it breaks or the size changes; yields how many were sent."""
        item = self._next()
        if item is None:
            return
        size = item[0].size
        even = (size[0] + size[0] % 2, size[1] + size[1] % 2)
        options = {"rtsp_transport": "tcp", "timeout": str(round(_TIMEOUT_SECONDS * 1_000_000))}
        with av.open(self._url, "w", format="rtsp", options=options, timeout=_TIMEOUT_SECONDS) as container:
            stream = container.add_stream("libx264", rate=max(1, round(self._frame_rate)), options=_ENCODER)
            stream.width, stream.height = even
            stream.pix_fmt = "yuv420p"
            stream.codec_context.time_base = Fraction(1, _TICKS)
            stream.codec_context.gop_size = max(1, round(_KEY_FRAME_SECONDS * self._frame_rate))
            begun, last, sent = item[0].pts_seconds, -1, 0
            while item is not None and item[0].size == size:
                frame, image, tracks = item
                drawn = self._drawn(size, image, tracks, even)
                picture = av.VideoFrame.from_ndarray(drawn, format="bgr24")
                last = max(last + 1, round((frame.pts_seconds - begun) * _TICKS))
                picture.pts, picture.time_base = last, Fraction(1, _TICKS)
                container.mux(stream.encode(picture))
                sent += 1
                yield sent
                item = self._next()

    def _next(self) -> tuple[Frame, Image, Tracks] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._closed.is_set())
            item, self._waiting = self._waiting, None
            return None if self._closed.is_set() else item

    def _drawn(self, size: tuple[int, int], image: Image, tracks: Tracks, even: tuple[int, int]) -> Pixels:
        """(H, W, 3) BGR with even sides, as 4:2:0 wants it."""
        width, height = size
        picture = to_bgr(image, out=self._work.array("picture", height, width, 3), work=self._work)
        self._painter.draw(picture, tracks)
        return np.pad(picture, ((0, even[1] - height), (0, even[0] - width), (0, 0)), mode="edge")
