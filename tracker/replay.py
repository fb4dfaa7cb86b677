"""Association alone: detections from a file in, tracks as MOT text out. No video, no engine.

So the same detections can be tracked with other settings in seconds, and the answers compared with those
of other trackers. Knows nothing of ground truth.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tracker.association import make_association
from tracker.errors import ConfigError
from tracker.motchallenge import SeqInfo, read_detections
from tracker.sinks.mot import format_rows
from tracker.sinks.output import PartialFile
from tracker.types import Detections

# The rate at which both published trackers count their buffers, and that of most MOTChallenge sequences.
DEFAULT_FRAME_RATE = 30.0

_TRACKER_OF = {"fairmot": "jde", "bytetrack": "byte"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """What a replay did. tracks: distinct ids written. seconds: spent associating; files not counted."""

    tracker: str
    frame_rate: float
    frames: int
    tracks: int
    rows: int
    seconds: float

    @property
    def ms_per_frame(self) -> float:
        return 1e3 * self.seconds / max(self.frames, 1)


def replay(
    detections: Path,
    out: Path,
    *,
    tracker: str | None = None,
    compat: str | None = None,
    seqinfo: SeqInfo | None = None,
    frame_rate: float | None = None,
    embedding_dim: int | None = None,
    first_frame: int = 1,
    last_frame: int | None = None,
) -> Replay:
    """Track the detections of a MOT text or .npy file and write MOT rows to `out`.

    tracker: "jde" or "byte"; by default the one that compat is about, else jde if there are embeddings.
    compat: "fairmot" or "bytetrack" for the published tracker. FairMOT's writer puts 1 for every
        confidence, and so is done here.
    seqinfo: the sequence's frame rate and length. frame_rate: instead of seqinfo's; without either, 30.
    embedding_dim: see `read_detections`.
    first_frame, last_frame: track only these frames of the file, numbered from 1 again. By default all.

    The rows carry a partial name until they are whole (see `tracker.sinks.output`).
    Raises ConfigError for options that contradict each other or the file, and what reading and writing
    raise.
    """
    if out.resolve() == detections.resolve():
        raise ConfigError(f"{out} holds the detections: write the tracks to another file")
    frames = _frames(detections, embedding_dim, seqinfo, first_frame, last_frame)
    if tracker is None:
        embeds = any(found.embedding is not None for found in frames[:1])
        tracker = _TRACKER_OF.get(compat or "", "jde" if embeds else "byte")
    if frame_rate is None:
        frame_rate = seqinfo.frame_rate if seqinfo else DEFAULT_FRAME_RATE
    association = make_association(tracker, compat=compat, frame_rate=frame_rate)

    ids: set[int] = set()
    rows, seconds, complete = 0, 0.0, False
    file = PartialFile(out.parent, out.stem, out.suffix)
    try:
        for number, found in enumerate(frames, start=1):
            started = time.perf_counter()
            tracks = association.update(number, found)
            seconds += time.perf_counter() - started
            if compat == "fairmot":
                tracks = replace(tracks, score=np.ones(len(tracks)))
            with file.step():
                file.write(format_rows(number, tracks).encode())
            ids.update(tracks.id.tolist())
            rows += len(tracks)
        complete = True
    finally:
        file.close(complete=complete)
    return Replay(
        tracker=tracker,
        frame_rate=frame_rate,
        frames=len(frames),
        tracks=len(ids),
        rows=rows,
        seconds=seconds,
    )


def _frames(
    path: Path, embedding_dim: int | None, seqinfo: SeqInfo | None, first: int, last: int | None
) -> list[Detections]:
    """The detections of the chosen frames, in order."""
    length = seqinfo.length if seqinfo else 0
    everything = read_detections(path, embedding_dim=embedding_dim, last_frame=last or length)
    numbered = [(n, found) for n, found in everything if first <= n <= (last or n)]
    if seqinfo and len(numbered) > length:
        raise ConfigError(
            f"{path} has detections up to frame {numbered[-1][0]} but {seqinfo.name} has {length} frames: "
            f"choose as many, for its last part with --frames {numbered[-1][0] - length + 1}:"
        )
    if not numbered and first > 1:
        raise ConfigError(f"{path} ends before frame {first}: there is nothing to track")
    return [found for _, found in numbered]
