"""Sinks: where tracks are kept. MOTChallenge, MOTS and DOTA-style text, JSON lines, annotated video.

Every sink writes one source's results under a partial name, and gives the file its final name when it is
closed as complete; see `output`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from tracker.errors import ConfigError
from tracker.sinks.dota import DotaSink
from tracker.sinks.jsonl import JsonlSink
from tracker.sinks.mot import MotSink
from tracker.sinks.mots import MotsSink
from tracker.sinks.video import VideoSink
from tracker.types import Sink

__all__ = [
    "KINDS",
    "SUFFIXES",
    "DotaSink",
    "JsonlSink",
    "MotSink",
    "MotsSink",
    "VideoSink",
    "check_kinds",
    "open_sinks",
]

_OPENERS: dict[str, Callable[[Path, str, float], Sink]] = {
    "mot": lambda directory, stem, frame_rate: MotSink(directory, stem),
    "jsonl": lambda directory, stem, frame_rate: JsonlSink(directory, stem),
    "dota": lambda directory, stem, frame_rate: DotaSink(directory, stem),
    "mots": lambda directory, stem, frame_rate: MotsSink(directory, stem),
    "video": lambda directory, stem, frame_rate: VideoSink(directory, stem, frame_rate=frame_rate),
}
KINDS = tuple(_OPENERS)
SUFFIXES = {"mot": ".txt", "jsonl": ".jsonl", "dota": ".dota.txt", "mots": ".mots.txt", "video": ".mp4"}


def check_kinds(kinds: Sequence[str], *, masks: bool) -> None:
    """Raise ConfigError for an unknown kind, and for one of masks where the network finds none.

    masks: whether it finds any.
    """
    for kind in kinds:
        if kind not in _OPENERS:
            raise ConfigError(f"cannot save {kind!r}: choose among {', '.join(KINDS)}")
    if "mots" in kinds and not masks:
        others = ", ".join(kind for kind in KINDS if kind != "mots")
        raise ConfigError(
            f"cannot save 'mots': this engine finds boxes and no masks; save {others}, or use an engine that "
            "finds masks, such as a Mask R-CNN or SOLOv2"
        )


def open_sinks(kinds: Sequence[str], directory: Path, stem: str, *, frame_rate: float) -> list[Sink]:
    """One open sink per kind for `<directory>/<stem>.*`; all of them, or none.

    kinds: of KINDS; twice the same is the same as once. frame_rate: the source's nominal frames per second.
    Raises ConfigError for an unknown kind, before any file is touched, and SinkError where a file cannot
    be written.
    """
    check_kinds(kinds, masks=True)  # whether there are any is for those to ask who know the engine
    sinks: list[Sink] = []
    with ExitStack() as on_failure:
        for kind in dict.fromkeys(kinds):
            sink = _OPENERS[kind](directory, stem, frame_rate)
            on_failure.callback(sink.close, complete=False)
            sinks.append(sink)
        on_failure.pop_all()
    return sinks
