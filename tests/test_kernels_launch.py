"""How Triton programs are started without a C compiler: arguments, memory, contexts and complaints.

A stand-in for CUDA's driver reads what it is handed as the real one would. The programs are real, compiled
for sm_90; nothing runs but on a GPU.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tracker.errors import EngineError
from tracker.kernels import launch as launching
from tracker.kernels.compile import specialised
from tracker.kernels.driver import Launcher
from tracker.kernels.launch import EXACT, launch

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

SELECT = {"INDEX_BITS": 16, "BLOCK": 1024, "SLOTS": 512, "num_warps": 16, **EXACT}


class Names:
    """Some enumeration of the driver's: each of its names is itself."""

    def __getattr__(self, name: str) -> str:
        return name


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_CONTEXT = 201


class Driver:
    """What `cuda.bindings.driver` offers, and a record of what was asked of it.

    takes: ctypes of the arguments it reads at a launch. answers: results by call that are not success.
    """

    CUresult = CUresult
    CUdevice_attribute = CUfunction_attribute = CUfunc_cache = Names()

    def __init__(self, *takes: Any, answers: dict[str, list[CUresult]] | None = None) -> None:
        self.takes, self.answers = takes, answers or {}
        self.asked: list[str] = []
        self.launches: list[dict[str, Any]] = []
        self.contexts = 0
        self.allowed = 227 * 1024
        self.meanwhile: Callable[[], object] = lambda: None

    def __getattr__(self, name: str) -> Callable[..., tuple[Any, ...]]:
        def call(*arguments: Any) -> tuple[Any, ...]:
            self.asked.append(name)
            planned = self.answers.get(name)
            result = planned.pop(0) if planned else CUresult.CUDA_SUCCESS
            value = getattr(self, f"_{name}", lambda *_: None)(*arguments) if result == 0 else None
            return (result,) if value is None else (result, value)

        return call

    def _cuCtxGetCurrent(self) -> int:  # noqa: N802 (the driver's names)
        return self.contexts

    def _cuDevicePrimaryCtxRetain(self, device: str) -> str:  # noqa: N802
        return f"context of {device}"

    def _cuCtxSetCurrent(self, context: str) -> None:  # noqa: N802
        assert context == "context of device 3"
        self.contexts += 1

    def _cuDeviceGet(self, index: int) -> str:  # noqa: N802
        return f"device {index}"

    def _cuModuleLoadData(self, code: bytes) -> bytes:  # noqa: N802
        assert code.startswith(b"\x7fELF")
        return code

    def _cuModuleGetFunction(self, module: bytes, name: bytes) -> str:  # noqa: N802
        assert name in module
        return name.decode()

    def _cuDeviceGetAttribute(self, attribute: str, device: str) -> int:  # noqa: N802
        assert (attribute, device) == ("CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN", "device 3")
        return self.allowed

    def _cuLaunchKernel(self, function: str, *numbers: int) -> None:  # noqa: N802
        x, y, z, threads, _, _, shared, stream, slots, extra = numbers
        self.meanwhile()
        addresses = (ctypes.c_void_p * len(self.takes)).from_address(slots)
        values = [
            kind.from_address(address).value for kind, address in zip(self.takes, addresses, strict=True)
        ]
        self.launches.append(
            {
                "function": function,
                "grid": (x, y, z),
                "threads": threads,
                "shared": shared,
                "stream": stream,
                "values": values,
            }
        )
        assert extra == 0


POINTER, NUMBER = ctypes.c_uint64, ctypes.c_int32
SELECTS = (POINTER, POINTER, POINTER, NUMBER, NUMBER, POINTER, POINTER)  # the last two are Triton's own


@pytest.fixture
def select() -> Any:
    from tracker.kernels.jit.best import select

    return select


def candidates(capacity: int, limit: int) -> tuple[Tensor, Tensor, Tensor, int, int]:
    keys, chosen = torch.zeros(2, capacity, dtype=torch.int64), torch.zeros(2, limit, dtype=torch.int64)
    return keys, torch.zeros(2, 2, dtype=torch.int32), chosen, capacity, limit


def test_a_launch_hands_over_what_the_program_takes_in_its_order(select: Any) -> None:
    driver = Driver(*SELECTS)
    arguments = candidates(10_003, 500)
    Launcher(driver, 3, 90)(select, (2,), arguments, SELECT, stream=77)
    (start,) = driver.launches
    assert start["function"] == "select"
    assert (start["grid"], start["threads"], start["stream"]) == ((2, 1, 1), 512, 77)
    addresses = [tensor.data_ptr() for tensor in arguments[:3]]
    assert start["values"] == [*addresses, 10_003, 500, 0, 0]


def test_a_program_is_loaded_once_for_each_way_in_which_its_code_differs(select: Any) -> None:
    driver = Driver(*SELECTS)
    launcher = Launcher(driver, 3, 90)
    for capacity in (10_003, 10_007, 5_003):
        launcher(select, (2,), candidates(capacity, 500), SELECT, stream=0)
    assert driver.asked.count("cuModuleLoadData") == 1
    launcher(select, (2,), candidates(10_000, 500), SELECT, stream=0)  # 16 divides it
    launcher(select, (2,), candidates(10_003, 500), SELECT | {"SLOTS": 1024}, stream=0)
    assert driver.asked.count("cuModuleLoadData") == 3
    assert [start["values"][3] for start in driver.launches] == [10_003, 10_007, 5_003, 10_000, 10_003]


def test_a_number_one_is_part_of_the_code_and_not_handed_over(select: Any) -> None:
    driver = Driver(POINTER, POINTER, POINTER, NUMBER, POINTER, POINTER)
    Launcher(driver, 3, 90)(select, (2,), candidates(10_003, 1), SELECT, stream=0)
    assert driver.launches[0]["values"][3:] == [10_003, 0, 0]


def test_a_grid_without_blocks_is_no_launch(select: Any) -> None:
    driver = Driver(*SELECTS)
    Launcher(driver, 3, 90)(select, (0,), candidates(10_003, 500), SELECT, stream=0)
    assert driver.launches == []


def test_a_thread_that_cuda_has_not_seen_enters_the_devices_context_first(select: Any) -> None:
    driver = Driver(*SELECTS)
    launcher = Launcher(driver, 3, 90)
    launcher(select, (2,), candidates(10_003, 500), SELECT, stream=0)
    driver.answers["cuLaunchKernel"] = [CUresult.CUDA_ERROR_INVALID_CONTEXT]
    driver.contexts = 0  # as in a new thread
    launcher(select, (2,), candidates(10_003, 400), SELECT, stream=0)
    assert driver.contexts == 1
    assert [start["values"][4] for start in driver.launches] == [500, 400]


def test_threads_that_launch_at_once_hand_over_each_its_own(select: Any) -> None:
    driver = Driver(*SELECTS)
    launcher = Launcher(driver, 3, 90)
    launcher(select, (2,), candidates(10_003, 500), SELECT, stream=0)
    driver.meanwhile = threading.Barrier(4).wait  # the driver reads when all have written
    work = [
        threading.Thread(target=launcher, args=(select, (2,), candidates(10_003, 500 + turn), SELECT, turn))
        for turn in range(1, 5)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert sorted((start["stream"], start["values"][4]) for start in driver.launches[1:]) == [
        (turn, 500 + turn) for turn in range(1, 5)
    ]


@pytest.mark.parametrize("call", ["cuModuleLoadData", "cuLaunchKernel"])
def test_what_the_driver_refuses_becomes_an_error_with_its_name(select: Any, call: str) -> None:
    driver = Driver(*SELECTS, answers={call: [CUresult.CUDA_ERROR_OUT_OF_MEMORY]})
    with pytest.raises(EngineError, match=r"select on cuda:3 \(CUDA_ERROR_OUT_OF_MEMORY\): look at nvidia-"):
        Launcher(driver, 3, 90)(select, (2,), candidates(10_003, 500), SELECT, stream=0)


def test_a_gpu_with_too_little_shared_memory_is_told_apart(select: Any) -> None:
    driver = Driver(*SELECTS)
    driver.allowed = 16
    with pytest.raises(EngineError, match=r"select needs \d+ bytes of shared memory, cuda:3 has 16"):
        Launcher(driver, 3, 90)(select, (2,), candidates(10_003, 500), SELECT, stream=0)


def test_what_cannot_be_compiled_is_said_with_the_line_and_the_remedy(select: Any) -> None:
    with pytest.raises(EngineError, match=r"cannot compile select for sm_90: .+; the kernels need Triton"):
        Launcher(Driver(), 3, 90)(select, (2,), candidates(10_003, 500), SELECT | {"BLOCK": 1000}, stream=0)


@triton.jit(do_not_specialize=["any_size"])
def _every_kind(half, whole, flag, octet, double_word, odd, size, any_size, one, zero, below, far, share):
    pass


def test_arguments_are_specialised_as_triton_does_it() -> None:
    """Triton's own function for it is no public interface: ours must agree with the installed one."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    tensors = [
        torch.zeros(8, dtype=dtype)
        for dtype in (torch.float16, torch.float32, torch.bool, torch.uint8, torch.int64)
    ]
    odd = torch.zeros(8, dtype=torch.bfloat16)[1:]
    arguments = [*tensors, odd, 1088, 16, 1, 0, -32, 2**31, 0.4]
    general = [each.do_not_specialize for each in _every_kind.params]
    kinds, values = specialised(arguments, general)

    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(_every_kind.signature, _every_kind.params, backend)
    _, theirs, _ = binder(*arguments)
    words = {("constexpr", 1): "1"}
    expected = [words.get(pair, pair[0] + (":16" if pair[1] == "D" else "")) for pair in theirs]
    assert [kind.replace("*i1", "*u1") for kind in kinds] == [kind.replace("*i1", "*u1") for kind in expected]
    assert values == [tensor.data_ptr() for tensor in (*tensors, odd)] + [1088, 16, 0, -32, 2**31, 0.4]


def test_what_is_no_tensor_and_no_number_is_refused() -> None:
    with pytest.raises(TypeError, match="not True"):
        specialised([True], [False])


class WithoutCompiler:
    """A program whose launcher Triton cannot build."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def run(*arguments: object) -> None:
            raise self.error

        return run


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable."),
        FileNotFoundError(2, "No such file or directory", "gcc"),
        subprocess.CalledProcessError(1, ["gcc", "main.c"]),
    ],
)
def test_without_cuda_python_and_without_a_compiler_both_remedies_are_named(error: Exception) -> None:
    with pytest.raises(EngineError, match=r"install cuda-python .+, or gcc and Python's headers"):
        launch(WithoutCompiler(error), (1,), torch.zeros(1))


def test_other_errors_of_triton_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="PassManager"):
        launch(WithoutCompiler(RuntimeError("PassManager::run failed")), (1,), torch.zeros(1))


@pytest.fixture
def forgotten() -> Iterator[None]:
    launching._launcher.cache_clear()
    yield
    launching._launcher.cache_clear()


def test_nvidias_binding_is_what_starts_programs_where_it_is_installed(
    forgotten: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", ModuleType("cuda.bindings.driver"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert isinstance(launching._launcher(0), Launcher)
    launching._launcher.cache_clear()
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    assert launching._launcher(0) is None


def test_no_c_compiler_is_needed(gpu: torch.device, tmp_path: Path) -> None:
    """In a process where none can be found, with an empty cache: Triton's own launcher fails there."""
    pytest.importorskip("cuda.bindings", reason="cuda-python is not installed: pip install cuda-python")
    program = (
        "import torch\n"
        "from tracker.kernels.heads import decode_heads\n"
        "heads = (torch.randn(1, c, 8, 8, device='cuda') for c in (1, 4, 2, 16))\n"
        "print(decode_heads(*heads, logits=True, limit=4).isfinite().all().item())\n"
    )
    environment = os.environ | {"CC": "/nowhere/gcc", "PATH": "/nowhere", "TRITON_CACHE_DIR": str(tmp_path)}
    said = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == "True"
    assert not list(tmp_path.rglob("cuda_utils*"))
