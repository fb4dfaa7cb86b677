"""The thread a front end works in, beside its caller's."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch


def single_worker() -> ThreadPoolExecutor:
    """One thread, in which torch computes without helpers.

    A helper that waits for a core, because the runtime's own threads still spin on it, makes a small
    operation last milliseconds instead of microseconds. torch keeps the number per thread, once the thread
    has asked for it, but setting it also changes what later threads begin with: that is put back.
    """
    before = torch.get_num_threads()
    worker = ThreadPoolExecutor(1, thread_name_prefix="frontend")
    worker.submit(_compute_alone).result()
    torch.set_num_threads(before)
    return worker


def _compute_alone() -> None:
    torch.get_num_threads()
    torch.set_num_threads(1)
