"""What a run costs beyond its slowest part: `track` against its decoder and its engine alone, in turns.

The decoder alone reads the same sources and throws their frames away. The engine alone answers as many
inputs with nothing else going on: once one after another, as a plain loop would (on a CPU on all cores, on a
GPU as a CUDA graph back to back), and once in as many lanes as the run uses (on a GPU with preprocessing and
decoding, from frames that lie there). The run does all of it, associates and writes. All are wall time.
"""

from __future__ import annotations

import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from tracker import engine_times
from tracker.manifest import beside, read
from tracker.runtimes.onnx import OnnxRuntime
from tracker.session import Options, Session
from tracker.sources import open_source

# Runs of the engine before it is timed: ONNX Runtime settles its memory in the first ones.
WARM_UP = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """Seconds of wall time for the same frames.

    decoder_seconds: the sources alone. loop_seconds: the engine alone, one run after another. lanes_seconds:
    in the run's lanes. stages: how long each was busy, over all threads, in ms per frame.
    """

    frames: int
    run_seconds: float
    decoder_seconds: float
    loop_seconds: float
    lanes_seconds: float
    stages: dict[str, float]

    @property
    def over_loop(self) -> float:
        """Of the run's wall time, what the plain loop would not have taken; below 0: the run was faster."""
        return 1 - self.loop_seconds / self.run_seconds

    @property
    def of_slower(self) -> float:
        """The run's frame rate, as a share of what its slower part reaches alone: decoder or plain loop."""
        return max(self.decoder_seconds, self.loop_seconds) / self.run_seconds

    @property
    def over_lanes(self) -> float:
        """Of the run's wall time, what the engine in the run's own lanes would not have taken."""
        return 1 - self.lanes_seconds / self.run_seconds


def measure(options: Options, *, repeats: int) -> list[Overhead]:
    """The run, its decoder alone and its engine alone, in turns. The engine needs a manifest."""
    found = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as out, Session(replace(options, out=out)) as session:
            for _ in session:
                pass
            frames, seconds = session.tracked_frames, session.wall_seconds
            stages = {stage.name: 1000 * stage.seconds / max(1, frames) for stage in session.stages()}
            place, size = session.frontend.frames_on, session.streams[0].feed.source.size
        decoder = _decoder_alone(options, place)
        loop, lanes = _engine_alone(Path(options.engine), place, options.device, size, frames)
        found.append(
            Overhead(
                frames=frames,
                run_seconds=seconds,
                decoder_seconds=decoder,
                loop_seconds=loop,
                lanes_seconds=lanes,
                stages=stages,
            )
        )
    return found


def table(laps: list[Overhead]) -> str:
    """A line per turn, then the median shares."""
    lines = [
        "turn  frames  track s   fps  decoder s  loop s  of the slower  overhead  lanes s  overhead  "
        "busy ms per frame"
    ]
    for number, lap in enumerate(laps, 1):
        busy = ", ".join(f"{name} {ms:.2f}" for name, ms in lap.stages.items())
        lines.append(
            f"{number:4}  {lap.frames:6}  {lap.run_seconds:7.2f}  {lap.frames / lap.run_seconds:4.0f}"
            f"  {lap.decoder_seconds:9.2f}  {lap.loop_seconds:6.2f}  {lap.of_slower:13.1%}"
            f"  {lap.over_loop:8.1%}  {lap.lanes_seconds:7.2f}  {lap.over_lanes:8.1%}  {busy}"
        )
    lines.append("loop: the engine alone, one run after another; lanes: side by side, as track runs it")
    slower = median(lap.of_slower for lap in laps)
    loop, lanes = median(lap.over_loop for lap in laps), median(lap.over_lanes for lap in laps)
    lines.append(
        f"median: {slower:.1%} of the frame rate of the slower of decoder and loop; overhead {loop:.1%} of "
        f"wall time over the loop, {lanes:.1%} over the lanes"
    )
    return "\n".join(lines)


def _decoder_alone(options: Options, place: torch.device) -> float:
    """Seconds for all sources at once, a thread each."""
    gpu = place if place.type == "cuda" else None

    def read(spec: str) -> None:
        with open_source(spec, gpu=gpu, decode=options.decode) as source:
            for _ in islice(source, options.max_frames):
                pass

    with ThreadPoolExecutor(len(options.sources)) as threads:
        begun = perf_counter()
        list(threads.map(read, options.sources))
        return perf_counter() - begun


def _engine_alone(
    engine: Path, place: torch.device, device: str, size: tuple[int, int], frames: int
) -> tuple[float, float]:
    """Seconds for that many frames: in a plain loop, and in lanes."""
    if place.type == "cuda":
        times = max(
            engine_times.measure(
                engine, batches=(1, 2, 4, 8, 16, 32), device=device, source_size=size, repeats=50
            ),
            key=lambda times: times.batch,
        )
        return frames * times.stages["inference"] / 1000 / times.batch, frames / times.lanes_fps
    loop, lanes = OnnxRuntime(engine, device=device, lanes=1), OnnxRuntime(engine, device=device)
    return _seconds(engine, loop, frames), _seconds(engine, lanes, frames)


def _seconds(engine: Path, runtime: OnnxRuntime, runs: int) -> float:
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
