"""The streams of a live run: added and removed at any moment, from any thread, and what is known of them.

The one object that a page or an API needs. Knows sources, sinks and numbers; not what detects or tracks.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tracker.addresses import file_name, redacted
from tracker.batcher import Batcher
from tracker.counters import Counters
from tracker.errors import ConfigError, TrackerError
from tracker.latency import Ages, Quantiles
from tracker.sinks.jsonl import with_counts, words_json
from tracker.sinks.output import LinesOf
from tracker.sinks.preview import Preview
from tracker.sources.live import LiveSource, State
from tracker.types import Frame, Sink, Tracks

MAX_STREAMS = 256
PREVIEW_WIDTH = 960
_SPEED_FRAMES = 50  # the speed shown is that of so many frames


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """One stream at one moment. Nothing in it is secret.

    state: of `State`. reason: the last fault in words. frames: decoded, corrupt, tracked. dropped: by reason.
    fps: tracked, over the last seconds; 0 while nothing comes. age_ms: from the last byte of a frame to its
    tracks. silent_seconds: since a frame was last tracked; None before the first. objects: in the last frame,
    by class. undelivered: by result or publisher. counters: lines and zones, and who crossed them.
    """

    name: str
    address: str
    state: str
    reason: str
    size: tuple[int, int]
    frame_rate: float
    decoder: str
    frames: dict[str, int]
    dropped: dict[str, int]
    faults: int
    reconnects: int
    clock_jumps: int
    fps: float
    age_ms: Quantiles
    silent_seconds: float | None
    objects: dict[str, int]
    tracks: int
    undelivered: dict[str, int]
    counters: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class LiveStream:
    """One stream: the thread that reads it, what it leaves behind, and its numbers.

    config: settings of its association, once it has one. tracks: ever reported. sinks: its results.
    lines_of: what words the lines of those that take lines.
    """

    def __init__(
        self, source: LiveSource, address: str, number: int, sinks: Sequence[Sink], counters: Counters
    ) -> None:
        self.source, self.address, self.number = source, address, number
        self.sinks, self.counters = list(sinks), counters
        # Asked once: a result that cannot be written at the moment has no words for its lines.
        words = [getattr(sink, "lines_of", None) for sink in self.sinks]
        self.lines_of: tuple[LinesOf, ...] = tuple(each for each in words if each is not None)
        self._words = words
        self.ages = Ages()
        self.preview = Preview(frame_rate=source.frame_rate, width=PREVIEW_WIDTH)
        self.config: Any = None
        self.error: TrackerError | None = None
        self.crash: BaseException | None = None
        self.tracked_frames = self.tracks = 0
        self.failed: Counter[str] = Counter()
        self.objects: dict[str, int] = {}
        self.seconds = 0.0  # in the reader, waiting for pictures included
        self._moments: deque[float] = deque(maxlen=_SPEED_FRAMES)
        self._thread: threading.Thread | None = None

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def over(self) -> bool:
        """Nothing will come any more."""
        return self._thread is not None and not self._thread.is_alive()

    def start(self, batcher: Batcher) -> None:
        def read() -> None:
            try:
                for frame in self.source:
                    batcher.offer(frame)
            except TrackerError as error:
                self.error = error
            except BaseException as error:  # a bug: it belongs in the caller's thread
                self.crash = error

        batcher.join(self.number)
        self._thread = threading.Thread(target=read, name=f"read {self.name}", daemon=True)
        self._thread.start()

    def join(self, timeout: float) -> None:
        if self._thread is not None:
            self._thread.join(timeout)

    def write(self, frame: Frame, tracks: Tracks, texts: Sequence[bytes], counts: bytes) -> None:
        """Into all results. texts: as `lines_of` words the frame. counts: of `counters`, may be empty."""
        worded = iter(texts)
        for sink, words in zip(self.sinks, self._words, strict=True):
            if words is None:
                sink.write(frame, tracks)
                continue
            text = next(worded)
            sink.append(with_counts(text, counts) if counts and words_json(words) else text)  # type: ignore[attr-defined]

    def tracked(self, frame: Frame, tracks: Tracks, confirmed: int) -> None:
        """A frame is done."""
        now = time.monotonic()
        assert frame.received is not None
        self.ages.add(now - frame.received)
        self._moments.append(now)
        self.tracked_frames += 1
        self.tracks = confirmed
        self.objects = dict(Counter(map(tracks.name_of, tracks.label.tolist())))
        self.preview.offer(frame, tracks)

    def status(self, superseded: int) -> Status:
        source, now = self.source, time.monotonic()
        moments = tuple(self._moments)
        speed = (len(moments) - 1) / (now - moments[0]) if len(moments) > 1 else 0.0
        dropped = Counter(dict(source.dropped)) + self.failed + Counter(superseded=superseded)
        return Status(
            name=self.name,
            address=self.address,
            state=source.state.value,
            reason=redacted(source.reason),
            size=source.size,
            frame_rate=round(source.frame_rate, 3),
            decoder=source.decoder,
            frames={
                "decoded": source.counts.decoded,
                "corrupt": source.counts.corrupt,
                "tracked": self.tracked_frames,
            },
            dropped=dict(dropped),
            faults=source.faults,
            reconnects=source.reconnects,
            clock_jumps=source.jumps,
            fps=round(speed if source.state is State.LIVE else 0.0, 2),
            age_ms=self.ages.quantiles(),
            silent_seconds=round(now - moments[-1], 3) if moments else None,
            objects=self.objects,
            tracks=self.tracks,
            undelivered={
                type(sink).__name__: lost for sink in self.sinks if (lost := getattr(sink, "undelivered", 0))
            },
            counters=self.counters.to_json(),
        )


class Streams:
    """All streams of a run, in order of their joining. Every method may be called from any thread.

    open: makes a stream of an address, a name and a number; raises TrackerError for what cannot be had.
    closing: streams that left and are still to be closed by the thread that writes their results.
    """

    def __init__(self, batcher: Batcher, open: Callable[[str, str, int, bool], LiveStream]) -> None:
        self._batcher, self._open = batcher, open
        self._lock = threading.Lock()
        self._streams: dict[int, LiveStream] = {}
        self._next = 0
        self.closing: deque[LiveStream] = deque()
        self.ages = Ages()  # of those that left

    def add(self, address: str, *, name: str = "", trusted: bool = True) -> str:
        """Start reading; gives the name it got, which differs from the one wished for where that is taken.

        trusted: False for addresses from outside: no files, webcams, loopback or link-local hosts.
        Raises ConfigError for an address that is not allowed or one stream too many.
        """
        with self._lock:
            if len(self._streams) >= MAX_STREAMS:
                raise ConfigError(f"there are {MAX_STREAMS} streams already: remove one first")
            number, self._next = self._next, self._next + 1
            stream = self._open(address, file_name(name, "") if name else "", number, trusted)
            self._streams[number] = stream
            stream.start(self._batcher)
            return stream.name

    @property
    def count(self) -> int:
        return len(self._streams)

    def taken(self, name: str) -> bool:
        """Only for `open`, which is called under the lock."""
        return any(stream.name == name for stream in self._streams.values())

    def remove(self, name: str) -> None:
        """Stop reading; its results are closed soon after. Raises ConfigError if there is none."""
        with self._lock:
            number = next((n for n, stream in self._streams.items() if stream.name == name), None)
            if number is None:
                raise ConfigError(f"there is no stream {redacted(name)[:80]!r}")
            stream = self._streams.pop(number)
        stream.source.stop()
        stream.failed["superseded"] += self._batcher.leave(number)
        self.ages.merge(stream.ages)
        self.closing.append(stream)

    def get(self, name: str) -> LiveStream:
        """Raises ConfigError if there is none."""
        for stream in self.all():
            if stream.name == name:
                return stream
        raise ConfigError(f"there is no stream {redacted(name)[:80]!r}")

    def numbered(self, number: int) -> LiveStream | None:
        with self._lock:
            return self._streams.get(number)

    def all(self) -> list[LiveStream]:
        with self._lock:
            return list(self._streams.values())

    def statuses(self) -> list[Status]:
        return [stream.status(self._batcher.superseded(stream.number)) for stream in self.all()]

    def all_ages(self) -> Ages:
        """Of every frame of every stream so far."""
        total = Ages()
        for ages in (self.ages, *(stream.ages for stream in self.all())):
            total.merge(ages)
        return total
