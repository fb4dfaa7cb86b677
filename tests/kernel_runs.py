"""Where the tests of GPU kernels run them: in Triton's interpreter anywhere, and on the GPU if there is one.

The interpreter needs TRITON_INTERPRET=1 before Triton is first imported, so it has a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from typing import Any

import pytest
import torch
from torch import Tensor

PLACES = ["interpreter", "gpu"]
Run = Callable[..., Any]  # (function, *arguments, **options): what it gives for tensors that lie there


def run_at(request: pytest.FixtureRequest) -> Run:
    """Calls a function where the fixture's parameter says; skips, with words, where that is impossible."""
    if request.param == "gpu":
        device: torch.device = request.getfixturevalue("gpu")
        return lambda function, *arguments, **options: _moved(
            function(*_moved(arguments, device), **_moved(options, device)), torch.device("cpu")
        )
    triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        pytest.skip(f"Triton {triton.__version__}'s interpreter fails beside NumPy 2.4; 3.7's does not")
    pool = _interpreter()
    return lambda function, *arguments, **options: pool.submit(_call, function, arguments, options).result()


@lru_cache(maxsize=1)
def _interpreter() -> ProcessPoolExecutor:
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        pool.submit(int).result()  # by now it has its environment
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before
    return pool


def _call(function: Run, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    torch.set_num_threads(1)
    return function(*arguments, **options)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        whole = value.as_strided((value.untyped_storage().nbytes() // value.itemsize,), (1,), 0)
        return whole.to(device).as_strided(value.shape, value.stride(), value.storage_offset())
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value
