"""The process that decodes some of a run's files, each in a thread, into memory that another process lends.

Started by `decoders` as `work()` in an interpreter of its own: so many calls into libraries, each of which
lets go of Python's lock and must get it back, hold up nobody who tracks. It ends when its input does.
"""

from __future__ import annotations

import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tracker import wire
from tracker.children import pipes_here
from tracker.errors import EngineError, SourceError, TrackerError
from tracker.sources.nvdec import NvdecFile
from tracker.sources.shared_memory import Address, Memory
from tracker.types import Frame, FrameCounts


class Wanted(NamedTuple):
    """A file needs memory: so many bytes for a picture. Goes on when it is lent."""

    source: int
    picture_bytes: int


class Picture(NamedTuple):
    """One that lies in a slot, and what its file's `Source` would say with it.

    width: bytes of a row. rows: of the surface, three for two of the picture. seconds: spent decoding so far.
    """

    slot: int
    rows: int
    width: int
    frame_index: int
    pts_seconds: float
    corrupt: int
    missing: int
    seconds: float


class Pictures(NamedTuple):
    """The next ones of a file, in order. frame_rate, declared: see `Source`."""

    source: int
    pictures: list[Picture]
    frame_rate: float
    declared: int | None


class Ended(NamedTuple):
    """There will be no more of a file, because of `failure` if that is not None."""

    source: int
    counts: FrameCounts
    seconds: float
    failure: TrackerError | None


class Loan(NamedTuple):
    """Slots `first` to `first + slots - 1` of a file, one after another; they replace those it had."""

    source: int
    address: Address
    slot_bytes: int
    first: int
    slots: int


class Back(NamedTuple):
    """Slots of a file that nobody reads any more."""

    source: int
    slots: list[int]


class LeavingError(BaseException):
    """Nobody wants pictures any more. Not an Exception: nothing on the way may take it for a fault."""


@dataclass(slots=True)
class _Slots:
    memory: Memory
    slot_bytes: int
    first: int
    free: deque[int]


class Delivery:
    """Puts one file's pictures into slots, then tells of them.

    What is in order of the device is told when it is there: the message is what the reader goes by. Nothing
    waits for that but what has to wait anyway, so pictures are told together where several are done.
    """

    def __init__(self, file: NvdecFile, send: Callable[[object], None]) -> None:
        self._file, self._send = file, send
        self._changed = threading.Condition()
        self._slots: _Slots | None = None
        self._slot = -1  # of the picture kept last
        self._leaving = False
        self._refused: EngineError | None = None
        self._waited = 0.0
        self._under_way: deque[tuple[Picture, torch.cuda.Event | None]] = deque()

    def lend(self, loan: Loan) -> None:
        """In the thread that hears; so are `take_back` and `leave`."""
        try:
            slots = _Slots(
                loan.address.open(),
                loan.slot_bytes,
                loan.first,
                deque(range(loan.first, loan.first + loan.slots)),
            )
        except EngineError as error:
            with self._changed:
                self._refused = error
                self._changed.notify()
            return
        with self._changed:
            self._slots = slots
            self._changed.notify()

    def take_back(self, numbers: Sequence[int]) -> None:
        with self._changed:
            if self._slots is not None:
                self._slots.free.extend(each for each in numbers if each >= self._slots.first)
            self._changed.notify()

    def leave(self) -> None:
        with self._changed:
            self._leaving = True
            self._changed.notify()

    def run(self) -> None:
        """Decode the file to its end, in the calling thread."""
        file, failure, begun = self._file, None, perf_counter()
        file.keep = self._keep
        try:
            with file:
                for frame in file:
                    self._note(frame, perf_counter() - begun - self._waited)
                self._tell(wait=True)
        except LeavingError:
            return
        except Exception as error:
            failure = explained(error, f"{file.name}: ")
            with suppress(Exception):  # a device that failed has lost them
                self._tell(wait=True)
        self._send(Ended(file.number, file.counts, perf_counter() - begun - self._waited, failure))

    def _keep(self, surface: Tensor) -> Tensor:
        """The surface in a free slot, which is waited for."""
        rows, width = surface.shape
        slots = self._slots_for(rows * width)
        if not slots.free:
            self._tell(wait=True)
            self._wait(lambda: bool(slots.free))
        self._slot = slots.free.popleft()
        start = (self._slot - slots.first) * slots.slot_bytes
        return slots.memory.tensor(start, (rows, width)).copy_(surface)

    def _slots_for(self, size: int) -> _Slots:
        had = self._slots
        if had is None or had.slot_bytes < size:
            self._tell(wait=True)
            self._send(Wanted(self._file.number, size))
            self._wait(lambda: self._slots is not had or self._refused is not None)
            if self._refused is not None:
                raise SourceError(
                    f"{self._file.name}: {self._refused}: decode in this process (--decoders 0)"
                )
        assert self._slots is not None
        return self._slots

    def _wait(self, until: Callable[[], bool]) -> None:
        begun = perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._leaving or until())
            if self._leaving:
                raise LeavingError
        self._waited += perf_counter() - begun

    def _note(self, frame: Frame, seconds: float) -> None:
        """A frame has been decoded, or will have been once its event passes."""
        assert frame.image is not None
        (plane,), counts = frame.image.planes, self._file.counts
        rows, width = plane.shape
        picture = Picture(
            self._slot, rows, width, frame.index, frame.pts_seconds, counts.corrupt, counts.missing, seconds
        )
        self._under_way.append((picture, frame.image.ready))
        self._tell(wait=False)

    def _tell(self, *, wait: bool) -> None:
        """Of the pictures that are there; with `wait` of all."""
        done = []
        while self._under_way:
            picture, ready = self._under_way[0]
            if ready is not None and not ready.query():  # type: ignore[no-untyped-call]
                if not wait:
                    break
                ready.synchronize()
            done.append(picture)
            self._under_way.popleft()
        if done:
            file = self._file
            self._send(Pictures(file.number, done, file.frame_rate, file.counts.declared))


def explained(error: Exception, source: str = "") -> TrackerError:
    """The error in words, with its traceback as a note for those who debug. source: how they begin."""
    told: TrackerError
    if isinstance(error, TrackerError):
        told = error
    elif isinstance(error, MemoryError):
        told = SourceError(f"{source}the process that decodes it ran out of memory: track fewer at once")
    else:
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        told = SourceError(
            f"{source}the process that decodes it failed ({reason}): decode in the main process "
            "(--decoders 0), and please report it if that goes well"
        )
    told.add_note("".join(traceback.format_exception(error)))
    return told


def sender(answers: Any) -> Callable[[object], None]:
    """What writes messages to a pipe, from any thread; raises LeavingError once nobody reads them."""
    telling = threading.Lock()

    def send(content: object) -> None:
        try:
            with telling:
                wire.write(answers, content)
        except BrokenPipeError:
            raise LeavingError from None

    return send


def work() -> None:
    """The whole life of a decoding process. Its first message: files."""
    requests, answers = pipes_here()
    torch.set_num_threads(1)
    send = sender(answers)
    message = wire.read(requests)
    files: list[NvdecFile] = [] if message is None else message[0]
    deliveries = {file.number: Delivery(file, send) for file in files}
    threads = [
        threading.Thread(target=_run, args=(delivery,), name=f"decode {number}", daemon=True)
        for number, delivery in deliveries.items()
    ]
    for thread in threads:
        thread.start()
    while (message := wire.read(requests)) is not None:
        _hear(message[0], deliveries)
    for delivery in deliveries.values():
        delivery.leave()
    for thread in threads:
        thread.join()


def _run(delivery: Delivery) -> None:
    try:
        delivery.run()
    except LeavingError:
        return


def _hear(content: Any, deliveries: dict[int, Delivery]) -> None:
    delivery = deliveries[content.source]
    if isinstance(content, Loan):
        delivery.lend(content)
    else:
        delivery.take_back(content.slots)
