"""What is done for one source after detection, and the process that does it for some of them.

Started by `crew` as `work()` in an interpreter of its own. It reads batches from its standard input and
answers on its standard output until the input ends; it opens no file and keeps nothing but its tracks.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from time import perf_counter
from typing import Any, NamedTuple

from tracker import wire
from tracker.children import pipes_here
from tracker.errors import TrackerError
from tracker.types import Association, Detections, Frame, Tracks

# Masks stay in the process that owns their device: see `crew`.
DETECTION_COLUMNS = tuple(field.name for field in fields(Detections) if field.name != "mask")
TRACK_COLUMNS = tuple(field.name for field in fields(Tracks) if field.name not in ("names", "mask"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Duty:
    """What is to be done for one source. Another process must be able to import both kinds of function.

    name: of the source, for messages. associate: starts its association. lines_of: words a frame, for each
    text result. frame_rate: of a live source, whose frames are as far apart as their times say, not their
    numbers; None for one whose frames are all there. masks: whether its detections have them, so that only
    the process that has them too can word a frame.
    """

    name: str
    associate: Callable[[], Association]
    lines_of: tuple[Callable[[Frame, Tracks], str], ...] = ()
    frame_rate: float | None = None
    masks: bool = False


class Post:
    """A duty being done, frame after frame.

    associate_seconds, format_seconds: spent so far.
    """

    def __init__(self, duty: Duty) -> None:
        self.association = duty.associate()
        self._lines_of = duty.lines_of
        self._frame_rate = duty.frame_rate
        self._size: tuple[int, int] | None = None
        self.associate_seconds = self.format_seconds = 0.0

    def follow(self, frame: Frame, detections: Detections) -> tuple[Tracks, tuple[bytes, ...]]:
        """The frame's tracks, and its lines for each text result."""
        begun = perf_counter()
        if self._size not in (None, frame.size):  # of the same view: a camera was set to another one
            self.association.rescale(frame.size[0] / self._size[0], frame.size[1] / self._size[1])
        self._size = frame.size
        moment = frame.index if self._frame_rate is None else frame.pts_seconds * self._frame_rate
        tracks = self.association.update(moment, detections).with_masks(detections)
        associated = perf_counter()
        texts = tuple(lines_of(frame, tracks).encode() for lines_of in self._lines_of)
        self.associate_seconds += associated - begun
        self.format_seconds += perf_counter() - associated
        return tracks, texts


class Task(NamedTuple):
    """A frame without its image; its detections travel beside it."""

    source: int
    frame_index: int
    pts_seconds: float
    size: tuple[int, int]
    received: float | None


class Done(NamedTuple):
    """A frame's outcome; its tracks travel beside it. names: None for those of its source's last frame."""

    texts: tuple[bytes, ...]
    confirmed: int
    names: tuple[str, ...] | None


class Answer(NamedTuple):
    """To one message of tasks: those done, in order, and what kept the next one from being done.

    associate_seconds, format_seconds: spent on this message.
    """

    done: list[Done]
    failure: TrackerError | None
    associate_seconds: float
    format_seconds: float


class Worker:
    """Answers messages. duties: by source."""

    def __init__(self, duties: Mapping[int, Duty]) -> None:
        self._duties = dict(duties)
        self._posts: dict[int, Post] = {}
        self._names: dict[int, tuple[str, ...]] = {}

    def change(self, duties: Mapping[int, Duty | None]) -> None:
        """Take on duties, by source, and give up those that are None."""
        for source, duty in duties.items():
            for of_source in (self._duties, self._posts, self._names):
                of_source.pop(source, None)
            if duty is not None:
                self._duties[source] = duty

    def answer(
        self, tasks: Sequence[Task], arrays: Sequence[wire.Array | None]
    ) -> tuple[Answer, list[wire.Array | None]]:
        """What became of the tasks, and the columns of their tracks."""
        associated, formatted = self._seconds()
        done: list[Done] = []
        columns: list[wire.Array | None] = []
        failure = None
        width = len(DETECTION_COLUMNS)
        for number, task in enumerate(tasks):
            try:
                tracks, outcome = self._do(task, arrays[width * number : width * (number + 1)])
            except Exception as error:
                failure = self._explain(error, task)
                break
            done.append(outcome)
            columns += [getattr(tracks, name) for name in TRACK_COLUMNS]
        associated_now, formatted_now = self._seconds()
        return Answer(done, failure, associated_now - associated, formatted_now - formatted), columns

    def _do(self, task: Task, columns: Sequence[Any]) -> tuple[Tracks, Done]:
        post = self._posts.get(task.source)
        if post is None:
            post = self._posts[task.source] = Post(self._duties[task.source])
        frame = Frame(
            source=task.source,
            index=task.frame_index,
            pts_seconds=task.pts_seconds,
            size=task.size,
            received=task.received,
        )
        detections = Detections(**dict(zip(DETECTION_COLUMNS, columns, strict=True)))
        tracks, texts = post.follow(frame, detections)
        known = self._names.get(task.source) == tracks.names
        self._names[task.source] = tracks.names
        return tracks, Done(texts, post.association.confirmed, None if known else tracks.names)

    def _seconds(self) -> tuple[float, float]:
        posts = self._posts.values()
        return sum(post.associate_seconds for post in posts), sum(post.format_seconds for post in posts)

    def _explain(self, error: Exception, task: Task) -> TrackerError:
        """The error in words, with its traceback as a note for those who debug."""
        if isinstance(error, TrackerError):
            told = error
        else:
            where = f"frame {task.frame_index + 1} of {self._duties[task.source].name}"
            if isinstance(error, MemoryError):
                words = f"a worker process ran out of memory at {where}: track fewer sources at once"
            else:
                reason = f"{type(error).__name__}: {error}".rstrip(": ")
                words = f"a worker process failed at {where}: {reason}; this is a bug, please report it"
            told = TrackerError(words)
        told.add_note("".join(traceback.format_exception(error)))
        return told


def work() -> None:
    """The whole life of a worker process."""
    requests, answers = pipes_here()
    with suppress(BrokenPipeError):  # nobody wants to know any more
        try:
            message = wire.read(requests)
        except Exception as error:  # what the duties name cannot be imported here
            failure = TrackerError(f"a worker process could not start: {type(error).__name__}: {error}")
            failure.add_note(traceback.format_exc())
            wire.write(answers, Answer([], failure, 0.0, 0.0))
            return
        worker = Worker({} if message is None else message[0])
        while (message := wire.read(requests)) is not None:
            content, arrays = message
            if isinstance(content, dict):
                worker.change(content)
            else:
                wire.write(answers, *worker.answer(content, arrays))
