"""One run from its options: opens everything, passes frames and tracks on, leaves results and summaries.

What the command `track` and the function `tracker.track` share. Decides nothing that a room can decide
for itself. Runs of live sources are `live`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Self, get_args

import torch

from tracker.addresses import LIVE_SCHEMES, redacted, scheme_of
from tracker.association import COSTS, make_association
from tracker.crew import CORES_PER_WORKER, LocalCrew, ProcessCrew
from tracker.crew_worker import Duty
from tracker.engine import open_engine
from tracker.errors import ConfigError, SinkError, TrackerError
from tracker.manifest import Manifest
from tracker.pipeline import Feed, Pipeline, ReadyFeed
from tracker.runtimes.onnx import usable_cores
from tracker.sinks import check_kinds, open_sinks
from tracker.sinks.output import LineSink
from tracker.sinks.rotating import Rotation
from tracker.sources import Decode, NvdecFile, open_source
from tracker.sources.decoders import Decoders, RemoteFile, processes_for
from tracker.sources.live import LiveSettings
from tracker.sources.shared_memory import sharing_problem
from tracker.summary import Stage, write_summary
from tracker.types import Association, Frame, Frontend, Sink, Source, Tracks, Transfers

# Detections below every tracker's own `low` are of no use to it.
DEFAULT_LOW = 0.1

# ByteTrack starts tracks only this much above `high` (`byte_tracker.py`, det_thresh).
BYTE_BIRTH_MARGIN = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveOptions:
    """What is asked of live sources alone.

    realtime: sources are files, replayed at their own pace as if they were live. loop: for ever.
    rtsp_transport, silence_seconds, max_reconnects, verify_tls: see `LiveSettings`.
    max_wait_ms: how long the first frame of a batch waits for those of other streams.
    max_batch: frames at once; None is as many as the engine takes, on a CPU one where it leaves that open.
    rotate: when to begin new files, see `Rotation.parse`.
    publish: "stdout", an mqtt:// or mqtts:// address, or an rtsp:// address to push annotated video to.

    Raises ConfigError for values out of range.
    """

    realtime: bool = False
    loop: bool = False
    rtsp_transport: str = "tcp"
    silence_seconds: float = 2.5
    max_reconnects: int | None = None
    verify_tls: bool = False
    max_wait_ms: float = 8.0
    max_batch: int | None = None
    rotate: str = "1d,256MB"
    publish: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.max_wait_ms <= 1000:
            raise ConfigError(f"max_wait_ms is {self.max_wait_ms}; it must lie between 0 and 1000")
        if self.max_batch is not None and self.max_batch < 1:
            raise ConfigError(f"max_batch is {self.max_batch}; it must be at least 1")
        if self.loop and not self.realtime:
            raise ConfigError("loop is for files that are replayed: add --realtime")
        Rotation.parse(self.rotate)
        self.source_settings()

    def source_settings(self) -> LiveSettings:
        return LiveSettings(
            rtsp_transport=self.rtsp_transport,
            silence_seconds=self.silence_seconds,
            max_reconnects=self.max_reconnects,
            verify_tls=self.verify_tls,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What to do; the defaults do the plain thing.

    sources: video files, image directories, globs. engine: an engine file.
    tracker: "jde", "byte", or None: jde when the front end gives embeddings, else byte.
    compat: None, or "fairmot" or "bytetrack" to do exactly as that published tracker.
    cost: "box", or "mask": masks count too where boxes touch several others. The engine must find masks, and
    association stays in this process, which owns their device. None is box, or what settings say.
    out: directory for results; None is runs/<name>, numbered where that exists already.
    save: kinds of result out of mot, jsonl, dota, mots, video; empty writes nothing, no summary either.
    device: "auto", "cpu" or "cuda:N". classes: names to track, empty for all.
    conf: score above which a detection is confident; weaker ones only keep tracks alive.
    frontend: needed only for an engine without manifest. max_frames: of each source.
    workers: processes that associate, beside this one: at most one per source, 0 for none. None is a quarter
    of the cores where several sources share a GPU, and 0 on a CPU, whose cores the engine needs.
    decoders: processes in which NVDEC's files are decoded: at most one per file, 0 for none. None is one for
    four files where there are three or more, and at most a quarter of the cores. Live streams: one for eight
    where there are three or more; they are read there, too.
    decode: where videos are decoded, "auto", "cpu" or "gpu": see `open_source`.
    settings: fields of the tracker's config (`JdeConfig`, `ByteConfig`) to change.
    live: how to read sources that are live, and to publish what is seen there; None for a run of files.

    Raises ConfigError for values out of range.
    """

    sources: Sequence[str]
    engine: str
    tracker: str | None = None
    compat: str | None = None
    cost: str | None = None
    out: str | None = None
    save: Sequence[str] = ("mot",)
    device: str = "auto"
    classes: Sequence[str] = ()
    conf: float | None = None
    frontend: str | None = None
    max_frames: int | None = None
    workers: int | None = None
    decoders: int | None = None
    decode: Decode = "auto"
    settings: Mapping[str, Any] = field(default_factory=dict)
    live: LiveOptions | None = None

    def __post_init__(self) -> None:
        if not self.sources and self.live is None:
            raise ConfigError("no source given: name a video file, an image directory or a quoted glob")
        if self.conf is not None and not 0.0 < self.conf < 1.0:
            raise ConfigError(f"conf must lie between 0 and 1, got {self.conf}")
        if self.cost is not None and self.cost not in COSTS:
            raise ConfigError(f"cost is {self.cost!r}; it must be {' or '.join(COSTS)}")
        if self.compares_masks and self.workers:
            raise ConfigError(
                f"workers is {self.workers}, but cost mask works in the process that owns the masks alone: "
                "leave one of them out"
            )
        if self.max_frames is not None and self.max_frames < 1:
            raise ConfigError(f"max_frames must be at least 1, got {self.max_frames}")
        if self.decode not in get_args(Decode):
            raise ConfigError(f"decode is {self.decode!r}; it must be {', '.join(get_args(Decode))}")
        if self.workers is not None and self.workers < 0:
            raise ConfigError(f"workers must be 0 or more, got {self.workers}")
        if self.decoders is not None and self.decoders < 0:
            raise ConfigError(f"decoders must be 0 or more, got {self.decoders}")

    @property
    def compares_masks(self) -> bool:
        """Whether association looks at masks."""
        return bool(self.settings.get("cost", self.cost) == "mask")

    def tracker_settings(self, tracker: str) -> dict[str, Any]:
        """`settings` with conf and cost spelled out for that tracker; what was set by name wins."""
        settings = dict(self.settings)
        if self.cost is not None:
            settings.setdefault("cost", self.cost)
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
    "decoders": (int, "a whole number"),
    "settings": (Mapping, "a table"),
    "live": (bool, "true or false"),
    "realtime": (bool, "true or false"),
    "loop": (bool, "true or false"),
    "verify_tls": (bool, "true or false"),
    "silence_seconds": ((float, int), "a number of seconds"),
    "max_reconnects": (int, "a whole number"),
    "max_wait_ms": ((float, int), "a number of milliseconds"),
    "max_batch": (int, "a whole number"),
    "publish": ((list, tuple), "a list of addresses"),
}


def options_from(values: Mapping[str, Any]) -> Options:
    """Options by name, from a command line, a file or a caller; those of `LiveOptions` stand among them.

    A run is live if a source is, or if it says "live" or "realtime".
    Raises ConfigError for a name that does not exist, one that is missing, or a value of the wrong kind.
    """
    of_live = {each.name for each in fields(LiveOptions)}
    known = [each.name for each in (*fields(Options), *fields(LiveOptions))]
    for name, value in values.items():
        if name not in known:
            raise ConfigError(f"there is no option {name!r}: there is {', '.join(known)}")
        kind, words = _KINDS.get(name, (str, "text"))
        if value is not None and (
            not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        ):
            raise ConfigError(f"option {name} must be {words}, got {redacted(repr(value))}")
    if "engine" not in values:
        raise ConfigError("no engine given: name one with --engine, such as --engine yolox_nano.onnx")
    live_values = {name: value for name, value in values.items() if name in of_live}
    others = {name: value for name, value in values.items() if name not in of_live}
    is_live = bool(others.pop("live", False)) or bool(live_values.get("realtime"))
    if not is_live and not any(scheme_of(source) in LIVE_SCHEMES for source in others.get("sources", ())):
        if live_values:
            name = next(iter(live_values)).replace("_", "-")
            raise ConfigError(
                f"--{name} is for live sources: leave it out, or add --realtime to replay files"
            )
        return Options(**others)
    others.setdefault("sources", ())
    return Options(**others, live=LiveOptions(**live_values))


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

    @property
    def error(self) -> TrackerError | None:
        """What ended it too early."""
        return self.feed.error


class Run:
    """What every run has: a front end, a crew, a directory for results, and times."""

    frontend: Frontend
    manifest: Manifest
    directory: Path | None
    tracker: str

    def __init__(self, options: Options) -> None:
        self.options = options
        self.wall_seconds = self._write_seconds = 0.0
        self._stack = ExitStack()

    def __exit__(self, *exc: Any) -> None:
        self._stack.__exit__(*exc)

    @property
    def tracked_frames(self) -> int:
        raise NotImplementedError

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
        stages = [Stage("decode", self._decode_seconds(), frames)]
        stages += [Stage(name, seconds, frames) for name, seconds in self.frontend.seconds.items()]
        stages.append(Stage("associate", self._crew.associate_seconds, frames))
        if self.directory is not None:
            stages.append(Stage("write", self._crew.format_seconds + self._write_seconds, frames))
        return stages

    _crew: LocalCrew | ProcessCrew

    def _decode_seconds(self) -> float:
        raise NotImplementedError

    def _open_frontend(self, stack: ExitStack) -> None:
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
        check_kinds(options.save, masks=self.frontend.masks)
        if options.compares_masks and not self.frontend.masks:
            raise ConfigError(
                "cost mask needs masks, and this engine finds boxes alone: leave it out, or use one that "
                "finds masks, such as a Mask R-CNN or SOLOv2"
            )
        self.tracker = options.tracker or ("jde" if self.frontend.embeds else "byte")
        self._transfers_before = replace(self.frontend.transfers)

    def _gpu(self) -> torch.device | None:
        """Where frames are wanted, if not on the host."""
        wanted = self.frontend.frames_on
        return wanted if wanted.type == "cuda" else None

    def _association(self, frame_rate: float, **defaults: Any) -> Callable[[], Association]:
        """Starts one. defaults: settings, where the options do not say otherwise."""
        fitted = {} if self.options.compat else self.manifest.thresholds(self.tracker)
        return partial(
            make_association,
            self.tracker,
            compat=self.options.compat,
            frame_rate=frame_rate,
            names=self.frontend.names,
            settings={**defaults, **fitted, **self.options.tracker_settings(self.tracker)},
        )

    def _worker_count(self, streams: int) -> int:
        if self.options.compares_masks:
            return 0
        if self.options.workers is not None:
            return min(self.options.workers, streams)
        if self.frontend.device.type == "cpu" or streams == 1:
            return 0
        return min(max(1, usable_cores() // CORES_PER_WORKER), streams)

    def _output_directory(self, name: str) -> Path:
        if self.options.out is not None:
            return Path(self.options.out)
        directory, number = Path("runs") / name, 1
        while directory.exists():
            number += 1
            directory = Path("runs") / f"{name}-{number}"
        return directory

    def engine_words(self) -> dict[str, Any]:
        """The engine, for summaries."""
        return {
            "path": self.options.engine,
            "sha256": self.manifest.engine_sha256,
            "frontend": self.manifest.frontend,
            "precision": self.manifest.precision,
            "problem": self.frontend.problem,
        }

    def tracker_words(self, config: Any) -> dict[str, Any]:
        return {"name": self.tracker, "compat": self.options.compat, **asdict(config)}


class Session(Run):
    """Enter to open everything, iterate once for (frame, tracks), leave to close everything.

    Results are written before a frame is yielded. Left before the end or by an exception, results stay
    marked partial. Raises TrackerError on entering before any frame is read, and SinkError as soon as a
    result cannot be written; a source that breaks half-way ends alone, with `feed.error` set.
    """

    streams: list[Stream]
    _finished = False

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            options = self.options
            self._open_frontend(stack)
            gpu = self._gpu()
            opened = [
                open_source(spec, source=index, gpu=gpu, decode=options.decode)
                for index, spec in enumerate(options.sources)
            ]
            self.decoders, self.decoding_problem = self._decoder_count(opened)
            sources = stack.enter_context(Decoders(opened, self.decoders)).sources
            for source in sources:
                stack.enter_context(source)
            stems = _distinct([source.name for source in sources])
            self.directory = self._output_directory(stems[0]) if options.save else None
            self.streams = []
            stack.push(self._close_results)
            duties = []
            for spec, source, stem in zip(options.sources, sources, stems, strict=True):
                associate = self._association(source.frame_rate)
                feed = (
                    ReadyFeed(source, max_frames=options.max_frames)
                    if isinstance(source, RemoteFile)
                    else Feed(source, max_frames=options.max_frames)
                )
                stream = Stream(spec=spec, stem=stem, feed=feed, config=associate().config, sinks=[])
                self.streams.append(stream)
                if self.directory is not None:
                    stream.sinks = open_sinks(
                        options.save, self.directory, stem, frame_rate=source.frame_rate
                    )
                lines_of = tuple(sink.lines_of for sink in stream.sinks if isinstance(sink, LineSink))
                masks = self.frontend.masks
                duties.append(Duty(name=stem, associate=associate, lines_of=lines_of, masks=masks))
            self.workers = self._worker_count(len(self.streams))
            if self.workers:
                self._crew = stack.enter_context(ProcessCrew(duties, self.workers))
            else:
                self._crew = LocalCrew(duties)
            for stream in self.streams:
                stack.enter_context(stream.feed)
            self._stack = stack.pop_all()
        return self

    def __iter__(self) -> Iterator[tuple[Frame, Tracks]]:
        begun = perf_counter()
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

    def _decoder_count(self, sources: Sequence[Source]) -> tuple[int, str | None]:
        """Processes to decode in, and why there are none where they would pay."""
        files = [source for source in sources if isinstance(source, NvdecFile)]
        if self.options.decoders is not None:
            return min(self.options.decoders, len(files)), None
        wanted = processes_for(len(files), usable_cores())
        problem = sharing_problem(files[0].device) if wanted else None
        return (0, problem) if problem else (wanted, None)

    def _decode_seconds(self) -> float:
        return sum(stream.feed.seconds for stream in self.streams)

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
        error = stream.feed.error
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
            decoders=self.decoders,
            device=str(self.frontend.device),
            batches=self.pipeline.batches,
            transfers=self.transfers,
            all_frames=self.tracked_frames,
            engine=self.engine_words(),
            tracker=self.tracker_words(stream.config),
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
