"""The loop with fakes at its seams: order, overlap, many sources, and what happens when one breaks."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest

from tracker.association import Byte
from tracker.crew import LocalCrew
from tracker.crew_worker import Duty
from tracker.errors import EngineError, SourceError
from tracker.pipeline import AHEAD, Feed, Pipeline, batches
from tracker.types import Detections, Frame, FrameCounts, Outcome


class CountingSource:
    """`length` empty frames; fails at frame `breaks_at` if given."""

    def __init__(
        self, length: int, *, source: int = 0, breaks_at: int | None = None, error: Exception | None = None
    ) -> None:
        self.name, self.size, self.frame_rate = f"fake{source}", (64, 48), 30.0
        self.counts = FrameCounts(declared=length)
        self._length, self._source = length, source
        self._breaks_at, self._error = breaks_at, error or SourceError("the cable was pulled")

    def __enter__(self) -> CountingSource:
        return self

    def __exit__(self, *exc: object) -> None:
        pass

    def __iter__(self) -> Iterator[Frame]:
        for index in range(self._length):
            if index == self._breaks_at:
                raise self._error
            self.counts.decoded += 1
            yield Frame(index=index, pts_seconds=index / 30, size=self.size, source=self._source)


class OneBox:
    """Finds one confident object in every frame, in threads of its own."""

    names, embeds, masks = ("thing",), False, False

    def __init__(self, usual_batch: int = 1, lanes: int = 1) -> None:
        self.usual_batch, self.max_batch = usual_batch, 2 * usual_batch  # it could take more
        self.lanes, self.seconds = lanes, {"inference": 0.0}
        self.batches: list[list[tuple[int, int]]] = []
        self.in_flight = self.most_in_flight = 0
        self._worker = ThreadPoolExecutor(lanes)

    def submit(self, frames: Sequence[Frame]) -> Future[list[Detections]]:
        self.batches.append([(frame.source, frame.index) for frame in frames])
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        work = self._worker.submit(lambda: [box(frame) for frame in frames])
        work.add_done_callback(lambda _: setattr(self, "in_flight", self.in_flight - 1))
        return work

    def close(self) -> None:
        self._worker.shutdown()


def box(frame: Frame) -> Detections:
    time.sleep(0.001)
    xyxy = np.array([[10, 10, 20 + frame.source, 30]], np.float32)
    return Detections(xyxy=xyxy, score=np.array([0.9], np.float32), label=np.array([0]))


def run(
    sources: Sequence[CountingSource], frontend: OneBox, max_frames: int | None = None
) -> tuple[list[tuple[int, int, list[int]]], list[Feed]]:
    """(source, frame, track ids) in the order they came out, and the feeds after the run."""
    feeds = [Feed(source, max_frames=max_frames) for source in sources]
    for feed in feeds:
        feed.__enter__()
    try:
        crew = LocalCrew([Duty(name=source.name, associate=Byte) for source in sources])
        pipeline = Pipeline(feeds, frontend, crew)
        out = [
            (outcome.frame.source, outcome.frame.index, outcome.tracks.id.tolist()) for outcome in pipeline
        ]
        assert pipeline.batches == len(frontend.batches)
        return out, feeds
    finally:
        for feed in feeds:
            feed.__exit__()
        frontend.close()


@pytest.mark.parametrize("lanes", [1, 3])
def test_every_frame_comes_out_once_and_in_order(lanes: int) -> None:
    out, _ = run([CountingSource(50)], OneBox(lanes=lanes))
    assert out == [(0, index, [1]) for index in range(50)]


@pytest.mark.parametrize("lanes", [1, 3])
def test_every_lane_has_work_while_a_frame_is_tracked(lanes: int) -> None:
    frontend = OneBox(lanes=lanes)
    run([CountingSource(20)], frontend)
    assert frontend.most_in_flight == lanes + 1


@pytest.mark.parametrize(
    ("lengths", "size", "expected"),
    [
        ([3], 1, [[(0, 0)], [(0, 1)], [(0, 2)]]),
        ([5], 2, [[(0, 0), (0, 1)], [(0, 2), (0, 3)], [(0, 4)]]),
        ([2, 2], 2, [[(0, 0), (1, 0)], [(0, 1), (1, 1)]]),
        ([1, 3], 2, [[(0, 0), (1, 0)], [(1, 1)], [(1, 2)]]),
        ([2, 2, 2], 2, [[(0, 0), (1, 0)], [(2, 0)], [(0, 1), (1, 1)], [(2, 1)]]),
        ([3, 3], 4, [[(0, 0), (0, 1), (1, 0), (1, 1)], [(0, 2), (1, 2)]]),
        ([0, 1], 2, [[(1, 0)]]),
        ([0], 4, []),
    ],
)
def test_sources_share_the_batch_in_turn(
    lengths: list[int], size: int, expected: list[list[tuple[int, int]]]
) -> None:
    frontend = OneBox(usual_batch=size)
    out, _ = run([CountingSource(n, source=k) for k, n in enumerate(lengths)], frontend)
    # How many frames the last, part-full batch of a dying source takes along depends on nothing but order.
    assert [pair for batch in frontend.batches for pair in batch] == [p for batch in expected for p in batch]
    assert max(map(len, frontend.batches), default=0) <= size
    assert sorted(p[:2] for p in out) == sorted(p for batch in expected for p in batch)


def test_each_source_has_ids_of_its_own() -> None:
    out, _ = run([CountingSource(10, source=k) for k in range(3)], OneBox(usual_batch=3))
    assert {ids[0] for _, _, ids in out} == {1}


def test_a_source_that_breaks_ends_alone_after_its_good_frames() -> None:
    out, feeds = run([CountingSource(10, breaks_at=4), CountingSource(10, source=1)], OneBox(usual_batch=2))
    assert [index for source, index, _ in out if source == 0] == [0, 1, 2, 3]
    assert [index for source, index, _ in out if source == 1] == list(range(10))
    assert isinstance(feeds[0].error, SourceError)
    assert feeds[1].error is None


class BatchBehind(LocalCrew):
    """Gives each batch's outcomes when it gets the next, as processes do."""

    def __init__(self, sources: int) -> None:
        super().__init__([Duty(name="fake", associate=Byte) for _ in range(sources)])
        self._done: list[Outcome] = []

    def associate(self, frames: Sequence[Frame], found: Sequence[Detections]) -> Iterator[Outcome]:
        before, self._done = self._done, list(super().associate(frames, found))
        return iter(before)

    def finish(self) -> Iterator[Outcome]:
        before, self._done = self._done, []
        return iter(before)


class LosesItsDevice(OneBox):
    """Fails at its fifth batch."""

    def submit(self, frames: Sequence[Frame]) -> Future[list[Detections]]:
        if len(self.batches) < 4:
            return super().submit(frames)
        lost: Future[list[Detections]] = Future()
        lost.set_exception(EngineError("the device fell off the bus"))
        return lost


def test_a_crew_may_be_a_batch_behind() -> None:
    frontend = OneBox()
    with Feed(CountingSource(10)) as feed:
        out = [outcome.frame.index for outcome in Pipeline([feed], frontend, BatchBehind(1))]
    frontend.close()
    assert out == list(range(10))


@pytest.mark.parametrize("crew", [BatchBehind(1), LocalCrew([Duty(name="fake", associate=Byte)])])
def test_frames_before_a_lost_device_come_out(crew: LocalCrew) -> None:
    out: list[int] = []
    frontend = LosesItsDevice()
    with Feed(CountingSource(10)) as feed, pytest.raises(EngineError, match="fell off the bus"):
        out.extend(outcome.frame.index for outcome in Pipeline([feed], frontend, crew))
    frontend.close()
    assert out == [0, 1, 2, 3]


def test_a_bug_in_a_source_is_not_mistaken_for_its_end() -> None:
    with pytest.raises(ZeroDivisionError):
        run([CountingSource(10, breaks_at=4, error=ZeroDivisionError())], OneBox())


def test_max_frames_is_counted_for_each_source() -> None:
    out, feeds = run([CountingSource(10), CountingSource(2, source=1)], OneBox(usual_batch=2), max_frames=3)
    assert [p[:2] for p in out] == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2)]
    assert feeds[0].source.counts.decoded == 3


def test_a_feed_decodes_no_further_ahead_than_its_queue() -> None:
    source = CountingSource(1000)
    with Feed(source) as feed:
        assert feed.next() is not None
        time.sleep(0.2)
        assert source.counts.decoded <= AHEAD + 2  # one taken, one in the thread's hand


def test_leaving_early_ends_the_decoding_thread() -> None:
    with Feed(CountingSource(1000)) as feed:
        assert next(batches([feed], 1))[0].index == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("decode")]
