"""Results of runs that never end, in files that do: a new one each hour, day or hundred megabytes.

Each is called `<stem>-<UTC of its beginning>`, has its partial name while it grows, and is whole once it has
the final one. Knows when to change files; what is in them their own sinks know.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tracker.errors import ConfigError, SinkError
from tracker.sinks.output import LineSink, LinesOf
from tracker.types import Frame, Sink, Tracks

_RETRY_SECONDS = 30.0  # after a file could not be written
_CHECK_SECONDS = 1.0  # between looks at a file's size

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_SIZES = {"kb": 1000, "mb": 1000**2, "gb": 1000**3}


@dataclass(frozen=True, slots=True)
class Rotation:
    """When to begin a new file: after so many seconds, or once it has so many bytes. None is never."""

    seconds: float | None = None
    bytes: int | None = None

    @classmethod
    def parse(cls, text: str) -> Rotation:
        """Of "1h", "100MB", "1d,256MB" or "never". Raises ConfigError."""
        seconds: float | None = None
        size: int | None = None
        for part in () if text == "never" else text.split(","):
            found = re.fullmatch(r"\s*(\d{1,9})\s*(s|m|h|d|kb|mb|gb)\s*", part, re.IGNORECASE)
            if found is None or int(found[1]) == 0:
                raise ConfigError(f"rotate is {text!r}; it must be like 1h, 100MB, 1d,256MB or never")
            number, unit = int(found[1]), found[2].lower()
            if unit in _UNITS:
                seconds = number * _UNITS[unit]
            else:
                size = number * _SIZES[unit]
        return cls(seconds, size)


class RotatingSink:
    """One source's results of one kind, file after file. Implements `types.Sink`.

    A file that cannot be written any more does not end the run: it stays partial, what it misses is counted,
    and another one is tried every half a minute.

    open: a sink for a stem, in that directory. suffix: of its files.
    undelivered: frames that are in no file. problem: why, while it lasts.
    Raises SinkError only where the very first file cannot be opened.
    """

    def __init__(
        self,
        directory: Path,
        stem: str,
        suffix: str,
        *,
        open: Callable[[str], Sink],
        rotation: Rotation,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._directory, self._stem, self._suffix = directory, stem, suffix
        self._open, self._rotation, self._clock = open, rotation, clock
        self._closer = ThreadPoolExecutor(1, thread_name_prefix="rotate")  # closing waits for the disk
        self.undelivered = 0
        self.problem: SinkError | None = None
        self._began = self._checked = 0.0
        self._sink: Sink | None = None
        self._begin()

    @property
    def lines_of(self) -> LinesOf | None:
        """What words its lines; None where they are no lines."""
        return self._sink.lines_of if isinstance(self._sink, LineSink) else None

    def write(self, frame: Frame, tracks: Tracks) -> None:
        self._do(lambda sink: sink.write(frame, tracks))

    def append(self, lines: bytes) -> None:
        def append(sink: Sink) -> None:
            assert isinstance(sink, LineSink)
            sink.append(lines)

        self._do(append)

    def close(self, *, complete: bool) -> None:
        """Waits until every file is whole."""
        self._end(complete=complete)
        self._closer.shutdown(wait=True)

    def _do(self, work: Callable[[Sink], None]) -> None:
        now = self._clock()
        try:
            if self._sink is None:
                if now - self._checked < _RETRY_SECONDS:
                    self.undelivered += 1
                    return
                self._begin()
            elif self._is_full(now):
                self._end(complete=True)
                self._begin()
            assert self._sink is not None
            work(self._sink)
            self.problem = None
        except SinkError as error:
            self.undelivered += 1
            self.problem = error
            self._checked = now
            self._end(complete=False)

    def _is_full(self, now: float) -> bool:
        rotation = self._rotation
        if rotation.seconds is not None and now - self._began >= rotation.seconds:
            return True
        if rotation.bytes is None or now - self._checked < _CHECK_SECONDS:
            return False
        self._checked = now
        try:
            return self._partial.stat().st_size >= rotation.bytes
        except OSError:  # somebody moved it away; so be it
            return False

    def _begin(self) -> None:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        stem, number = f"{self._stem}-{stamp}", 1
        while any(
            (self._directory / f"{stem}{partial}{self._suffix}").exists() for partial in ("", ".partial")
        ):
            number += 1
            stem = f"{self._stem}-{stamp}-{number}"
        self._partial = self._directory / f"{stem}.partial{self._suffix}"
        self._began = self._checked = self._clock()
        self._sink = self._open(stem)

    def _end(self, *, complete: bool) -> None:
        sink, self._sink = self._sink, None
        if sink is not None:
            self._closer.submit(_close, sink, complete)


def _close(sink: Sink, complete: bool) -> None:
    with suppress(SinkError):  # the file stays partial, which says so
        sink.close(complete=complete)
