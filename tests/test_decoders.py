"""Files decoded in other processes: the same frames, places that are used again, and words whatever breaks.

Most of it plays between two threads, as between two processes; the rest with processes of its own.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from clips import cut, write_clip
from duties import crowd
from fake_nvdec import FakeFile, HostAddress, HostMemory, fake_file
from test_crew import is_running, pids_of_children, wait_until

from tracker.children import Child
from tracker.errors import ConfigError, EngineError, SourceError, TrackerError
from tracker.pipeline import Feed, ReadyFeed
from tracker.pixels import to_bgr
from tracker.session import Options, Session
from tracker.sources import VideoFile
from tracker.sources.decode_worker import Delivery, _hear, _run
from tracker.sources.decoders import AHEAD, SLOTS, Decoders, RemoteFile, processes_for
from tracker.sources.shared_memory import DeviceMemory, sharing_problem
from tracker.types import Detections, Frame, Source, Transfers

pytestmark = [pytest.mark.alone, pytest.mark.usefixtures("library")]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    return [write_clip(folder / f"{name}.mp4", frames=70, options={"bf": "2"}) for name in "abc"]


class Beside:
    """The other process as a thread: what is sent to it is heard at once, what it says waits in a queue."""

    def __init__(self) -> None:
        self._said: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.received = 0
        self.lent: list[HostMemory] = []

    def start(self, file: FakeFile, *, ready: Callable[[], Any] = lambda: None) -> RemoteFile:
        """ready: makes the event of each picture."""
        theirs = file.unturned()
        theirs.ready = ready
        self.delivery = Delivery(theirs, self._said.put)
        self.remote = RemoteFile(file, self, self._allocate)  # type: ignore[arg-type]
        self._thread = threading.Thread(target=_run, args=(self.delivery,), daemon=True)
        self._thread.start()
        return self.remote

    def send(self, content: Any) -> None:
        _hear(content, {content.source: self.delivery})

    def receive(self) -> None:
        self.received += 1
        self.remote.hear(self._said.get(timeout=20))

    def leave(self) -> None:
        self.delivery.leave()
        self._thread.join(10)
        assert not self._thread.is_alive()

    def _allocate(self, size: int) -> HostMemory:
        self.lent.append(HostMemory(size))
        return self.lent[-1]


@pytest.fixture
def beside() -> Iterator[Beside]:
    other = Beside()
    yield other
    other.leave()


def pixels(frame: Frame) -> np.ndarray:
    assert frame.image is not None
    return to_bgr(frame.image)


def seen(source: Source) -> list[tuple[Any, ...]]:
    """Everything about every frame, none of which is kept."""
    with source:
        return [(f.index, f.pts_seconds, f.size, f.source, pixels(f).tobytes()) for f in source]


def lies_in(memory: HostMemory, frame: Frame) -> bool:
    assert frame.image is not None
    begin = memory.tensor(0, (1,)).data_ptr()
    return 0 <= frame.image.planes[0].data_ptr() - begin < memory.size


# The same as in this process


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("b-frames.mp4", {"options": {"bf": "3"}, "frames": 70}),
        ("annex-b.ts", {"gop": 5}),
        ("turned.mp4", {"prepare": lambda stream: stream.set_display_rotation(90)}),
        ("upside-down.mp4", {"prepare": lambda stream: stream.set_display_rotation(180), "frames": 50}),
    ],
)
def test_frames_times_and_counts_are_those_of_this_process(
    beside: Beside, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    path = write_clip(tmp_path / name, **options)
    here, there = fake_file(path, 3), beside.start(fake_file(path, 3))
    assert seen(there) == seen(here)
    assert there.counts == here.counts
    assert (there.size, there.frame_rate) == (here.size, here.frame_rate)
    assert (there.name, there.decoder) == (path.stem, "NVDEC")
    assert there.seconds > 0


def test_a_truncated_file_counts_what_is_missing(beside: Beside, tmp_path: Path) -> None:
    path = cut(write_clip(tmp_path / "whole.mkv", frames=60), tmp_path / "cut.mkv", 0.5)
    here, there = fake_file(path), beside.start(fake_file(path))
    assert seen(there) == seen(here)
    assert there.counts == here.counts
    assert there.counts.missing > 0


def test_pictures_that_grow_get_other_places(beside: Beside, tmp_path: Path) -> None:
    """The earlier ones stay as they are, for whoever still reads them."""
    parts = [
        write_clip(tmp_path / f"{width}.ts", size=(width, 64), options={"bf": "0"})
        for width in (96, 128, 400)
    ]
    path = tmp_path / "growing.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    expected = seen(fake_file(path))
    assert {size for _, _, size, *_ in expected} == {(96, 64), (128, 64), (400, 64)}
    with beside.start(fake_file(path)) as there:
        frames = list(there)
    assert [(f.index, f.pts_seconds, f.size, f.source, pixels(f).tobytes()) for f in frames] == expected
    assert len(beside.lent) == 3


# Places


def test_a_run_that_lets_go_of_frames_copies_none(beside: Beside, clips: list[Path]) -> None:
    with beside.start(fake_file(clips[0])) as there:
        held: list[Frame] = []
        for frame in there:
            held = [*held[-(SLOTS - AHEAD - 2) :], frame]
            assert lies_in(beside.lent[0], frame)
    assert len(beside.lent) == 1


def test_who_keeps_every_frame_gets_copies_and_they_stay(beside: Beside, clips: list[Path]) -> None:
    expected = seen(fake_file(clips[0]))
    with beside.start(fake_file(clips[0])) as there:
        frames = list(there)
    beside.leave()
    there.forget()
    assert [pixels(frame).tobytes() for frame in frames] == [pixel for *_, pixel in expected]
    lent = [lies_in(beside.lent[0], frame) for frame in frames]
    assert lent == [True] * (SLOTS - AHEAD) + [False] * (70 - SLOTS + AHEAD)


def test_a_part_of_a_picture_keeps_all_of_it(beside: Beside, clips: list[Path]) -> None:
    with beside.start(fake_file(clips[0])) as there:
        frames = iter(there)
        first = next(frames)
        assert first.image is not None
        part = first.image.planes[0][3:40:2, ::3]
        was = part.clone()
        del first
        for _ in frames:
            pass
        assert torch.equal(part, was)


def test_several_pictures_come_in_one_message(beside: Beside, clips: list[Path]) -> None:
    class Late:
        """An event of the device that passes when it is waited for."""

        passed = False

        def query(self) -> bool:
            return self.passed

        def synchronize(self) -> None:
            self.passed = True

    assert len(seen(beside.start(fake_file(clips[0]), ready=Late))) == 70
    assert beside.received < 20


def test_memory_goes_back_with_the_last_frame(clips: list[Path]) -> None:
    beside = Beside()
    with beside.start(fake_file(clips[0])) as there:
        kept = next(iter(there))
    beside.leave()
    there.forget()
    fd = beside.lent.pop().owned
    assert pixels(kept).any()
    os.fstat(fd)
    del kept, there
    beside.delivery = beside.remote = None  # type: ignore[assignment]
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(fd)


# What breaks


def test_a_decoder_that_gives_up_says_so_after_the_good_frames(beside: Beside, clips: list[Path]) -> None:
    file = fake_file(clips[0], at=20, error=RuntimeError("error 999"))
    frames = []
    with (
        beside.start(file) as there,
        pytest.raises(SourceError, match=r"failed \(RuntimeError: error 999\)") as raised,
    ):
        frames.extend(frame.index for frame in there)
    assert frames == list(range(20))
    assert there.counts.decoded == 20
    assert "fake_nvdec.py" in raised.value.__notes__[0]


def test_a_device_that_is_lost_gives_words_and_no_wait(beside: Beside, clips: list[Path]) -> None:
    class Lost:
        def query(self) -> bool:
            raise RuntimeError("CUDA error: the GPU has fallen off the bus")

        synchronize = query

    there = beside.start(fake_file(clips[0]), ready=Lost)
    with pytest.raises(SourceError, match=r"fallen off the bus.*--decoders 0"), there:
        pass


def test_a_file_that_is_gone_is_said_on_entering(beside: Beside, tmp_path: Path) -> None:
    file = fake_file(write_clip(tmp_path / "a.mp4"))
    (tmp_path / "a.mp4").unlink()
    with pytest.raises(SourceError, match="no such file"), beside.start(file):
        pass


class Elsewhere(HostAddress):
    def open(self) -> HostMemory:
        raise EngineError("CUDA cannot open another process's memory on cuda:0 (CUDA_ERROR_NOT_SUPPORTED)")


class Unreachable(HostMemory):
    @property
    def address(self) -> HostAddress:
        return Elsewhere(self.path, self.size)


def no_memory(size: int) -> HostMemory:
    raise EngineError("CUDA cannot give 100 MB on cuda:0 (CUDA_ERROR_OUT_OF_MEMORY)")


@pytest.mark.parametrize(
    ("allocate", "words"),
    [(no_memory, "a: CUDA cannot give.*--decoders 0"), (Unreachable, "a: CUDA cannot open.*--decoders 0")],
)
def test_memory_that_cannot_be_shared_is_said_with_the_way_out(
    beside: Beside, clips: list[Path], monkeypatch: pytest.MonkeyPatch, allocate: Any, words: str
) -> None:
    monkeypatch.setattr(beside, "_allocate", allocate)
    with pytest.raises(SourceError, match=words), beside.start(fake_file(clips[0])):
        pass


def test_leaving_at_any_moment_ends_the_thread(beside: Beside, clips: list[Path]) -> None:
    """Here while it waits for places; the fixture sees to it that it ended."""
    with beside.start(fake_file(clips[0])) as there:
        kept = [frame for frame, _ in zip(there, range(5), strict=False)]
        assert len(kept) == 5


# In processes


def test_files_in_processes_come_out_as_here_and_what_breaks_breaks_alone(clips: list[Path]) -> None:
    """Files 0, 2 and 4 in one process, 1 and 3 in the other, which file 3 takes down with it."""
    quirks: list[dict[str, Any]] = [{}, {}, {"breaks_at": 30}, {"at": 40, "signal": signal.SIGKILL}]
    files: list[Source] = [fake_file(clips[k % 3], k, **each) for k, each in enumerate(quirks)]
    files.append(VideoFile(clips[2], source=4))
    expected = [seen(fake_file(clips[k % 3], k)) for k in range(2)]
    got: list[list[Any]] = [[] for _ in files]
    with Decoders(files, 2, allocate=HostMemory) as decoders:
        assert len(pids_of_children()) == 2
        assert decoders.sources[4] is files[4]
        feeds = []
        for source in decoders.sources:
            source.__enter__()
            feeds.append(ReadyFeed(source) if isinstance(source, RemoteFile) else Feed(source))
        feeds[4].__enter__()
        for feed in feeds[:4]:
            feed.__enter__()
        waiting = set(range(5))
        while waiting:
            for k in tuple(waiting):
                frame = feeds[k].next()
                if frame is None:
                    waiting.discard(k)
                else:
                    got[k].append(
                        (frame.index, frame.pts_seconds, frame.size, frame.source, pixels(frame).tobytes())
                    )
        feeds[4].__exit__()
        files[4].__exit__()
    assert not pids_of_children()
    assert got[0] == expected[0]
    assert len(got[4]) == 70
    assert len(got[2]) < 30
    assert "NVDEC gave up after" in str(feeds[2].error)
    # File 1 shares file 3's fate, wherever it was.
    assert [number for number, *_ in got[3]] == list(range(len(got[3])))
    assert len(got[3]) <= 40
    assert got[1] == expected[1][: len(got[1])]
    assert str(feeds[3].error) == (
        "the process that decodes b, a was killed, as a system does when memory runs out: track fewer "
        "sources at once, or decode in this process (--decoders 0)"
    )
    assert feeds[0].error is feeds[4].error is None


def test_no_python_to_start_gives_words(clips: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    decoders = Decoders([fake_file(clips[0])], 1, allocate=HostMemory)
    with pytest.raises(TrackerError, match=r"cannot start a process to decode in .*--decoders 0"), decoders:
        pass


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from fake_nvdec import FakeLibrary, HostMemory, fake_file
from tracker.sources import nvdec
from tracker.sources.decoders import Decoders

nvdec._library = lambda: FakeLibrary()
with Decoders([fake_file(Path(sys.argv[1]))], 1, allocate=HostMemory) as decoders:
    with decoders.sources[0] as source:
        next(iter(source))
        print("under way", flush=True)
        time.sleep(60)
"""


def test_they_end_when_the_run_is_killed(clips: list[Path]) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(clips[0]), str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "under way\n"
    stats = [path.read_text() for path in Path("/proc").glob("[0-9]*/stat")]
    (child,) = [int(stat.split()[0]) for stat in stats if stat.rpartition(")")[2].split()[1] == str(run.pid)]
    run.kill()
    run.communicate()
    wait_until(lambda: not is_running(child))


# As users meet it


class Gpu:
    """Stands for a front end on a GPU; finds one object in every frame."""

    names, max_batch, usual_batch, embeds, masks, lanes = ("person",), 4, 4, False, False, 2
    problem: str | None = None
    device = torch.device("cuda:0")
    frames_on = torch.device("cuda:0")

    def __init__(self) -> None:
        self.transfers = Transfers()
        self.seconds = {"inference": 0.0}

    def submit(self, frames: Sequence[Frame]) -> Future[list[Detections]]:
        done: Future[list[Detections]] = Future()
        # What is seen depends on the picture, so that a wrong one gives other tracks.
        done.set_result([crowd(3, seed=int(pixels(frame)[::9, ::9].sum()) % 97) for frame in frames])
        return done

    def close(self) -> None:
        pass


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    about = SimpleNamespace(
        engine_sha256="0" * 64, frontend="fake", precision="fp16", thresholds=lambda tracker: {}
    )
    monkeypatch.setattr("tracker.session.open_engine", lambda *_, **__: (Gpu(), about))
    monkeypatch.setattr(
        "tracker.session.open_source", lambda spec, *, source, **_: fake_file(Path(spec), source)
    )
    monkeypatch.setattr("tracker.sources.decoders.DeviceMemory", lambda size, device: HostMemory(size))
    monkeypatch.setattr("tracker.session.sharing_problem", lambda device: None)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)


def test_a_run_that_decodes_in_processes_leaves_the_files_of_a_run_without(
    on_gpu: None, clips: list[Path], tmp_path: Path
) -> None:
    for decoders in (0, 2):
        options = Options(
            sources=[str(clip) for clip in clips],
            engine="any",
            out=str(tmp_path / str(decoders)),
            save=("mot", "jsonl"),
            workers=0,
            decoders=decoders,
            max_frames=50,
        )
        with Session(options) as session:
            assert len(list(session)) == 150
            assert session.decoders == len(pids_of_children()) == decoders
        assert not pids_of_children()
    for path in (tmp_path / "0").iterdir():
        if path.suffix in (".txt", ".jsonl"):
            assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()
    summaries = [json.loads((tmp_path / name / "b.summary.json").read_text()) for name in ("0", "2")]
    assert [summary["decoders"] for summary in summaries] == [0, 2]
    assert summaries[0]["frames"] == summaries[1]["frames"]
    assert summaries[1]["stages"]["decode"]["ms_per_frame"] > 0


def test_where_memory_cannot_be_shared_it_decodes_here_and_keeps_the_reason(
    on_gpu: None, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracker.session.sharing_problem", lambda device: "CUDA cannot share memory")
    options = Options(sources=[str(clip) for clip in clips], engine="any", save=(), workers=0)
    with Session(options) as session:
        assert (session.decoders, session.decoding_problem) == (0, "CUDA cannot share memory")
        assert not pids_of_children()


@pytest.mark.parametrize(
    ("files", "cores", "processes"),
    [(1, 64, 0), (2, 64, 0), (3, 16, 1), (8, 16, 2), (8, 4, 1), (8, 2, 0), (30, 64, 8)],
)
def test_processes_are_used_where_they_pay(files: int, cores: int, processes: int) -> None:
    assert processes_for(files, cores) == processes


def test_fewer_than_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="decoders must be 0 or more, got -1"):
        Options(sources=["a.mp4"], engine="any", decoders=-1)


# On a GPU


def test_what_cannot_share_memory_says_why() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    problem = sharing_problem(torch.device("cuda", 0))
    assert problem is not None
    assert "cuda-python" in problem


def fill_with_seven() -> None:
    """In another process: fill what was lent, and say so."""
    from tracker import wire
    from tracker.children import pipes_here

    requests, answers = pipes_here()
    message = wire.read(requests)
    assert message is not None
    memory = message[0].open()
    memory.tensor(256, (4, 256)).fill_(7)
    torch.cuda.synchronize()
    wire.write(answers, "done")


def test_two_processes_see_the_same_gpu_memory(gpu: torch.device) -> None:
    """And it is given back, though another process had it. The first time around also loads kernels."""
    for _ in range(2):
        free = torch.cuda.mem_get_info(gpu)[0]
        memory = DeviceMemory(256 << 20, gpu)
        memory.tensor(0, (64 << 20,)).zero_()
        torch.cuda.synchronize()
        child = Child("test_decoders", "fill_with_seven")
        child.send(memory.address)
        assert child.receive() is not None
        child.leave()
        assert memory.tensor(0, (2048,)).sum().item() == 7 * 1024
        part = memory.tensor(256, (4, 256))
        del memory
        assert bool((part == 7).all())
        del part
    assert torch.cuda.mem_get_info(gpu)[0] > free - (64 << 20)
