"""Stories of results: what is in the files, and what is left of them when a run is cut short."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from results import (
    NO_TRACKS,
    ONE_TRACK,
    Number,
    frame_of,
    frames_in,
    masked,
    noise_image,
    small_disk,
    tracks_of,
)

from tracker.errors import ConfigError, SinkError
from tracker.sinks import KINDS, SUFFIXES, MotSink, open_sinks
from tracker.sinks.jsonl import format_line
from tracker.sinks.mot import format_rows
from tracker.sinks.video import FRAMES_BEHIND
from tracker.types import Sink

# What is written


@pytest.mark.parametrize(
    ("frame_number", "rows", "text"),
    [
        (1, (), ""),
        (1, ((1, 10, 20, 30, 45, 0.5, 0),), "1,1,10.0000,20.0000,20.0000,25.0000,0.5000,-1,-1,-1\n"),
        (795, ((70000, -3.5, 0, 1e4, 0.0625, 1, 3),),
         "795,70000,-3.5000,0.0000,10003.5000,0.0625,1.0000,-1,-1,-1\n"),
        (2, ((1, 0, 0, 1, 1, 1, 0), (2, 0, 0, 2, 2, 1, 0)),
         "2,1,0.0000,0.0000,1.0000,1.0000,1.0000,-1,-1,-1\n2,2,0.0000,0.0000,2.0000,2.0000,1.0000,-1,-1,-1\n"),
    ],
)  # fmt: skip
def test_mot_rows_hold_plain_pixels_and_count_from_one(
    frame_number: int, rows: tuple[tuple[Number, ...], ...], text: str
) -> None:
    assert format_rows(frame_number, tracks_of(*rows)) == text


def test_mot_files_number_frames_from_one_and_skip_empty_ones(tmp_path: Path) -> None:
    with MotSink(tmp_path, "clip") as sink:
        for index in range(4):
            sink.write(frame_of(index), ONE_TRACK if index % 2 == 0 else NO_TRACKS)
    assert np.loadtxt(tmp_path / "clip.txt", delimiter=",")[:, 0].tolist() == [1, 3]


@pytest.mark.parametrize(
    ("rows", "names", "expected"),
    [
        ((), (), []),
        (((7, 1.005, 2, 3.14159, 4, 0.98768, 1),), ("person", "car"),
         [{"id": 7, "xyxy": [1.0, 2.0, 3.14, 4.0], "score": 0.9877, "label": "car"}]),
        (((1, 0, 0, 1, 1, 1, 2),), ("person",), [{"id": 1, "xyxy": [0, 0, 1, 1], "score": 1, "label": "2"}]),
        (((1, 0, 0, 1, 1, 1, 0),), ('a "b"\n\u2028é',),
         [{"id": 1, "xyxy": [0, 0, 1, 1], "score": 1, "label": 'a "b"\n\u2028é'}]),
    ],
)  # fmt: skip
def test_json_lines_say_everything_about_a_frame_in_one_line(
    rows: tuple[tuple[Number, ...], ...], names: tuple[str, ...], expected: list[dict[str, object]]
) -> None:
    line = format_line(frame_of(4, pts_seconds=1.5), tracks_of(*rows, names=names))
    assert line.endswith("\n")
    assert len(line.splitlines()) == 1
    assert json.loads(line) == {"frame": 5, "pts_seconds": 1.5, "tracks": expected}


def test_json_lines_never_hold_what_json_does_not_know() -> None:
    with pytest.raises(ValueError, match="JSON"):
        format_line(frame_of(0), tracks_of((1, np.nan, 0, 1, 1, 1, 0)))


# Partial until whole

ONE_MASK = masked(ONE_TRACK)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def open_one(kind: str, directory: Path, stem: str = "clip") -> Sink:
    [sink] = open_sinks([kind], directory, stem, frame_rate=10)
    return sink


def test_a_result_gets_its_final_name_when_it_is_whole(kind: str, tmp_path: Path) -> None:
    final, partial = tmp_path / f"a/b/v1.2{SUFFIXES[kind]}", tmp_path / f"a/b/v1.2.partial{SUFFIXES[kind]}"
    sink = open_one(kind, tmp_path / "a/b", "v1.2")
    sink.write(frame_of(0), ONE_MASK)
    assert partial.exists()
    assert not final.exists()
    sink.close(complete=True)
    sink.close(complete=False)  # too late to change anything
    assert [p.name for p in final.parent.iterdir()] == [final.name]
    assert final.stat().st_size > 0


def test_an_interrupted_run_leaves_its_finished_frames_under_the_partial_name(
    kind: str, tmp_path: Path
) -> None:
    [sink] = open_sinks([kind], tmp_path, "clip", frame_rate=10)
    with pytest.raises(KeyboardInterrupt), sink:  # type: ignore[attr-defined]
        for index in range(5):
            sink.write(frame_of(index), ONE_MASK)
        raise KeyboardInterrupt
    [path] = tmp_path.iterdir()
    assert path.name == f"clip.partial{SUFFIXES[kind]}"
    assert frames_in(path) == 5


def test_an_earlier_result_survives_a_failed_rerun_and_yields_to_a_whole_one(
    kind: str, tmp_path: Path
) -> None:
    final = tmp_path / f"clip{SUFFIXES[kind]}"
    for frames, complete, survivor in ((3, True, 3), (2, False, 3), (4, True, 4)):
        sink = open_one(kind, tmp_path)
        for index in range(frames):
            sink.write(frame_of(index), ONE_MASK)
        sink.close(complete=complete)
        assert frames_in(final) == survivor


ENDLESS_RUN = """
import signal, sys, time
from pathlib import Path
from results import ONE_TRACK, frame_of, masked, noise_image
from tracker.sinks import KINDS, open_sinks
sinks = open_sinks(KINDS, Path(sys.argv[1]), "clip", frame_rate=10)
image, index, tracks = noise_image(0), 0, masked(ONE_TRACK)
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs inherit that it is ignored
try:
    while True:
        for sink in sinks:
            sink.write(frame_of(index, image=image), tracks)
        index += 1
        print(index, flush=True)
        time.sleep(float(sys.argv[2]))
except KeyboardInterrupt:
    for sink in sinks:
        sink.close(complete=False)
    sys.exit(130)
"""


@pytest.mark.parametrize(
    ("number", "code", "pause"),
    [
        (signal.SIGKILL, -signal.SIGKILL, "0.002"),
        (signal.SIGINT, 130, "0.002"),
        (signal.SIGINT, 130, "0"),  # then it mostly waits for the encoder, with frames under way
    ],
)
def test_a_killed_or_interrupted_process_leaves_whole_lines_and_a_video_that_plays(
    number: signal.Signals, code: int, pause: str, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", ENDLESS_RUN, str(tmp_path), pause]
    with subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        written = [int(next(run.stdout)) for _ in range(60)][-1]
        run.send_signal(number)
        written = max([written, *map(int, run.stdout)])
    assert run.returncode == code
    frames = {path.name: frames_in(path) for path in tmp_path.iterdir()}
    assert set(frames) == {f"clip.partial{suffix}" for suffix in SUFFIXES.values()}
    assert frames["clip.partial.txt"] - written in (0, 1)  # one may be written but not yet reported
    assert frames["clip.partial.jsonl"] - written in (0, 1)
    assert frames["clip.partial.mots.txt"] - written in (0, 1)
    if number == signal.SIGINT:
        assert frames["clip.partial.mp4"] - written in (0, 1)
    else:  # a second of film is a fragment; x264 and the queue hold some more frames
        assert written - 10 - FRAMES_BEHIND - 20 <= frames["clip.partial.mp4"] <= written + 1


# What cannot be written


def a_file_for_a_directory(directory: Path, suffix: str) -> Path:
    (directory / "out").write_text("in the way")
    return directory / "out"


def a_file_for_a_parent(directory: Path, suffix: str) -> Path:
    return a_file_for_a_directory(directory, suffix) / "deeper"


def a_directory_for_the_result(directory: Path, suffix: str) -> Path:
    (directory / f"clip{suffix}").mkdir()
    return directory


def a_directory_for_the_partial(directory: Path, suffix: str) -> Path:
    (directory / f"clip.partial{suffix}").mkdir()
    return directory


def a_name_too_long(directory: Path, suffix: str) -> Path:
    return directory / ("x" * 300)


@pytest.mark.parametrize(
    ("obstacle", "reason"),
    [
        (a_file_for_a_directory, "File exists; move that file away"),
        (a_file_for_a_parent, "Not a directory; move the file that stands in the way"),
        (a_directory_for_the_result, "Is a directory; move that directory away"),
        (a_directory_for_the_partial, "Is a directory; move that directory away"),
        (a_name_too_long, "File name too long; choose a shorter name"),
    ],
)
def test_an_impossible_place_is_refused_at_once_with_path_reason_and_remedy(
    obstacle: Callable[[Path, str], Path], reason: str, kind: str, tmp_path: Path
) -> None:
    directory = obstacle(tmp_path, SUFFIXES[kind])
    with pytest.raises(SinkError) as refusal:
        open_one(kind, directory)
    assert str(refusal.value).startswith(f"cannot write {directory / 'clip'}{SUFFIXES[kind]}: {reason}")


def test_a_read_only_disk_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    refusal = "Read-only file system; choose a directory you may write to"
    with small_disk(tmp_path, "size=64k,ro") as disk, pytest.raises(SinkError, match=refusal):
        open_one(kind, disk)


def write_until_it_fails(sink: Sink) -> tuple[int, SinkError]:
    """Frames accepted, and what was said then. Noise and long rows fill a disk quickly."""
    crowd = masked(tracks_of(*((i, i, i, i + 20, i + 30, 0.5, 0) for i in range(1, 60))), size=(160, 120))
    for index in range(2000):
        try:
            sink.write(frame_of(index, image=noise_image(index)), crowd)
        except SinkError as error:
            return index, error
    raise AssertionError("2000 frames fitted")


def test_a_full_disk_is_told_and_what_fitted_is_whole(kind: str, tmp_path: Path) -> None:
    with small_disk(tmp_path, "size=400k") as disk:
        (disk / f"clip{SUFFIXES[kind]}").write_text("an earlier result")
        sink = open_one(kind, disk)
        frames, error = write_until_it_fails(sink)
        assert str(error).startswith(
            f"cannot write {disk}/clip.partial{SUFFIXES[kind]}: No space left on device; free"
        )
        with pytest.raises(SinkError, match="No space left"):  # hopeless now, but never a deadlock
            for index in range(3 * FRAMES_BEHIND):
                sink.write(frame_of(frames + index, image=noise_image(index)), ONE_MASK)
        sink.close(complete=False)
        with pytest.raises(SinkError, match="No space left"):
            sink.close(complete=True)
        kept = frames_in(disk / f"clip.partial{SUFFIXES[kind]}")
        assert kept == frames if kind != "video" else 0 < kept <= frames
        assert (disk / f"clip{SUFFIXES[kind]}").read_text() == "an earlier result"


@pytest.mark.parametrize("kind", ["mot", "jsonl"])
def test_half_a_row_is_taken_back(kind: str, tmp_path: Path) -> None:
    sink = open_one(kind, tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))  # the kernel writes up to it, then refuses
    try:
        frames, error = write_until_it_fails(sink)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    sink.close(complete=False)
    assert "File too large; check the disk" in str(error)
    assert frames_in(tmp_path / f"clip.partial{SUFFIXES[kind]}") == frames > 0


def test_where_one_cannot_be_opened_the_others_are_closed(tmp_path: Path) -> None:
    (tmp_path / "clip.mp4").mkdir()
    with pytest.raises(SinkError, match=r"clip\.mp4: Is a directory"):
        open_sinks(KINDS, tmp_path, "clip", frame_rate=10)
    assert not [name for name in open_files() if name.startswith(str(tmp_path))]


def open_files() -> list[str]:
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("no /proc here to see open files in")
    return [os.path.realpath(descriptor) for descriptor in descriptors.iterdir()]


def test_an_unknown_kind_is_refused_before_any_file_is_touched(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot save 'csv': choose among mot, jsonl, dota, mots, video"):
        open_sinks(["mot", "csv"], tmp_path / "out", "clip", frame_rate=10)
    assert not (tmp_path / "out").exists()


def test_a_kind_named_twice_is_written_once(tmp_path: Path) -> None:
    [sink] = open_sinks(["mot", "mot"], tmp_path, "clip", frame_rate=10)
    sink.close(complete=True)
