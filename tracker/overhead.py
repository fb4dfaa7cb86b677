"""What a run costs beyond the detector itself: `track` against the bare engine, in turns.

The engine alone answers as many inputs as the video has frames, with nothing else going on: once one after
another on all cores, as a plain loop would, and once side by side in as many lanes as the run uses. The run
decodes, prepares, detects, associates and writes. All are wall time.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
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
    """Seconds of wall time for the same frames.

    loop_seconds: the engine alone, one run after another. lanes_seconds: side by side. stages: how long each
    was busy, over all threads, in ms per frame.
    """

    frames: int
    run_seconds: float
    loop_seconds: float
    lanes_seconds: float
    stages: dict[str, float]

    @property
    def over_loop(self) -> float:
        """Of the run's wall time, what the plain loop would not have taken; below 0: the run was faster."""
        return 1 - self.loop_seconds / self.run_seconds

    @property
    def over_lanes(self) -> float:
        """Of the run's wall time, what the engine in the run's own lanes would not have taken."""
        return 1 - self.lanes_seconds / self.run_seconds


def measure(options: Options, *, repeats: int) -> list[Overhead]:
    """The run and the engine alone, in turns. The engine needs a manifest."""
    found = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as out, Session(replace(options, out=out)) as session:
            for _ in session:
                pass
            frames, seconds = session.tracked_frames, session.wall_seconds
            stages = {stage.name: 1000 * stage.seconds / max(1, frames) for stage in session.stages()}
        engine, device = Path(options.engine), options.device
        loop, lanes = OnnxRuntime(engine, device=device, lanes=1), OnnxRuntime(engine, device=device)
        found.append(
            Overhead(
                frames=frames,
                run_seconds=seconds,
                loop_seconds=_engine_alone(engine, loop, frames),
                lanes_seconds=_engine_alone(engine, lanes, frames),
                stages=stages,
            )
        )
    return found


def table(laps: list[Overhead]) -> str:
    """A line per turn, then the median shares."""
    lines = ["turn  frames  track s  loop s  overhead  lanes s  overhead  busy ms per frame"]
    for number, lap in enumerate(laps, 1):
        busy = ", ".join(f"{name} {ms:.2f}" for name, ms in lap.stages.items())
        lines.append(
            f"{number:4}  {lap.frames:6}  {lap.run_seconds:7.2f}  {lap.loop_seconds:6.2f}"
            f"  {lap.over_loop:8.1%}  {lap.lanes_seconds:7.2f}  {lap.over_lanes:8.1%}  {busy}"
        )
    lines.append("loop: the engine alone, one run after another; lanes: side by side, as track runs it")
    loop, lanes = median(lap.over_loop for lap in laps), median(lap.over_lanes for lap in laps)
    lines.append(f"median overhead: {loop:.1%} of wall time over the loop, {lanes:.1%} over the lanes")
    return "\n".join(lines)


def _engine_alone(engine: Path, runtime: OnnxRuntime, runs: int) -> float:
    """Seconds for that many runs, in the runtime's lanes."""
    spec = read(beside(engine)).input
    image = torch.rand(1, 3, spec.size[1], spec.size[0]) * 255

    def answer(_: int) -> None:
        runtime.run({spec.name: image})

    with ThreadPoolExecutor(runtime.lanes) as lanes:
        list(lanes.map(answer, range(WARM_UP * runtime.lanes)))
        begun = perf_counter()
        list(lanes.map(answer, range(runs)))
        return perf_counter() - begun
