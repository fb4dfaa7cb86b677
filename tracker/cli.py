"""The command `track`: arguments and a TOML file become options, a run becomes lines for people.

Exit codes: 0 done; 1 an error, or frames lost on the way (results kept); 2 wrong usage; 130 interrupted,
with the results of the finished frames complete on disk. A run of live sources ends by interrupting it; its
results are then whole. A second signal ends the process at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import tomllib
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from tracker.addresses import redacted
from tracker.errors import ConfigError, DeviceError, TrackerError

if TYPE_CHECKING:
    from tracker.live import LiveSession
    from tracker.progress import Progress
    from tracker.serve.options import ServeOptions
    from tracker.session import Session, Stream

# After the first signal a live run has this long to close its files; then the process ends as it is.
SHUTDOWN_SECONDS = 4.5
INTERRUPTED = 130
_ELSEWHERE = {"source_env", "source_file", "serve"}  # options that name sources, or let others name them


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    if argv is None:
        _hide_passwords(sys.argv)
    parser = _parser()
    arguments = vars(parser.parse_args(argv))
    if not arguments.get("sources") and not _ELSEWHERE & arguments.keys() and arguments["config"] is None:
        parser.error("the following arguments are required: SOURCE")
    debug, quiet, config = (arguments.pop(name) for name in ("debug", "quiet", "config"))
    try:
        with _Signals() as signals:
            return _track(_with_secrets({**_read_config(config), **arguments}), signals, quiet=quiet)
    except TrackerError as error:
        if debug:
            raise
        print(f"track: {redacted(error)}", file=sys.stderr)
        if isinstance(error, DeviceError):
            _leave(1)
        return 1
    except KeyboardInterrupt:
        print("track: interrupted; what was finished is in the .partial files", file=sys.stderr)
        return INTERRUPTED


def _leave(code: int) -> NoReturn:
    """End at once: torch aborts the process when it gives back memory of a GPU that has failed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _parser() -> argparse.ArgumentParser:
    # What is not given stays absent, so that it can come from --config; defaults live in session.Options.
    parser = argparse.ArgumentParser(
        prog="track",
        description="Track objects through videos and image sequences.",
        epilog="Every option may also stand in the file of --config, by its long name; a table [settings] "
        "there changes the tracker's own settings, which docs/settings.md explains.",
        argument_default=argparse.SUPPRESS,
    )
    option = parser.add_argument
    option(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="video file, image directory, quoted glob, or a live rtsp://…, http://… (MJPEG) or webcam:N",
    )
    option("--engine", help="an .onnx, .engine (TensorRT) or .pt2 (torch) file, with its manifest beside it")
    option("--tracker", choices=("jde", "byte"), help="default: jde if the engine embeds, else byte")
    option("--compat", choices=("fairmot", "bytetrack"), help="do exactly as that published tracker")
    option(
        "--cost", choices=("box", "mask"), help="mask: where objects touch, compare masks too (default: box)"
    )
    option("--out", metavar="DIR", help="directory for results (default: runs/<name>)")
    option("--save", metavar="LIST", type=_names, help="of mot,jsonl,dota,mots,video (default: mot)")
    option("--device", help="auto, cpu or cuda:N (default: auto)")
    option("--classes", metavar="LIST", type=_names, help="classes to track, such as person,car")
    option("--conf", type=float, metavar="F", help="detections above it are confident")
    option("--frontend", metavar="NAME", help="what the engine is, where it has no manifest")
    option("--max-frames", type=int, metavar="N", help="of each source")
    option(
        "--decode",
        choices=("auto", "cpu", "gpu"),
        help="where videos are decoded (default: auto, by NVDEC if frames are wanted on a GPU)",
    )
    option(
        "--workers",
        type=int,
        metavar="N",
        help="processes that associate, 0 for none (default: as cores allow, if several sources share a GPU)",
    )
    option(
        "--decoders",
        type=int,
        metavar="N",
        help="processes in which NVDEC decodes, 0 for none (default, from three sources on: one per four "
        "files or eight live streams)",
    )
    live = parser.add_argument_group("live sources").add_argument
    live("--live", action="store_true", help="sources are live (implied by rtsp://… and the like)")
    live("--realtime", action="store_true", help="replay files at their own pace, as if they were live")
    live("--loop", action="store_true", help="replay them for ever")
    live(
        "--source-env",
        metavar="NAME",
        action="append",
        help="an environment variable that holds one more source; keeps its password out of sight",
    )
    live("--source-file", metavar="FILE", type=Path, help="a file with more sources, one per line")
    live("--rtsp-transport", choices=("tcp", "udp"), help="default: tcp; udp loses pictures with packets")
    live("--silence-seconds", type=float, metavar="S", help="silence that is a fault (default: 2.5)")
    live("--max-reconnects", type=int, metavar="N", help="attempts in a row (default: for ever)")
    live("--verify-tls", action="store_true", help="refuse servers without a good certificate")
    live("--max-wait-ms", type=float, metavar="MS", help="a batch waits so long for others (default: 8)")
    live(
        "--max-batch",
        type=int,
        metavar="N",
        help="frames at once (default: the engine's; if open, on a CPU 1)",
    )
    live("--rotate", metavar="LIST", help="when to begin new files (default: 1d,256MB), or never")
    live(
        "--publish",
        metavar="WHERE",
        action="append",
        help="stdout, mqtt://broker/topic, or rtsp://server/path for annotated video; may be repeated",
    )
    live("--publish-env", metavar="NAME", action="append", help="as --source-env, for --publish")
    live("--serve", metavar="HOST:PORT", help="a page to watch and an API there, such as 127.0.0.1:8080")
    live(
        "--serve-token-env",
        metavar="NAME",
        help="an environment variable that holds the page's token (default: TRACK_TOKEN, if set)",
    )
    live(
        "--serve-allow-local",
        action="store_true",
        help="let cameras be added through the API that are on this machine or on link-local addresses",
    )
    option("--config", metavar="FILE", type=Path, default=None, help="TOML file with any of these options")
    option("--quiet", action="store_true", default=False, help="print nothing but warnings and errors")
    option("--debug", action="store_true", default=False, help="show the traceback of an error")
    option("--version", action="version", version=f"track {version('tracker')}")
    return parser


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _read_config(path: Path | None) -> dict[str, Any]:
    """Options from a TOML file, named as on the command line."""
    if path is None:
        return {}
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read --config {path}: {error}") from error
    options = {name.replace("-", "_"): value for name, value in table.items()}
    for name in ("save", "classes", "publish"):
        if isinstance(options.get(name), str):
            options[name] = _names(options[name])
    for name in ("source_env", "publish_env", "sources"):
        if isinstance(options.get(name), str):
            options[name] = [options[name]]
    return options


def _hide_passwords(argv: list[str]) -> None:
    """Start over with addresses that hold a password in the environment, which only their owner can read.

    The command line of a process is for everybody on the machine to see.
    """
    if not any("://" in argument and redacted(argument) != argument for argument in argv[1:]):
        return
    environment = dict(os.environ)
    command = sys.orig_argv[: len(sys.orig_argv) - len(argv) + 1]
    for number, argument in enumerate(argv[1:]):
        option, _, address = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        if "://" not in address or redacted(address) == address:
            command.append(argument)
            continue
        environment[name := f"TRACK_ADDRESS_{number}"] = address
        if command[-1] == "--publish":
            option = command.pop()
        command.append(f"--{'publish' if option == '--publish' else 'source'}-env={name}")
    os.execve(sys.executable, command, environment)


def _with_secrets(options: dict[str, Any]) -> dict[str, Any]:
    """Options with the sources and addresses that stand elsewhere, in order after the others.

    Raises ConfigError for a variable or file that is not there.
    """
    for kept, into in (("source_env", "sources"), ("publish_env", "publish")):
        for name in options.pop(kept, None) or ():
            if not os.environ.get(name):
                raise ConfigError(f"the environment variable {name} is not set: it should hold an address")
            options[into] = [*(options.get(into) or ()), os.environ[name]]
    if (path := options.pop("source_file", None)) is not None:
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot read --source-file {path}: {error}") from error
        more = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        options["sources"] = [*(options.get("sources") or ()), *more]
    return options


class _Signals:
    """SIGINT and SIGTERM end the run in order: results closed, threads joined. A second one ends the process.

    In a run of files the first raises KeyboardInterrupt; a live one is told to stop, and gets
    SHUTDOWN_SECONDS.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._session: LiveSession | None = None

    def __enter__(self) -> _Signals:
        self._before = {
            number: signal.signal(number, self._interrupt) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def stops(self, session: LiveSession) -> None:
        """From now on a signal stops this session."""
        self._session = session

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.interrupted:
            os._exit(INTERRUPTED)
        self.interrupted = True
        if self._session is None:
            raise KeyboardInterrupt
        self._session.stop()
        end = threading.Timer(SHUTDOWN_SECONDS, os._exit, (INTERRUPTED,))
        end.daemon = True
        end.start()


def _track(arguments: dict[str, Any], signals: _Signals, *, quiet: bool) -> int:
    # Torch, OpenCV and the engine's runtime load here: `track --help` and typing errors stay quick.
    from tracker.live import LiveSession
    from tracker.serve.options import take_options
    from tracker.session import Session, options_from

    serving = take_options(arguments)
    options = options_from(arguments if serving is None else {**arguments, "live": True})
    if serving is not None:
        run = LiveSession(options, stay=True, allow_local=serving.allow_local)
        return _watch(run, signals, quiet=quiet, serving=serving)
    if options.live is not None:
        return _watch(LiveSession(options), signals, quiet=quiet)
    return _track_files(Session(options), quiet=quiet)


def _track_files(run: Session, *, quiet: bool) -> int:
    from tracker.progress import Progress

    with contextlib.ExitStack() as stack:
        session = stack.enter_context(run)
        progress = stack.enter_context(Progress(session.declared_frames, quiet))
        for frame, tracks in session:
            progress.update(session.tracked_frames, len(tracks), session.streams[frame.source].stem)
        for stream in session.streams:
            _warn(stream, progress)
        for words in _detours(session):
            progress.warn(words)
        lossless = all(_is_whole(stream) for stream in session.streams)
    if not quiet:
        _close(session)
    return 0 if lossless else 1


def _watch(run: LiveSession, signals: _Signals, *, quiet: bool, serving: ServeOptions | None = None) -> int:
    """Track live sources until they are over or somebody says stop."""
    from tracker.progress import Progress
    from tracker.serve.server import Server

    with contextlib.ExitStack() as stack:
        server = None if serving is None else stack.enter_context(Server(serving))
        progress = stack.enter_context(Progress(None, quiet))
        run.tell = progress.warn
        session = stack.enter_context(run)
        signals.stops(session)
        if server is not None:
            stack.enter_context(server.shown(session))
            if not quiet:
                print(f"track: the page is at {server.url}", file=sys.stderr, flush=True)
        for frame, tracks in session:
            stream = session.streams.numbered(frame.source)
            progress.update(session.tracked_frames, len(tracks), "" if stream is None else stream.name)
        failed = [stream.error for stream in session.streams.all() if stream.error is not None]
    if not quiet:
        _close(session)
    if signals.interrupted:
        return INTERRUPTED
    if failed:
        raise failed[0]
    return 0


def _is_whole(stream: Stream) -> bool:
    return stream.feed.error is None and stream.feed.source.counts.lost == 0


def _warn(stream: Stream, progress: Progress) -> None:
    """Say what of this source is not in the results, and why."""
    counts, error = stream.feed.source.counts, stream.feed.error
    if error is not None:
        progress.warn(f"{stream.stem}: {error}; its results end with frame {stream.tracked_frames}")
    elif counts.lost:
        promised = "" if counts.declared is None else f"{counts.declared} frames declared, "
        progress.warn(
            f"{stream.stem}: {promised}{counts.decoded} good, {counts.corrupt} corrupt, "
            f"{counts.missing} missing: the source is damaged or truncated; results cover the good frames"
        )


def _detours(session: Session) -> Iterator[str]:
    """What was not done where it should be: no run is slower in silence."""
    frontend = session.frontend
    if frontend.problem is not None:
        yield f"{session.options.engine} ran {frontend.problem}"
    if session.decoding_problem is not None:
        yield f"videos were decoded in the main process, because {session.decoding_problem}"
    for stream in session.streams:
        decoder = stream.feed.source.decoder
        if frontend.frames_on.type == "cuda" and decoder.startswith("CPU, because"):
            yield f"{stream.stem} was decoded on the {decoder}"


def _close(session: Session | LiveSession) -> None:
    """The closing table, and where the results are."""
    from rich.console import Console

    from tracker.live import LiveSession
    from tracker.progress import stage_table

    console = Console(stderr=True)
    rows = [(stage.name, stage.seconds, stage.frames) for stage in session.stages()]
    console.print(stage_table(rows, session.wall_seconds))
    streams = session.streams.all() if isinstance(session, LiveSession) else session.streams
    tracks = sum(stream.tracks for stream in streams)
    frames, seconds = session.tracked_frames, session.wall_seconds
    rate = frames / seconds if seconds > 0 else 0.0
    where = "" if session.directory is None else f"; results in {session.directory}"
    age = ""
    if isinstance(session, LiveSession):
        ages = session.ages.quantiles()
        age = f"; age of frames p50 {ages.p50:.0f}, p95 {ages.p95:.0f}, p99 {ages.p99:.0f} ms"
    console.print(
        f"{frames} frames, {tracks} tracks, {seconds:.1f} s, {rate:.1f} fps{age}{_transfers(session)}{where}",
        highlight=False,
        soft_wrap=True,
    )


def _transfers(session: Session | LiveSession) -> str:
    """How often the GPU was waited for, and what came from it; nothing to tell on a CPU."""
    if session.frontend.device.type == "cpu":
        return ""
    moved, frames = session.transfers, max(1, session.tracked_frames)
    return (
        f"; per frame {moved.waits / frames:.3g} waits, {moved.copies / frames:.3g} copies and "
        f"{moved.bytes / frames / 1000:.1f} kB from {session.frontend.device}"
    )
