"""Who follows the objects of the sources: this process alone, or several beside it.

One frame's association is some hundred NumPy calls in a row, which keep Python to themselves. For one
source they fit between two frames. Several sources on a GPU leave them less time than they take, so they
go to other processes: each source belongs to one of them, all work at once, and what this process keeps is
to hand detections over and to take tracks back.

Not `multiprocessing`: its children import the caller's main module again, so that a plain script that calls
`tracker.track` would start itself over and over; and a fork would take a CUDA context along.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

from tracker import wire
from tracker.crew_worker import DETECTION_COLUMNS, TRACK_COLUMNS, Answer, Duty, Post, Task
from tracker.errors import TrackerError
from tracker.types import Detections, Frame, Outcome, Tracks

# Cores that leave one to a worker process. At 2,500 frames a second association takes about one core in
# all, while decoding and the front end want the others.
CORES_PER_WORKER = 4

# A worker ends within milliseconds after its input has; one that does not is ended.
GRACE_SECONDS = 5.0

# Of numerical libraries: a worker's arrays are far too small for helpers.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class LocalCrew:
    """All sources in this process, one frame after another. Implements `types.Crew`."""

    def __init__(self, duties: Sequence[Duty]) -> None:
        self._posts = [Post(duty) for duty in duties]

    @property
    def associate_seconds(self) -> float:
        return sum(post.associate_seconds for post in self._posts)

    @property
    def format_seconds(self) -> float:
        return sum(post.format_seconds for post in self._posts)

    def associate(self, frames: Sequence[Frame], found: Sequence[Detections]) -> Iterator[Outcome]:
        """This very batch, frame after frame as they are asked for."""
        for frame, detections in zip(frames, found, strict=True):
            post = self._posts[frame.source]
            tracks, texts = post.follow(frame, detections)
            yield Outcome(frame, tracks, texts, post.association.confirmed)

    def finish(self) -> Iterator[Outcome]:
        return iter(())


class ProcessCrew:
    """Source k in process k % processes. Implements `types.Crew`; enter before, leave after.

    They work on one batch while this process waits for the next one's detections: `associate` gives the
    batch before. An error of one comes out as a TrackerError where its frame would have, after all good
    frames before it; so does its death. Whatever happens here, the processes end when their input does,
    and leaving sees to it.
    """

    def __init__(self, duties: Sequence[Duty], processes: int) -> None:
        self._duties = duties
        self._count = min(processes, len(duties))
        self._members: list[_Member] = []
        self._frames: Sequence[Frame] = ()  # under way
        self._names: list[tuple[str, ...]] = [() for _ in duties]
        self._stack = ExitStack()
        self.associate_seconds = self.format_seconds = 0.0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for first in range(self._count):
                duties = {k: self._duties[k] for k in range(first, len(self._duties), self._count)}
                self._members.append(stack.enter_context(_Member(duties)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        for member in self._members:  # all first, so that they end side by side
            member.dismiss()
        self._stack.close()

    def associate(self, frames: Sequence[Frame], found: Sequence[Detections]) -> Iterator[Outcome]:
        # Answers are taken before new tasks are given: both ends of two full pipes would wait for ever.
        outcomes = self.finish()
        shares: list[list[tuple[Frame, Detections]]] = [[] for _ in self._members]
        for pair in zip(frames, found, strict=True):
            shares[pair[0].source % self._count].append(pair)
        for member, share in zip(self._members, shares, strict=True):
            if share:
                member.give(share)
        self._frames = frames
        return outcomes

    def finish(self) -> Iterator[Outcome]:
        frames, self._frames = self._frames, ()
        answers = {}
        for number in {frame.source % self._count for frame in frames}:
            answer, columns = self._members[number].answer()
            self.associate_seconds += answer.associate_seconds
            self.format_seconds += answer.format_seconds
            answers[number] = deque(answer.done), iter(columns), answer.failure
        return self._in_order(frames, answers)

    def _in_order(self, frames: Sequence[Frame], answers: dict[int, Any]) -> Iterator[Outcome]:
        for frame in frames:
            done, columns, failure = answers[frame.source % self._count]
            if not done:
                raise failure
            texts, confirmed, names = done.popleft()
            if names is not None:
                self._names[frame.source] = names
            arrays = {name: next(columns) for name in TRACK_COLUMNS}
            tracks = Tracks(**arrays, names=self._names[frame.source])
            yield Outcome(frame, tracks, texts, confirmed)


class _Member:
    """One worker process and the pipes to it. duties: by source."""

    def __init__(self, duties: dict[int, Duty]) -> None:
        self._duties = duties

    def __enter__(self) -> Self:
        try:
            # -P: no module of the working directory may stand in for one of Python's, unless it does so here
            # too; what this process can import, the worker can.
            places = [place or str(Path.cwd()) for place in sys.path]
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", "from tracker.crew_worker import work; work()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                env={**os.environ, **_ONE_THREAD, "PYTHONPATH": os.pathsep.join(places)},
                # Ctrl-C on a terminal goes to the whole group: only the main process shall hear it.
                process_group=0 if os.name == "posix" else None,
            )
        except OSError as error:
            raise TrackerError(
                f"cannot start a worker process ({error}): --workers 0 runs without them"
            ) from error
        self._tasks: Any = self._process.stdin
        self._answers: io.BufferedReader[Any] = io.BufferedReader(self._process.stdout)
        try:
            self._send(self._duties)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.dismiss()
        try:
            self._process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def dismiss(self) -> None:
        """Close both pipes, which ends the process."""
        self._tasks.close()
        self._answers.close()

    def give(self, share: Sequence[tuple[Frame, Detections]]) -> None:
        """Hand frames over; one `answer` is to be taken before the next are."""
        tasks = [Task(frame.source, frame.index, frame.pts_seconds, frame.size) for frame, _ in share]
        self._send(tasks, [getattr(found, name) for _, found in share for name in DETECTION_COLUMNS])

    def answer(self) -> tuple[Answer, Sequence[wire.Array | None]]:
        """What became of them; of a process that died, why there is nothing."""
        message = wire.read(self._answers)
        if message is None:
            return Answer([], self._death(), 0.0, 0.0), ()
        return message

    def _send(self, content: Any, arrays: Sequence[wire.Array | None] = ()) -> None:
        with suppress(BrokenPipeError):  # it died: why, its missing answer will tell
            wire.write(self._tasks, content, arrays)

    def _death(self) -> TrackerError:
        try:
            code = self._process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        names = ", ".join(duty.name for duty in self._duties.values())
        if code == -signal.SIGKILL:
            how = "was killed, as a system does when memory runs out: track fewer sources at once"
        elif code < 0:
            how = f"was ended by {signal.Signals(-code).name}: try again"
        else:
            how = f"ended with code {code}: try again"
        return TrackerError(
            f"the worker process for {names} {how}, or without worker processes (--workers 0)"
        )
