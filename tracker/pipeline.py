"""The loop: frames enter, tracks leave. Once for sources that are read to their end, once for live ones.

Every source is decoded in a thread of its own, a few frames ahead; the front end works in threads of its own
or on the device; a crew associates, in the caller's thread or in processes of its own. So decoding frame
t+2, detecting in t+1 and tracking t overlap. Knows no files, no options and nobody's names.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Self

from tracker.batcher import Batcher
from tracker.errors import TrackerError
from tracker.types import AheadSource, Crew, Frame, Frontend, Outcome, Pending, Source

# Frames decoded ahead of the front end: enough to ride out a slow one, few enough to hold in memory.
AHEAD = 8


class Feed:
    """A source decoded in a thread of its own.

    The source must be open, and stay open until this is left. An error of the source ends its feed, not
    the run: what was decoded before still comes out, then `error` holds it.

    seconds: spent decoding so far.
    """

    def __init__(self, source: Source, *, max_frames: int | None = None) -> None:
        self.source = source
        self.error: TrackerError | None = None
        self.seconds = 0.0
        self._max_frames = max_frames
        self._crash: BaseException | None = None
        self._decoded = _Handover()
        self._thread = threading.Thread(target=self._decode, name=f"decode {source.name}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop decoding and wait for the thread; frames not yet taken are thrown away."""
        self._decoded.close()
        self._thread.join()

    def next(self) -> Frame | None:
        """The next frame, waiting for it; None at the end."""
        frame = self._decoded.take()
        if self._crash is not None:
            raise self._crash
        return frame

    def _decode(self) -> None:
        try:
            frames = iter(self.source)
            taken = 0
            while taken != self._max_frames:
                begun = perf_counter()
                frame = next(frames, None)
                self.seconds += perf_counter() - begun
                if frame is None or not self._decoded.put(frame):
                    break
                taken += 1
        except TrackerError as error:
            self.error = error
        except BaseException as error:  # a bug: it belongs in the caller's thread, not on this one's stderr
            self._crash = error
        self._decoded.put(None)


class ReadyFeed(Feed):
    """A source that decodes ahead by itself, read in the caller's thread: one thread less to wait for."""

    source: AheadSource

    def __init__(self, source: AheadSource, *, max_frames: int | None = None) -> None:
        super().__init__(source, max_frames=max_frames)
        self._taken = 0

    def __enter__(self) -> Self:
        self._frames = iter(self.source)
        return self

    def __exit__(self, *exc: object) -> None:
        """Its owner stops it."""

    def next(self) -> Frame | None:
        if self.error is not None or self._taken == self._max_frames:
            return None
        try:
            frame = next(self._frames, None)
        except TrackerError as error:
            self.error, frame = error, None
        self._taken += 1
        self.seconds = self.source.seconds
        return frame


class _Handover:
    """Frames from one thread to another, at most `AHEAD`, None at the end.

    A thread that waits costs more than a frame's bookkeeping, and makes the others wait for Python's lock. So
    whoever fills it sleeps until half of it is empty, not until each frame is taken.
    """

    def __init__(self) -> None:
        self._frames: deque[Frame | None] = deque()
        self._changed = threading.Condition()
        self._closed = self._full = self._awaited = False

    def put(self, frame: Frame | None) -> bool:
        """Waits for room. False when nobody wants frames any more."""
        with self._changed:
            if len(self._frames) >= AHEAD:
                self._full = True
                self._changed.wait_for(lambda: self._closed or not self._full)
            if self._closed:
                return False
            self._frames.append(frame)
            if self._awaited:
                self._changed.notify()
        return True

    def take(self) -> Frame | None:
        """Waits for a frame."""
        with self._changed:
            if not self._frames:
                self._awaited = True
                self._changed.wait_for(lambda: self._frames)
                self._awaited = False
            frame = self._frames.popleft()
            if self._full and len(self._frames) <= AHEAD // 2:
                self._full = False
                self._changed.notify()
        return frame

    def close(self) -> None:
        """Let whoever fills it go; what was not taken is thrown away."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def batches(feeds: Sequence[Feed], size: int) -> Iterator[list[Frame]]:
    """Up to `size` frames at a time, the same number from every feed that still has some, in turn."""
    live = list(feeds)
    while live:
        batch: list[Frame] = []
        share = max(1, size // len(live))
        for feed in tuple(live):
            for _ in range(share):
                frame = feed.next()
                if frame is None:
                    live.remove(feed)
                    break
                batch.append(frame)
            if len(batch) + share > size:
                yield batch
                batch = []
        if batch:
            yield batch


class Pipeline:
    """Feeds → front end → crew.

    batches: settled so far. wait_seconds: spent waiting for the front end.
    """

    def __init__(self, feeds: Sequence[Feed], frontend: Frontend, crew: Crew) -> None:
        self.feeds, self.frontend, self.crew = feeds, frontend, crew
        self.batches, self.wait_seconds = 0, 0.0

    def __iter__(self) -> Iterator[Outcome]:
        """Every frame of every feed with its tracks; frames of one feed in order."""
        depth = self.frontend.lanes + 1  # one batch waits, so that no lane does while another is tracked
        pending: deque[tuple[list[Frame], Pending]] = deque()
        for batch in batches(self.feeds, self.frontend.usual_batch):
            pending.append((batch, self.frontend.submit(batch)))
            if len(pending) == depth:
                yield from self._settle(*pending.popleft())
        while pending:
            yield from self._settle(*pending.popleft())
        yield from self.crew.finish()

    def _settle(self, batch: list[Frame], work: Pending) -> Iterator[Outcome]:
        begun = perf_counter()
        try:
            found = work.result()  # the only place where the host waits for the front end
        except TrackerError:
            yield from self.crew.finish()  # what was detected before is good
            raise
        self.wait_seconds += perf_counter() - begun
        self.batches += 1
        yield from self.crew.associate(batch, found)


# A frame may make the engine fail, and the camera's next one not; an engine that always fails is broken.
FAILURES_IN_A_ROW = 10
_TICK_SECONDS = 0.25


class LivePipeline:
    """Batcher → front end → crew, for ever.

    A thread of its own hands batches over as soon as the front end has room: one per lane, none waiting, so
    that no frame grows old in a queue. What is detected is settled in the caller's thread.

    admit: asked for each frame before it is associated, False throws it away. failed: told of each frame
    whose detection failed. tick: called now and then, frames or not. All three in the caller's thread.
    batches, wait_seconds: see `Pipeline`.
    """

    def __init__(
        self,
        batcher: Batcher,
        frontend: Frontend,
        crew: Crew,
        *,
        admit: Callable[[Frame], bool],
        failed: Callable[[Frame, TrackerError], None],
        tick: Callable[[], None],
    ) -> None:
        self.batcher, self.frontend, self.crew = batcher, frontend, crew
        self.batches, self.wait_seconds = 0, 0.0
        self._admit, self._failed, self._tick = admit, failed, tick
        self._stop = threading.Event()
        self._room = threading.Semaphore(frontend.lanes)
        self._under_way: queue.SimpleQueue[tuple[list[Frame], Pending] | BaseException | None] = (
            queue.SimpleQueue()
        )

    def stop(self) -> None:
        """From any thread or signal handler: finish what is under way, take nothing more."""
        self._stop.set()

    def __iter__(self) -> Iterator[Outcome]:
        """Every frame that was tracked; frames of one source in order."""
        submitter = threading.Thread(target=self._submit, name="submit", daemon=True)
        submitter.start()
        failures, ticked = 0, perf_counter()
        try:
            while True:
                begun = perf_counter()
                if begun - ticked >= _TICK_SECONDS:
                    self._tick()
                    ticked = begun
                try:
                    item = self._under_way.get(timeout=_TICK_SECONDS)
                except queue.Empty:
                    continue
                if item is None:
                    return
                if isinstance(item, BaseException):
                    raise item
                batch, work = item
                try:
                    found = work.result()
                except TrackerError as error:
                    failures += 1
                    if failures == FAILURES_IN_A_ROW:
                        raise
                    for frame in batch:
                        self._failed(frame, error)
                    continue
                finally:
                    self._room.release()
                    self.wait_seconds += perf_counter() - begun
                failures = 0
                self.batches += 1
                wanted = [pair for pair in zip(batch, found, strict=True) if self._admit(pair[0])]
                if wanted:
                    yield from self.crew.associate([pair[0] for pair in wanted], [pair[1] for pair in wanted])
                    yield from self.crew.finish()  # the next batch may be long in coming
        finally:
            self._stop.set()
            submitter.join()

    def _submit(self) -> None:
        try:
            while not self._stop.is_set():
                if not self._room.acquire(timeout=_TICK_SECONDS):
                    continue
                batch: list[Frame] = []
                while not batch and not self._stop.is_set():
                    batch = self.batcher.take(_TICK_SECONDS)
                if batch:
                    self._under_way.put((batch, self.frontend.submit(batch)))
            self._under_way.put(None)
        except BaseException as error:  # it belongs in the caller's thread
            self._under_way.put(error)
