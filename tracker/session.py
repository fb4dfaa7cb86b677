"""One run from its options: opens everything, passes frames and tracks on, leaves results and summaries.

What the command `track` and the function `tracker.track` share. Decides nothing that a room can decide
for itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Self, get_args

from tracker.association import make_association
from tracker.crew import CORES_PER_WORKER, LocalCrew, ProcessCrew
from tracker.crew_worker import Duty
from tracker.engine import open_engine
from tracker.errors import ConfigError, SinkError
from tracker.pipeline import Feed, Pipeline
from tracker.runtimes.onnx import usable_cores
from tracker.sinks import open_sinks
from tracker.sinks.output import LineSink
from tracker.sources import Decode, open_source
from tracker.summary import Stage, write_summary
from tracker.types import Crew, Frame, Frontend, Sink, Tracks, Transfers

# Detections below every tracker's own `low` are of no use to it.
DEFAULT_LOW = 0.1

# ByteTrack starts tracks only this much above `high` (`byte_tracker.py`, det_thresh).
BYTE_BIRTH_MARGIN = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What to do; the defaults do the plain thing.

    sources: video files, image directories, globs. engine: an engine file.
    tracker: "jde", "byte", or None: jde when the front end gives embeddings, else byte.
    compat: None, or "fairmot" or "bytetrack" to do exactly as that published tracker.
    out: directory for results; None is runs/<name>, numbered where that exists already.
    save: kinds of result out of mot, jsonl, video; empty writes nothing at all, no summary either.
    device: "auto", "cpu" or "cuda:N". classes: names to track, empty for all.
    conf: score above which a detection is confident; weaker ones only keep tracks alive.
    frontend: needed only for an engine without manifest. max_frames: of each source.
    workers: processes that associate, beside this one: at most one per source, 0 for none. None is a quarter
    of the cores where several sources share a GPU, and 0 on a CPU, whose cores the engine needs.
    decode: where videos are decoded, "auto", "cpu" or "gpu": see `open_source`.
    settings: fields of the tracker's config (`JdeConfig`, `ByteConfig`) to change.

    Raises ConfigError for values out of range.
    """

    sources: Sequence[str]
    engine: str
    tracker: str | None = None
    compat: str | None = None
    out: str | None = None
    save: Sequence[str] = ("mot",)
    device: str = "auto"
    classes: Sequence[str] = ()
    conf: float | None = None
    frontend: str | None = None
    max_frames: int | None = None
    workers: int | None = None
    decode: Decode = "auto"
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("no source given: name a video file, an image directory or a quoted glob")
        if self.conf is not None and not 0.0 < self.conf < 1.0:
            raise ConfigError(f"conf must lie between 0 and 1, got {self.conf}")
        if self.max_frames is not None and self.max_frames < 1:
            raise ConfigError(f"max_frames must be at least 1, got {self.max_frames}")
        if self.decode not in get_args(Decode):
            raise ConfigError(f"decode is {self.decode!r}; it must be {', '.join(get_args(Decode))}")
        if self.workers is not None and self.workers < 0:
            raise ConfigError(f"workers must be 0 or more, got {self.workers}")

    def tracker_settings(self, tracker: str) -> dict[str, Any]:
        """`settings` with conf spelled out for that tracker; what was set by name wins."""
        settings = dict(self.settings)
        if self.conf is not None:
            settings.setdefault("high", self.conf)
            settings.setdefault("low", min(self.conf, DEFAULT_LOW))
            if tracker == "byte":
                settings.setdefault("birth", min(1.0, self.conf + BYTE_BIRTH_MARGIN))
        return settings


_KINDS: dict[str, tuple[type | tuple[type, ...], str]] = {
    "sources": (list, "a list of names"),
    "save": ((list, tuple), "a list such as mot,video"),
    "classes": ((list, tuple), "a list such as person,car"),
    "conf": ((float, int), "a number"),
    "max_frames": (int, "a whole number"),
    "workers": (int, "a whole number"),
    "settings": (Mapping, "a table"),
}


def options_from(values: Mapping[str, Any]) -> Options:
    """Options by name, from a command line, a file or a caller.

    Raises ConfigError for a name that does not exist, one that is missing, or a value of the wrong kind.
    """
    known = [each.name for each in fields(Options)]
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"there is no option {name!r}: there is {', '.join(known)}")
        kind, words = _KINDS.get(name, (str, "text"))
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise ConfigError(f"option {name} must be {words}, got {value!r}")
    if "engine" not in values:
        raise ConfigError("no engine given: name one with --engine, such as --engine yolox_nano.onnx")
    return Options(**values)


@dataclass(slots=True, kw_only=True)
class Stream:
    """One source on its way through: what reads it and writes it, and how far it is.

    config: settings of its association. tracks: ever reported.
    """

    spec: str
    stem: str
    feed: Feed
    config: Any
    sinks: list[Sink]
    tracked_frames: int = 0
    tracks: int = 0


class Session:
    """Enter to open everything, iterate once for (frame, tracks), leave to close everything.

    Results are written before a frame is yielded. Left before the end or by an exception, results stay
    marked partial. Raises TrackerError on entering before any frame is read, and SinkError as soon as a
    result cannot be written; a source that breaks half-way ends alone, with `feed.error` set.
    """

    streams: list[Stream]
    frontend: Frontend
    directory: Path | None

    def __init__(self, options: Options) -> None:
        self.options = options
        self.wall_seconds = self._write_seconds = 0.0
        self._finished = False
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            options = self.options
            self.frontend, self.manifest = open_engine(
                Path(options.engine),
                device=options.device,
                frontend=options.frontend,
                classes=options.classes,
                conf=options.tracker_settings("byte").get("low"),
                compat=options.compat,
            )
            stack.callback(self.frontend.close)
            self.tracker = options.tracker or ("jde" if self.frontend.embeds else "byte")
            wanted = self.frontend.frames_on
            gpu = wanted if wanted.type == "cuda" else None
            sources = [
                stack.enter_context(open_source(spec, source=index, gpu=gpu, decode=options.decode))
                for index, spec in enumerate(options.sources)
            ]
            stems = _distinct([source.name for source in sources])
            self.directory = self._output_directory(stems[0]) if options.save else None
            self.streams = []
            stack.push(self._close_results)
            duties = []
            for spec, source, stem in zip(options.sources, sources, stems, strict=True):
                associate = partial(
                    make_association,
                    self.tracker,
                    compat=options.compat,
                    frame_rate=source.frame_rate,
                    names=self.frontend.names,
                    settings=options.tracker_settings(self.tracker),
                )
                feed = Feed(source, max_frames=options.max_frames)
                stream = Stream(spec=spec, stem=stem, feed=feed, config=associate().config, sinks=[])
                self.streams.append(stream)
                if self.directory is not None:
                    stream.sinks = open_sinks(
                        options.save, self.directory, stem, frame_rate=source.frame_rate
                    )
                lines_of = tuple(sink.lines_of for sink in stream.sinks if isinstance(sink, LineSink))
                duties.append(Duty(name=stem, associate=associate, lines_of=lines_of))
            self.workers = self._worker_count()
            self._crew: Crew
            if self.workers:
                self._crew = stack.enter_context(ProcessCrew(duties, self.workers))
            else:
                self._crew = LocalCrew(duties)
            for stream in self.streams:
                stack.enter_context(stream.feed)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: Any) -> None:
        self._stack.__exit__(*exc)

    def __iter__(self) -> Iterator[tuple[Frame, Tracks]]:
        begun = perf_counter()
        self._transfers_before = replace(self.frontend.transfers)
        self.pipeline = Pipeline([stream.feed for stream in self.streams], self.frontend, self._crew)
        for frame, tracks, texts, confirmed in self.pipeline:
            stream = self.streams[frame.source]
            writing = perf_counter()
            worded = iter(texts)
            for sink in stream.sinks:
                if isinstance(sink, LineSink):
                    sink.append(next(worded))
                else:
                    sink.write(frame, tracks)
            now = perf_counter()
            self._write_seconds += now - writing
            self.wall_seconds = now - begun
            stream.tracked_frames += 1
            stream.tracks = confirmed
            yield frame, tracks
        self.wall_seconds = perf_counter() - begun
        self._finished = True

    @property
    def declared_frames(self) -> int | None:
        """How many frames the run will have, where every source says."""
        limit = self.options.max_frames
        total = 0
        for stream in self.streams:
            declared = stream.feed.source.counts.declared
            if declared is None:
                return None
            total += declared if limit is None else min(declared, limit)
        return total

    @property
    def tracked_frames(self) -> int:
        return sum(stream.tracked_frames for stream in self.streams)

    @property
    def transfers(self) -> Transfers:
        """Between device and host since the first frame; what opening the engine took does not count."""
        now, before = self.frontend.transfers, self._transfers_before
        return Transfers(
            waits=now.waits - before.waits, copies=now.copies - before.copies, bytes=now.bytes - before.bytes
        )

    def stages(self) -> list[Stage]:
        """Busy time of every stage so far, over all sources."""
        frames = self.tracked_frames
        stages = [Stage("decode", sum(stream.feed.seconds for stream in self.streams), frames)]
        stages += [Stage(name, seconds, frames) for name, seconds in self.frontend.seconds.items()]
        stages.append(Stage("associate", self._crew.associate_seconds, frames))
        if self.directory is not None:
            stages.append(Stage("write", self._crew.format_seconds + self._write_seconds, frames))
        return stages

    def _worker_count(self) -> int:
        if self.options.workers is not None:
            return min(self.options.workers, len(self.streams))
        if self.frontend.device.type == "cpu" or len(self.streams) == 1:
            return 0
        return min(max(1, usable_cores() // CORES_PER_WORKER), len(self.streams))

    def _output_directory(self, name: str) -> Path:
        if self.options.out is not None:
            return Path(self.options.out)
        directory, number = Path("runs") / name, 1
        while directory.exists():
            number += 1
            directory = Path("runs") / f"{name}-{number}"
        return directory

    def _close_results(self, *exc: object) -> None:
        """Close every sink, whatever happens to its neighbours, and write the summaries."""
        failures: list[SinkError] = []
        for stream in self.streams:
            complete = self._finished and exc[0] is None and stream.feed.error is None
            for sink in stream.sinks:
                try:
                    sink.close(complete=complete)
                except SinkError as error:
                    failures.append(error)
                    complete = False
            if stream.sinks and hasattr(self, "pipeline"):
                try:
                    self._write_summary(stream, complete)
                except SinkError as error:
                    failures.append(error)
        if failures and exc[0] is None:
            raise failures[0]

    def _write_summary(self, stream: Stream, complete: bool) -> None:
        assert self.directory is not None
        manifest, error = self.manifest, stream.feed.error
        write_summary(
            self.directory,
            stream.stem,
            source=stream.spec,
            complete=complete,
            error=None if error is None else str(error),
            decoder=stream.feed.source.decoder,
            counts=stream.feed.source.counts,
            tracked_frames=stream.tracked_frames,
            tracks=stream.tracks,
            wall_seconds=self.wall_seconds,
            stages=self.stages(),
            workers=self.workers,
            device=str(self.frontend.device),
            batches=self.pipeline.batches,
            transfers=self.transfers,
            all_frames=self.tracked_frames,
            engine={
                "path": self.options.engine,
                "sha256": manifest.engine_sha256,
                "frontend": manifest.frontend,
                "precision": manifest.precision,
                "problem": self.frontend.problem,
            },
            tracker={
                "name": self.tracker,
                "compat": self.options.compat,
                **asdict(stream.config),
            },
        )


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with -2, -3 … where one has been taken: two cameras may both record video.mp4."""
    taken: list[str] = []
    for name in names:
        stem, number = name, 1
        while stem in taken:
            number += 1
            stem = f"{name}-{number}"
        taken.append(stem)
    return taken
