"""Live frames become batches: the newest of every stream, and nobody waits long for anybody.

Knows frames by their source alone; neither where they come from nor what becomes of them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from tracker.types import Frame

# A stream that has been silent so long is not waited for; even those that are cost max_wait at most.
_ABSENT_SECONDS = 1.0


@dataclass(slots=True)
class _Slot:
    """Room for one frame: the newest.

    served: the turn in which a frame was last taken from it. offered: when one last came.
    superseded: frames overwritten.
    """

    frame: Frame | None = None
    served: int = 0
    offered: float = 0.0
    superseded: int = 0


class Batcher:
    """Readers offer frames, the pipeline takes batches. For any number of threads.

    A frame that nobody took is replaced by its stream's next: so what is tracked is never older than a
    frame's interval plus the work itself, however slow the machine. Who has waited longest goes first, so
    that each stream gets its share where there is not enough for all.

    size: frames in a batch. max_wait_seconds: how long the first frame of a batch waits for those of other
    streams.
    """

    def __init__(
        self, size: int, max_wait_seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._size, self._max_wait = size, max_wait_seconds
        self._clock = clock
        self._slots: dict[int, _Slot] = {}
        self._changed = threading.Condition()
        self._ready = self._turn = 0
        self._wanted = 1  # frames that make whoever waits in `take` come back
        self._first_ready = 0.0
        self._closed = False

    def join(self, source: int) -> None:
        with self._changed:
            self._slots[source] = _Slot(served=self._turn)

    def leave(self, source: int) -> int:
        """Its waiting frame is thrown away; gives how many of its frames were superseded in all."""
        with self._changed:
            slot = self._slots.pop(source, None)
            self._ready -= slot is not None and slot.frame is not None
            self._changed.notify_all()
            return 0 if slot is None else slot.superseded

    def offer(self, frame: Frame) -> None:
        """The stream's newest frame. Never waits. Frames of streams that left are nobody's."""
        with self._changed:
            slot = self._slots.get(frame.source)
            if slot is None:
                return
            now = self._clock()
            if slot.frame is not None:
                slot.superseded += 1
            else:
                self._first_ready = self._first_ready if self._ready else now
                self._ready += 1
                # Whoever takes is woken for the first frame of a batch and for its last, not for each.
                if self._ready == 1 or self._ready >= self._wanted:
                    self._changed.notify()
            slot.frame, slot.offered = frame, now

    @property
    def waiting(self) -> int:
        """Streams with a frame that nobody took yet."""
        return self._ready

    def superseded(self, source: int) -> int:
        with self._changed:
            slot = self._slots.get(source)
            return 0 if slot is None else slot.superseded

    def close(self) -> None:
        """Whoever waits in `take` comes back with what there is."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def take(self, timeout: float) -> list[Frame]:
        """The next batch; empty if there is no frame within `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._ready or self._closed, timeout):
                return []
            # While nobody took anything, a frame may have waited for others long enough already.
            while not self._closed:
                self._wanted = min(self._size, self._present())
                if self._ready >= self._wanted:
                    break
                rest = self._first_ready + self._max_wait - self._clock()
                if rest <= 0 or not self._changed.wait(rest):
                    break
            waiting = sorted(
                (slot for slot in self._slots.values() if slot.frame is not None),
                key=lambda slot: slot.served,
            )
            batch: list[Frame] = []
            for slot in waiting[: self._size]:
                assert slot.frame is not None
                batch.append(slot.frame)
                self._turn += 1  # a turn for each, so that within a batch, too, there is a first and a last
                slot.frame, slot.served = None, self._turn
            self._ready -= len(batch)
            return batch

    def _present(self) -> int:
        """Streams that may be expected to have a frame soon."""
        now = self._clock()
        return sum(
            slot.frame is not None or now - slot.offered < _ABSENT_SECONDS for slot in self._slots.values()
        )
