"""What the command line shows while it works: a bar on a terminal, plain lines elsewhere, times at the end.

Knows counts and clocks; not what is being counted.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table

BAR_SECONDS = 0.1  # between redraws
LINE_SECONDS = 5.0  # between plain lines
SPEED_SECONDS = 5.0  # the speed shown is that of the last seconds, so that it follows the scene


class Progress:
    """Shows how far a run is: `update` after every frame, `warn` at any time. For one thread.

    total: frames expected, None where the source does not say. quiet: show nothing but warnings.
    stream: standard error unless given; what is shown depends on whether it is a terminal.
    clock: seconds, from anywhere.
    """

    def __init__(
        self,
        total: int | None,
        quiet: bool = False,
        stream: TextIO | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._quiet = quiet
        self._console = Console(file=stream or sys.stderr, highlight=False, emoji=False)
        self._bar: Bar | None = None
        # A terminal by rich's opinion (FORCE_COLOR, say) may still be a log file, where a bar is garbage.
        if self._console.is_interactive and self._console.file.isatty() and not quiet:
            self._bar = _bar(self._console)
            self._task = self._bar.add_task("", total=total, name="", status="")
        self._now = (0, 0, "")
        self._clock = clock
        self._start = clock()
        self._marks = deque([(self._start, 0)])
        self._due = float("inf") if quiet else self._start + (0 if self._bar else LINE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        done, _, name = self._now
        if self._quiet or not name:
            return
        seconds = self._clock() - self._start
        text = f"{_frames(done, self._total)} in {_minutes(seconds)}, {done / max(seconds, 1e-9):.1f} fps"
        if self._bar is None:
            self._print(f"{name}: {text}")
            return
        if kind is None and self._total is None:
            self._bar.update(self._task, total=done)
        self._bar.update(self._task, completed=done, name=name, status=text)
        self._bar.stop()

    def update(self, frames_done: int, objects: int, name: str) -> None:
        """frames_done: since the start. objects: tracked in the latest frame. name: of its source."""
        self._now = (frames_done, objects, name)
        now = self._clock()
        if now >= self._due:
            self._show(now)

    def warn(self, text: str) -> None:
        """A line that stays, above the bar; also when quiet, since it tells of something lost."""
        self._print(f"warning: {text}", style="yellow")

    def _show(self, now: float) -> None:
        done, objects, name = self._now
        speed = self._speed(now, done)
        parts = [_frames(done, self._total), f"{speed:.1f} fps", f"{objects} object{'s' * (objects != 1)}"]
        if self._total and self._total > done and speed > 0:
            parts.append(f"{_minutes((self._total - done) / speed)} left")
        text = ", ".join(parts)
        if self._bar is None:
            self._print(f"{name}: {text}")
            self._due = now + LINE_SECONDS
        else:
            self._bar.start()
            self._bar.update(self._task, completed=done, name=name, status=text)
            self._bar.refresh()
            self._due = now + BAR_SECONDS

    def _speed(self, now: float, done: int) -> float:
        """Frames per second since the newest mark that is SPEED_SECONDS old, or since the start."""
        while len(self._marks) > 1 and now - self._marks[1][0] >= SPEED_SECONDS:
            self._marks.popleft()
        then, before = self._marks[0]
        self._marks.append((now, done))
        return (done - before) / max(now - then, 1e-9)

    def _print(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, markup=False, soft_wrap=True)


def stage_table(rows: Sequence[tuple[str, float, int]], wall_seconds: float) -> Table:
    """Where the time went: rows of (stage, seconds in it, frames through it), and the run's wall time.

    Stages overlap, so their shares may add up to more than 100 %; the table says so.
    """
    table = Table("stage", caption="stages overlap")
    for heading in ("ms/frame", "share of wall time", "frames/s"):
        table.add_column(heading, justify="right")
    for stage, seconds, frames in rows:
        each = f"{seconds / frames * 1e3:.2f}" if frames else "–"
        rate = f"{frames / seconds:.1f}" if seconds > 0 else "–"
        table.add_row(stage, each, f"{seconds / wall_seconds:.1%}" if wall_seconds > 0 else "–", rate)
    return table


def _bar(console: Console) -> Bar:
    # Only stderr may be rerouted above the bar: what is printed to stdout may be meant for a file.
    return Bar(
        TextColumn("{task.fields[name]}", markup=False, table_column=Column(no_wrap=True, max_width=24)),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),
        TextColumn("{task.fields[status]}", markup=False, table_column=Column(no_wrap=True)),
        console=console,
        auto_refresh=False,
        redirect_stdout=False,
        expand=True,
    )


def _frames(done: int, total: int | None) -> str:
    return f"{done}/{total} frames" if total else f"{done} frame{'s' * (done != 1)}"


def _minutes(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
