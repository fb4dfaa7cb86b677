"""The threads a front end works in, beside its caller's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import torch


def start_workers(count: int) -> ThreadPoolExecutor:
    """`count` threads, all begun, in which torch computes without helpers.

    A helper that waits for a core, because the runtime's own threads are busy on it, makes a small operation
    last milliseconds instead of microseconds. torch keeps the number per thread, once the thread has asked
    for it, but setting it also changes what later threads begin with: that is put back.
    """
    before = torch.get_num_threads()
    workers = ThreadPoolExecutor(count, thread_name_prefix="frontend")
    together = Barrier(count)  # nobody is done before everybody has begun
    for begun in [workers.submit(_compute_alone, together) for _ in range(count)]:
        begun.result()
    torch.set_num_threads(before)
    return workers


def _compute_alone(together: Barrier) -> None:
    together.wait()
    torch.get_num_threads()
    torch.set_num_threads(1)
