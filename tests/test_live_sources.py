"""Live sources against real servers that die, hang, refuse, lie and change their minds."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from cameras import DEMO, Camera, write_feed
from clips import write_clip

from tracker.errors import ConfigError, SourceError
from tracker.sources import connect_to
from tracker.sources.connections import Connect
from tracker.sources.live import LiveSettings, LiveSource, State
from tracker.types import Frame

pytestmark = pytest.mark.alone

QUICK = LiveSettings(silence_seconds=0.6, open_seconds=2.0)


class Watched:
    """A live source being read, with all that it told."""

    def __init__(self, source: LiveSource) -> None:
        self.source = source
        self.frames: list[Frame] = []
        self.told: list[tuple[float, State, str]] = []
        self.error: Exception | None = None
        source._on_change = lambda each: self.told.append((time.monotonic(), each.state, each.reason))
        self._thread = threading.Thread(target=self._read, daemon=True)

    def _read(self) -> None:
        try:
            for frame in self.source:
                self.frames.append(frame)
        except Exception as error:
            self.error = error

    def until(self, condition: Callable[[], object], seconds: float = 8.0) -> float:
        """Seconds until it held."""
        begun = time.monotonic()
        while not condition():
            assert time.monotonic() - begun < seconds, (self.told, self.source.counts)
            time.sleep(0.005)
        return time.monotonic() - begun

    def frame_after(self) -> float:
        """Seconds until another frame has come."""
        count = len(self.frames)
        return self.until(lambda: len(self.frames) > count)

    @property
    def state(self) -> State:
        return self.source.state


@contextmanager
def watching(spec: str, settings: LiveSettings = QUICK, **options: object) -> Iterator[Watched]:
    max_reconnects = options.pop("max_reconnects", None)
    name, _, connect = connect_to(spec, settings, **options)  # type: ignore[arg-type]
    with watched(connect, name=name, max_reconnects=max_reconnects) as live:
        yield live


@contextmanager
def watched(connect: Connect, *, name: str = "live", **options: Any) -> Iterator[Watched]:
    live = Watched(LiveSource(name, connect, **options))
    live._thread.start()
    try:
        yield live
    finally:
        live.source.stop()
        live._thread.join(5)
        assert not live._thread.is_alive()


# RTSP


def test_a_camera_is_read_without_delay(camera: Camera) -> None:
    with watching(camera.url) as live:
        live.until(lambda: len(live.frames) > 30)
    assert live.frames[0].size == (640, 360)
    assert live.source.frame_rate == 25
    assert [frame.index for frame in live.frames] == list(range(len(live.frames)))
    assert np.diff([frame.pts_seconds for frame in live.frames[5:]]) == pytest.approx(0.04, abs=0.002)
    assert live.source.counts.corrupt == 0


def test_a_camera_that_is_killed_is_noticed_at_once_and_found_again(camera: Camera) -> None:
    with watching(camera.url) as live:
        live.until(lambda: len(live.frames) > 5)
        camera.kill()
        assert live.until(lambda: live.state is State.RECONNECTING) < 1.0
        before = live.frames[-1].pts_seconds
        time.sleep(0.8)
        camera.start()
        assert live.frame_after() < 1.0
        assert 0.7 < live.frames[-1].pts_seconds - before < 4
    assert live.source.reconnects == 1
    assert live.source.faults == 1


def test_a_camera_that_freezes_is_noticed(camera: Camera) -> None:
    with watching(camera.url) as live:
        live.until(lambda: len(live.frames) > 5)
        camera.freeze()
        assert live.until(lambda: live.state is State.RECONNECTING) < QUICK.silence_seconds + 0.5
        assert "silent" in live.told[-1][2]
        camera.thaw()
        live.frame_after()


def test_a_camera_may_come_later_than_its_reader(demo_feed: Path) -> None:
    camera = Camera(demo_feed)
    with watching(camera.url) as live:
        live.until(lambda: any("refused" in reason for _, _, reason in live.told))
        assert live.state is State.CONNECTING
        with camera:
            assert live.frame_after() < 1.5
    assert live.source.reconnects == 0


def test_a_wrong_password_is_said_without_it_and_not_tried_in_a_hurry(demo_feed: Path) -> None:
    with Camera(demo_feed, user="admin", password="right") as camera:
        with watching(camera.url.replace("right", "wr0ng-pass")) as live:
            live.until(lambda: live.told)
            time.sleep(1.5)
        assert [reason for _, _, reason in live.told if reason] == [
            f"rtsp://***@127.0.0.1:{camera.port}/cam: the server refuses this user name and password"
        ]
        with watching(camera.url) as live:
            live.frame_after()


def test_a_camera_that_stays_away_is_given_up_after_so_many_attempts() -> None:
    with watching("rtsp://127.0.0.1:9/none", max_reconnects=1) as live:
        live.until(lambda: live.error)
    assert isinstance(live.error, SourceError)
    assert "gave up after 2 attempts" in str(live.error)
    assert live.state is State.FAILED


def test_another_resolution_after_a_restart_is_just_another_size(
    camera: Camera, tmp_path: Path, demo_feed: Path
) -> None:
    small = write_feed(
        write_clip(tmp_path / "small.mp4", frames=50, size=(320, 180)), tmp_path / "small.feed"
    )
    with watching(camera.url) as live:
        live.until(lambda: len(live.frames) > 5)
        camera.kill()
        camera.start(small)
        live.until(lambda: live.frames[-1].size == (320, 180))
    times = [frame.pts_seconds for frame in live.frames]
    assert times == sorted(times)


def test_a_picture_over_the_limit_is_a_fault_not_a_bomb(camera: Camera) -> None:
    with watching(camera.url, LiveSettings(max_pixels=640 * 360 - 1)) as live:
        live.until(lambda: live.told)
    assert not live.frames
    assert "640×360 pictures are over the limit" in live.told[0][2]


def test_lost_packets_cost_time_not_pictures(lossy_camera: Camera) -> None:
    """5 % over TCP: what is lost is sent again."""
    with watching(lossy_camera.url, LiveSettings()) as live:
        live.until(lambda: len(live.frames) > 60, seconds=15)
    assert live.source.counts.corrupt == 0
    assert np.diff([frame.received for frame in live.frames]).max() < 2.5
    assert live.source.faults == 0


# HTTP


def jpeg(number: int = 0, size: tuple[int, int] = (96, 64)) -> bytes:
    picture = np.full((size[1], size[0], 3), number * 10 % 256, np.uint8)
    return cv2.imencode(".jpg", picture)[1].tobytes()


@contextmanager
def http_server(body: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body(self)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # clients hang up
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/video"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def mjpeg(
    pictures: Callable[[int], bytes], count: int, fps: float = 50
) -> Callable[[BaseHTTPRequestHandler], None]:
    def body(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        handler.end_headers()
        for number in range(count):
            data = pictures(number)
            handler.wfile.write(
                b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(data)
            )
            handler.wfile.write(data + b"\r\n")
            handler.wfile.flush()
            time.sleep(1 / fps)

    return body


def test_mjpeg_over_http_is_read_again_and_again() -> None:
    with http_server(mjpeg(jpeg, 20)) as url, watching(url) as live:
        live.until(lambda: live.source.reconnects >= 1)
    assert live.frames[0].size == (96, 64)
    times = [frame.pts_seconds for frame in live.frames]
    assert np.all(np.diff(times) > 0)


def test_broken_jpegs_are_counted_and_not_tracked() -> None:
    def pictures(number: int) -> bytes:
        whole = jpeg(number)
        return whole[: len(whole) // 3] if number % 4 == 3 else whole

    with http_server(mjpeg(pictures, 40)) as url, watching(url) as live:
        live.until(lambda: live.source.reconnects >= 1)
    assert live.source.counts.corrupt >= 5
    assert len(live.frames) >= 25


def test_a_redirection_is_not_followed() -> None:
    def elsewhere(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(302)
        handler.send_header("Location", "http://169.254.169.254/latest/meta-data/")
        handler.end_headers()

    with http_server(elsewhere) as url, watching(url) as live:
        live.until(lambda: live.told)
        time.sleep(0.1)
    assert not live.frames
    assert "169.254" not in live.told[0][2]


@pytest.mark.parametrize(
    "playlist",
    [
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        b"ffconcat version 1.0\nfile '/etc/passwd'\n",
        b"v=0\r\nm=video 9 RTP/AVP 96\r\n",
    ],
)
def test_a_playlist_is_no_camera(playlist: bytes) -> None:
    def body(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(playlist)

    with http_server(body) as url, watching(url) as live:
        live.until(lambda: live.told)
    assert not live.frames


@pytest.mark.parametrize("seed", range(6))
def test_any_bytes_are_a_fault_at_worst(seed: int) -> None:
    """Noise, cut headers, lies about lengths, in HTTP and in what should be RTSP."""
    chance = np.random.default_rng(seed)
    noise = chance.bytes(4000)
    lies = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: 99999999999\r\n\r\n" + noise[:500]
    answers = {
        "http": [
            b"HTTP/1.0 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=frame\r\n\r\n" + lies,
            noise,
        ],
        "rtsp": [
            b"RTSP/1.0 200 OK\r\nCSeq: 1\r\nPublic: DESCRIBE, SETUP\r\n\r\n" + noise,
            b"RTSP/1.0 200 OK\r\nCSeq: 1\r\nContent-Length: 2147483647\r\n\r\n" + noise[:100],
        ],
    }
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    scheme = ("http", "rtsp")[seed % 2]

    def serve() -> None:
        for number in range(100):
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer:
                peer.settimeout(0.2)
                try:
                    peer.recv(2000)
                    peer.sendall(answers[scheme][number % 2])
                except OSError:
                    pass

    threading.Thread(target=serve, daemon=True).start()
    try:
        with watching(f"{scheme}://user:pl4nted@127.0.0.1:{port}/x") as live:
            live.until(lambda: live.told)
            time.sleep(0.4)
    finally:
        listener.close()
    assert live.error is None
    assert not live.frames
    assert all("pl4nted" not in reason for _, _, reason in live.told)


# Files, webcams, strangers


def test_a_file_is_replayed_at_its_own_pace(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", frames=25)
    begun = time.monotonic()
    with watching(str(clip), replay=True) as live:
        live.until(lambda: live.state is State.ENDED)
    assert 0.9 < time.monotonic() - begun < 1.6
    assert len(live.frames) == 25
    assert all(frame.received is not None for frame in live.frames)
    assert np.diff([frame.received for frame in live.frames]) == pytest.approx(0.04, abs=0.001)


def test_a_loop_goes_on_and_time_with_it(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", frames=5)
    with watching(f"file://{clip}", replay=True, loop=True) as live:
        live.until(lambda: len(live.frames) > 18)
    assert np.all(np.diff([frame.pts_seconds for frame in live.frames]) > 0)
    assert live.source.faults == 0


def test_a_webcam_that_is_not_there_is_waited_for() -> None:
    with watching("webcam:97") as live:
        live.until(lambda: live.told)
    assert "/dev/video97" in live.told[0][2] or "camera 97" in live.told[0][2]


def test_a_file_is_live_only_on_request() -> None:
    with pytest.raises(ConfigError, match="--realtime"):
        connect_to(str(DEMO), QUICK)


@pytest.mark.parametrize("spec", ["webcam:0", f"file://{DEMO}", str(DEMO), "/etc/passwd"])
def test_strangers_get_no_files_and_no_webcams(spec: str) -> None:
    with pytest.raises(ConfigError):
        connect_to(spec, QUICK, trusted=False, replay=True)


def test_strangers_get_no_cameras_of_this_machine(camera: Camera) -> None:
    with watching(camera.url, trusted=False) as live:
        live.until(lambda: live.told)
    assert "not open to" in live.told[0][2]
    assert not live.frames
