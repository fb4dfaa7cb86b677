"""Live sources: cameras and servers that come and go, read for weeks by one thread each.

Knows how a connection is lost and made again, and what time it is. How the pictures of one connection are
got, `connections` knows; who wants them, nobody here does.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from enum import Enum
from typing import Self

from tracker.errors import ConfigError, SourceError
from tracker.sources.connections import Arrival, Connect, RefusedError
from tracker.sources.limits import MAX_PIXELS
from tracker.sources.live_clock import LiveClock
from tracker.sources.live_pictures import UnfitError
from tracker.types import Frame, FrameCounts

FALLBACK_RATE = 30.0
LEAST_DELAY_SECONDS, MOST_DELAY_SECONDS = 0.5, 30.0
# So long must pictures have come before the next fault counts as a new one.
SETTLED_SECONDS = 2.0


class State(Enum):
    CONNECTING = "connecting"
    LIVE = "live"
    RECONNECTING = "reconnecting"
    ENDED = "ended"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveSettings:
    """How live sources are read.

    rtsp_transport: "tcp", or "udp", which loses pictures where packets get lost.
    open_seconds: for connecting, until the first packet. silence_seconds: without a packet is a fault.
    max_reconnects: attempts in a row without a picture before giving up; None is never.
    verify_tls: refuse rtsps and https servers whose certificate no known authority has signed.
    """

    rtsp_transport: str = "tcp"
    open_seconds: float = 4.0
    silence_seconds: float = 2.5
    max_reconnects: int | None = None
    verify_tls: bool = False
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        if self.rtsp_transport not in ("tcp", "udp"):
            raise ConfigError(f"rtsp_transport is {self.rtsp_transport!r}; it must be tcp or udp")
        for key in ("open_seconds", "silence_seconds"):
            if not 0.1 <= getattr(self, key) <= 3600:
                raise ConfigError(f"{key} is {getattr(self, key)}; it must lie between 0.1 and 3600")
        if self.max_reconnects is not None and self.max_reconnects < 0:
            raise ConfigError(f"max_reconnects is {self.max_reconnects}; it must be 0 or more")


class Backoff:
    """How long to wait before the next attempt: an eighth of the outage so far, 0.5 to 30 s, or up to two
    fifths less.

    So attempts get rarer as in exponential backoff, and the time lost after a camera is back stays small
    beside the time that it was gone. The chance in it keeps a hundred cameras from coming back at once.
    """

    def __init__(self, chance: Callable[[], float] = random.random) -> None:
        self._chance = chance
        self._gone_since: float | None = None

    def healthy(self, now: float, since: float) -> None:
        """Pictures have been coming since then."""
        if now - since >= SETTLED_SECONDS:
            self._gone_since = None

    def delay(self, now: float, *, at_least: float = LEAST_DELAY_SECONDS) -> float:
        """After a fault, in seconds."""
        if self._gone_since is None:
            self._gone_since = now
        seconds = min(MOST_DELAY_SECONDS, max(at_least, (now - self._gone_since) / 8))
        return seconds * (0.6 + 0.4 * self._chance())


class LiveSource:
    """One live source, across all its connections. Implements `types.Source`; the thread that iterates it
    owns the connection, opens it and closes it.

    Frames are numbered as they come, damaged ones included; their time is that of `LiveClock`, in seconds
    since `epoch` (of `time.monotonic`). Iteration ends when a source that has an end is over, or after
    `stop`, within the time that connecting or silence may take. It raises SourceError after
    max_reconnects, and where NVDEC is a must and cannot decode it; max_frames ends it, too.

    state, reason: what it is doing, and the last fault in words. faults, reconnects: lost connections, and
    successful ones after the first. dropped: frames by reason. jumps: of the source's own clock.
    decode_seconds: from the last bytes of pictures to the pictures, so far.
    on_change: called in the reading thread whenever the state changes.
    """

    def __init__(
        self,
        name: str,
        connect: Connect,
        *,
        source: int = 0,
        max_reconnects: int | None = None,
        max_frames: int | None = None,
        epoch: float | None = None,
        on_change: Callable[[LiveSource], None] = lambda source: None,
    ) -> None:
        self.name = name
        self.counts = FrameCounts()
        self.size = (0, 0)
        self.frame_rate = FALLBACK_RATE
        self.state, self.reason = State.CONNECTING, ""
        self.faults = self.reconnects = 0
        self.decode_seconds = 0.0
        self.dropped: Counter[str] = Counter()
        self._connect, self._source = connect, source
        self._max_reconnects, self._max_frames = max_reconnects, max_frames
        self._epoch = time.monotonic() if epoch is None else epoch
        self._on_change = on_change
        self._stop = threading.Event()
        self._clock = LiveClock()
        self._index = -1
        self._attempts = 0  # since the last picture
        self._since = 0.0  # pictures have been coming

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def stop(self) -> None:
        """From any thread: no more frames."""
        self._stop.set()

    @property
    def decoder(self) -> str:
        """For people, what decodes and why it is that; a new connection may change it."""
        return self._connect.decoder

    @property
    def jumps(self) -> int:
        return self._clock.jumps

    def __iter__(self) -> Iterator[Frame]:
        backoff = Backoff()
        while not self._stop.is_set():
            patience = LEAST_DELAY_SECONDS
            try:
                yield from self._connection(backoff)
                if self._connect.ends or self._stop.is_set() or self._enough():
                    break
                reason = "the stream ended"
            except UnfitError as error:
                self._become(State.FAILED, str(error))
                raise SourceError(f"{self.name}: {error}") from None
            except RefusedError as error:
                reason, patience = str(error), MOST_DELAY_SECONDS
            except SourceError as error:
                reason = str(error)
            if self._stop.is_set():
                break
            self._fault(reason)
            self._stop.wait(backoff.delay(time.monotonic(), at_least=patience))
        self._become(State.ENDED)

    def _enough(self) -> bool:
        return self.counts.decoded == self._max_frames

    def _fault(self, reason: str) -> None:
        """A connection was lost, or could not be had. Raises SourceError if it was the last that may be."""
        if self.state is State.LIVE:
            self.faults += 1
        self._attempts += 1
        if self._max_reconnects is not None and self._attempts > self._max_reconnects:
            self._become(State.FAILED, reason)
            raise SourceError(
                f"{self.name}: {reason}; gave up after {self._attempts} attempts (--max-reconnects)"
            )
        self._become(State.CONNECTING if self._index < 0 else State.RECONNECTING, reason)

    def _connection(self, backoff: Backoff) -> Iterator[Frame]:
        """All frames of one connection."""
        self._clock.restart()
        with closing(self._connect(self._stop)) as arrivals:
            for arrival in arrivals:
                if self._stop.is_set():
                    return
                now = time.monotonic()
                self._index += 1
                if arrival.dropped:
                    self.dropped[arrival.dropped] += 1
                    self.counts.dropped += 1
                elif arrival.frame is None:
                    self.counts.corrupt += 1
                else:
                    if self.state is not State.LIVE:
                        self._arrived(now, arrival)
                    backoff.healthy(now, self._since)
                    self.decode_seconds += now - arrival.received
                    yield self._stamped(arrival, arrival.frame)
                    if self._enough():
                        return

    def _arrived(self, now: float, arrival: Arrival) -> None:
        """The first picture of a connection."""
        self.frame_rate = arrival.frame_rate or self.frame_rate
        self.reconnects += self.counts.decoded > 0
        self._attempts, self._since = 0, now
        self._become(State.LIVE)

    def _stamped(self, arrival: Arrival, frame: Frame) -> Frame:
        interval = 1 / self.frame_rate
        moment = self._clock.time_of(arrival.pts_seconds, arrival.received - self._epoch, interval)
        self.size = frame.size
        self.counts.decoded += 1
        return replace(
            frame, index=self._index, pts_seconds=moment, source=self._source, received=arrival.received
        )

    def _become(self, state: State, reason: str = "") -> None:
        changed = (state, reason) != (self.state, self.reason)
        self.state, self.reason = state, reason
        if changed:
            self._on_change(self)
