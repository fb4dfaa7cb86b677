"""Live sources that NVDEC decodes in processes of their own: here only their newest pictures arrive.

As with files (`decoders`): a dozen calls into libraries for each frame, of 32 streams, in one process, and
everybody waits for Python's lock. A process reads its connections, too; when it ends, each of them is broken,
which their sources know what to do about. What is lost and found again, and when, stays `live`'s to say.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Generator
from contextlib import suppress
from functools import partial
from typing import Any, Self

from tracker.children import Child
from tracker.errors import EngineError, SourceError
from tracker.sources.connections import Arrival, Network, Replay
from tracker.sources.decode_worker import Back, Wanted
from tracker.sources.decoders import CORES_PER_DECODER, FEW_FILES
from tracker.sources.live_pictures import UnfitError
from tracker.sources.live_worker import Came, Close, Missed, Open, Over
from tracker.sources.nvdec import Look, frame_of, upright
from tracker.sources.planes import Turn
from tracker.sources.ring import Ring
from tracker.sources.shared_memory import Allocate, DeviceMemory
from tracker.types import Frame

# Of 32 streams at 30 frames a second one process tracked 935 frames a second, 46 ms old at p95; two tracked
# 932 (54 ms), four 918 (56): they take turns on the GPU. Two, so that half go on when one dies.
STREAMS_PER_DECODER = 16

# Of one stream: the newest, those that two lanes and the crew work on, one that is shown, and some to decode
# into. Within a budget of memory, for 32 of them.
SLOTS, FEWEST_SLOTS = 12, 6
BYTES_PER_STREAM = 48 << 20
AHEAD = 4

# A process that is silent so long hangs: it says every second that it does not. One that starts loads torch
# and CUDA first, and while NVDEC makes a decoder nothing else runs there: with a dozen to make, beside seven
# other processes, one was silent for more than 10 s.
_MUTE_SECONDS, _START_SECONDS = 10.0, 90.0
_TICK_SECONDS = 0.2  # how soon it is noticed that a source shall stop
_LEAVE_SECONDS = 2.0


def processes_for(streams: int, cores: int) -> int:
    """How many pay, where nobody says."""
    if streams <= FEW_FILES:
        return 0
    return min(-(-streams // STREAMS_PER_DECODER), cores // CORES_PER_DECODER)


class LiveDecoders:
    """Processes for connections, started when they are needed, and again when they died. Leave it last.

    processes: at most; may grow. allocate: memory that a child can open; the device's where nobody says.
    """

    def __init__(self, processes: int, *, allocate: Allocate | None = None) -> None:
        self.processes = processes
        self.allocate = allocate
        self._running: list[_Process] = []
        self._lock = threading.Lock()
        self._left = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._lock:
            self._left = True
            running, self._running = self._running, []
        for process in running:  # all first, so that they end side by side
            process.dismiss()
        until = time.monotonic() + _LEAVE_SECONDS
        for process in running:
            process.leave(max(0.0, until - time.monotonic()))

    def open(self, connect: Network | Replay) -> Link:
        """A connection in the process that has fewest. Raises SourceError where none can be started."""
        with self._lock:
            if self._left:
                raise SourceError("the run is over")
            self._running = [process for process in self._running if not process.over]
            fewest = min(self._running, key=lambda process: len(process.links), default=None)
            if fewest is None or (fewest.links and len(self._running) < self.processes):
                try:
                    fewest = _Process()
                except OSError as error:
                    raise SourceError(
                        f"cannot start a process to decode in ({error}): --decoders 0 decodes without"
                    ) from None
                self._running.append(fewest)
            return fewest.open(connect, self.allocate)


class _Process:
    """One that reads and decodes. links: its connections by number, until it lets go of them."""

    def __init__(self) -> None:
        self._child = Child("tracker.sources.live_worker")
        self._sending = threading.Lock()
        self._numbers = itertools.count()
        self._heard = time.monotonic()
        self._lock = threading.Lock()  # of links, opening and over
        self.links: dict[int, Link] = {}
        self._opening = set[int]()  # those of which no picture has come yet
        self._hung: float | None = None  # seconds, after which it was ended
        self.over = False
        self._thread = threading.Thread(target=self._listen, name="decoding process", daemon=True)
        self._thread.start()

    def open(self, connect: Network | Replay, allocate: Allocate | None) -> Link:
        link = Link(next(self._numbers), connect, self, allocate)
        with self._lock:
            if self.over:
                raise SourceError("the process that decodes it has ended: try again")
            self.links[link.key] = link
            self._opening.add(link.key)
        self.send(Open(link.key, connect))
        return link

    def send(self, content: object) -> None:
        with self._sending, suppress(OSError, ValueError):  # it died, or was dismissed: `_listen` tells
            self._child.send(content)

    def check(self) -> None:
        """End it if it hangs."""
        with self._lock:
            patience = _START_SECONDS if self._opening else _MUTE_SECONDS
        if not self.over and self._hung is None and time.monotonic() - self._heard > patience:
            self._hung = patience
            self._child.kill()

    def dismiss(self) -> None:
        if self._sending.acquire(timeout=_TICK_SECONDS):
            self._child.finish()
            self._sending.release()
        else:
            self._child.kill()

    def leave(self, seconds: float) -> None:
        """Wait so long for its end, then end it."""
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._child.kill()
            self._thread.join()

    def _listen(self) -> None:
        with suppress(Exception):  # what cannot be read comes from one that is dying
            while (message := self._child.receive()) is not None:
                self._heard = time.monotonic()
                content = message[0]
                key = content.key if hasattr(content, "key") else content.source
                link = self.links.get(key)
                if link is not None:
                    link.hear(content)
                if isinstance(content, Came | Over):
                    with self._lock:
                        self._opening.discard(key)
                        if isinstance(content, Over):
                            self.links.pop(key, None)
        with self._lock:
            self.over = True
            links, self.links = list(self.links.values()), {}
        ending = self._child.ending()
        if self._hung is not None:
            ending = f"said nothing for {self._hung:g} s and was ended: track fewer sources at once"
        with self._sending:
            self._child.leave()
        for link in links:
            link.hear(Over(link.key, SourceError(f"the process that decodes it {ending}")))


class Link:
    """A connection in another process. `hear` is for the thread that listens there, all else for one."""

    def __init__(
        self, key: int, connect: Network | Replay, process: _Process, allocate: Allocate | None
    ) -> None:
        device = connect.nvdec.device
        assert device is not None
        self.key = key
        self._process = process
        self._ring = Ring(
            key,
            allocate or partial(DeviceMemory, device=device),
            process.send,
            slots=SLOTS,
            fewest=FEWEST_SLOTS,
            budget=BYTES_PER_STREAM,
            ahead=AHEAD,
        )
        self._changed = threading.Condition()
        self._newest: Came | None = None
        self._others: deque[Wanted | Missed] = deque()
        self._look: Look | None = None
        self._end: Over | None = None

    def hear(self, content: Any) -> None:
        with self._changed:
            if isinstance(content, Came):
                if self._newest is not None:
                    # At once: who reads may be a long time coming, and the decoder wants places.
                    self._process.send(Back(self.key, [self._newest.slot]))
                    self._others.append(Missed(self.key, self._newest.received, "superseded"))
                self._newest = content
                self._look = content.look or self._look
            elif isinstance(content, Over):
                self._end = content
            else:
                self._others.append(content)
            self._changed.notify()

    def arrivals(self, stop: threading.Event) -> Generator[Arrival]:
        """Until it is over. Raises what the connection does, and UnfitError with its reason alone."""
        while not stop.is_set():
            with self._changed:
                self._changed.wait_for(
                    lambda: self._newest or self._others or self._end is not None, _TICK_SECONDS
                )
                others, self._others = self._others, deque()
                newest, self._newest = self._newest, None
                look, end = self._look, self._end
            self._ring.settle(wait=False)
            for each in others:
                if isinstance(each, Wanted):
                    self._lend(each.picture_bytes)
                else:
                    yield Arrival(frame=None, pts_seconds=None, received=each.received, dropped=each.dropped)
            if newest is not None:
                assert look is not None
                yield Arrival(
                    frame=self._frame(newest, look),
                    pts_seconds=newest.pts_seconds,
                    received=newest.received,
                    frame_rate=newest.frame_rate,
                )
            elif end is not None:
                self._finish(end)
                return
            elif not others:
                self._process.check()

    def close(self) -> None:
        """Its memory stays until the other process has let go of it, or is no more."""
        with self._changed:
            if self._end is not None:
                self._ring.forget()
        self._process.send(Close(self.key))

    def _finish(self, end: Over) -> None:
        if end.unfit:
            raise UnfitError("this stream", end.unfit)
        if end.failure is not None:
            raise end.failure

    def _lend(self, picture_bytes: int) -> None:
        try:
            self._ring.lend(picture_bytes)
        except EngineError as error:
            raise SourceError(f"{error}: decode in the main process (--decoders 0)") from None

    def _frame(self, came: Came, look: Look) -> Frame:
        nv12, ready = self._ring.take(came.slot, came.rows, came.width, copied=look.turn != Turn())
        return frame_of(upright(nv12, look.turn), look, index=0, pts_seconds=0.0, source=0, ready=ready)


class Remote:
    """`Connect` for a source that is read and decoded in another process if NVDEC can decode it; else here.

    connect: as it would be here. Its `nvdec.strict` says that there is no else: then UnfitError is raised.
    """

    def __init__(self, connect: Network | Replay, decoders: LiveDecoders) -> None:
        self.ends = connect.ends
        self._connect, self._decoders = connect, decoders
        self._unfit = False

    @property
    def decoder(self) -> str:
        return self._connect.decoder

    def __call__(self, stop: threading.Event) -> Generator[Arrival]:
        if not self._unfit:
            try:
                yield from self._elsewhere(stop)
                return
            except UnfitError as unfit:
                if self._connect.nvdec.strict:
                    raise
                self._connect.decoder = f"CPU, because {unfit.reason}"
                self._unfit = True
        yield from self._connect(stop)

    def _elsewhere(self, stop: threading.Event) -> Generator[Arrival]:
        link = self._decoders.open(self._connect)
        try:
            yield from link.arrivals(stop)
        finally:
            link.close()
