"""Stories of the progress display: what stands on a terminal, in a log, and where silence was asked for."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable

import pytest
from rich.console import Console

from tracker.progress import Progress, stage_table


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def run(
    total: int | None, frames: int, *, stream: io.TextIOBase, quiet: bool = False, warn_at: int | None = None
) -> None:
    """Ten frames a second, with as many objects as tens of frames."""
    clock = FakeClock()
    with Progress(total, quiet, stream, clock=clock) as progress:  # type: ignore[arg-type]
        for done in range(1, frames + 1):
            clock.now = 100 + done / 10
            progress.update(done, done // 10, "clip[1].mp4")
            if done == warn_at:
                progress.warn("2 frames are corrupt [bold]")


@pytest.mark.parametrize(
    ("total", "frames", "lines"),
    [
        (120, 120, ["50/120 frames, 10.0 fps, 5 objects, 0:07 left",
                    "100/120 frames, 10.0 fps, 10 objects, 0:02 left",
                    "120/120 frames in 0:12, 10.0 fps"]),
        (None, 60, ["50 frames, 10.0 fps, 5 objects", "60 frames in 0:06, 10.0 fps"]),
        (100_000, 50, ["50/100000 frames, 10.0 fps, 5 objects, 2:46:35 left",
                       "50/100000 frames in 0:05, 10.0 fps"]),
        (40, 1, ["1/40 frames in 0:00, 10.0 fps"]),
        (40, 0, []),
    ],
)  # fmt: skip
def test_a_log_gets_a_line_every_five_seconds_and_one_at_the_end(
    total: int | None, frames: int, lines: list[str]
) -> None:
    log = io.StringIO()
    run(total, frames, stream=log)
    assert log.getvalue().splitlines() == [f"clip[1].mp4: {line}" for line in lines]


def test_the_speed_shown_is_that_of_the_last_seconds() -> None:
    log, clock = io.StringIO(), FakeClock()
    with Progress(None, stream=log, clock=clock) as progress:
        for done in range(1, 16):
            clock.now += 5  # four slow intervals, then frames come by the thousand
            progress.update(done if done < 5 else done * 1000, 1, "clip")
    assert [re.search(r"([\d.]+) fps", line)[1] for line in log.getvalue().splitlines()[2:7]] == [  # type: ignore[index]
        "0.2", "0.2", "999.2", "200.0", "200.0",
    ]  # fmt: skip


def test_quiet_says_nothing_but_what_was_lost() -> None:
    log = io.StringIO()
    run(120, 120, stream=log, quiet=True, warn_at=60)
    assert log.getvalue() == "warning: 2 frames are corrupt [bold]\n"


def test_a_warning_is_one_line_of_the_log() -> None:
    log = io.StringIO()
    run(120, 60, stream=log, warn_at=10)
    assert log.getvalue().splitlines()[0] == "warning: 2 frames are corrupt [bold]"


def test_a_log_file_gets_no_bar_even_where_colour_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    log = io.StringIO()
    run(120, 60, stream=log)
    assert "\x1b[2K" not in log.getvalue()
    assert len(log.getvalue().splitlines()) == 2


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Does a run on a pseudo-terminal of 100 columns; returns every byte that was sent to it."""
    for name, value in (("TERM", "xterm-256color"), ("COLUMNS", "100"), ("LINES", "30")):
        monkeypatch.setenv(name, value)

    def show(*args: int | None, **options: int | None) -> str:
        control, device = os.openpty()
        with os.fdopen(control, "rb", buffering=0) as screen, os.fdopen(device, "w") as terminal:
            run(*args, stream=terminal, **options)  # type: ignore[arg-type]
            os.write(device, b"END")
            sent = b""
            while not sent.endswith(b"END"):
                sent += screen.read(65536)
        return sent.removesuffix(b"END").decode()

    return show


def test_a_terminal_gets_a_bar_that_ends_with_the_outcome(on_terminal: Callable[..., str]) -> None:
    sent = on_terminal(30, 30)
    drawn = [
        line for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", sent)) if line.strip()
    ]
    assert any(
        re.fullmatch(r"clip\[1\]\.mp4 ━.* 15/30 frames, 10.0 fps, 1 object, 0:0[12] left", d) for d in drawn
    )
    assert re.fullmatch(r"clip\[1\]\.mp4 ━+ 30/30 frames in 0:03, 10.0 fps", drawn[-1])
    assert max(map(len, drawn)) <= 100
    assert sent.count("\x1b[?25l") == sent.count("\x1b[?25h") == 1  # the cursor comes back


def test_a_warning_stands_above_the_bar_as_a_line_of_its_own(on_terminal: Callable[..., str]) -> None:
    sent = on_terminal(30, 30, warn_at=15)
    assert re.search(r"\x1b\[2K(\x1b\[33m)?warning: 2 frames are corrupt \[bold\](\x1b\[0m)?\r\n", sent)


def test_an_interrupted_run_says_how_far_it_came() -> None:
    log, clock = io.StringIO(), FakeClock()
    with pytest.raises(KeyboardInterrupt), Progress(100, stream=log, clock=clock) as progress:
        clock.now += 2
        progress.update(20, 1, "clip")
        raise KeyboardInterrupt
    assert log.getvalue() == "clip: 20/100 frames in 0:02, 10.0 fps\n"


@pytest.mark.parametrize(
    ("row", "wall_seconds", "cells"),
    [
        (("decode", 1.2, 300), 9.0, ["decode", "4.00", "13.3%", "250.0"]),
        (("inference", 9.0, 300), 9.0, ["inference", "30.00", "100.0%", "33.3"]),
        (("sinks", 0.0, 0), 9.0, ["sinks", "–", "0.0%", "–"]),
        (("sinks", 0.0, 0), 0.0, ["sinks", "–", "–", "–"]),
    ],
)
def test_the_closing_table_says_where_the_time_went(
    row: tuple[str, float, int], wall_seconds: float, cells: list[str]
) -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(stage_table([row], wall_seconds))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert re.split(r"\s*│\s*", lines[3])[1:-1] == cells
