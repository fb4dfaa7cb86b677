"""The loop: frames enter, tracks leave.

Every source is decoded in a thread of its own, a few frames ahead; the front end works in threads of its own
or on the device; a crew associates, in the caller's thread or in processes of its own. So decoding frame
t+2, detecting in t+1 and tracking t overlap. Knows no files, no options and nobody's names.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import Self

from tracker.errors import TrackerError
from tracker.types import Crew, Frame, Frontend, Outcome, Pending, Source

# Frames decoded ahead of the front end: enough to ride out a slow one, few enough to hold in memory.
AHEAD = 4


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
        self._decoded: queue.Queue[Frame | None] = queue.Queue(AHEAD)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._decode, name=f"decode {source.name}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """Stop decoding and wait for the thread; frames not yet taken are thrown away."""
        self._stop.set()
        self._thread.join()

    def next(self) -> Frame | None:
        """The next frame, waiting for it; None at the end."""
        frame = self._decoded.get()
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
                if frame is None or not self._put(frame):
                    break
                taken += 1
        except TrackerError as error:
            self.error = error
        except BaseException as error:  # a bug: it belongs in the caller's thread, not on this one's stderr
            self._crash = error
        self._put(None)

    def _put(self, frame: Frame | None) -> bool:
        """False when nobody wants frames any more."""
        while not self._stop.is_set():
            try:
                self._decoded.put(frame, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False


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
        for batch in batches(self.feeds, self.frontend.max_batch):
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
