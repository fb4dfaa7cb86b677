"""What every source does alike: opened once, read once, closed at any moment.

Knows nothing of files or codecs: a subclass writes `_read`, a generator that holds the resources and
releases them when it ends or is closed.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from typing import Self

from tracker.errors import SourceError
from tracker.types import Frame, FrameCounts


class Reader(ABC):
    """A `Source` around one generator of frames.

    decoder: for people, what decodes and why it is that.

    Reading happens in the thread that iterates, which need not be the one that entered. Neither FFmpeg's
    containers nor generators bear two threads at once, so each step and the exit hold the same lock:
    leaving while another thread reads waits for its current frame, after which that iteration ends.
    """

    name: str
    size: tuple[int, int]  # (0, 0) until entered
    frame_rate: float

    def __init__(self, name: str, decoder: str = "CPU") -> None:
        self.name, self.decoder = name, decoder
        self.counts = FrameCounts()
        self.size = (0, 0)
        self._frames: Generator[Frame] | None = None
        self._first: Frame | None = None
        self._lock = threading.Lock()

    @abstractmethod
    def _read(self) -> Generator[Frame]:
        """All frames, at least one. Keeps `counts` true, but for `decoded`."""

    def __enter__(self) -> Self:
        """Opens and decodes up to the first good picture. Raises SourceError where there is none."""
        self._frames = self._read()
        self._first = next(self._frames)
        self.size = self._first.size
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._first = None
            if self._frames is not None:
                self._frames.close()

    def __iter__(self) -> Iterator[Frame]:
        while (frame := self._next()) is not None:
            self.counts.decoded += 1
            yield frame

    def _next(self) -> Frame | None:
        if self._frames is None:
            raise SourceError(f"{self.name} is not open: iterate inside a `with` block")
        with self._lock:
            frame, self._first = self._first, None
            return frame or next(self._frames, None)
