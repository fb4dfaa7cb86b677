"""Live runs as their users see them: ids across outages, streams that come and go, ends, no secrets."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cameras import DEMO_ENGINE, Camera, free_port
from results import frames_in
from test_cli import engine, make_clip

import tracker
from tracker.cli import main
from tracker.errors import ConfigError, SourceError
from tracker.live import LiveSession, open_session
from tracker.session import Session, options_from
from tracker.types import Frame, Tracks

pytestmark = pytest.mark.alone

__all__ = ["engine"]  # a fixture

PASSWORD = "pl4nted-Secret"


class Running:
    """A live session iterated in a thread of its own."""

    def __init__(self, session: LiveSession) -> None:
        self.session = session
        self.done: list[tuple[Frame, Tracks]] = []
        self.told: list[str] = []
        self.error: BaseException | None = None
        session.tell = self.told.append
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            with self.session:
                for frame, tracks in self.session:
                    self.done.append((frame, tracks))
        except BaseException as error:
            self.error = error

    def until(self, condition: Callable[[], object], seconds: float = 10.0) -> None:
        begun = time.monotonic()
        while not condition():
            assert time.monotonic() - begun < seconds, (self.told, self.error)
            assert self.thread.is_alive(), self.error
            time.sleep(0.01)

    def frames_of(self, number: int) -> int:
        return sum(frame.source == number for frame, _ in self.done)

    @property
    def status(self) -> dict[str, object]:
        return {status.name: status for status in self.session.streams.statuses()}


@contextmanager
def running(*sources: str, engine: Path, stay: bool = False, **options: object) -> Iterator[Running]:
    values = {"sources": list(sources), "engine": str(engine), "save": [], "live": True, **options}
    live = Running(LiveSession(options_from(values), stay=stay))
    live.thread.start()
    try:
        live.until(lambda: hasattr(live.session, "pipeline"))
        yield live
    finally:
        live.session.stop()
        live.thread.join(6)
        assert not live.thread.is_alive()
    if live.error is not None:
        raise live.error


def test_people_keep_their_ids_while_the_camera_is_gone_for_two_seconds(camera: Camera) -> None:
    with running(camera.url, engine=DEMO_ENGINE) as live:
        live.until(lambda: len(live.done) > 15)
        camera.kill()
        time.sleep(2.0)
        count = len(live.done)
        camera.start()
        back = time.monotonic()
        live.until(lambda: len(live.done) > count + 3)
    gap = next(k for k in range(count, len(live.done)) if live.done[k][0].received > back)
    assert live.done[gap][0].received - live.done[gap - 1][0].received > 1.9
    before, after = (set(live.done[k][1].id.tolist()) for k in (gap - 1, gap + 2))
    known = {each for _, tracks in live.done[:gap] for each in tracks.id.tolist()}
    assert len(after & known) >= 0.6 * len(after), (before, after)
    assert len(before & after) >= 0.5 * len(before), (before, after)


def test_streams_are_added_and_removed_while_others_go_on(engine: Path, tmp_path: Path) -> None:
    clip, out = make_clip(tmp_path / "clip.mp4"), tmp_path / "out"
    options = {"realtime": True, "loop": True, "save": ["mot", "jsonl"], "out": str(out)}
    with running(str(clip), engine=engine, **options) as live:
        live.until(lambda: live.frames_of(0) > 3)
        name = live.session.streams.add(str(clip), name="../gate 2")
        assert name == "gate-2"
        live.until(lambda: live.frames_of(1) > 3)
        assert list(live.status) == ["clip", "gate-2"]
        live.session.streams.remove("gate-2")
        count = live.frames_of(0)
        live.until(lambda: live.frames_of(0) > count + 3)
        assert list(live.status) == ["clip"]
        assert (out / "gate-2.summary.json").is_file()
        total = live.session.tracked_frames
        assert total >= live.frames_of(0) + live.frames_of(1) - 1
        with pytest.raises(ConfigError, match="no stream"):
            live.session.streams.remove("gate-2")
        with pytest.raises(ConfigError):
            live.session.streams.add("webcam:0", trusted=False)
    kinds = {path.name.split("-2026")[0].split("-20")[0] for path in out.iterdir()}
    assert {"clip", "gate-2"} <= kinds
    assert not list(out.glob("*.partial.*"))


def test_a_run_may_begin_without_any_stream(engine: Path, tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4")
    with running(engine=engine, stay=True, realtime=True) as live:
        time.sleep(0.3)
        live.session.streams.add(str(clip))
        live.until(lambda: live.frames_of(0) > 3)
        assert time.monotonic() - live.session.beat < 2
    with pytest.raises(ConfigError, match="no source"):
        LiveSession(options_from({"sources": [], "engine": str(engine), "live": True}))


def test_one_camera_that_hangs_delays_no_other(camera: Camera, engine: Path, tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4")
    with running(camera.url, str(clip), engine=engine, realtime=True, loop=True) as live:
        live.until(lambda: live.frames_of(0) > 5 and live.frames_of(1) > 5)
        camera.freeze()
        first = live.frames_of(1)
        time.sleep(1.0)
        camera.thaw()
        assert live.frames_of(1) - first >= 8  # of 10 frames per second
    ages = live.session.ages.quantiles()
    assert ages.count == len(live.done)
    assert ages.p50 < 200


def test_a_replay_ends_by_itself_and_leaves_whole_results(engine: Path, tmp_path: Path) -> None:
    clip, out = make_clip(tmp_path / "clip.mp4", frames=10), tmp_path / "out"
    code = main(
        [
            str(clip),
            "--engine",
            str(engine),
            "--realtime",
            "--save",
            "jsonl,mot",
            "--out",
            str(out),
            "--quiet",
        ]
    )
    assert code == 0
    (lines,) = out.glob("clip-*.jsonl")
    summary = json.loads((out / "clip.summary.json").read_text())
    frames = summary["frames"]
    assert frames["tracked"] + frames["dropped"] == 10  # a busy machine drops some
    assert frames_in(lines) == frames["tracked"] > 0
    assert all("age_ms" in json.loads(line) for line in lines.read_text().splitlines())
    assert summary["complete"] is True
    assert summary["age_ms"]["count"] == frames["tracked"]
    assert summary["state"] == "ended"


def test_the_python_function_takes_live_sources_too(engine: Path, tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4", frames=8)
    found = [frame.index for frame, _ in tracker.track(clip, engine=engine, realtime=True)]
    assert found == sorted(found)
    assert len(found) > 4
    with pytest.raises(SourceError, match="gave up"):
        list(tracker.track("rtsp://127.0.0.1:9/x", engine=engine, max_reconnects=0))


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_associate_live_streams_too(engine: Path, tmp_path: Path, workers: int) -> None:
    clips = [make_clip(tmp_path / f"clip{k}.mp4", frames=8) for k in range(2)]
    ids = defaultdict(set)
    for frame, tracks in tracker.track(clips, engine=engine, realtime=True, workers=workers):
        ids[frame.source] |= {track.id for track in tracks}
    assert ids == {0: {1, 2}, 1: {1, 2}}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sources": ["clip.mp4"], "max_wait_ms": 5.0}, "--max-wait-ms is for live sources"),
        ({"sources": ["clip.mp4"], "loop": True}, "--loop is for live sources"),
        ({"sources": ["rtsp://x/"], "loop": True}, "add --realtime"),
        ({"sources": ["rtsp://x/"], "rotate": "often"}, "rotate is 'often'"),
        ({"sources": ["rtsp://x/"], "rtsp_transport": "pigeon"}, "must be tcp or udp"),
        ({"sources": ["rtsp://x/"], "max_wait_ms": -1.0}, "between 0 and 1000"),
        ({"sources": ["rtsp://x/"], "silence_seconds": 0.0}, "between 0.1 and 3600"),
        ({"sources": f"rtsp://u:{PASSWORD}@x/"}, "must be a list of names"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        options_from({"engine": "x.onnx", **options})
    assert PASSWORD not in str(refused.value)


def test_sources_say_whether_a_run_is_live() -> None:
    files = open_session(options_from({"engine": "x.onnx", "sources": ["clip.mp4"]}))
    assert isinstance(files, Session)
    for sources in (["rtsp://camera/x"], ["webcam:0"], ["http://camera/mjpg"]):
        live = open_session(options_from({"engine": "x.onnx", "sources": sources}))
        assert isinstance(live, LiveSession)


# The process


def start(*arguments: object, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tracker", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **(env or {})},
    )


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds
        time.sleep(0.02)


def test_a_signal_ends_a_run_whole_and_no_password_is_left_anywhere(
    demo_feed: Path, engine: Path, tmp_path: Path
) -> None:
    """One run: a camera with a password, one that refuses it, a broker and a server that are not there."""
    out = tmp_path / "out"
    closed = free_port()
    with Camera(demo_feed, user="admin", password=PASSWORD) as server:
        process = start(
            server.url,
            f"rtsp://admin:{PASSWORD}2@127.0.0.1:{server.port}/cam?key={PASSWORD}",
            "--engine",
            engine,
            "--save",
            "mot,jsonl",
            "--out",
            out,
            "--publish",
            f"mqtt://me:{PASSWORD}@127.0.0.1:{closed}/topic",
            f"--publish=rtsp://me:{PASSWORD}@127.0.0.1:{closed}/x",
            "--publish",
            "stdout",
            "--debug",
        )
        try:
            wait_until(lambda: any(path.stat().st_size > 2000 for path in out.glob("*.jsonl")))
            titles = (
                b"".join(path.read_bytes() for path in Path("/proc").glob(f"{process.pid}/**/cmdline"))
                if Path("/proc").is_dir()
                else b""
            )
            begun = time.monotonic()
            process.send_signal(signal.SIGTERM)
            stdout, stderr = process.communicate(timeout=10)
            assert time.monotonic() - begun < 5.0
        finally:
            process.kill()
    assert process.returncode == 130
    everything = stdout + stderr + titles.decode() + "".join(path.read_text() for path in out.rglob("*.*"))
    assert PASSWORD not in everything
    assert "refuses this user name" in stderr
    assert not list(out.glob("*.partial.*"))
    lines = [json.loads(line) for line in stdout.splitlines()]
    assert lines
    assert {line["stream"] for line in lines} == {"127.0.0.1-cam"}
    (whole,) = [path for path in out.glob("127.0.0.1-cam-2*.jsonl") if path.stat().st_size]
    assert (
        frames_in(whole) == json.loads((out / "127.0.0.1-cam.summary.json").read_text())["frames"]["tracked"]
    )


def test_a_second_signal_ends_the_process_at_once(engine: Path, tmp_path: Path) -> None:
    clip, out = make_clip(tmp_path / "clip.mp4"), tmp_path / "out"
    process = start(
        clip, "--realtime", "--loop", "--engine", engine, "--out", out, "--save", "jsonl", "--quiet"
    )
    try:
        wait_until(lambda: any(path.stat().st_size > 500 for path in out.glob("*.jsonl")))
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        begun = time.monotonic()
        process.wait(timeout=5)
        assert time.monotonic() - begun < 3
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130


def test_sources_may_stand_in_the_environment_or_a_file(engine: Path, tmp_path: Path) -> None:
    clip, out = make_clip(tmp_path / "clip.mp4", frames=5), tmp_path / "out"
    listed = tmp_path / "sources"
    listed.write_text(f"# cameras\n\nfile://{clip}\n")
    os.environ["TEST_TRACK_SOURCE"] = str(clip)
    try:
        code = main(
            f"--realtime --source-env TEST_TRACK_SOURCE --source-file {listed} --out {out} "
            f"--engine {engine} --save jsonl --quiet".split()
        )
    finally:
        del os.environ["TEST_TRACK_SOURCE"]
    assert code == 0
    assert {path.name for path in out.glob("*summary*")} == {"clip.summary.json", "clip-2.summary.json"}


def test_a_variable_that_is_not_set_is_named(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--source-env", "TEST_TRACK_MISSING", "--engine", str(engine)]) == 1
    assert "TEST_TRACK_MISSING is not set" in capsys.readouterr().err
