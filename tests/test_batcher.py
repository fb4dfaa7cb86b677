"""Batches of live frames: the newest of each stream, a fair share for all, and no waiting for the silent."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

import numpy as np
import pytest
from test_pipeline import OneBox, box

from tracker.association import Byte
from tracker.batcher import Batcher
from tracker.crew import LocalCrew
from tracker.crew_worker import Duty
from tracker.errors import EngineError, TrackerError
from tracker.latency import Ages
from tracker.pipeline import FAILURES_IN_A_ROW, LivePipeline
from tracker.types import Detections, Frame


def frame(source: int, index: int = 0) -> Frame:
    now = time.monotonic()
    return Frame(index=index, pts_seconds=now, size=(64, 48), source=source, received=now)


def batcher_for(streams: int, *, size: int = 8, max_wait: float = 0.008) -> Batcher:
    batcher = Batcher(size, max_wait)
    for source in range(streams):
        batcher.join(source)
    return batcher


def taken(batcher: Batcher, timeout: float = 1.0) -> list[tuple[int, int]]:
    return [(each.source, each.index) for each in batcher.take(timeout)]


def test_the_newest_frame_replaces_the_one_that_nobody_took() -> None:
    batcher = batcher_for(1)
    for index in range(5):
        batcher.offer(frame(0, index))
    assert taken(batcher) == [(0, 4)]
    assert batcher.superseded(0) == 4


def test_a_full_batch_leaves_at_once() -> None:
    batcher = batcher_for(3, max_wait=5.0)
    for source in range(3):
        batcher.offer(frame(source))
    begun = time.monotonic()
    assert len(taken(batcher)) == 3
    assert time.monotonic() - begun < 0.5


def test_a_stream_that_stalls_costs_the_others_no_more_than_the_wait() -> None:
    batcher = batcher_for(2, max_wait=0.05)
    batcher.offer(frame(0))
    batcher.offer(frame(1))
    batcher.take(1.0)
    batcher.offer(frame(0, 1))  # stream 1 has just been there, and may come again
    begun = time.monotonic()
    assert taken(batcher) == [(0, 1)]
    assert 0.04 < time.monotonic() - begun < 0.3


def test_a_stream_that_never_came_is_not_waited_for() -> None:
    batcher = batcher_for(2, max_wait=5.0)
    batcher.offer(frame(0))
    begun = time.monotonic()
    assert taken(batcher) == [(0, 0)]
    assert time.monotonic() - begun < 0.5


def test_where_there_is_not_enough_for_all_each_gets_its_share() -> None:
    """Ten streams always have a frame, three fit into a batch."""
    batcher = batcher_for(10, size=3)
    served: Counter[int] = Counter()
    for index in range(100):
        for source in range(10):
            batcher.offer(frame(source, index))
        served.update(source for source, _ in taken(batcher))
    assert max(served.values()) - min(served.values()) <= 1


def test_fast_streams_do_not_push_slow_ones_aside() -> None:
    batcher = batcher_for(3, size=1)
    served: Counter[int] = Counter()
    for index in range(300):
        batcher.offer(frame(0, index))
        batcher.offer(frame(1, index))
        if index % 10 == 0:
            batcher.offer(frame(2, index))
        served.update(source for source, _ in taken(batcher))
    assert served[2] == 30


def test_a_stream_that_left_is_forgotten() -> None:
    batcher = batcher_for(2)
    batcher.offer(frame(0))
    batcher.leave(0)
    batcher.offer(frame(0, 1))
    assert taken(batcher, timeout=0.05) == []
    assert batcher.waiting == 0


def test_nobody_there_is_no_batch() -> None:
    assert taken(batcher_for(0), timeout=0.01) == []


# The loop around it


@contextmanager
def camera(batcher: Batcher, source: int, *, fps: float) -> Iterator[None]:
    """Offers frames at that rate."""
    stop = threading.Event()

    def run() -> None:
        index = 0
        while not stop.wait(1 / fps):
            batcher.offer(frame(source, index))
            index += 1

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class SlowBox(OneBox):
    """Takes so many seconds for each batch."""

    def __init__(self, seconds: float, **options: int) -> None:
        super().__init__(**options)
        self._seconds = seconds

    def submit(self, frames: Sequence[Frame]) -> Future[list[Detections]]:
        def work() -> list[Detections]:
            time.sleep(self._seconds)
            return [box(each) for each in frames]

        return self._worker.submit(work)


def pipeline_of(batcher: Batcher, frontend: OneBox, streams: int) -> LivePipeline:
    crew = LocalCrew([Duty(name=f"{k}", associate=Byte, frame_rate=30.0) for k in range(streams)])
    return LivePipeline(
        batcher, frontend, crew, admit=lambda _: True, failed=lambda *_: None, tick=lambda: None
    )


def test_a_slow_detector_makes_frames_rare_not_old() -> None:
    """50 fps in, at most 10 a second out: still none is older than an interval and the work itself."""
    batcher, frontend = batcher_for(1), SlowBox(0.1)
    pipeline, ages = pipeline_of(batcher, frontend, 1), []
    with camera(batcher, 0, fps=50):
        for outcome in pipeline:
            assert outcome.frame.received is not None
            ages.append(time.monotonic() - outcome.frame.received)
            if len(ages) == 12:
                pipeline.stop()
    frontend.close()
    assert np.median(ages) < 0.1 + 0.02 + 0.02
    assert batcher.superseded(0) > 12


def test_a_lane_is_never_idle_while_another_is_slow() -> None:
    batcher, frontend = batcher_for(4, size=1), SlowBox(0.05, lanes=2)
    pipeline = pipeline_of(batcher, frontend, 4)
    begun, count = time.monotonic(), 0
    with camera(batcher, 0, fps=100), camera(batcher, 1, fps=100):
        for _ in pipeline:
            count += 1
            if count == 20:
                pipeline.stop()
    frontend.close()
    assert time.monotonic() - begun < 20 * 0.05 * 0.8  # one lane would need 1 s


class Sneezes(OneBox):
    """Fails now and then, or for ever."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self._every, self._count = every, 0

    def submit(self, frames: Sequence[Frame]) -> Future[list[Detections]]:
        self._count += 1
        if self._count % self._every:
            return super().submit(frames)
        failed: Future[list[Detections]] = Future()
        failed.set_exception(EngineError("the engine answers NaN"))
        return failed


def test_a_frame_that_the_engine_cannot_bear_is_counted_and_the_run_goes_on() -> None:
    batcher, frontend = batcher_for(1), Sneezes(every=3)
    failed: list[tuple[Frame, TrackerError]] = []
    pipeline = LivePipeline(
        batcher,
        frontend,
        LocalCrew([Duty(name="cam", associate=Byte, frame_rate=30.0)]),
        admit=lambda _: True,
        failed=lambda *what: failed.append(what),
        tick=lambda: None,
    )
    count = 0
    with camera(batcher, 0, fps=100):
        for _ in pipeline:
            count += 1
            if count == 10:
                pipeline.stop()
    frontend.close()
    assert len(failed) >= 3


def test_an_engine_that_always_fails_ends_the_run() -> None:
    batcher, frontend = batcher_for(1), Sneezes(every=1)
    failed: list[Frame] = []
    pipeline = pipeline_of(batcher, frontend, 1)
    pipeline._failed = lambda frame, error: failed.append(frame)
    with camera(batcher, 0, fps=200), pytest.raises(EngineError, match="NaN"):
        list(pipeline)
    frontend.close()
    assert len(failed) == FAILURES_IN_A_ROW - 1


# The ages


def test_quantiles_are_those_of_the_numbers() -> None:
    numbers = np.random.default_rng(0).lognormal(np.log(0.05), 0.7, 20_000)
    ages = Ages()
    for number in numbers:
        ages.add(float(number))
    found = ages.quantiles()
    for value, q in ((found.p50, 50), (found.p95, 95), (found.p99, 99)):
        assert value == pytest.approx(1000 * np.percentile(numbers, q), rel=0.025)
    assert found.worst == pytest.approx(1000 * numbers.max(), abs=0.001)
    assert ages.at_most([0.05])[0] == pytest.approx((numbers <= 0.05).sum(), rel=0.05)
    assert len(ages.recent()) == 240


def test_no_frames_have_no_age() -> None:
    assert Ages().quantiles().count == 0


def test_ages_beyond_all_bounds_are_counted_too() -> None:
    ages = Ages()
    for seconds in (0.0, 1e-9, 1e6):
        ages.add(seconds)
    assert ages.quantiles().count == 3
    assert ages.quantiles().worst == 1e9
