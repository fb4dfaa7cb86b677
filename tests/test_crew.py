"""Associations in processes of their own: the same tracks, and words and good results whatever breaks."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from clips import write_clip
from duties import Breaking, Slow, Talkative, crowd, long_lines
from onnx_files import detector

import tracker
from tracker import wire
from tracker.association import Byte, make_association
from tracker.cli import main
from tracker.crew import LocalCrew, ProcessCrew
from tracker.crew_worker import Duty
from tracker.engine import describe
from tracker.errors import ConfigError, DetectionsError, TrackerError
from tracker.manifest import beside
from tracker.manifest import write as write_manifest
from tracker.masks import MaskBits
from tracker.session import Options, Session
from tracker.sinks import JsonlSink, MotSink, open_sinks
from tracker.types import Detections, Frame, Outcome, Transfers

pytestmark = pytest.mark.alone

Batch = tuple[list[Frame], list[Detections]]
NAMES = ("person", "car")


def frame_of(source: int, index: int) -> Frame:
    return Frame(index=index, pts_seconds=index / 10, size=(1920, 1080), source=source)


def batches(sources: int, frames: int, *, dim: int | None = None, count: int = 12) -> list[Batch]:
    """One frame of each source in turn; objects stay, every fourth frame is empty, numbers have gaps."""
    given = []
    for index in range(frames):
        number = index + index // 5
        found = [crowd(0 if index % 4 == 3 else count, seed=source, dim=dim) for source in range(sources)]
        given.append(([frame_of(source, number) for source in range(sources)], found))
    return given


def outcomes(crew: LocalCrew | ProcessCrew, given: Sequence[Batch]) -> Iterator[Outcome]:
    for frames, found in given:
        yield from crew.associate(frames, found)
    yield from crew.finish()


def plain(outcome: Outcome) -> tuple[object, ...]:
    """Everything in an outcome, to be compared."""
    tracks = outcome.tracks
    columns = [getattr(tracks, name) for name in ("id", "xyxy", "score", "label")]
    return (
        (outcome.frame.source, outcome.frame.index, outcome.texts, outcome.confirmed, tracks.names),
        [(column.dtype, column.shape, column.tobytes()) for column in columns],
    )


def text_functions(directory: Path) -> tuple[Callable[..., str], ...]:
    sinks = open_sinks(["mot", "jsonl"], directory, "any", frame_rate=10)
    for sink in sinks:
        sink.close(complete=False)
    return tuple(sink.lines_of for sink in sinks if isinstance(sink, MotSink | JsonlSink))


def pids_of_children() -> list[int]:
    """Of this very process, zombies not counted."""
    if not Path("/proc/self/stat").exists():
        pytest.skip("no /proc here to see processes in")
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has ended since
            continue
        if int(parent) == os.getpid() and state != "Z":
            found.append(int(path.parent.name))
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(true: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# The same as in one process


@pytest.mark.parametrize(("kind", "dim"), [("byte", None), ("jde", 16)])
@pytest.mark.parametrize("processes", [1, 2, 5])
def test_processes_find_what_one_process_finds(
    kind: str, dim: int | None, processes: int, tmp_path: Path
) -> None:
    duties = [
        Duty(
            name=f"clip{k}",
            associate=partial(make_association, kind, frame_rate=25.0, names=NAMES),
            lines_of=text_functions(tmp_path),
        )
        for k in range(3)
    ]
    given = batches(3, 12, dim=dim)
    expected = [plain(outcome) for outcome in outcomes(LocalCrew(duties), given)]
    with ProcessCrew(duties, processes) as crew:
        assert len(pids_of_children()) == min(processes, 3)
        got = [plain(outcome) for outcome in outcomes(crew, given)]
        assert crew.associate_seconds > 0
        assert crew.format_seconds > 0
    assert got == expected
    assert not pids_of_children()


def test_masks_stay_here_and_come_back_with_their_tracks() -> None:
    """Detections are handed over in turning order, two of them too weak to be tracked."""
    masks = MaskBits.pack(torch.eye(12, dtype=torch.bool)[:, None].repeat(1, 8, 1), (12, 8))
    given = []
    for index in range(5):
        order = np.roll(np.arange(12), index)
        found = crowd(12, seed=0)
        given.append(
            (
                [frame_of(0, index)],
                [
                    Detections(
                        xyxy=found.xyxy[order],
                        score=np.where(order < 2, 0.01, 0.9),
                        label=found.label[order],
                        mask=masks[order],
                    )
                ],
            )
        )
    duty = Duty(name="clip", associate=Byte, masks=True)
    here = [outcome.tracks for outcome in outcomes(LocalCrew([duty]), given)]
    with ProcessCrew([duty], 1) as crew:
        there = [outcome.tracks for outcome in outcomes(crew, given)]
    first = {}
    for a, b in zip(here, there, strict=True):
        assert a.mask is not None and b.mask is not None
        assert len(a) == 10 and torch.equal(a.mask.pasted(), b.mask.pasted())
        which = b.mask.pasted()[:, 0].int().argmax(dim=1).tolist()
        for track, column in zip(b.id.tolist(), which, strict=True):
            assert first.setdefault(track, column) == column
    assert sorted(first.values()) == list(range(2, 12))


def test_sources_that_end_or_send_several_frames_keep_their_order() -> None:
    duties = [Duty(name=f"clip{k}", associate=Byte) for k in range(3)]
    pattern = [[(0, 0), (0, 1), (1, 0), (2, 0)], [(1, 1)], [(2, 1), (2, 2), (1, 2)], []]
    given = [([frame_of(*key) for key in keys], [crowd(5, 1) for _ in keys]) for keys in pattern]
    with ProcessCrew(duties, 2) as crew:
        got = [(outcome.frame.source, outcome.frame.index) for outcome in outcomes(crew, given)]
    assert got == [key for keys in pattern for key in keys]


def test_they_work_on_one_batch_while_the_next_is_detected() -> None:
    given = batches(2, 3)
    with ProcessCrew([Duty(name=f"clip{k}", associate=Byte) for k in range(2)], 2) as crew:
        out = [[outcome.frame.index for outcome in crew.associate(*batch)] for batch in given]
        out.append([outcome.frame.index for outcome in crew.finish()])
        assert not list(crew.finish())
    assert out == [[], [0, 0], [1, 1], [2, 2]]


def test_messages_larger_than_every_pipe_pass_both_ways() -> None:
    duties = [Duty(name=f"clip{k}", associate=Byte, lines_of=(long_lines,)) for k in range(2)]
    given = batches(2, 4, dim=512, count=300)
    with ProcessCrew(duties, 1) as crew:
        assert [len(outcome.texts[0]) > 300_000 for outcome in outcomes(crew, given)] == [True] * 8


def test_tracks_that_crossed_may_be_written_to_as_others() -> None:
    with ProcessCrew([Duty(name="clip", associate=Byte)], 1) as crew:
        [outcome] = outcomes(crew, batches(1, 1))
    for track, before in zip(outcome.tracks, outcome.tracks.xyxy.copy(), strict=True):
        track.xyxy[:] *= 2
        np.testing.assert_array_equal(track.xyxy, 2 * before)


def test_what_a_library_prints_does_not_get_between(capfd: pytest.CaptureFixture[str]) -> None:
    with ProcessCrew([Duty(name="clip", associate=partial(Talkative, at=99))], 1) as crew:
        assert len(list(outcomes(crew, batches(1, 3)))) == 3
    printed = capfd.readouterr()
    assert printed.out == ""
    assert "from below Python" in printed.err


# What breaks


def run_into(duty: Duty, *, processes: int = 2) -> tuple[list[tuple[int, int]], TrackerError]:
    """A good source 0 and `duty` as source 1: the frames that come out, then the error."""
    got: list[tuple[int, int]] = []
    with (
        pytest.raises(TrackerError) as raised,
        ProcessCrew([Duty(name="good", associate=Byte), duty], processes) as crew,
    ):
        got.extend((outcome.frame.source, outcome.frame.index) for outcome in outcomes(crew, batches(2, 10)))
    assert not pids_of_children()
    return got, raised.value


@pytest.mark.parametrize("processes", [1, 2])
def test_a_bug_in_a_worker_is_told_after_all_good_frames(processes: int) -> None:
    duty = Duty(name="clip", associate=partial(Breaking, at=2, error=ZeroDivisionError("division by zero")))
    got, error = run_into(duty, processes=processes)
    assert got == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2)]
    assert str(error) == (
        "a worker process failed at frame 3 of clip: ZeroDivisionError: division by zero; this is a bug, "
        "please report it"
    )
    assert "Traceback" in error.__notes__[0]
    assert "duties.py" in error.__notes__[0]


def test_a_worker_without_memory_says_so() -> None:
    _, error = run_into(Duty(name="clip", associate=partial(Breaking, at=1, error=MemoryError())))
    assert str(error) == "a worker process ran out of memory at frame 2 of clip: track fewer sources at once"


def test_an_error_on_purpose_is_the_same_as_in_one_process() -> None:
    duties = [Duty(name="clip", associate=partial(make_association, "jde"))]
    told = []
    for crew in (LocalCrew(duties), ProcessCrew(duties, 1)):
        with pytest.raises(DetectionsError) as raised:
            if isinstance(crew, ProcessCrew):
                with crew:
                    list(outcomes(crew, batches(1, 1)))
            else:
                list(outcomes(crew, batches(1, 1)))
        told.append(str(raised.value))
    assert told[0] == told[1]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, "was killed, as a system does when memory runs out: track fewer"),
        (signal.SIGUSR1, "was ended by SIGUSR1: try again"),
    ],
)
def test_a_worker_that_dies_gives_words_after_the_good_frames(number: signal.Signals, words: str) -> None:
    got, error = run_into(Duty(name="clip", associate=partial(Breaking, at=2, number=number)))
    assert got == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2)]
    assert words in str(error)
    assert str(error).startswith("the worker process for clip ")
    assert "--workers 0" in str(error)


def test_a_worker_that_cannot_import_its_duty_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    duty = Duty(name="clip", associate=partial(Breaking, at=99))
    places = [place for place in sys.path if place != str(Path(__file__).parent)]
    monkeypatch.setattr(sys, "path", places)
    _, error = run_into(duty)
    assert "could not start: ModuleNotFoundError: No module named 'duties'" in str(error)


def test_no_python_to_start_gives_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    crew = ProcessCrew([Duty(name="clip", associate=Byte)], 1)
    with pytest.raises(TrackerError, match=r"cannot start a worker process .*--workers 0"), crew:
        pass


def test_what_cannot_be_sent_leaves_no_process() -> None:
    with (
        pytest.raises(AttributeError, match="lambda"),
        ProcessCrew([Duty(name="clip", associate=lambda: Byte())], 1),
    ):
        pass
    assert not pids_of_children()


def test_leaving_with_work_under_way_leaves_no_process() -> None:
    duties = [Duty(name=f"clip{k}", associate=partial(Slow, at=99), lines_of=(long_lines,)) for k in (0, 1)]
    given = batches(2, 2, dim=512, count=300)
    with ProcessCrew(duties, 2) as crew:
        list(crew.associate(*given[0]))
        begun = time.monotonic()
    assert time.monotonic() - begun < 4  # nobody had to be killed
    assert not pids_of_children()


def test_a_worker_that_hangs_does_not_outlive_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tracker.children.GRACE_SECONDS", 0.2)
    with ProcessCrew([Duty(name="clip", associate=partial(Breaking, at=0))], 1) as crew:
        list(crew.associate(*batches(1, 1)[0]))
    assert not pids_of_children()


# Messages


@pytest.mark.parametrize(
    "arrays",
    [
        [],
        [None],
        [np.empty((0, 4), np.float32)],
        [np.arange(3, dtype=np.float32), None, np.arange(5), np.empty((2, 0)), np.ones((2, 3, 4), np.uint8)],
        [np.arange(12.0).reshape(3, 4)[:, 1:3], np.arange(6)[::-2]],
    ],
)
def test_a_message_arrives_as_it_was_sent(arrays: list[wire.Array | None]) -> None:
    content = ("words", 1.5, None, [b"\0\xff"])
    pipe = io.BytesIO()
    wire.write(pipe, content, arrays)  # type: ignore[arg-type]
    wire.write(pipe, "next")  # type: ignore[arg-type]
    pipe.seek(0)
    reader = io.BufferedReader(pipe)  # type: ignore[type-var]
    first, second = wire.read(reader), wire.read(reader)
    assert first is not None
    assert first[0] == content
    assert second == ("next", [])
    assert wire.read(reader) is None
    for sent, got in zip(arrays, first[1], strict=True):
        assert (sent is None) == (got is None)
        if sent is not None and got is not None:
            np.testing.assert_array_equal(got, sent)
            assert (got.dtype, got.shape, got.flags.writeable) == (sent.dtype, sent.shape, True)
            assert got.flags.aligned


def test_a_message_cut_short_is_the_end() -> None:
    pipe = io.BytesIO()
    wire.write(pipe, "content", [np.arange(9)])  # type: ignore[arg-type]
    whole = pipe.getvalue()
    for length in range(len(whole)):
        assert wire.read(io.BufferedReader(io.BytesIO(whole[:length]))) is None  # type: ignore[type-var]


# As users meet it


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine that finds the same person in every image."""
    rows = np.full((84, 6), -4.0, np.float32)
    rows[:, 4:] = 0.0
    rows[0] = [0.5, 0.5, np.log(3), np.log(4), 0.95, 0.99]
    path = detector(tmp_path_factory.mktemp("engine") / "one.onnx", rows, size=(64, 64))
    write_manifest(describe(path, frontend="yolox", names=("person",)), beside(path))
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("clips")
    return [str(write_clip(folder / f"{name}.mp4", frames=300)) for name in "abc"]


def test_a_run_in_processes_leaves_the_files_of_a_run_without(
    engine: Path, clips: list[str], tmp_path: Path
) -> None:
    for workers in (0, 2):
        options = Options(
            sources=clips,
            engine=str(engine),
            out=str(tmp_path / str(workers)),
            save=("mot", "jsonl", "video"),
            workers=workers,
            max_frames=30,
        )
        with Session(options) as session:
            assert len(list(session)) == 90
    for path in (tmp_path / "0").iterdir():
        if path.suffix in (".txt", ".jsonl"):
            assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()
    summaries = [json.loads((tmp_path / workers / "b.summary.json").read_text()) for workers in "02"]
    assert [summary["workers"] for summary in summaries] == [0, 2]
    assert [summary["tracks"] for summary in summaries] == [1, 1]
    assert summaries[0]["tracker"] == summaries[1]["tracker"]
    assert summaries[1]["stages"]["associate"]["ms_per_frame"] > 0


def test_a_killed_worker_ends_the_run_with_words_and_partial_results(
    engine: Path, clips: list[str], tmp_path: Path
) -> None:
    options = Options(
        sources=clips[:2], engine=str(engine), out=str(tmp_path), save=("mot", "jsonl"), workers=2
    )
    tracked = 0
    with pytest.raises(TrackerError, match="worker process for b was killed"), Session(options) as session:
        _, second = sorted(pids_of_children())
        for _ in session:
            tracked += 1
            if tracked == 20:
                os.kill(second, signal.SIGKILL)
    assert 20 <= tracked < 600
    assert not pids_of_children()
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{stem}.partial.{kind}" for stem in "ab" for kind in ("txt", "jsonl", "summary.json")
    }
    lines = [(tmp_path / f"{stem}.partial.jsonl").read_text().splitlines() for stem in "ab"]
    assert sum(map(len, lines)) == tracked
    for stem, kept in zip("ab", lines, strict=True):
        assert [json.loads(line)["frame"] for line in kept] == list(range(1, len(kept) + 1))
        summary = json.loads((tmp_path / f"{stem}.partial.summary.json").read_text())
        assert summary["frames"]["tracked"] == len(kept)
        assert summary["complete"] is False


def test_leaving_the_iterator_early_leaves_no_process(engine: Path, clips: list[str]) -> None:
    iterator = tracker.track(clips, engine=engine, workers=3)
    next(iterator)
    assert len(pids_of_children()) == 3
    iterator.close()  # type: ignore[attr-defined]
    assert not pids_of_children()


def command(engine: Path, clips: list[str], out: Path) -> list[str]:
    arguments = [*clips, "--engine", str(engine), "--out", str(out), "--workers", "2"]
    return [sys.executable, "-m", "tracker", *arguments, "--save", "mot,jsonl"]


def start(engine: Path, clips: list[str], out: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """A run under way, in a process group of its own as on a terminal, and its workers."""
    run = subprocess.Popen(command(engine, clips, out), stderr=subprocess.PIPE, text=True, process_group=0)
    partial_rows = [out / f"{Path(clip).stem}.partial.txt" for clip in clips]
    wait_until(lambda: all(path.exists() and path.stat().st_size for path in partial_rows))
    stats = [path.read_text() for path in Path("/proc").glob("[0-9]*/stat")]
    workers = [int(stat.split()[0]) for stat in stats if stat.rpartition(")")[2].split()[1] == str(run.pid)]
    assert len(workers) == 2
    return run, workers


@pytest.fixture(scope="module")
def long_clips(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("long")
    return [str(write_clip(folder / f"{name}.mp4", frames=3000)) for name in "ab"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_leaves_whole_lines_and_no_process(
    number: signal.Signals, engine: Path, long_clips: list[str], tmp_path: Path
) -> None:
    run, workers = start(engine, long_clips, tmp_path)
    os.killpg(run.pid, number)
    _, printed = run.communicate(timeout=30)
    assert run.returncode == 130, printed
    assert "Traceback" not in printed
    assert not any(map(is_running, workers))
    for stem in "ab":
        lines = [json.loads(line) for line in (tmp_path / f"{stem}.partial.jsonl").read_text().splitlines()]
        rows = (tmp_path / f"{stem}.partial.txt").read_text().splitlines()
        assert {row.count(",") for row in rows} == {9}
        assert int(rows[-1].split(",")[0]) - lines[-1]["frame"] in (0, 1)
        summary = json.loads((tmp_path / f"{stem}.partial.summary.json").read_text())
        assert 0 < summary["frames"]["tracked"] < 3000


def test_workers_end_when_the_run_is_killed(engine: Path, long_clips: list[str], tmp_path: Path) -> None:
    run, workers = start(engine, long_clips, tmp_path)
    run.kill()
    run.communicate()
    wait_until(lambda: not any(map(is_running, workers)))


SCRIPT = """
import sys, tracker

print("begun")
for frame, tracks in tracker.track(sys.argv[2:], engine=sys.argv[1], workers=2, max_frames=3):
    print(frame.source, frame.index, [track.id for track in tracks])
"""


def test_a_plain_script_needs_no_main_guard(engine: Path, clips: list[str], tmp_path: Path) -> None:
    """Nor does it matter what lies about in the directory it is called from."""
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "pickle.py").write_text("raise SystemExit('the wrong pickle')")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(engine), *clips[:2]],
        cwd=tmp_path / "elsewhere",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = [f"{source} {index} [1]" for index in range(3) for source in range(2)]
    assert sorted(done.stdout.splitlines()) == sorted(["begun", *expected])


# On which device


class Gpu:
    """Stands for a front end on a GPU, or where it is said to be; finds one object in every frame."""

    names, max_batch, usual_batch, embeds, masks, lanes = ("person",), 4, 4, False, False, 2
    problem: str | None = None

    def __init__(self, device: str = "cuda:0") -> None:
        self.device, self.frames_on = torch.device(device), torch.device("cpu")
        self.transfers = Transfers(waits=7, copies=3, bytes=1000)  # what opening it took
        self.seconds = {"inference": 0.0}

    def submit(self, frames: Sequence[Frame]) -> Future[list[Detections]]:
        self.transfers.waits += 1
        self.transfers.copies += 1
        self.transfers.bytes += 6000
        done: Future[list[Detections]] = Future()
        done.set_result([crowd(1, seed=0) for _ in frames])
        return done

    def close(self) -> None:
        pass


def pretend(frontend: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    about = SimpleNamespace(
        engine_sha256="0" * 64, frontend="fake", precision="fp16", thresholds=lambda tracker: {}
    )
    monkeypatch.setattr("tracker.session.open_engine", lambda *_, **__: (frontend, about))


@pytest.mark.parametrize(
    ("device", "sources", "cores", "asked", "workers"),
    [
        ("cpu", 3, 16, None, 0),
        ("cuda:0", 1, 16, None, 0),
        ("cuda:0", 3, 16, None, 3),
        ("cuda:0", 3, 8, None, 2),
        ("cuda:0", 3, 2, None, 1),
        ("cuda:0", 3, 16, 0, 0),
        ("cpu", 3, 2, 2, 2),
        ("cpu", 1, 2, 8, 1),
    ],
)
def test_processes_are_used_where_they_pay(
    device: str,
    sources: int,
    cores: int,
    asked: int | None,
    workers: int,
    clips: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(Gpu(device), monkeypatch)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)), raising=False)
    with Session(Options(sources=clips[:sources], engine="any", save=(), workers=asked)) as session:
        assert session.workers == workers
        assert len(pids_of_children()) == workers


def test_fewer_than_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="workers must be 0 or more, got -1"):
        Options(sources=["a.mp4"], engine="any", workers=-1)


def test_what_crossed_from_the_gpu_is_told_per_frame(
    clips: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend(Gpu(), monkeypatch)
    monkeypatch.setenv("COLUMNS", "200")
    assert main([*clips[:2], "--engine", "any", "--out", str(tmp_path), "--max-frames", "40"]) == 0
    summary = json.loads((tmp_path / "a.summary.json").read_text())
    assert summary["transfers"] == {
        "device": "cuda:0",
        "batches": 20,
        "waits": 20,
        "copies": 20,
        "bytes": 120_000,
        "per_frame": {"waits": 0.25, "copies": 0.25, "bytes": 1500.0},
    }
    assert "; per frame 0.25 waits, 0.25 copies and 1.5 kB from cuda:0; results in" in capsys.readouterr().err


def test_what_ran_slower_than_it_should_is_said_aloud(
    clips: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No CUDA graphs, and a video that NVDEC cannot take: neither stops the run, neither goes unsaid."""
    frontend = Gpu()
    frontend.problem = "without CUDA graphs: the driver is too old"
    frontend.frames_on = torch.device("cuda:0")
    pretend(frontend, monkeypatch)
    monkeypatch.setattr("tracker.sources.examine", lambda *_, **__: "its codec is mpeg4")
    monkeypatch.setenv("COLUMNS", "200")
    assert main([clips[0], "--engine", "any", "--out", str(tmp_path), "--max-frames", "4"]) == 0
    said = capsys.readouterr().err
    assert "any ran without CUDA graphs: the driver is too old" in said
    assert "a was decoded on the CPU, because its codec is mpeg4" in said
    summary = json.loads((tmp_path / "a.summary.json").read_text())
    assert summary["engine"]["problem"] == frontend.problem
    assert summary["decoder"] == "CPU, because its codec is mpeg4"


def test_a_detector_on_the_cpu_counts_one_wait_and_one_copy_per_batch(
    engine: Path, clips: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([clips[0], "--engine", str(engine), "--out", str(tmp_path), "--max-frames", "5"]) == 0
    transfers = json.loads((tmp_path / "a.summary.json").read_text())["transfers"]
    assert transfers["device"] == "cpu"
    assert transfers["waits"] == transfers["copies"] == transfers["batches"] == 5
    assert transfers["bytes"] > 0
    assert "waits" not in capsys.readouterr().err
