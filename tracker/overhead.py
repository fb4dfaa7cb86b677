"""What a run costs beyond the detector itself: `track` against the bare engine, in turns.

The engine alone answers as many inputs as the video has frames, one after another, with nothing else going
on; the run decodes, prepares, detects, associates and writes. Both are wall time.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from tracker.manifest import beside, read
from tracker.runtimes.onnx import OnnxRuntime
from tracker.session import Options, Session

# Runs of the engine before it is timed: ONNX Runtime settles its memory in the first ones.
WARM_UP = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """Seconds of wall time for the same frames. stages: how long each was busy, in ms per frame."""

    frames: int
    run_seconds: float
    engine_seconds: float
    stages: dict[str, float]

    @property
    def share(self) -> float:
        """Of the run's wall time, what the engine alone would not have taken."""
        return 1 - self.engine_seconds / self.run_seconds


def measure(options: Options, *, repeats: int) -> list[Overhead]:
    """The run and the engine alone, in turns. The engine needs a manifest."""
    found = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as out, Session(replace(options, out=out)) as session:
            for _ in session:
                pass
            frames, seconds = session.tracked_frames, session.wall_seconds
            stages = {stage.name: 1000 * stage.seconds / max(1, frames) for stage in session.stages()}
        alone = _engine_alone(Path(options.engine), options.device, frames)
        found.append(Overhead(frames=frames, run_seconds=seconds, engine_seconds=alone, stages=stages))
    return found


def table(laps: list[Overhead]) -> str:
    """A line per turn, then the median share."""
    lines = ["turn  frames  track s  engine alone s  overhead  busy ms per frame"]
    for number, lap in enumerate(laps, 1):
        busy = ", ".join(f"{name} {ms:.2f}" for name, ms in lap.stages.items())
        lines.append(
            f"{number:4}  {lap.frames:6}  {lap.run_seconds:7.2f}  {lap.engine_seconds:14.2f}"
            f"  {lap.share:8.1%}  {busy}"
        )
    lines.append(f"median overhead {median(lap.share for lap in laps):.1%} of wall time")
    return "\n".join(lines)


def _engine_alone(engine: Path, device: str, runs: int) -> float:
    spec = read(beside(engine)).input
    runtime = OnnxRuntime(engine, device=device)
    image = torch.rand(1, 3, spec.size[1], spec.size[0]) * 255
    for _ in range(WARM_UP):
        runtime.run({spec.name: image})
    begun = perf_counter()
    for _ in range(runs):
        runtime.run({spec.name: image})
    return perf_counter() - begun
