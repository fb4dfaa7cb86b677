"""What a run did, in numbers: `<stem>.summary.json` and the rows of the closing table."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from tracker.sinks.output import PartialFile
from tracker.types import FrameCounts, Transfers

_PACKAGES = ("tracker", "numpy", "scipy", "lap", "torch", "onnxruntime", "av", "opencv-python")


@dataclass(frozen=True, slots=True)
class Stage:
    """Time one stage was busy, and for how many frames. Stages overlap: they add up to more than the wall."""

    name: str
    seconds: float
    frames: int

    def to_json(self) -> dict[str, float]:
        per_frame = 1000 * self.seconds / max(1, self.frames)
        rate = self.frames / self.seconds if self.seconds > 0 else 0.0
        return {"ms_per_frame": round(per_frame, 3), "fps": round(rate, 1)}


@cache
def versions() -> dict[str, str]:
    """Of Python and of every package the results depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found


def write_summary(
    directory: Path,
    stem: str,
    *,
    source: str,
    complete: bool,
    error: str | None,
    decoder: str,
    counts: FrameCounts,
    tracked_frames: int,
    tracks: int,
    wall_seconds: float,
    stages: list[Stage],
    workers: int,
    decoders: int,
    device: str,
    batches: int,
    transfers: Transfers,
    all_frames: int,
    engine: Mapping[str, Any],
    tracker: Mapping[str, Any],
) -> Path:
    """Write `<stem>.summary.json`, under its partial name unless complete. Raises SinkError.

    wall_seconds, stages, workers, decoders, batches, transfers, all_frames: of the whole run, over all its
    sources.
    """
    summary = {
        "source": source,
        "complete": complete,
        "error": error,
        "decoder": decoder,
        "frames": {**asdict(counts), "tracked": tracked_frames},
        "tracks": tracks,
        "wall_seconds": round(wall_seconds, 3),
        "fps": round(tracked_frames / wall_seconds, 2) if wall_seconds > 0 else 0.0,
        "stages": {stage.name: stage.to_json() for stage in stages},
        "workers": workers,
        "decoders": decoders,
        "transfers": {
            "device": device,
            "batches": batches,
            **asdict(transfers),
            "per_frame": {
                name: round(count / max(1, all_frames), 4) for name, count in asdict(transfers).items()
            },
        },
        "engine": dict(engine),
        "tracker": dict(tracker),
        "versions": versions(),
    }
    return _write(directory, stem, summary, complete=complete)


def write_live_summary(
    directory: Path,
    stem: str,
    *,
    complete: bool,
    status: Mapping[str, Any],
    counts: FrameCounts,
    wall_seconds: float,
    stages: list[Stage],
    workers: int,
    decoders: int,
    ages_ms: Mapping[str, float],
    engine: Mapping[str, Any],
    tracker: Mapping[str, Any],
) -> Path:
    """Write `<stem>.summary.json` of a live stream, under its partial name unless complete. Raises SinkError.

    status: `streams.Status` as JSON. wall_seconds, stages, workers, decoders, ages_ms: of the whole run, over
    all its streams.
    """
    frames = {**asdict(counts), "tracked": status["frames"]["tracked"]}
    frames["dropped"] = sum(status["dropped"].values())
    summary = {
        "source": status["address"],
        "complete": complete,
        **{name: value for name, value in status.items() if name not in ("address", "frames")},
        "frames": frames,
        "wall_seconds": round(wall_seconds, 3),
        "run": {
            "age_ms": dict(ages_ms),
            "stages": {stage.name: stage.to_json() for stage in stages},
            "workers": workers,
            "decoders": decoders,
        },
        "engine": dict(engine),
        "tracker": dict(tracker),
        "versions": versions(),
    }
    return _write(directory, stem, summary, complete=complete)


def _write(directory: Path, stem: str, summary: Mapping[str, Any], *, complete: bool) -> Path:
    file = PartialFile(directory, stem, ".summary.json")
    try:
        with file.step():
            file.write((json.dumps(summary, indent=2, allow_nan=False) + "\n").encode())
    finally:
        file.close(complete=complete)
    return file.final if complete else file.partial
