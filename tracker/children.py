"""Processes beside this one: how they start, are spoken to through pipes, and end.

Not `multiprocessing`: its children import the caller's main module again, so that a plain script that calls
`tracker.track` would start itself over and over; and a fork would take a CUDA context along.
Knows nothing of what they work on.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tracker import wire

# A child ends within milliseconds after its input has; one that does not is ended.
GRACE_SECONDS = 5.0

# Of numerical libraries: a child's arrays are far too small for helpers.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class Child:
    """An interpreter of its own that calls one function, and the pipes to it. `leave` it.

    module, function: what it calls, which reads its pipes through `pipes_here`.
    Raises OSError where no process can be started.
    """

    def __init__(self, module: str, function: str = "work") -> None:
        # -P: no module of the working directory may stand in for one of Python's, unless it does so here
        # too; what this process can import, the child can.
        places = [place or str(Path.cwd()) for place in sys.path]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {module} import {function}; {function}()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, **_ONE_THREAD, "PYTHONPATH": os.pathsep.join(places)},
            # Ctrl-C on a terminal goes to the whole group: only the main process shall hear it.
            process_group=0 if os.name == "posix" else None,
        )
        self._requests: Any = self._process.stdin
        self._answers: io.BufferedReader[Any] = io.BufferedReader(self._process.stdout)

    def send(self, content: Any, arrays: Sequence[wire.Array | None] = ()) -> None:
        with suppress(BrokenPipeError):  # it died: why, `ending` tells once its answers are at their end
            wire.write(self._requests, content, arrays)

    def receive(self) -> tuple[Any, list[wire.Array | None]] | None:
        """Its next answer, waiting for it; None where there will be none."""
        return wire.read(self._answers)

    def finish(self) -> None:
        """Close its input, which ends it once it has said all."""
        self._requests.close()

    def kill(self) -> None:
        """End one that hangs."""
        self._process.kill()

    def dismiss(self) -> None:
        """Close both pipes, which ends it."""
        self._requests.close()
        self._answers.close()

    def leave(self) -> None:
        """Dismiss it and wait until it is gone."""
        self.dismiss()
        self._end()

    def ending(self) -> str:
        """How it ended, and a remedy: what follows "the process …"."""
        code = self._end()
        if code == -signal.SIGKILL:
            return "was killed, as a system does when memory runs out: track fewer sources at once"
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}: try again"
        return f"ended with code {code}: try again"

    def _end(self) -> int:
        try:
            return self._process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def pipes_here() -> tuple[io.BufferedReader[Any], io.RawIOBase]:
    """In a child, once: what it is asked and where it answers.

    From here on it ends with its input alone: whoever interrupts the run means its main process, which will
    close that. What some library prints goes to standard error, not between the answers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    requests: io.BufferedReader[Any] = io.BufferedReader(io.FileIO(0, closefd=False))
    answers = io.FileIO(os.dup(1), "w")
    os.dup2(2, 1)
    return requests, answers
