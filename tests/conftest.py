"""Where the real test data and the GPU are, and the one way to do without either."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn

import pytest
from cameras import camera, demo_feed, lossy_camera

if TYPE_CHECKING:
    import torch
    from fake_nvdec import FakeLibrary

__all__ = ["camera", "demo_feed", "lossy_camera"]  # fixtures for all modules

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("TRACKER_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real videos, ground truth and official results; skips when it is not there."""
    if not (DATA / "pets09").is_dir():
        pytest.skip(f"no test data at {DATA}: set TRACKER_DATA to the folder that holds pets09/ and mot17/")
    return DATA


def without_gpu(reason: str) -> NoReturn:
    """Skip what needs a GPU; fail where TRACKER_REQUIRE_GPU=1 says that there is one."""
    (pytest.fail if os.environ.get("TRACKER_REQUIRE_GPU") == "1" else pytest.skip)(reason)
    raise AssertionError


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    """The first CUDA device; skips without one, or fails where TRACKER_REQUIRE_GPU=1."""
    import torch

    if not torch.cuda.is_available():
        without_gpu("needs an NVIDIA GPU: torch sees none")
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def tensorrt(gpu: torch.device) -> ModuleType:
    """TensorRT, on a machine with a GPU; skips without, or fails where TRACKER_REQUIRE_GPU=1."""
    try:
        import tensorrt
    except ImportError as error:
        without_gpu(f"needs TensorRT: {error}")
    return tensorrt


@pytest.fixture(scope="session")
def rtx() -> ModuleType:
    """TensorRT-RTX, or skip: its libraries exist for few platforms."""
    from tracker.errors import EngineError
    from tracker.runtimes.trt import trt_module

    try:
        return trt_module("tensorrt_rtx")
    except EngineError as error:
        pytest.skip(str(error))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    """In PyNvVideoCodec's place."""
    from fake_nvdec import FakeLibrary

    from tracker.sources import nvdec

    fake = FakeLibrary()
    monkeypatch.setattr(nvdec, "_library", lambda: fake)
    return fake


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch on one thread: for small networks more cost more than they save, above all on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
