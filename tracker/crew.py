"""Who follows the objects of the sources: this process alone, or several beside it.

One frame's association is some hundred NumPy calls in a row, which keep Python to themselves. For one
source they fit between two frames. Several sources on a GPU leave them less time than they take, so they
go to other processes: each source belongs to one of them, all work at once, and what this process keeps is
to hand detections over and to take tracks back. Masks are not handed over: they stay where they were found,
and each track is given that of its detection when it comes back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from time import perf_counter
from typing import Any, Self

from tracker import wire
from tracker.children import Child
from tracker.crew_worker import DETECTION_COLUMNS, TRACK_COLUMNS, Answer, Duty, Post, Task
from tracker.errors import TrackerError
from tracker.types import Detections, Frame, Outcome, Tracks

# Cores that leave one to a worker process. At 2,500 frames a second association takes about one core in
# all, while decoding and the front end want the others.
CORES_PER_WORKER = 4


class LocalCrew:
    """All sources in this process, one frame after another. Implements `types.Crew`."""

    def __init__(self, duties: Sequence[Duty]) -> None:
        self._posts = {source: Post(duty) for source, duty in enumerate(duties)}

    def add(self, source: int, duty: Duty) -> None:
        self._posts[source] = Post(duty)

    def remove(self, source: int) -> None:
        """Its seconds go with it."""
        self._posts.pop(source, None)

    @property
    def associate_seconds(self) -> float:
        return sum(post.associate_seconds for post in self._posts.values())

    @property
    def format_seconds(self) -> float:
        return sum(post.format_seconds for post in self._posts.values())

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
        self._words: dict[int, tuple[Callable[[Frame, Tracks], str], ...]] = {}  # of sources with masks
        self._duties = {source: self._share(source, duty) for source, duty in enumerate(duties)}
        # Without duties all are still to come, for as many as there may be.
        self._count = min(processes, len(duties)) if duties else processes
        self._members: list[_Member] = []
        self._under_way: Sequence[tuple[Frame, Detections]] = ()
        self._names: dict[int, tuple[str, ...]] = {}
        self._stack = ExitStack()
        self.associate_seconds = self.format_seconds = 0.0

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for first in range(self._count):
                duties = {k: duty for k, duty in self._duties.items() if k % self._count == first}
                self._members.append(stack.enter_context(_Member(duties)))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        for member in self._members:  # all first, so that they end side by side
            member.dismiss()
        self._stack.close()

    def add(self, source: int, duty: Duty) -> None:
        self._members[source % self._count].change(source, self._share(source, duty))

    def remove(self, source: int) -> None:
        """Not while one of its frames is under way."""
        self._members[source % self._count].change(source, None)
        self._names.pop(source, None)
        self._words.pop(source, None)

    def associate(self, frames: Sequence[Frame], found: Sequence[Detections]) -> Iterator[Outcome]:
        # Answers are taken before new tasks are given: both ends of two full pipes would wait for ever.
        outcomes = self.finish()
        shares: list[list[tuple[Frame, Detections]]] = [[] for _ in self._members]
        pairs = list(zip(frames, found, strict=True))
        for pair in pairs:
            shares[pair[0].source % self._count].append(pair)
        for member, share in zip(self._members, shares, strict=True):
            if share:
                member.give(share)
        self._under_way = pairs
        return outcomes

    def finish(self) -> Iterator[Outcome]:
        pairs, self._under_way = self._under_way, ()
        answers = {}
        for number in {frame.source % self._count for frame, _ in pairs}:
            answer, columns = self._members[number].answer()
            self.associate_seconds += answer.associate_seconds
            self.format_seconds += answer.format_seconds
            answers[number] = deque(answer.done), iter(columns), answer.failure
        return self._in_order(pairs, answers)

    def _share(self, source: int, duty: Duty) -> Duty:
        """A process's part of a duty: all, but not the words for masks, which it does not have."""
        if not duty.masks:
            return duty
        self._words[source] = duty.lines_of
        return replace(duty, lines_of=())

    def _in_order(
        self, pairs: Sequence[tuple[Frame, Detections]], answers: dict[int, Any]
    ) -> Iterator[Outcome]:
        for frame, found in pairs:
            done, columns, failure = answers[frame.source % self._count]
            if not done:
                raise failure
            texts, confirmed, names = done.popleft()
            if names is not None:
                self._names[frame.source] = names
            arrays = {name: next(columns) for name in TRACK_COLUMNS}
            tracks = Tracks(**arrays, names=self._names[frame.source]).with_masks(found)
            if words := self._words.get(frame.source):
                begun = perf_counter()
                texts = tuple(lines_of(frame, tracks).encode() for lines_of in words)
                self.format_seconds += perf_counter() - begun
            yield Outcome(frame, tracks, texts, confirmed)


class _Member:
    """One worker process. duties: by source."""

    def __init__(self, duties: dict[int, Duty]) -> None:
        self._duties = duties

    def __enter__(self) -> Self:
        try:
            self._child = Child("tracker.crew_worker")
        except OSError as error:
            raise TrackerError(
                f"cannot start a worker process ({error}): --workers 0 runs without them"
            ) from error
        try:
            self._child.send(self._duties)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._child.leave()

    def dismiss(self) -> None:
        self._child.dismiss()

    def change(self, source: int, duty: Duty | None) -> None:
        """Another duty, or one less."""
        if duty is None:
            self._duties.pop(source, None)
        else:
            self._duties[source] = duty
        self._child.send({source: duty})

    def give(self, share: Sequence[tuple[Frame, Detections]]) -> None:
        """Hand frames over; one `answer` is to be taken before the next are."""
        tasks = [
            Task(frame.source, frame.index, frame.pts_seconds, frame.size, frame.received)
            for frame, _ in share
        ]
        self._child.send(tasks, [getattr(found, name) for _, found in share for name in DETECTION_COLUMNS])

    def answer(self) -> tuple[Answer, Sequence[wire.Array | None]]:
        """What became of them; of a process that died, why there is nothing."""
        message = self._child.receive()
        if message is None:
            return Answer([], self._death(), 0.0, 0.0), ()
        return message

    def _death(self) -> TrackerError:
        names = ", ".join(duty.name for duty in self._duties.values())
        ending = self._child.ending()
        return TrackerError(
            f"the worker process for {names} {ending}, or without worker processes (--workers 0)"
        )
