"""The newest annotated picture of a stream, as JPEG, for whoever watches. Nobody watching, nothing is done.

Knows pictures and watchers; not how they are shown.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
import numpy as np

from tracker.errors import SinkError
from tracker.pixels import Workspace, to_bgr
from tracker.sinks.drawing import MAX_TRAIL_FRAMES, TRAIL_SECONDS, Painter
from tracker.types import Frame, Tracks

QUALITY = 80  # 1080p in 5 ms
USUAL_RATE = 10.0  # pictures per second that somebody asks for; trails fade at that pace


class Watch:
    """One watcher's view: `next` gives each time a newer picture than before."""

    def __init__(self, preview: Preview) -> None:
        self._preview, self._seen = preview, 0

    def next(self, timeout: float) -> bytes | None:
        """A JPEG; None if there is no newer one within so many seconds."""
        found = self._preview.newer_than(self._seen, timeout)
        if found is None:
            return None
        self._seen, jpeg = found
        return jpeg


class Preview:
    """Frames go in from one thread, JPEGs come out in any number of others; each is drawn once, by the first
    who asks for it, and those in between not at all. While nobody watches it holds no frame.

    width: wider pictures are scaled down to it; None shows all pixels.
    """

    def __init__(self, *, frame_rate: float, width: int | None = None) -> None:
        self._width = width
        self._changed = threading.Condition()
        self._watchers = 0
        self._number = 0
        self._newest: tuple[Frame, Tracks] | None = None
        self._drawing = threading.Lock()
        self._painter = Painter(frame_rate=min(frame_rate, USUAL_RATE))
        self._moments: deque[float] = deque(maxlen=MAX_TRAIL_FRAMES)  # of what was drawn, in its own time
        self._work = Workspace()
        self._drawn: tuple[int, bytes] = (0, b"")

    @property
    def watched(self) -> bool:
        return self._watchers > 0

    def offer(self, frame: Frame, tracks: Tracks) -> None:
        """Costs nothing while nobody watches, and never waits."""
        if not self._watchers:
            return
        with self._changed:
            self._number += 1
            self._newest = (frame, tracks)
            self._changed.notify_all()

    @contextmanager
    def watch(self) -> Iterator[Watch]:
        with self._changed:
            self._watchers += 1
        try:
            yield Watch(self)
        finally:
            with self._changed:
                self._watchers -= 1
                if not self._watchers:
                    self._newest = None
                    self._drawn = (0, b"")

    def newer_than(self, number: int, timeout: float) -> tuple[int, bytes] | None:
        """Number and JPEG of the newest picture, if it is newer than that; waits so many seconds for it."""
        with self._changed:
            if not self._changed.wait_for(
                lambda: self._newest is not None and self._number > number, timeout
            ):
                return None
        deadline = time.monotonic() + timeout
        with self._drawing:
            with self._changed:
                newest, current = self._newest, self._number
            if self._drawn[0] > number and (self._drawn[0] == current or time.monotonic() > deadline):
                return self._drawn
            if newest is None:
                return None
            self._drawn = current, self._draw(*newest)
            return self._drawn

    def _draw(self, frame: Frame, tracks: Tracks) -> bytes:
        if frame.image is None:
            raise SinkError("a frame without a picture cannot be shown")
        width, height = frame.size
        picture = to_bgr(frame.image, out=self._work.array("picture", height, width, 3), work=self._work)
        # However rarely somebody asks, or the machine gets round to it, a trail is that of the last seconds.
        self._moments.append(frame.pts_seconds)
        recent = sum(0 <= frame.pts_seconds - moment < TRAIL_SECONDS for moment in self._moments)
        self._painter.trails.shorten(recent - 1)
        self._painter.draw(picture, tracks)
        if self._width is not None and width > self._width:
            size = (self._width, max(1, round(height * self._width / width)))
            picture = np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)
        good, jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
        if not good:
            raise SinkError(f"a picture of {width}×{height} cannot be encoded as JPEG")
        return jpeg.tobytes()
