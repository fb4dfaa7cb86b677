"""Triton programs launched through CUDA's driver: no C compiler builds a launcher on the user's machine.

What Triton's own launcher does for programs such as ours, by means of NVIDIA's Python binding
(`cuda.bindings.driver`, of cuda-python). See triton/backends/nvidia/driver.c and CUDA's manual, "Execution
Control".
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tracker.errors import EngineError
from tracker.kernels.compile import Kinds, Program, compile_program, specialised

Grid = tuple[int, ...]
Key = tuple[Kinds, tuple[tuple[str, object], ...]]  # of a program: kinds of arguments, options

# Every argument has a slot of 8 bytes: what `struct` calls its type, and what fills it up.
_SLOT = 8
_FORMATS = {"i32": "i4x", "i64": "q", "fp32": "f4x"}
_UNASKED = 48 * 1024  # bytes of shared memory that a block may have without asking


class Launcher:
    """Starts Triton's programs on one device, compiled when they first come.

    driver: `cuda.bindings.driver`. device: index. capability: of it, 90 for sm_90. For any number of threads.
    A program must have run once before it is captured in a CUDA graph: loading it is not for graphs.
    """

    def __init__(self, driver: Any, device: int, capability: int) -> None:
        self._driver, self._device, self._capability = driver, device, capability
        self._kernels: dict[object, _Kernel] = {}
        self._loading = threading.Lock()

    def __call__(
        self,
        kernel: Any,
        grid: Grid,
        arguments: Sequence[object],
        options: Mapping[str, object],
        stream: int,
    ) -> None:
        """Enqueue one launch on a stream of CUDA's, given as its address, and wait for nothing.

        kernel: a function of `kernels.jit`. grid: blocks along x, y and z. arguments: in order, but for the
        compile-time ones, which are among `options` as Triton's own are.
        Raises EngineError where it cannot be compiled, loaded or started.
        """
        known = self._kernels.get(kernel.fn)
        if known is None:
            known = self._kernels.setdefault(kernel.fn, _Kernel.of(kernel))
        kinds, values = specialised(arguments, known.general)
        key = kinds, tuple(options.items())
        loaded = known.loaded.get(key)
        if loaded is None:
            with self._loading:
                loaded = known.loaded.get(key) or known.loaded.setdefault(key, self._load(kernel, key))
        x, y, z = (*grid, 1, 1)[:3]
        if x and y and z:
            self._start(loaded, (x, y, z), values, stream)

    def _start(self, loaded: _Loaded, grid: Grid, values: Sequence[int | float], stream: int) -> None:
        slots, driver = loaded.slots, self._driver
        loaded.format.pack_into(slots.memory, 0, *values)
        how = (loaded.function, *grid, loaded.threads, 1, 1, loaded.shared, stream, slots.addresses, 0)
        answer = driver.cuLaunchKernel(*how)
        if answer[0] == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:  # this thread's first word to CUDA
            self._enter()
            answer = driver.cuLaunchKernel(*how)
        self._ask(answer, f"start {loaded.name}")

    def _load(self, kernel: Any, key: Key) -> _Loaded:
        kinds, options = key
        program = compile_program(kernel, kinds, dict(options), self._capability)
        return self._loaded(program)

    def _loaded(self, program: Program) -> _Loaded:
        driver, doing = self._driver, f"load {program.name}"
        self._enter()
        device = self._ask(driver.cuDeviceGet(self._device), doing)
        module = self._ask(driver.cuModuleLoadData(program.cubin), doing)
        function = self._ask(driver.cuModuleGetFunction(module, program.name.encode()), doing)
        about = driver.CUdevice_attribute
        most = self._ask(
            driver.cuDeviceGetAttribute(about.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device),
            doing,
        )
        if program.shared > most:
            raise EngineError(
                f"{program.name} needs {program.shared} bytes of shared memory, cuda:{self._device} has "
                f"{most} for a block: use a smaller plan"
            )
        if program.shared > _UNASKED:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            preference = driver.CUfunc_cache.CU_FUNC_CACHE_PREFER_SHARED
            self._ask(driver.cuFuncSetCacheConfig(function, preference), doing)
            self._ask(driver.cuFuncSetAttribute(function, attribute, program.shared), doing)
        return _Loaded(
            name=program.name,
            module=module,
            function=function,
            threads=program.threads,
            shared=program.shared,
            format=struct.Struct("=" + "".join(_FORMATS.get(kind, "Q") for kind in program.kinds)),
            slots=_Slots(len(program.kinds) + program.scratch),
        )

    def _enter(self) -> None:
        """Make the device's context, which torch uses too, this thread's where it has none."""
        driver, doing = self._driver, "enter the device's context"
        if not int(self._ask(driver.cuCtxGetCurrent(), doing)):
            device = self._ask(driver.cuDeviceGet(self._device), doing)
            context = self._ask(driver.cuDevicePrimaryCtxRetain(device), doing)
            self._ask(driver.cuCtxSetCurrent(context), doing)

    def _ask(self, answer: Any, doing: str) -> Any:
        """The value of an answer (result, value…). EngineError where it is none."""
        result, *values = answer
        if result == self._driver.CUresult.CUDA_SUCCESS:
            return values[0] if values else None
        name = getattr(result, "name", str(result))
        raise EngineError(
            f"CUDA cannot {doing} on cuda:{self._device} ({name}): look at nvidia-smi, free GPU memory, or "
            "start again if an earlier step has failed on the GPU"
        )


@dataclass(frozen=True, slots=True)
class _Kernel:
    """One function: which arguments are never specialised, and its programs."""

    general: tuple[bool, ...]
    loaded: dict[Key, _Loaded] = field(default_factory=dict)

    @classmethod
    def of(cls, kernel: Any) -> _Kernel:
        return cls(tuple(each.do_not_specialize for each in kernel.params if not each.is_constexpr))


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A program on the device. module: keeps the function. format: of the values in the slots."""

    name: str
    module: Any
    function: Any
    threads: int
    shared: int
    format: struct.Struct
    slots: _Slots


class _Slots(threading.local):
    """Where the driver reads a launch's arguments: in each thread elsewhere, for it runs beside Python.

    memory: the slots, zero where nothing is written. addresses: where an array of their addresses begins.
    """

    def __init__(self, count: int) -> None:
        self.memory = (ctypes.c_uint64 * count)()
        begin = ctypes.addressof(self.memory)
        self._array = (ctypes.c_void_p * count)(*range(begin, begin + count * _SLOT, _SLOT))
        self.addresses = ctypes.addressof(self._array)
