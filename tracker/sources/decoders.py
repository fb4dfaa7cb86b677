"""Files that NVDEC decodes in processes of their own, a few frames ahead.

Decoding one frame takes a dozen calls into libraries. Each lets go of Python's lock and must get it back;
with eight files in one process everybody waits for it (1,120 to 1,290 frames a second, where engine and
decoders alone do 7,150 and 2,000). So, as with association, what this process keeps is to hand over and to
take back: pictures come by number, in memory of this process that theirs writes into.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, Self

from tracker.children import Child
from tracker.errors import EngineError, SourceError, TrackerError
from tracker.sources.decode_worker import Ended, Picture, Pictures, Wanted
from tracker.sources.nvdec import NvdecFile, frame_of, upright
from tracker.sources.planes import Turn
from tracker.sources.ring import Ring
from tracker.sources.shared_memory import Allocate, DeviceMemory
from tracker.types import Frame, FrameCounts, Source

# Up to this many files, threads of the main process decode as fast.
FEW_FILES = 2
# Eight 1080p files on an H200: 1,366 fps in the main process; 2,437 with two others, 2,025 with four, 2,597
# with eight. Each takes half a gigabyte of the GPU's memory for its CUDA context.
FILES_PER_DECODER = 4
# A decoding process keeps about a core busy; association, lanes and the system want the others.
CORES_PER_DECODER = 4

# Pictures of one file that may be somewhere between its decoder and whoever tracks, within a budget of
# memory; and how many of them the decoder is left with to work ahead, when frames are kept for long.
SLOTS, FEWEST_SLOTS = 32, 8
BYTES_PER_FILE = 128 << 20
AHEAD = 8


def processes_for(files: int, cores: int) -> int:
    """How many pay, where nobody says."""
    if files <= FEW_FILES:
        return 0
    return min(-(-files // FILES_PER_DECODER), cores // CORES_PER_DECODER)


class Decoders:
    """File k of those for NVDEC in process k % processes. Enter before the sources, leave after them.

    sources: in order, those given, but with a `RemoteFile` for each `NvdecFile`. With 0 processes just those
    given. allocate: memory that a child can open; the device's where nobody says.
    Raises TrackerError on entering where no process can be started. One that dies ends its own sources only.
    """

    def __init__(
        self, sources: Sequence[Source], processes: int, *, allocate: Allocate | None = None
    ) -> None:
        self.sources = list(sources)
        self._decoding: list[_Process] = []
        files = [(place, file) for place, file in enumerate(sources) if isinstance(file, NvdecFile)]
        for first in range(min(processes, len(files))):
            share = files[first::processes]
            process = _Process([file for _, file in share])
            self._decoding.append(process)
            for place, file in share:
                self.sources[place] = process.remote[file.number] = RemoteFile(file, process, allocate)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for process in self._decoding:
                stack.enter_context(process)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self._decoding:  # all first, so that they end side by side
            process.dismiss()
        self._stack.close()


class _Process:
    """One that decodes. remote: its sources by number."""

    def __init__(self, files: Sequence[NvdecFile]) -> None:
        self._files = files
        self.remote: dict[int, RemoteFile] = {}

    def __enter__(self) -> Self:
        try:
            self._child = Child("tracker.sources.decode_worker")
        except OSError as error:
            raise TrackerError(
                f"cannot start a process to decode in ({error}): --decoders 0 decodes without"
            ) from error
        try:
            self.send([file.unturned() for file in self._files])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._child.leave()
        for source in self.remote.values():
            source.forget()

    def dismiss(self) -> None:
        self._child.dismiss()

    def send(self, content: Any) -> None:
        self._child.send(content)

    def receive(self) -> None:
        """Wait for its next message, and hand that to the source it is for; its death to all."""
        message = self._child.receive()
        if message is not None:
            content = message[0]
            self.remote[content.source].hear(content)
            return
        names = ", ".join(file.name for file in self._files)
        ending = self._child.ending()
        for source in self.remote.values():
            source.hear_of(
                SourceError(
                    f"the process that decodes {names} {ending}, or decode in this process (--decoders 0)"
                )
            )


class RemoteFile:
    """One file that a process decodes: a `Source` that decodes ahead by itself. For one thread at a time.

    A frame's planes lie where the process put them: see `Ring`.

    seconds: spent decoding so far.
    Raises what `NvdecFile` does, and SourceError where the process dies, after all good frames.
    """

    def __init__(self, file: NvdecFile, process: _Process, allocate: Allocate | None) -> None:
        self.name, self.decoder = file.name, file.decoder
        self.counts = FrameCounts()
        self.size = (0, 0)
        self.frame_rate = file.frame_rate
        self.seconds = 0.0
        self._file, self._process = file, process
        self._ring = Ring(
            file.number,
            allocate or partial(DeviceMemory, device=file.device),
            process.send,
            slots=SLOTS,
            fewest=FEWEST_SLOTS,
            budget=BYTES_PER_FILE,
            ahead=AHEAD,
        )
        self._arrived: deque[Picture] = deque()
        self._end: Ended | None = None
        self._first: Frame | None = None

    def __enter__(self) -> Self:
        self._first = self._next()
        assert self._first is not None, "a file without a picture ends in an error"
        self.size = self._first.size
        return self

    def __exit__(self, *exc: object) -> None:
        self._first = None
        self._arrived.clear()

    def __iter__(self) -> Iterator[Frame]:
        while True:
            frame, self._first = self._first, None
            frame = frame or self._next()
            if frame is None:
                return
            self.counts.decoded += 1
            yield frame

    def hear(self, content: Any) -> None:
        """A message about it."""
        if isinstance(content, Pictures):
            self._arrived += content.pictures
            self.frame_rate, self.counts.declared = content.frame_rate, content.declared
        elif isinstance(content, Wanted):
            self._lend(content.picture_bytes)
        else:
            self._end = content

    def hear_of(self, failure: TrackerError) -> None:
        """No message will come any more."""
        self._end = self._end or Ended(self._file.number, replace(self.counts), self.seconds, failure)

    def forget(self) -> None:
        """The memory, which nobody writes to any more: frames that are kept keep it."""
        self._ring.forget()

    def _next(self) -> Frame | None:
        self._ring.settle(wait=False)
        while not self._arrived:
            if self._end is not None:
                self._finish(self._end)
                return None
            # The process must have places left, or both would wait.
            self._ring.settle(wait=True)
            self._ring.give_back()
            self._process.receive()
        picture = self._arrived.popleft()
        self.counts.corrupt, self.counts.missing = picture.corrupt, picture.missing
        self.seconds = picture.seconds
        return self._frame(picture)

    def _finish(self, end: Ended) -> None:
        self.counts.corrupt, self.counts.missing = end.counts.corrupt, end.counts.missing
        self.seconds = end.seconds
        if end.failure is not None:
            raise end.failure

    def _frame(self, picture: Picture) -> Frame:
        turn = self._file.look.turn
        nv12, ready = self._ring.take(picture.slot, picture.rows, picture.width, copied=turn != Turn())
        return frame_of(
            upright(nv12, turn),
            self._file.look,
            index=picture.frame_index,
            pts_seconds=picture.pts_seconds,
            source=self._file.number,
            ready=ready,
        )

    def _lend(self, picture_bytes: int) -> None:
        try:
            self._ring.lend(picture_bytes)
        except EngineError as error:
            self.hear_of(SourceError(f"{self.name}: {error}: decode in this process (--decoders 0)"))
