"""How long work is shown to go on: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

Tell = Callable[[str, float, float | None], None]


@contextmanager
def shown(
    name: str, *columns: ProgressColumn, line_seconds: float, worded: Callable[[float, float | None], str]
) -> Iterator[Tell]:
    """On standard error, while inside: what goes on, how much is done, and of how much, None if unknown.

    columns: beside the bar. line_seconds: between lines where there is no terminal. worded: how much is done,
    behind what is done, in such a line.
    """
    begun = due = monotonic()
    console = Console(stderr=True, highlight=False)
    ends = TimeElapsedColumn(), TextColumn("{task.description}", markup=False)
    bar = Progress(
        TextColumn(name, markup=False), BarColumn(), *columns, *ends,
        console=console, transient=True, redirect_stdout=False,
    )  # fmt: skip
    task = bar.add_task("", total=None)

    def on_terminal(what: str, done: float, total: float | None) -> None:
        bar.update(task, description=what, completed=done, total=total)

    def in_lines(what: str, done: float, total: float | None) -> None:
        nonlocal due
        if monotonic() >= due + line_seconds:
            due = monotonic()
            print(f"{name}: {due - begun:.0f} s, {what}{worded(done, total)}", file=sys.stderr)

    if console.is_interactive and sys.stderr.isatty():
        with bar:
            yield on_terminal
    else:
        yield in_lines
