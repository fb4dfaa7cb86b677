"""Result files that show whether they are whole: partial until finished, never half a frame.

A result is written as `<stem>.partial<suffix>`, readable at any moment, and takes its final name in one
atomic step when it is whole; so an earlier whole result stands until then. Whatever stops the run, the
partial file ends with the last finished frame. (Only a kill in the very microseconds of a frame's one
write may cut it: the kernel copies more than a page in pieces.)
Knows files and the ways they fail; not what is written into them.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from tracker.errors import SinkError
from tracker.types import Frame, Tracks

LinesOf = Callable[[Frame, Tracks], str]

_REMEDIES = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some of your quota, or write to another disk",
    errno.EACCES: "choose a directory you may write to",
    errno.EPERM: "choose a directory you may write to",
    errno.EROFS: "choose a directory you may write to",
    errno.EEXIST: "move that file away, or choose another directory",
    errno.ENOTDIR: "move the file that stands in the way, or choose another directory",
    errno.EISDIR: "move that directory away, or choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def _explain(path: Path, error: OSError) -> SinkError:
    remedy = _REMEDIES.get(error.errno or 0, "check the disk, or write to another directory")
    return SinkError(f"cannot write {path}: {error.strerror or error}; {remedy}")


class PartialFile:
    """One result file, from its partial name to its final one.

    Parents of the directory are created; a leftover partial file is overwritten. All that is written
    inside one `step` stays, or none of it does. After a failure nothing more is accepted.

    Raises SinkError, with path, reason and remedy, from every method that touches the disk.
    """

    def __init__(self, directory: Path, stem: str, suffix: str) -> None:
        self.final = directory / f"{stem}{suffix}"
        self.partial = directory / f"{stem}.partial{suffix}"
        self.failure: SinkError | None = None
        self._whole = 0  # bytes up to the end of the last finished step
        try:
            directory.mkdir(parents=True, exist_ok=True)
            if self.final.is_dir():  # found out now, not after hours of work
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            self._file = self.partial.open("wb", buffering=0)
        except OSError as error:
            raise _explain(self.final, error) from error

    @property
    def closed(self) -> bool:
        return self._file.closed

    @property
    def empty(self) -> bool:
        """Whether no step has left anything in it."""
        return self._whole == 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the writes of one piece: if one of them fails, the file is cut back to the piece before."""
        if self.failure is not None:
            raise self.failure
        try:
            yield
            self._whole = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            failure = _explain(self.partial, error)
            self._fail(failure)
            raise failure from error
        except SinkError as error:
            self._fail(error)
            raise

    def append(self, data: bytes) -> None:
        """A step of one piece at the end: the same as `write` in a `step`, at a third of its cost."""
        if self.failure is not None:
            raise self.failure
        try:
            self.write(data)
        except OSError as error:
            failure = _explain(self.partial, error)
            self._fail(failure)
            raise failure from error
        self._whole += len(data)

    def write(self, data: bytes) -> int:
        """All of it, or OSError: a file without a buffer may take less than it is given."""
        if self.failure is not None:
            raise self.failure
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self, *, complete: bool) -> None:
        """Give the file its final name, or leave it under the partial one. Closing again changes nothing.

        A file that failed before is never published: complete=True raises its failure again.
        """
        if not self.closed:
            self._finish(publish=complete and self.failure is None)
        if complete and self.failure is not None:
            raise self.failure

    def discard(self) -> None:
        """Close and remove the partial file: there was nothing to write."""
        if not self.closed:
            self._file.close()
            self.partial.unlink(missing_ok=True)

    def _finish(self, *, publish: bool) -> None:
        try:
            if self.failure is None:
                self._file.truncate(self._whole)  # an interrupt may have left half a step
            if publish:
                os.fsync(self._file.fileno())  # else a power cut could leave the final name on an empty file
            self._file.close()
            if publish:
                self.partial.replace(self.final)
        except OSError as error:
            self._file.close()
            self.failure = _explain(self.final if publish else self.partial, error)
            raise self.failure from error

    def _fail(self, failure: SinkError) -> None:
        self.failure = failure
        with suppress(OSError):  # the failure itself is what must be told
            self._file.truncate(self._whole)


class LineSink:
    """A text result: the lines of a frame are written at once, as soon as the frame is finished.

    lines_of: words a frame, newlines included. A function at the top of its module, so that another process
    can be told to call it; what it answers there goes to `append` here.
    """

    def __init__(self, directory: Path, stem: str, *, suffix: str, lines_of: LinesOf) -> None:
        self._file = PartialFile(directory, stem, suffix)
        self.lines_of = lines_of

    def write(self, frame: Frame, tracks: Tracks) -> None:
        """Append one frame. Raises SinkError; then the file ends with the frame before."""
        self.append(self.lines_of(frame, tracks).encode())

    def append(self, lines: bytes) -> None:
        """Append the lines of one frame. Raises SinkError as `write` does."""
        self._file.append(lines)

    def close(self, *, complete: bool) -> None:
        self._file.close(complete=complete)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close(complete=kind is None)
