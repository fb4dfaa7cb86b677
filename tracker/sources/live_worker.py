"""The process that reads and decodes some of a run's live sources, each in a thread.

Started by `live_decoders` as `work()` in an interpreter of its own, for what `decode_worker` is started for.
Pictures go into memory that the other process lends; one that finds no place there is dropped, for nobody
here waits for who reads. It ends when its input does, within a second.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tracker import wire
from tracker.children import pipes_here
from tracker.errors import EngineError, SourceError, TrackerError
from tracker.sources.connections import Arrival, Network, Replay
from tracker.sources.decode_worker import Back, LeavingError, Loan, Wanted, explained, sender
from tracker.sources.live_pictures import UnfitError
from tracker.sources.nvdec import Look
from tracker.sources.shared_memory import Memory

ALIVE_SECONDS = 1.0
_LEAVE_SECONDS = 1.0
NO_ROOM = "no room"


class Open(NamedTuple):
    """Connect, and say all that comes under this number. Its pictures are to be left as they lie."""

    key: int
    connect: Network | Replay


class Close(NamedTuple):
    key: int


class Came(NamedTuple):
    """A picture of (rows, width) bytes, in a slot. look: where it is another than before. See `Arrival`."""

    key: int
    slot: int
    rows: int
    width: int
    pts_seconds: float | None
    received: float
    frame_rate: float | None
    look: Look | None


class Missed(NamedTuple):
    """One that is damaged, or dropped and why. See `Arrival`."""

    key: int
    received: float
    dropped: str


class Over(NamedTuple):
    """The last of a connection. unfit: why NVDEC cannot decode it, if that is the failure."""

    key: int
    failure: TrackerError | None = None
    unfit: str = ""


class Alive(NamedTuple):
    """Said every ALIVE_SECONDS."""

    key: int = -1


class Viewing:
    """One connection. `run` is a thread's; all else is that of the thread that hears."""

    def __init__(self, key: int, connect: Network | Replay, send: Callable[[object], None]) -> None:
        self._key, self._connect, self._send = key, connect, send
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._refused: EngineError | None = None
        self._memory: Memory | None = None
        self._slot_bytes = self._first = 0
        self._free: deque[int] = deque()
        self._slot = -1  # holds the picture that was kept last and is not told of; -1 is none
        self._copied: torch.cuda.Event | None = None
        self._look: Look | None = None

    def lend(self, loan: Loan) -> None:
        try:
            memory = loan.address.open()
        except EngineError as error:
            with self._changed:
                self._refused = error
                self._changed.notify()
            return
        with self._changed:
            self._memory, self._slot_bytes, self._first = memory, loan.slot_bytes, loan.first
            self._free = deque(range(loan.first, loan.first + loan.slots))
            self._slot = -1
            self._changed.notify()

    def take_back(self, slots: list[int]) -> None:
        self._free.extend(each for each in slots if each >= self._first)

    def leave(self) -> None:
        self._stop.set()
        with self._changed:
            self._changed.notify()

    def run(self) -> None:
        over = self._view()
        # Whoever lent the memory frees it when told that it is over: nothing here may refer to it any more.
        self._memory = None
        self._send(over)

    def _view(self) -> Over:
        nvdec = self._connect.nvdec
        nvdec.keep, nvdec.turning, nvdec.strict = self._keep, False, True
        try:
            if nvdec.device is not None and nvdec.device.type == "cuda":
                # One that is waited for asleep: eight threads that spin would take all cores.
                self._copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            with closing(self._connect(self._stop)) as arrivals:
                for arrival in arrivals:
                    if self._stop.is_set():
                        break
                    self._tell(arrival)
        except UnfitError as error:
            return Over(self._key, unfit=error.reason)
        except TrackerError as error:
            # Tracebacks keep pictures; and FFmpeg's own errors repeat addresses.
            error.__context__ = error.__cause__ = None
            return Over(self._key, error.with_traceback(None))
        except LeavingError:
            pass
        except Exception as error:
            return Over(self._key, explained(error))
        return Over(self._key)

    def _keep(self, surface: Tensor) -> Tensor:
        rows, width = surface.shape
        if self._memory is None or self._slot_bytes < rows * width:
            self._ask_for(rows * width)
        if self._slot < 0:
            if not self._free:
                return surface
            self._slot = self._free.popleft()
        assert self._memory is not None
        start = (self._slot - self._first) * self._slot_bytes
        kept = self._memory.tensor(start, (rows, width)).copy_(surface)
        if self._copied is not None:
            self._copied.record()
        return kept

    def _ask_for(self, size: int) -> None:
        self._send(Wanted(self._key, size))
        with self._changed:
            self._changed.wait_for(
                lambda: self._slot_bytes >= size or self._refused is not None or self._stop.is_set()
            )
        if self._refused is not None:
            raise SourceError(f"{self._refused}: decode in the main process (--decoders 0)")
        if self._stop.is_set():
            raise LeavingError

    def _tell(self, arrival: Arrival) -> None:
        frame = arrival.frame
        if frame is None or self._slot < 0:
            dropped = arrival.dropped if frame is None else NO_ROOM
            self._send(Missed(self._key, arrival.received, dropped))
            return
        assert frame.image is not None
        rows, width = frame.image.planes[0].shape
        if self._copied is not None:
            self._copied.synchronize()
        slot, self._slot = self._slot, -1
        look, news = self._connect.nvdec.look, None
        if look != self._look:
            news = self._look = look
        self._send(
            Came(
                self._key,
                slot,
                rows,
                width,
                arrival.pts_seconds,
                arrival.received,
                arrival.frame_rate,
                news,
            )
        )


def work() -> None:
    """The whole life of a decoding process."""
    requests, answers = pipes_here()
    torch.set_num_threads(1)
    send = sender(answers)
    viewings: dict[int, Viewing] = {}
    threads: list[threading.Thread] = []
    leaving = threading.Event()

    def live() -> None:
        while not leaving.wait(ALIVE_SECONDS):
            _quietly(lambda: send(Alive()))

    threading.Thread(target=live, name="alive", daemon=True).start()
    send(Alive())
    while (message := wire.read(requests)) is not None:
        content = message[0]
        if isinstance(content, Open):
            viewing = viewings[content.key] = Viewing(content.key, content.connect, send)
            thread = threading.Thread(
                target=_quietly, args=(viewing.run,), name=f"read {content.key}", daemon=True
            )
            threads = [each for each in threads if each.is_alive()]
            threads.append(thread)
            thread.start()
        else:
            hear(content, viewings)
    leaving.set()
    for viewing in viewings.values():
        viewing.leave()
    until = time.monotonic() + _LEAVE_SECONDS
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    os._exit(0)  # those that wait for a silent camera would be waited for


def _quietly(step: Callable[[], None]) -> None:
    try:
        step()
    except LeavingError:
        return


def hear(content: Any, viewings: dict[int, Viewing]) -> None:
    """A message about a connection, which may be over."""
    if isinstance(content, Close):
        if (viewing := viewings.pop(content.key, None)) is not None:
            viewing.leave()
        return
    viewing = viewings.get(content.source)
    if viewing is None:
        return
    if isinstance(content, Loan):
        viewing.lend(content)
    elif isinstance(content, Back):
        viewing.take_back(content.slots)
