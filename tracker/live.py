"""A run of live sources: streams that come and go, until somebody says stop.

What `session` is for files. Opens everything, passes frames and tracks on, leaves results and summaries;
`streams` says at any moment how each one is.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Self

from tracker.addresses import parse, redacted, scheme_of
from tracker.batcher import Batcher
from tracker.counters import Counters
from tracker.crew import LocalCrew, ProcessCrew
from tracker.crew_worker import Duty
from tracker.errors import ConfigError, SinkError, TrackerError
from tracker.latency import Ages
from tracker.pipeline import LivePipeline
from tracker.runtimes.onnx import usable_cores
from tracker.session import LiveOptions, Options, Run, Session
from tracker.sinks import SUFFIXES, check_kinds, open_sinks
from tracker.sinks.publish import LinePublisher, Listener, Mqtt, standard_output
from tracker.sinks.push import RtspPush
from tracker.sinks.rotating import RotatingSink, Rotation
from tracker.sources import LiveSource, connect_to
from tracker.sources.live import FALLBACK_RATE, State
from tracker.sources.live_decoders import LiveDecoders, processes_for
from tracker.sources.shared_memory import sharing_problem
from tracker.streams import LiveStream, Streams
from tracker.summary import write_live_summary
from tracker.types import Frame, Sink, Tracks

# A camera may be gone so long, in frames at 30 per second, and its tracks go on: 5 s are enough for one that
# starts again. Waiting that long for people who are merely hidden costs identities (docs/log.md).
OUTAGE_FRAMES = 150

# Readers that are connecting, or waiting in silence, end within this or with the process.
_LEAVE_SECONDS = 1.0
_SUMMARY_SECONDS = 60.0
_PUBLISH_SCHEMES = ("mqtt", "mqtts", "rtsp", "rtsps")


def open_session(options: Options) -> Session | LiveSession:
    """The run for these options."""
    return Session(options) if options.live is None else LiveSession(options)


class LiveSession(Run):
    """Enter to open everything, iterate for (frame, tracks), leave to close everything.

    Iteration goes on until `stop`, or until every source is over: files replayed, or cameras given up. A
    source that fails ends alone. Results are whole when the session is left, unless by an exception.

    tell: given a line of text for people, in the iterating thread, when a stream is lost or back, and when
    something cannot be delivered.
    beat: when the loop last turned, by `time.monotonic`. decoders: processes that read and decode what NVDEC
    can decode. decoding_problem: why there are none where they would pay.
    Raises TrackerError on entering for an engine, option or address that cannot be used, and while iterating
    for an engine that keeps failing.
    """

    streams: Streams
    live: LiveOptions

    def __init__(self, options: Options, *, stay: bool = False, allow_local: bool = False) -> None:
        """stay: go on while there are no streams, because some may be added. allow_local: strangers may add
        cameras on this machine and on link-local addresses.
        """
        super().__init__(options)
        if options.live is None:
            raise ConfigError("these options are for files: add --live, or a live source")
        self.live = options.live
        self._stay, self._allow_local = stay, allow_local
        if not options.sources and not stay:
            raise ConfigError("no source given: name a camera, such as rtsp://camera/stream or webcam:0")
        check_kinds(options.save, masks=True)  # the engine is asked for them when it is opened
        self.beat = time.monotonic()
        self.tell: Callable[[str], None] = lambda text: None
        self._news: deque[str] = deque()
        self._known: set[int] = set()  # streams that the crew follows
        self._listeners: list[tuple[str, Listener]] = []
        self._pushes: list[str] = []
        self._left = 0  # frames tracked of streams that left
        self._summary_due = 0.0
        self._problems: dict[str, str] = {}
        self._read_seconds = 0.0
        self.decoding_problem: str | None = None
        self._told_decoders: dict[str, str] = {}

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            options = self.options
            self._epoch = time.monotonic()
            self._open_frontend(stack)
            self._decoders = stack.enter_context(LiveDecoders(0))
            size = min(self.live.max_batch or self.frontend.usual_batch, self.frontend.max_batch)
            self._batcher = Batcher(size, self.live.max_wait_ms / 1000)
            self.streams = Streams(self._batcher, self._open)
            self.workers = self._worker_count(max(1, len(options.sources)))
            if self.workers:
                self._crew = stack.enter_context(ProcessCrew((), self.workers))
            else:
                self._crew = LocalCrew(())
            self.directory = self._output_directory("live") if options.save else None
            self._open_listeners(stack)
            self.pipeline = LivePipeline(
                self._batcher,
                self.frontend,
                self._crew,
                admit=self._admit,
                failed=self._failed,
                tick=self._tick,
            )
            stack.push(self._close_streams)
            self._want_decoders(len(options.sources))
            for source in options.sources:
                self.streams.add(source)
            self._stack = stack.pop_all()
        return self

    @property
    def decoders(self) -> int:
        return self._decoders.processes

    def _want_decoders(self, streams: int) -> None:
        """As many processes as pay for so many; never fewer than before."""
        gpu = self._gpu()
        if gpu is None or self.options.decode == "cpu" or self.decoding_problem is not None:
            return
        wanted = self.options.decoders
        if wanted is None:
            wanted = processes_for(streams, usable_cores())
            if wanted and not self._decoders.processes:
                self.decoding_problem = sharing_problem(gpu)
            if self.decoding_problem is not None:
                self.note(f"streams are decoded in the main process, because {self.decoding_problem}")
                return
        self._decoders.processes = max(wanted, self._decoders.processes)

    def stop(self) -> None:
        """From any thread or signal handler: finish the frames under way, then end."""
        self.pipeline.stop()

    def note(self, text: str) -> None:
        """From any thread: something to `tell`."""
        self._news.append(redacted(text))

    def __iter__(self) -> Iterator[tuple[Frame, Tracks]]:
        begun = perf_counter()
        for frame, tracks, texts, confirmed in self.pipeline:
            stream = self.streams.numbered(frame.source)
            if stream is None:
                continue
            counts = stream.counters.update(frame, tracks)
            writing = perf_counter()
            stream.write(frame, tracks, texts, counts)
            now = perf_counter()
            self._write_seconds += now - writing
            self.wall_seconds = now - begun
            stream.tracked(frame, tracks, confirmed)
            yield frame, tracks
        self.wall_seconds = perf_counter() - begun

    @property
    def tracked_frames(self) -> int:
        return self._left + sum(stream.tracked_frames for stream in self.streams.all())

    @property
    def declared_frames(self) -> None:
        """Nobody knows."""

    @property
    def ages(self) -> Ages:
        return self.streams.all_ages()

    def _decode_seconds(self) -> float:
        return self._read_seconds + sum(stream.source.decode_seconds for stream in self.streams.all())

    def _open_listeners(self, stack: ExitStack) -> None:
        for target in self.live.publish:
            listener: Listener
            if target == "stdout":
                listener = standard_output()
            elif scheme_of(target) in ("rtsp", "rtsps"):
                self._pushes.append(target)
                parse(target, schemes=_PUBLISH_SCHEMES)
                continue
            else:
                listener = Mqtt(parse(target, schemes=_PUBLISH_SCHEMES))
            stack.callback(listener.close)
            self._listeners.append((target, listener))

    def _open(self, spec: str, name: str, number: int, trusted: bool) -> LiveStream:
        """A stream, not started yet. Called under the lock of `streams`, from any thread."""
        self._want_decoders(self.streams.count + 1)
        wished, address, connect = connect_to(
            spec,
            self.live.source_settings(),
            trusted=trusted,
            allow_local=self._allow_local,
            replay=self.live.realtime,
            loop=self.live.loop,
            gpu=self._gpu(),
            decode=self.options.decode,
            decoders=self._decoders,
        )
        name = name or wished
        stem, again = name, 1
        while self.streams.taken(stem):
            again += 1
            stem = f"{name}-{again}"
        source = LiveSource(
            stem,
            connect,
            source=number,
            max_reconnects=self.live.max_reconnects,
            max_frames=self.options.max_frames,
            epoch=self._epoch,
            on_change=self._changed,
        )
        kept = None if self.directory is None else self.directory / f"{stem}.counters.json"
        counters = Counters(kept)
        return LiveStream(source, address, number, self._sinks(stem), counters)

    def _sinks(self, stem: str) -> list[Sink]:
        rotation = Rotation.parse(self.live.rotate)
        sinks: list[Sink] = []
        if self.directory is not None:
            for kind in dict.fromkeys(self.options.save):
                open_one = partial(_open_sink, kind, self.directory)
                sinks.append(
                    RotatingSink(self.directory, stem, SUFFIXES[kind], open=open_one, rotation=rotation)
                )
        sinks += [LinePublisher(listener, stem) for _, listener in self._listeners]
        sinks += [
            RtspPush(parse(target, schemes=_PUBLISH_SCHEMES), stem, frame_rate=FALLBACK_RATE)
            for target in self._pushes
        ]
        return sinks

    def _changed(self, source: LiveSource) -> None:
        """In the source's thread."""
        if source.state is State.LIVE:
            self._tell_decoder(source)
        if source.reason:
            self._news.append(f"{source.name} is {source.state.value}: {redacted(source.reason)}")
        elif source.state is State.LIVE and source.reconnects:
            self._news.append(f"{source.name} is live again")

    def _tell_decoder(self, source: LiveSource) -> None:
        """Once, where it is not what one would expect."""
        known, self._told_decoders[source.name] = self._told_decoders.get(source.name), source.decoder
        if source.decoder != known and source.decoder.startswith("CPU, because"):
            self._news.append(f"{source.name} is decoded on the {redacted(source.decoder)}")

    def _admit(self, frame: Frame) -> bool:
        stream = self.streams.numbered(frame.source)
        if stream is None:
            return False
        if frame.source not in self._known:
            rate = stream.source.frame_rate
            associate = self._association(rate, outage_buffer=OUTAGE_FRAMES)
            duty = Duty(
                name=stream.name,
                associate=associate,
                lines_of=stream.lines_of,
                frame_rate=rate,
                masks=self.frontend.masks,
            )
            self._crew.add(frame.source, duty)
            stream.config = associate().config
            self._known.add(frame.source)
        return True

    def _failed(self, frame: Frame, error: TrackerError) -> None:
        stream = self.streams.numbered(frame.source)
        if stream is not None:
            stream.failed["engine"] += 1
            self._news.append(f"{stream.name}: frame {frame.index + 1} is not tracked: {error}")

    def _tick(self) -> None:
        """Now and then, in the iterating thread."""
        now = self.beat = time.monotonic()
        while self._news:
            self.tell(self._news.popleft())
        while self.streams.closing:
            self._part(self.streams.closing.popleft())
        streams = self.streams.all()
        for stream in streams:
            if stream.crash is not None:
                raise stream.crash
            for sink in stream.sinks:
                self._report(f"{stream.name} {type(sink).__name__}", getattr(sink, "problem", None))
        if not self._stay and all(stream.over for stream in streams):
            self._batcher.close()
            if not self._batcher.waiting:
                self.pipeline.stop()
        if now >= self._summary_due:
            self._summary_due = now + _SUMMARY_SECONDS
            for stream in streams:
                self._summarise(stream, complete=False)

    def _report(self, what: str, problem: object) -> None:
        """Tell of a result that cannot be delivered, once."""
        words = redacted(problem or "")
        if words and words != self._problems.get(what):
            self._news.append(f"{what}: {words}")
        self._problems[what] = words

    def _part(self, stream: LiveStream) -> None:
        """With one that was removed."""
        self._known.discard(stream.number)
        self._crew.remove(stream.number)
        self._told_decoders.pop(stream.name, None)
        self._left += stream.tracked_frames
        self._read_seconds += stream.source.decode_seconds
        self._close(stream, complete=True)

    def _close(self, stream: LiveStream, *, complete: bool) -> None:
        for sink in stream.sinks:
            try:
                sink.close(complete=complete)
            except SinkError as error:
                self._news.append(f"{stream.name}: {error}")
        self._summarise(stream, complete=complete)

    def _close_streams(self, kind: type[BaseException] | None, *rest: object) -> None:
        """The end: readers are told to leave, and results are closed without waiting for them."""
        streams = self.streams.all()
        for stream in streams:
            stream.source.stop()
        while self.streams.closing:
            self._part(self.streams.closing.popleft())
        for stream in streams:
            self._close(stream, complete=kind is None and stream.error is None)
        until = time.monotonic() + _LEAVE_SECONDS
        for stream in streams:
            stream.join(max(0.0, until - time.monotonic()))
        while self._news:
            self.tell(self._news.popleft())

    def _summarise(self, stream: LiveStream, *, complete: bool) -> None:
        if self.directory is None:
            return
        try:
            write_live_summary(
                self.directory,
                stream.name,
                complete=complete,
                status=stream.status(self._batcher.superseded(stream.number)).to_json(),
                counts=stream.source.counts,
                wall_seconds=self.wall_seconds,
                stages=self.stages(),
                workers=self.workers,
                decoders=self.decoders,
                ages_ms=asdict(self.ages.quantiles()),
                engine=self.engine_words(),
                tracker={} if stream.config is None else self.tracker_words(stream.config),
            )
        except SinkError as error:
            self._news.append(f"{stream.name}: {error}")


def _open_sink(kind: str, directory: Path, stem: str) -> Sink:
    (sink,) = open_sinks([kind], directory, stem, frame_rate=FALLBACK_RATE)
    return sink
