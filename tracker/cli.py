"""The command `track`: arguments and a TOML file become options, a run becomes lines for people.

Exit codes: 0 done; 1 an error, or frames lost on the way (results kept); 2 wrong usage; 130 interrupted,
with the results of the finished frames complete on disk.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import tomllib
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from tracker.errors import ConfigError, TrackerError

if TYPE_CHECKING:
    from tracker.progress import Progress
    from tracker.session import Session, Stream


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    arguments = vars(_parser().parse_args(argv))
    debug, quiet, config = (arguments.pop(name) for name in ("debug", "quiet", "config"))
    try:
        with _terminable():
            return _track({**_read_config(config), **arguments}, quiet=quiet)
    except TrackerError as error:
        if debug:
            raise
        print(f"track: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("track: interrupted; what was finished is in the .partial files", file=sys.stderr)
        return 130


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
    option("sources", nargs="+", metavar="SOURCE", help="video file, image directory or quoted glob")
    option("--engine", help="an .onnx, .engine (TensorRT) or .pt2 (torch) file, with its manifest beside it")
    option("--tracker", choices=("jde", "byte"), help="default: jde if the engine embeds, else byte")
    option("--compat", choices=("fairmot", "bytetrack"), help="do exactly as that published tracker")
    option("--out", metavar="DIR", help="directory for results (default: runs/<name>)")
    option("--save", metavar="LIST", type=_names, help="of mot,jsonl,video (default: mot)")
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
    for name in ("save", "classes"):
        if isinstance(options.get(name), str):
            options[name] = _names(options[name])
    return options


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does: results closed, threads joined."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _track(arguments: dict[str, Any], *, quiet: bool) -> int:
    # Torch, OpenCV and the engine's runtime load here: `track --help` and typing errors stay quick.
    from tracker.progress import Progress
    from tracker.session import Session, options_from

    with contextlib.ExitStack() as stack:
        session = stack.enter_context(Session(options_from(arguments)))
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
    for stream in session.streams:
        decoder = stream.feed.source.decoder
        if frontend.frames_on.type == "cuda" and decoder.startswith("CPU, because"):
            yield f"{stream.stem} was decoded on the {decoder}"


def _close(session: Session) -> None:
    """The closing table, and where the results are."""
    from rich.console import Console

    from tracker.progress import stage_table

    console = Console(stderr=True)
    rows = [(stage.name, stage.seconds, stage.frames) for stage in session.stages()]
    console.print(stage_table(rows, session.wall_seconds))
    tracks = sum(stream.tracks for stream in session.streams)
    frames, seconds = session.tracked_frames, session.wall_seconds
    rate = frames / seconds if seconds > 0 else 0.0
    where = "" if session.directory is None else f"; results in {session.directory}"
    console.print(
        f"{frames} frames, {tracks} tracks, {seconds:.1f} s, {rate:.1f} fps{_transfers(session)}{where}",
        highlight=False,
        soft_wrap=True,
    )


def _transfers(session: Session) -> str:
    """How often the GPU was waited for, and what came from it; nothing to tell on a CPU."""
    if session.frontend.device.type == "cpu":
        return ""
    moved, frames = session.transfers, max(1, session.tracked_frames)
    return (
        f"; per frame {moved.waits / frames:.3g} waits, {moved.copies / frames:.3g} copies and "
        f"{moved.bytes / frames / 1000:.1f} kB from {session.frontend.device}"
    )
