"""CUDA graphs: work that is the same every time, captured once for each batch size, then replayed.

Knows when to capture and when not to; what the work does, its owner knows. On devices without CUDA graphs
the work simply runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")

WARM_UPS = 2  # libraries choose algorithms and allocate at first, and update their state after new shapes

# CUDA refuses to wait for a device while any of its streams is being captured, and to begin a capture torch
# does wait for it: two threads must not capture at once.
_capturing = threading.Lock()


class Graphs(Generic[T]):
    """`work(batch)` behind one CUDA graph per batch size; for one thread at a time.

    work: enqueues on torch's current stream and waits for nothing, reads and writes the same memory each
        time, and does the same for the same batch size. What it returned when it was captured is returned
        again by each replay, and holds new values until the next call.
    problem: why the work cannot be captured and runs plainly, None where it can. Known after the first call.

    The first call with a batch size warms up and captures, and waits for the device; later ones never wait.
    Inside somebody else's capture the work runs plainly and becomes part of it.
    """

    def __init__(self, work: Callable[[int], T], device: torch.device) -> None:
        self._work = work
        self._device = device
        self._captured: dict[int, tuple[torch.cuda.CUDAGraph, T]] = {}
        self._pool: Any = None  # memory of all graphs here: they never run at the same time
        self.problem = None if device.type == "cuda" else f"no CUDA graphs on {device.type}"

    def __call__(self, batch: int) -> T:
        """Raises what the work raises when it runs plainly."""
        if batch not in self._captured:
            if self.problem is not None or torch.cuda.is_current_stream_capturing():
                return self._work(batch)
            try:
                self._captured[batch] = self._capture(batch)
            except _NotCapturableError as error:
                self.problem = str(error)
                return self._work(batch)
        graph, answer = self._captured[batch]
        graph.replay()
        return answer

    def _capture(self, batch: int) -> tuple[torch.cuda.CUDAGraph, T]:
        with _capturing, torch.cuda.device(self._device):
            aside = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            current = torch.cuda.current_stream(self._device)
            aside.wait_stream(current)
            with torch.cuda.stream(aside):
                for _ in range(WARM_UPS):
                    self._work(batch)
            graph = torch.cuda.CUDAGraph()
            try:
                # "thread_local": other threads may go on allocating and launching meanwhile.
                with torch.cuda.graph(graph, self._pool, aside, capture_error_mode="thread_local"):
                    answer = self._work(batch)
            except Exception as error:  # torch's, TensorRT's behind ours, a compiler's: all mean the same
                raise _NotCapturableError(first_line(error)) from error
            self._pool = graph.pool()
            current.wait_stream(aside)
            return graph, answer


class _NotCapturableError(Exception):
    """The work itself ran, but not under capture."""


def first_line(error: BaseException) -> str:
    """What it says without the advice that torch adds below."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
