"""Device memory that two processes see: one has it, the other opens what it was told about it.

CUDA's inter-process memory (driver API, "cuIpcGetMemHandle"), by means of NVIDIA's Python binding.
Not torch's own (`torch.multiprocessing.reductions`): a process that is killed leaves its counters as they
were, and the memory with them for as long as the other lives; and blocks of its allocator's expandable
segments cannot be handed over that way.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from tracker.errors import EngineError

_HANDLE_BYTES = 64  # CU_IPC_HANDLE_SIZE
_SMALL = 1 << 21  # what the driver hands out at least


class Memory(Protocol):
    """Bytes that lie in both processes' sight. size: how many."""

    size: int

    @property
    def address(self) -> Address: ...
    def tensor(self, start: int, shape: tuple[int, ...], owner: object = None) -> Tensor:
        """A part of it as uint8. It and all its views keep the memory, and `owner`, alive."""
        ...


class Address(Protocol):
    """Of some memory, to be pickled."""

    def open(self) -> Memory:
        """The same bytes in another process, for as long as the first keeps them."""
        ...


Allocate = Callable[[int], Memory]


class DeviceMemory:
    """Memory of a CUDA device, given back when nothing refers to it any more. See `Memory`.

    Raises EngineError where there is none left, or the device or system cannot share it.
    """

    def __init__(self, size: int, device: torch.device, *, handle: bytes | None = None) -> None:
        """handle: of another process's memory, to be opened here; else it is allocated."""
        self.size, self._device, self._pointer = size, device.index or 0, 0
        self._cuda = _driver()
        self._free = self._cuda.cuMemFree if handle is None else self._cuda.cuIpcCloseMemHandle
        with self._context():
            if handle is None:
                answer, doing = self._cuda.cuMemAlloc(size), f"give {size / 1e6:.0f} MB"
            else:
                shared = self._cuda.CUipcMemHandle()
                ctypes.memmove(int(shared.getPtr()), handle, _HANDLE_BYTES)
                how = int(self._cuda.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS)
                answer = self._cuda.cuIpcOpenMemHandle(shared, how)
                doing = "open another process's memory"
            self._pointer = int(self._ask(answer, doing))

    @property
    def address(self) -> DeviceAddress:
        with self._context():
            shared = self._ask(self._cuda.cuIpcGetMemHandle(self._pointer), "share memory between processes")
        handle = ctypes.string_at(int(shared.getPtr()), _HANDLE_BYTES)
        return DeviceAddress(handle, self.size, self._device)

    def tensor(self, start: int, shape: tuple[int, ...], owner: object = None) -> Tensor:
        view = _View(self, start, shape, owner)
        return torch.as_tensor(view, device=torch.device("cuda", self._device))

    def __del__(self) -> None:
        if getattr(self, "_pointer", 0):
            # A device that is gone has nothing to take back.
            with suppress(Exception), self._context():
                self._free(self._pointer)

    @contextmanager
    def _context(self) -> Iterator[None]:
        """Inside, the device's context, which torch uses too, is this thread's. It lives as long as we do."""
        cuda, doing = self._cuda, "enter the device's context"
        device = self._ask(cuda.cuDeviceGet(self._device), doing)
        self._ask(cuda.cuCtxPushCurrent(self._ask(cuda.cuDevicePrimaryCtxRetain(device), doing)), doing)
        try:
            yield
        finally:
            cuda.cuCtxPopCurrent()

    def _ask(self, answer: Any, doing: str) -> Any:
        """The value of an answer (result, value…). EngineError where it is none."""
        result, *values = answer
        if result == self._cuda.CUresult.CUDA_SUCCESS:
            return values[0] if values else None
        name = getattr(result, "name", str(result))
        raise EngineError(f"CUDA cannot {doing} on cuda:{self._device} ({name})")


@dataclass(frozen=True, slots=True)
class DeviceAddress:
    """See `Address`."""

    handle: bytes
    size: int
    device: int

    def open(self) -> DeviceMemory:
        return DeviceMemory(self.size, torch.device("cuda", self.device), handle=self.handle)


class _View:
    """What torch makes a tensor of ("CUDA Array Interface", numba.readthedocs.io); its storage keeps it."""

    __slots__ = ("__cuda_array_interface__", "_kept")

    def __init__(self, memory: DeviceMemory, start: int, shape: tuple[int, ...], owner: object) -> None:
        self._kept = memory, owner
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": "|u1",
            "data": (memory._pointer + start, False),
            "version": 2,
        }


def sharing_problem(device: torch.device) -> str | None:
    """Why processes cannot share this device's memory, as far as one of them can tell; None if they can."""
    try:
        _ = DeviceMemory(_SMALL, device).address
    except EngineError as error:
        return str(error)
    return None


def _driver() -> Any:
    """CUDA's driver API, initialised."""
    try:
        cuda = importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise EngineError(
            "sharing GPU memory between processes needs cuda-python: install tracker[gpu]"
        ) from error
    try:
        cuda.cuInit(0)
    except RuntimeError as error:  # that is how it says that NVIDIA's driver libraries are missing
        raise EngineError(f"cuda-python finds no NVIDIA driver ({error})") from error
    return cuda
