"""How long an engine takes, batch by batch and stage by stage, as the front end runs it.

On a GPU every stage is captured in a CUDA graph of its own and replayed back to back, so that the clock (CUDA
events) sees the device and not the host. On a CPU stages run one after another under the host's clock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch

from tracker.engine import open_engine
from tracker.frontends.lanes import DeviceLane
from tracker.graphs import Graphs
from tracker.types import Frame, Image

ROUNDS = 5  # of `repeats` runs each; the table has the median of the rounds


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """One engine at one batch size.

    stages: ms per batch of preprocess, inference, postprocess and all of them as one. latency_ms: from frames
    to detections, host included, one batch at a time. lanes_fps: frames per second with all lanes at work,
    host included. memory_mib: of the device, that opening and running took. problem: what makes it slower
    than it should be, None where nothing does.
    """

    engine: str
    batch: int
    stages: dict[str, float]
    latency_ms: float
    lanes_fps: float
    memory_mib: float | None
    problem: str | None = None


def measure(
    engine: Path, *, batches: Sequence[int], device: str, source_size: tuple[int, int], repeats: int
) -> list[Times]:
    """source_size: (width, height) of the frames that go in, which lie where the front end wants them.

    Batches larger than the engine takes are left out. Raises EngineError as opening and running do.
    """
    free = free_memory(device)
    detector, _ = open_engine(engine, device=device)
    try:
        found = []
        for batch in (batch for batch in batches if batch <= detector.max_batch):
            frames = [_frame(source_size, detector.frames_on)] * batch

            def run(frames: list[Frame] = frames) -> None:
                detector.submit(frames).result()

            run()
            lane = detector.lane()
            with torch.inference_mode():
                stages = lane.stages(frames)
                clock = device_clock if isinstance(lane, DeviceLane) else host_clock
                times = {name: clock(work, repeats, detector.device) for name, work in stages.items()}
            found.append(
                Times(
                    engine=engine.name,
                    batch=batch,
                    stages=times,
                    latency_ms=host_clock(run, repeats, detector.device),
                    lanes_fps=_fps(run, batch, detector.lanes, repeats),
                    memory_mib=taken_since(free, device),
                    problem=detector.problem,
                )
            )
        return found
    finally:
        detector.close()


def table(rows: Sequence[Times]) -> str:
    """A line per engine and batch, then what is wrong with engines."""
    lines = [
        f"{'engine':32} batch  preprocess  inference  postprocess  all ms  ms/frame  latency  fps, all lanes"
        "  memory MiB"
    ]
    for row in rows:
        memory = "" if row.memory_mib is None else f"{row.memory_mib:.0f}"
        ms = row.stages
        lines.append(
            f"{row.engine:32} {row.batch:5}  {ms['preprocess']:10.3f}  {ms['inference']:9.3f}"
            f"  {ms['postprocess']:11.3f}  {ms['all']:6.3f}  {ms['all'] / row.batch:8.3f}"
            f"  {row.latency_ms:7.3f}  {row.lanes_fps:14.0f}  {memory:>10}"
        )
    wrong = dict.fromkeys(f"{row.engine}: {row.problem}" for row in rows if row.problem)
    return "\n".join([*lines, *wrong])


def _frame(size: tuple[int, int], place: torch.device) -> Frame:
    """A picture of noise, 4:2:0."""
    width, height = size
    noise = np.random.default_rng(0)
    shapes = ((height, width), *[(-(-height // 2), -(-width // 2))] * 2)
    planes = [noise.integers(0, 256, shape, np.uint8) for shape in shapes]
    if place.type == "cpu":
        image = Image(format="yuv", planes=tuple(planes))
    else:
        image = Image(format="yuv", planes=tuple(torch.from_numpy(plane).to(place) for plane in planes))
    return Frame(index=0, pts_seconds=0.0, size=size, image=image)


def host_clock(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    """ms of one run by the host's clock; runs one after another, each of which waits for its answer."""
    rounds = []
    for _ in range(ROUNDS):
        begun = perf_counter()
        for _ in range(repeats):
            work()
        rounds.append((perf_counter() - begun) / repeats)
    return 1000 * median(rounds)


def device_clock(
    work: Callable[[], object], repeats: int, device: torch.device, *, captured: bool = True
) -> float:
    """ms of one run by the GPU's clock; runs back to back, each the replay of one CUDA graph.

    captured: False launches each run anew; so it is, too, with what cannot be captured.
    """
    graph = Graphs(lambda _: work(), device)

    def run() -> None:
        if captured:
            graph(1)
        else:
            work()

    run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    rounds = []
    for _ in range(ROUNDS):
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        rounds.append(float(start.elapsed_time(end)) / repeats)
    return median(rounds)


def _fps(run: Callable[[], object], batch: int, lanes: int, repeats: int) -> float:
    """Frames per second with a thread per lane, and one more, submitting batch after batch."""

    def go() -> None:
        for _ in range(repeats):
            run()

    threads = [threading.Thread(target=go) for _ in range(lanes + 1)]
    begun = perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(threads) * repeats * batch / (perf_counter() - begun)


def free_memory(device: str) -> int | None:
    """Bytes free on the GPU; None where the engine will not run on one."""
    if device == "cpu" or not torch.cuda.is_available():
        return None
    return torch.cuda.mem_get_info()[0]


def taken_since(free: int | None, device: str) -> float | None:
    """MiB of the GPU's memory that have gone since so many bytes were free."""
    now = free_memory(device)
    return None if free is None or now is None else (free - now) / 2**20
