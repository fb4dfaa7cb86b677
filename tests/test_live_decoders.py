"""Live sources that NVDEC decodes, here and in processes: the newest picture, whatever breaks."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cameras import Camera, write_feed
from clips import write_clip
from fake_nvdec import CPU, FakeNetwork, HostMemory, fake_open
from test_crew import pids_of_children, wait_until
from test_decoders import Gpu, Unreachable, no_memory, pixels
from test_live_sources import QUICK, http_server, jpeg, mjpeg, watched

from tracker.addresses import parse
from tracker.errors import ConfigError, SourceError
from tracker.live import LiveSession
from tracker.session import options_from
from tracker.sources import VideoFile, connect_to
from tracker.sources.connections import Arrival, Network, Nvdec, Replay
from tracker.sources.decode_worker import Loan
from tracker.sources.live import LiveSettings, LiveSource, State
from tracker.sources.live_decoders import AHEAD, SLOTS, Link, LiveDecoders, Remote, processes_for
from tracker.sources.live_worker import NO_ROOM, Came, Over, Viewing, hear
from tracker.types import Frame

pytestmark = [pytest.mark.alone, pytest.mark.usefixtures("library")]


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", frames=25)


def decoding() -> list[int]:
    """Processes of ours that decode."""
    found = []
    for pid in pids_of_children():
        with suppress(OSError):
            if b"live_worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return sorted(found)


def replay(path: Path, *, loop: bool = False, strict: bool = False, **quirks: Any) -> Replay:
    return Replay(partial(fake_open, path, **quirks), loop=loop, nvdec=Nvdec(CPU, strict=strict))


def camera_at(url: str, settings: LiveSettings = QUICK, *, strict: bool = False) -> FakeNetwork:
    return FakeNetwork(
        parse(url),
        rtsp_transport=settings.rtsp_transport,
        open_seconds=settings.open_seconds,
        silence_seconds=settings.silence_seconds,
        verify_tls=False,
        max_pixels=settings.max_pixels,
        nvdec=Nvdec(CPU, strict=strict),
    )


@pytest.fixture(scope="module")
def decoders() -> Iterator[LiveDecoders]:
    with LiveDecoders(1, allocate=HostMemory) as processes:
        yield processes
    assert not decoding()


class Beside:
    """The other process as a thread: what is sent to it is heard at once, what it says is heard here."""

    def __init__(self, connect: Network | Replay, allocate: Any = HostMemory) -> None:
        self.lent: list[HostMemory] = []
        self.link = Link(0, connect, self, self._allocate)  # type: ignore[arg-type]
        self._make = allocate
        self._viewing = Viewing(0, connect, self.link.hear)
        self._viewings = {0: self._viewing}
        self._thread = threading.Thread(target=self._viewing.run, daemon=True)
        self._thread.start()

    def _allocate(self, size: int) -> HostMemory:
        self.lent.append(self._make(size))
        return self.lent[-1]

    def send(self, content: object) -> None:
        hear(content, self._viewings)

    def check(self) -> None:
        pass

    def leave(self) -> None:
        self.link.close()
        self._thread.join(5)
        assert not self._thread.is_alive()


def arrivals(beside: Beside) -> list[Arrival]:
    return list(beside.link.arrivals(threading.Event()))


# The same as on the CPU


def test_a_file_is_replayed_as_on_the_cpu_wherever_it_is_decoded(clip: Path, decoders: LiveDecoders) -> None:
    with VideoFile(clip) as source:
        expected = [(frame.pts_seconds, frame.size, pixels(frame)) for frame in source]
    for connect in (replay(clip), Remote(replay(clip), decoders)):
        source = LiveSource("clip", connect, source=3)
        seen = [(frame, pixels(frame)) for frame in source]
        assert source.decoder == "NVDEC"
        assert [frame.source for frame, _ in seen] == [3] * len(seen)
        assert len(seen) + source.counts.dropped == 25
        first = seen[0][0].pts_seconds
        for frame, picture in seen:
            pts_seconds, size, wanted = expected[frame.index]
            assert frame.size == size
            assert frame.pts_seconds - first == pytest.approx(pts_seconds - expected[0][0], abs=0.02)
            # One way of halving chroma and another: NV12 and planes come to the same but for rounding.
            assert np.abs(picture.astype(int) - wanted).mean() < 1.0


def test_a_turned_film_comes_out_upright_from_the_other_process(tmp_path: Path) -> None:
    path = write_clip(
        tmp_path / "turned.mp4", frames=8, prepare=lambda stream: stream.set_display_rotation(90)
    )
    with VideoFile(path) as source:
        expected = pixels(next(iter(source)))
    beside = Beside(replay(path))
    (first, *_) = (each for each in beside.link.arrivals(threading.Event()) if each.frame is not None)
    assert first.frame is not None
    assert first.frame.size == (64, 96)
    assert np.abs(pixels(first.frame).astype(int) - expected).mean() < 1.0
    beside.leave()


def test_a_camera_is_read_without_delay_in_another_process(camera: Camera, decoders: LiveDecoders) -> None:
    """Each picture comes out with its own packet; a decoder that held one back would add 40 ms."""
    with watched(Remote(camera_at(camera.url), decoders)) as live:
        live.until(lambda: len(live.frames) > 30, seconds=30)
        assert live.source.decoder == "NVDEC"
        assert live.frames[0].size == (640, 360)
        assert live.source.frame_rate == 25
        assert live.source.counts.corrupt == 0
        assert live.source.decode_seconds / live.source.counts.decoded < 0.035
    steps = np.diff([frame.pts_seconds for frame in live.frames[5:]])
    assert np.median(steps) == pytest.approx(0.04, abs=0.002)


def test_pictures_shown_in_another_order_than_sent_come_in_that_order(tmp_path: Path) -> None:
    """B-frames: noticed by their time stamps, after which the decoder is one that waits for them."""
    stream = write_clip(
        tmp_path / "b.ts", frames=100, gop=10, options={"bf": "2", "b_strategy": "0"}
    ).read_bytes()
    with http_server(mpegts(stream)) as url, watched(camera_at(url)) as live:
        live.until(lambda: live.source.faults or live.source.counts.decoded > 60)
    times = [frame.pts_seconds for frame in live.frames]
    assert times == sorted(times)
    assert live.source.jumps <= 1
    assert np.median(np.diff(times[20:])) == pytest.approx(0.04, abs=0.002)


def mpegts(stream: bytes, *, bytes_per_second: float = 2e6) -> Callable[[Any], None]:
    def body(handler: Any) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "video/mp2t")
        handler.end_headers()
        for start in range(0, len(stream), 1880):
            handler.wfile.write(stream[start : start + 1880])
            time.sleep(1880 / bytes_per_second)

    return body


# Newest first


def test_who_reads_late_gets_the_newest_and_the_rest_is_counted(clip: Path) -> None:
    beside = Beside(replay(clip))
    stop = threading.Event()
    source = LiveSource("late", Given(beside.link.arrivals(stop)))
    frames = iter(source)
    next(frames)
    time.sleep(0.5)
    begun = time.monotonic()
    second = next(frames)
    assert second.received is not None
    assert begun - second.received < 0.2
    assert second.index >= 9
    assert source.dropped["superseded"] == second.index - 1
    stop.set()
    beside.leave()


class Given:
    """A connection that there is already."""

    ends, decoder = True, "NVDEC"

    def __init__(self, arrivals: Iterator[Arrival]) -> None:
        self._arrivals = arrivals

    def __call__(self, stop: threading.Event) -> Any:
        yield from self._arrivals


def test_who_keeps_every_frame_gets_copies_and_decoding_goes_on(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "long.mp4", frames=40)
    beside = Beside(replay(path))
    kept = [each.frame for each in arrivals(beside) if each.frame is not None]
    beside.leave()
    (memory,) = beside.lent
    begin = memory.tensor(0, (1,)).data_ptr()
    lent = [0 <= frame.image.planes[0].data_ptr() - begin < memory.size for frame in kept if frame.image]
    assert sum(lent) <= SLOTS - AHEAD
    assert len(kept) > 30
    assert len({pixels(frame).tobytes() for frame in kept}) == len(kept)


def test_a_picture_without_a_place_is_dropped_and_not_waited_for(clip: Path) -> None:
    """Nobody takes any, so that no place comes back."""
    sent: list[Any] = []
    viewing = Viewing(0, replay(clip), sent.append)
    thread = threading.Thread(target=viewing.run, daemon=True)
    thread.start()
    wait_until(lambda: sent)
    memory = HostMemory(4 * 9216)
    hear(Loan(0, memory.address, 9216, 0, 4), {0: viewing})
    thread.join(5)
    assert [type(each) for each in sent[1:5]] == [Came] * 4
    assert {each.dropped for each in sent[5:-1]} == {NO_ROOM}
    assert len(sent) == 27
    assert sent[-1] == Over(0)


def test_memory_goes_back_with_the_last_frame(clip: Path) -> None:
    beside = Beside(replay(clip))
    kept = next(each for each in beside.link.arrivals(threading.Event()) if each.frame is not None)
    assert arrivals(beside)
    beside.leave()
    fd = beside.lent.pop().owned
    del beside
    gc.collect()
    os.fstat(fd)
    assert kept.frame is not None
    assert pixels(kept.frame).any()
    del kept
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(fd)


# What NVDEC cannot


def test_what_nvdec_cannot_decode_is_decoded_here_and_says_why(decoders: LiveDecoders) -> None:
    with http_server(mjpeg(jpeg, 60)) as url:
        for connect in (camera_at(url), Remote(camera_at(url), decoders)):
            with watched(connect) as live:
                live.until(lambda live=live: len(live.frames) > 5, seconds=30)
                assert live.source.decoder == "CPU, because its codec is mjpeg"
                assert live.source.faults == 0


def test_what_nvdec_must_decode_and_cannot_ends_in_words(decoders: LiveDecoders, tmp_path: Path) -> None:
    deep = write_clip(tmp_path / "deep.mp4", pix_fmt="yuv420p10le")
    with http_server(mjpeg(jpeg, 60)) as url:
        for connect in (
            camera_at(url, strict=True),
            Remote(camera_at(url, strict=True), decoders),
            replay(deep, strict=True),
        ):
            with watched(connect) as live:
                live.until(lambda live=live: live.error, seconds=30)
            assert isinstance(live.error, SourceError)
            assert "NVDEC cannot decode it, because" in str(live.error)
            assert "--decode auto" in str(live.error)
            assert live.state is State.FAILED


def test_over_udp_damage_would_not_be_noticed(camera: Camera) -> None:
    with watched(camera_at(camera.url, LiveSettings(rtsp_transport="udp"))) as live:
        live.until(lambda: live.frames)
    assert live.source.decoder.startswith("CPU, because packets get lost over UDP")
    with watched(camera_at(camera.url, LiveSettings(rtsp_transport="udp"), strict=True)) as live:
        live.until(lambda: live.error)
    assert "NVDEC cannot decode it, because packets get lost" in str(live.error)


def test_nvdec_needs_a_gpu() -> None:
    with pytest.raises(ConfigError, match="--decode gpu needs an engine that runs on a GPU"):
        connect_to("rtsp://camera/x", QUICK, decode="gpu")


# What breaks


def test_damage_is_counted_and_not_shown_up_to_the_next_key_frame(tmp_path: Path) -> None:
    """Of a stream whose transport says where something is missing."""
    data = bytearray(
        write_clip(
            tmp_path / "ts.ts", frames=100, gop=25, options={"bf": "0", "sc_threshold": "0"}
        ).read_bytes()
    )
    pictures = [start for start in range(0, len(data), 188) if starts_picture(data[start : start + 188])]
    del data[pictures[30] + 188 : pictures[30] + 376]
    with http_server(mpegts(bytes(data))) as url, watched(camera_at(url)) as live:
        live.until(lambda: live.source.faults)
    lost = live.source.counts.corrupt
    assert 15 <= lost <= 25, lost
    indices = [frame.index for frame in live.frames if frame.index < 100]
    gap = max(np.diff(indices))
    assert gap >= lost - 1


def starts_picture(packet: bytes | bytearray) -> bool:
    return bool(packet[1] & 0x40) and (packet[1] & 0x1F) << 8 | packet[2] == 0x100


def test_a_decoder_that_gives_up_is_a_fault_and_begun_anew(clip: Path, decoders: LiveDecoders) -> None:
    with watched(Remote(replay(clip, loop=True, breaks_at=10), decoders)) as live:
        live.until(lambda: live.source.reconnects >= 1, seconds=30)
        live.until(lambda: sum(map(len, links(decoders))) <= 1)  # what is over keeps nothing
    assert live.source.faults >= 1
    assert any("NVDEC gave up" in reason for _, _, reason in live.told)


@pytest.mark.parametrize(
    ("allocate", "words"),
    [(no_memory, "CUDA cannot give.*--decoders 0"), (Unreachable, "CUDA cannot open.*--decoders 0")],
)
def test_memory_that_cannot_be_shared_is_said_with_the_way_out(clip: Path, allocate: Any, words: str) -> None:
    beside = Beside(replay(clip), allocate)
    with pytest.raises(SourceError, match=words):
        arrivals(beside)
    beside.leave()


def test_a_process_that_is_killed_or_hangs_is_a_fault_of_its_streams_alone(
    clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams 0 and 2 in one process, 1 and 3 in the other; which dies, and once more hangs."""
    monkeypatch.setattr("tracker.sources.live_decoders._MUTE_SECONDS", 1.6)
    before = set(decoding())
    with LiveDecoders(2, allocate=HostMemory) as decoders:
        with ExitStack() as stack:
            streams = []
            for number in range(4):
                source = Remote(replay(clip, loop=True), decoders)
                streams.append(stack.enter_context(watched(source)))
                streams[-1].until(lambda number=number: sum(map(len, links(decoders))) > number)
            for live in streams:
                live.until(lambda live=live: len(live.frames) > 3, seconds=30)
            first, second = sorted(set(decoding()) - before)
            for number, (way, words) in enumerate(
                [(signal.SIGKILL, "was killed"), (signal.SIGSTOP, "said nothing for 1.6 s")], start=1
            ):
                os.kill(second, way)
                for live in (streams[1], streams[3]):
                    live.until(lambda live=live, number=number: live.source.faults == number, seconds=30)
                    assert f"the process that decodes it {words}" in live.told[-1][2]
                if way is signal.SIGKILL:
                    for live in (streams[1], streams[3]):
                        live.until(lambda live=live: live.state is State.LIVE, seconds=30)
                    (second,) = set(decoding()) - before - {first}
            for live in (streams[0], streams[2]):
                assert live.source.faults == 0
                live.frame_after()
        begun = time.monotonic()
    assert time.monotonic() - begun < 3
    assert set(decoding()) == before


def test_a_process_that_opens_streams_may_be_silent(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVDEC makes a decoder without letting go of Python's lock; of many at once that takes long."""
    monkeypatch.setattr("tracker.sources.live_decoders._MUTE_SECONDS", 1.2)
    before = set(decoding())
    with LiveDecoders(1, allocate=HostMemory) as decoders, ExitStack() as stack:
        first = stack.enter_context(watched(Remote(replay(clip, loop=True), decoders)))
        first.until(lambda: len(first.frames) > 3, seconds=30)
        (process,) = set(decoding()) - before
        os.kill(process, signal.SIGSTOP)
        try:
            second = stack.enter_context(watched(Remote(replay(clip, loop=True), decoders)))
            time.sleep(2.5)
        finally:
            os.kill(process, signal.SIGCONT)
        second.until(lambda: len(second.frames) > 3, seconds=30)
        assert first.source.faults == second.source.faults == 0
        assert set(decoding()) - before == {process}


def links(decoders: LiveDecoders) -> list[dict[int, Link]]:
    return [process.links for process in decoders._running]


def test_a_camera_of_another_size_after_a_restart(
    camera: Camera, tmp_path: Path, decoders: LiveDecoders
) -> None:
    small = write_feed(write_clip(tmp_path / "s.mp4", frames=50, size=(320, 180)), tmp_path / "s.feed")
    with watched(Remote(camera_at(camera.url), decoders)) as live:
        live.until(lambda: len(live.frames) > 5, seconds=30)
        camera.kill()
        live.until(lambda: live.state is State.RECONNECTING)
        camera.start(small)
        live.until(lambda: live.frames[-1].size == (320, 180))
        camera.freeze()
        assert live.until(lambda: live.state is State.RECONNECTING) < QUICK.silence_seconds + 0.7
        camera.thaw()
        live.frame_after()
    assert live.source.reconnects == 2


def test_a_wrong_password_is_said_without_it_and_not_tried_in_a_hurry(
    demo_feed: Path, decoders: LiveDecoders
) -> None:
    with Camera(demo_feed, user="admin", password="right") as camera:
        refused = Remote(camera_at(camera.url.replace("right", "wr0ng-pass")), decoders)
        with watched(refused) as live:
            live.until(lambda: live.told, seconds=30)
            time.sleep(0.8)
        assert [reason for _, _, reason in live.told if reason] == [
            f"rtsp://***@127.0.0.1:{camera.port}/cam: the server refuses this user name and password"
        ]


def test_no_python_to_start_is_a_fault_in_words(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with (
        LiveDecoders(1, allocate=HostMemory) as decoders,
        watched(Remote(replay(clip), decoders), max_reconnects=0) as live,
    ):
        live.until(lambda: live.error)
    assert "cannot start a process to decode in" in str(live.error)


# As users meet it


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    about = SimpleNamespace(
        engine_sha256="0" * 64, frontend="fake", precision="fp16", thresholds=lambda tracker: {}
    )
    monkeypatch.setattr("tracker.session.open_engine", lambda *_, **__: (Gpu(), about))
    monkeypatch.setattr("tracker.live.LiveSession._gpu", lambda session: CPU)
    monkeypatch.setattr("tracker.sources.open_source", fake_source)
    monkeypatch.setattr("tracker.sources.live_decoders.DeviceMemory", lambda size, device: HostMemory(size))
    monkeypatch.setattr("tracker.live.sharing_problem", lambda device: None)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)


def fake_source(path: Path, *, gpu: torch.device | None) -> Any:
    return fake_open(path)


def run(*sources: Path, **options: Any) -> tuple[LiveSession, list[Frame], list[str]]:
    values = {"sources": list(map(str, sources)), "engine": "any", "save": [], "realtime": True, "workers": 0}
    told: list[str] = []
    before = set(decoding())
    with LiveSession(options_from({**values, **options})) as session:
        session.tell = told.append
        frames = [frame for frame, _ in session]
        assert len(set(decoding()) - before) == session.decoders
    assert set(decoding()) == before
    return session, frames, told


def test_a_live_run_of_many_streams_decodes_in_processes_and_says_what_it_cannot(
    on_gpu: None, clip: Path, tmp_path: Path
) -> None:
    deep = write_clip(tmp_path / "deep.mp4", pix_fmt="yuv420p10le")
    session, frames, told = run(clip, clip, deep, out=str(tmp_path / "out"), save=["jsonl"])
    assert session.decoders == 1
    counts = Counter(frame.source for frame in frames)
    for number, status in enumerate(session.streams.statuses()):
        assert status.frames["tracked"] == counts[number] > 10
        assert counts[number] + sum(status.dropped.values()) in (24, 25)
        assert status.decoder == ("NVDEC" if number < 2 else "CPU, because its pixels are yuv420p10le")
    assert [line for line in told if "decoded" in line] == [
        "deep is decoded on the CPU, because its pixels are yuv420p10le"
    ]
    assert session.ages.quantiles().p50 < 100


def test_few_streams_are_decoded_here(on_gpu: None, clip: Path) -> None:
    session, frames, told = run(clip, max_frames=8)
    assert (session.decoders, told) == (0, [])
    assert session.streams.statuses()[0].decoder == "NVDEC"
    assert len(frames) > 4


def test_memory_that_processes_cannot_share_is_told(
    on_gpu: None, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracker.live.sharing_problem", lambda device: "CUDA cannot share memory")
    session, frames, told = run(clip, clip, clip, max_frames=8)
    assert session.decoders == 0
    assert told == ["streams are decoded in the main process, because CUDA cannot share memory"]
    assert len(frames) > 12


@pytest.mark.parametrize(
    ("streams", "cores", "processes"),
    [(1, 64, 0), (2, 16, 0), (3, 16, 1), (16, 16, 1), (17, 16, 2), (32, 16, 2), (96, 16, 4), (32, 2, 0)],
)
def test_processes_are_used_where_they_pay(streams: int, cores: int, processes: int) -> None:
    assert processes_for(streams, cores) == processes
