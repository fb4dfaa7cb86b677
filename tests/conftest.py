"""Where the real test data is, and the one way to skip without it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("TRACKER_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of real videos, ground truth and official results; skips when it is not there."""
    if not (DATA / "pets09").is_dir():
        pytest.skip(f"no test data at {DATA}: set TRACKER_DATA to the folder that holds pets09/ and mot17/")
    return DATA


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch on one thread: for small networks more cost more than they save, above all on a busy machine."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
