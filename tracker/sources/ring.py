"""Places for one source's pictures, which another process fills and this one reads, over and over.

The memory is the reader's, so that a process that dies takes none along. A frame's planes lie where that
process put them; the place is used again when the last tensor of it dies. Who keeps frames for long gets
copies, so that decoding goes on. Knows tensors and numbers of places; not what is in the pictures.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from tracker.sources.decode_worker import Back, Loan
from tracker.sources.shared_memory import Allocate, Memory

_ALIGNMENT = 256  # of every slot, as CUDA's own of memory


class Ring:
    """For one thread at a time; `Back` and `Loan` are said through `send`.

    number: of the source, for messages. slots, fewest: places at best, and with large pictures, within
    `budget` bytes. ahead: how many of them the decoder is left with, when frames are kept for long.
    """

    def __init__(
        self,
        number: int,
        allocate: Allocate,
        send: Callable[[object], None],
        *,
        slots: int,
        fewest: int,
        budget: int,
        ahead: int,
    ) -> None:
        self._number, self._allocate, self._send = number, allocate, send
        self._slots, self._fewest, self._budget, self._ahead = slots, fewest, budget, ahead
        self._loans: list[_Lent] = []  # the last one is in use; what lies in earlier ones may still be read
        self._copying: deque[tuple[torch.cuda.Event | None, Tensor]] = deque()
        self._stream: torch.cuda.Stream | None = None

    def lend(self, picture_bytes: int) -> None:
        """Memory for pictures of that size; it grows fast, so that a source cannot ask again and again.

        Raises EngineError where there is none, or none that another process can open.
        """
        had = self._loans[-1] if self._loans else None
        slot_bytes = picture_bytes if had is None else max(picture_bytes, 2 * had.slot_bytes)
        slot_bytes += -slot_bytes % _ALIGNMENT
        slots = max(self._fewest, min(self._slots, self._budget // slot_bytes))
        memory = self._allocate(slots * slot_bytes)
        address = memory.address
        first = 0 if had is None else had.first + had.slots
        self._loans.append(_Lent(memory, slot_bytes, first, slots, min(self._ahead, slots // 2)))
        self._send(Loan(self._number, address, slot_bytes, first, slots))

    def take(
        self, slot: int, rows: int, width: int, *, copied: bool
    ) -> tuple[Tensor, torch.cuda.Event | None]:
        """The picture in a place: (rows, width), and what passes when it is there, None if it is.

        copied: whether it is to be changed about anyway, so that its place need not be kept.
        """
        lent = self._lent(slot)
        nv12, ready = lent.tensor(slot, rows, width), None
        self.give_back()
        if copied or lent.out > lent.most:
            nv12, ready = self._copy(nv12)
        return nv12, ready

    def give_back(self) -> None:
        """Several places at once, while there are enough: a message costs more than a picture."""
        if not self._loans:
            return
        lent = self._loans[-1]
        if len(lent.returned) >= (1 if lent.out > lent.most else self._ahead):
            self._send(Back(self._number, lent.take_returned()))

    def settle(self, *, wait: bool) -> None:
        """Let go of the originals of copies that are made; with `wait` of all."""
        while self._copying:
            made, _ = self._copying[0]
            if made is not None and not made.query():  # type: ignore[no-untyped-call]
                if not wait:
                    return
                made.synchronize()
            self._copying.popleft()

    def forget(self) -> None:
        """The memory, which nobody writes to any more: frames that are kept keep it."""
        self._loans.clear()
        self._copying.clear()

    def _lent(self, slot: int) -> _Lent:
        return next(lent for lent in reversed(self._loans) if lent.first <= slot)

    def _copy(self, nv12: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """A copy with a life of its own; the original's place is free once that is made."""
        if self._stream is None and nv12.device.type == "cuda":
            self._stream = torch.cuda.Stream(nv12.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            copy = nv12.clone()
        made = self._stream.record_event() if self._stream else None
        self._copying.append((made, nv12))
        return copy, made


class _Lent:
    """Memory that a process puts pictures into: slots of slot_bytes, numbered from `first`.

    out: slots that the process has filled and not got back. most: so many may be read at leisure.
    returned: numbers of slots whose tensors died, in whatever thread.
    """

    def __init__(self, memory: Memory, slot_bytes: int, first: int, slots: int, ahead: int) -> None:
        self.slot_bytes, self.first, self.slots = slot_bytes, first, slots
        self.out, self.most = 0, slots - ahead
        self.returned: deque[int] = deque()
        self._memory = memory

    def tensor(self, slot: int, rows: int, width: int) -> Tensor:
        self.out += 1
        start = (slot - self.first) * self.slot_bytes
        return self._memory.tensor(start, (rows, width), _Stay(self.returned, slot))

    def take_returned(self) -> list[int]:
        numbers = [self.returned.popleft() for _ in range(len(self.returned))]
        self.out -= len(numbers)
        return numbers


class _Stay:
    """A picture's stay in a slot: kept by the storage of its tensors, over with it."""

    __slots__ = ("_number", "_returned")

    def __init__(self, returned: deque[int], number: int) -> None:
        self._returned, self._number = returned, number

    def __del__(self) -> None:
        self._returned.append(self._number)
